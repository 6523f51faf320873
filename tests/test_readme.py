"The README's commands exist, and its times and claims are those of a recorded run."
import json
import re
import shlex
import subprocess
import sys

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


def test_every_line_of_boig_parses():
    "Commands, options and names of stages, as README types them; nothing is run."
    from typer.main import get_command
    from boig.cli import app
    from boig.stages import load_stages
    lines = re.findall(r"^\.venv/bin/boig (.*?)(?:\s+#.*)?$", README, re.M)
    assert len(lines) >= 8
    for line in lines:
        words, command = shlex.split(line), get_command(app)
        while words and words[0] in getattr(command, "commands", {}): command = command.commands[words.pop(0)]
        context = command.make_context("boig", words, resilient_parsing=False)
        for name in (context.params.get("only") or []) + (context.params.get("start") or []): assert name in load_stages(), line


def test_one_notebook_runs_by_plain_papermill(tmp_path):
    "README's line, with smaller numbers and in a folder of its own."
    line = re.search(r"^\.venv/bin/papermill (.*?)(?:\s+#.*)?$", README, re.M)[1].split()
    small = ["-p", "results", str(tmp_path/"results"), "-p", "run_dir", str(tmp_path/"run"), "-p", "rows", "120"]
    done = subprocess.run([sys.executable, "-m", "papermill", *[w.replace("out.ipynb", str(tmp_path/"out.ipynb")) for w in line], *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(pd.read_parquet(tmp_path/"results"/"data"/"emojibench.parquet")) == 120


def test_snippets_run(tmp_path, monkeypatch):
    write_market(tmp_path/"market", tweets=400, stock=0, seed=1)
    (tmp_path/"market"/"twitter").rename(tmp_path/"pages")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S): exec(snippet, scope)
    assert scope["answer"].value is not None and scope["pictures"].shape == (1, 3, 64, 64) and pd.read_parquet("chosen.parquet").bucket.nunique() == 2


def test_times_are_the_measured_ones():
    found = json.loads((ROOT/"bench"/"results"/"fresh.json").read_text())
    said = re.search(r"took (\d+) minutes of\s+installation and (\d+) of running \((\d+) CPU minutes; the first table was on the page after (\d+) seconds", README)
    minutes = [round(found[k] / 60) for k in ("installation_s", "run_s", "cpu_s")]
    assert [int(m) for m in said.groups()] == [*minutes, round(found["first_table_after_installation_s"])]


def test_claims_are_the_recorded_ones():
    claims = {name: pd.read_csv(ROOT/"results"/"reference"/scale/"claims.csv") for name, scale in (("pocket", "pocket"), ("longer run", "reference"))}
    assert f"<!-- claims -->\n{decided(claims)}\n<!-- /claims -->" in README


def test_links_between_notebooks_lead_somewhere():
    for notebook in sorted((ROOT/"nbs").rglob("*.ipynb")):
        text = "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", text): assert (notebook.parent/link).exists(), (notebook.name, link)
