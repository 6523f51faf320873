"The README's commands exist, and its numbers are those of a recorded run."
import re

import pandas as pd

from boig.benches.market import write_market
from boig.claims import decided
from boig.core import project_root

ROOT = project_root()
README = (ROOT/"README.md").read_text(encoding="utf-8")


def test_commands_exist():
    makefile = (ROOT/"Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M): assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"nbs/[\w/]+\.ipynb", README): assert (ROOT/path).exists(), path


def test_snippets_run(tmp_path, monkeypatch):
    write_market(tmp_path/"market", tweets=400, stock=0, seed=1)
    (tmp_path/"market"/"twitter").rename(tmp_path/"pages")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S): exec(snippet, scope)
    assert scope["pictures"].shape == (1, 3, 64, 64) and pd.read_parquet("chosen.parquet").bucket.nunique() == 2


def test_claims_are_the_recorded_ones():
    claims = pd.read_csv(ROOT/"results"/"reference"/"pocket"/"claims.csv")
    assert f"<!-- claims -->\n{decided(claims)}\n<!-- /claims -->" in README
