"The documentation site is built without a warning, shows pictures and formulas, and loads nothing from elsewhere."
import re
import subprocess
import sys

import pytest

from boig.core import project_root


def test_the_site_is_built(tmp_path):
    pytest.importorskip("myst_nb", reason="pip install 'boig[docs]'")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "-j", "auto", project_root()/"nbs", tmp_path/"site"], check=True)
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path/"site").rglob("*.html")}
    assert all(p.stem in pages for p in (project_root()/"nbs").glob("[0-9]*/*.ipynb"))
    loss = pages["71_loss"]
    assert "_images/" in loss and 'class="math' in loss and "#| export" not in loss
    assert (tmp_path/"site"/"_static"/"tex-svg.js").is_file() and "site.css" in loss
    assert not [u for page in pages.values() for u in re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(https?:[^"]+)"', page)]
