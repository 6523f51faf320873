"The README's commands exist, and its numbers are those of a recorded run."
import re

import pandas as pd

from boig.benches.market import write_market
from boig.core import project_root
from boig.metrics.verbalization_metrics import METRICS

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


def test_table_is_the_recorded_one():
    table = pd.read_csv(ROOT/"results"/"reference"/"pocket"/"boig_table1.csv")
    every = table[table.KPI == "All"].set_index("Model")
    names = {"Finetuned Llama (the twin": "Finetuned Llama", "BoigLLM |": "Finetuned Llama (BoigLLM)", "BoigLLM, told": "Finetuned Llama (BoigLLM), shuffled KPI",
             "random training": "Random training picture", "constant answer (best": "Constant answer"}
    for start, model in names.items():
        line = next(l for l in README.splitlines() if l.startswith(f"| {start}"))
        shown = [float(x) for x in re.findall(r"\d\.\d{3}", line)]
        assert shown == [round(every.loc[model, m], 3) for m in list(METRICS)[:5]], line
