"The whole compendium at the smoke scale, through papermill: once undisturbed, once killed with -9 in the middle of a training."
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

from boig.benches.cards import check_croissant, fill, read_card, table_facts
from boig.benches.instructions import SPECS, instruction
from boig.core import sha256_file
from boig.data.verbalization import parse
from boig.metrics.verbalization_metrics import METRICS
from boig.stages import load_stages

COMMAND = [sys.executable, "-c", "from boig.cli import app; app()", "reproduce", "--scale", "smoke", "--results"]
TABLES = [f"tables/boig_table1{end}.csv" for end in ("", "_differences", "_boigbench", "_boigbench_differences", "_stock", "_stock_differences")]


def run(folder):
    done = subprocess.run([*COMMAND, folder], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")/"results"
    run(folder)
    return folder


def test_everything_is_there(whole):
    for stage in load_stages(scale="smoke").values():
        assert all((whole/o).stat().st_size > 0 for o in stage.outputs)
        record = json.loads((whole/"provenance"/f"{stage.name}.json").read_text())
        assert record["parameters"]["scale"] == "smoke" and record["provenance"]["packages"]["torch"] and record["seconds"] > 0
        notebook = nbformat.read(whole/"notebooks"/f"{stage.name}.ipynb", 4)
        assert not any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))


def test_table1_has_its_rows_and_columns(whole):
    table = pd.read_csv(whole/TABLES[0])
    names = ["Finetuned Llama", "Finetuned Llama (BoigLLM)", "Finetuned Llama (BoigLLM), shuffled KPI", "Random training picture", "Constant answer"]
    own, shots = table[table.Model.isin(names)], table[~table.Model.isin(names)]
    assert list(own.Model.unique()) == names and list(own.KPI.unique()) == ["High", "Medium", "Low", "All"] and len(own) == 20
    assert set(shots.Model) == {f"{k}-shot {m}" for k in (3, 5) for m in ("pocket-llama", "gpt-3.5-turbo", "gpt-4")} | {"0-shot pocket-llama"}
    asked = shots.Model.str.endswith("pocket-llama")
    assert (shots.status[asked] == "done").all() and shots.status[~asked].str.startswith("not run").all() and (shots.n[~asked] == 0).all() and shots[list(METRICS)][~asked].isna().all(axis=None)
    assert {*METRICS, "scale", "seed", "llm", "n", "unreadable", "objects named in the question", "objects seen in training"} <= set(table.columns)
    assert (own.unreadable == 0).all() and (own.n[own.KPI == "All"] == 6).all() and (table.scale == "smoke").all()
    for m in METRICS:
        interval = table[[f"{m} low", m, f"{m} high"]].dropna()
        assert (interval[f"{m} low"] <= interval[f"{m} high"]).all()


def test_the_page_shows_pictures_and_what_ran(whole):
    page = (whole/"index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") >= 4 and page.count("<svg") >= 9 and page.count("<i>not run</i>") == sum((pd.read_csv(whole/t).n == 0).sum() for t in TABLES[::2])
    assert "pocket-llama" in page and "smoke" in page and "http-equiv" not in page and "<script" not in page


def test_data_sets_come_with_cards_and_numbers(whole):
    for name, own, table, subject in (("pocket_boigbench", "boigbench", "boig_table3", "tweet_id"), ("pocket_stock", "stock", "boig_table4", "id")):
        path = whole/"data"/f"{name}.parquet"
        bench, card = pd.read_parquet(path), path.with_suffix(".md").read_text(encoding="utf-8")
        assert fill(card, table_facts(bench) | {"source": re.search("<!-- source -->(.*?)<!--", card)[1]}) == card and "simulated pocket market" in card
        assert {c for c, *_ in read_card(path.with_suffix(".md")).columns[0].rows} == set(bench.columns)
        assert check_croissant(json.loads(path.with_suffix(".croissant.json").read_text()))["distribution"][0]["sha256"] == sha256_file(path)
        assert bench.id.is_unique and (bench.groupby(subject).split.nunique() == 1).all() and set(bench.split) == {"train", "valid", "test"}
        assert [parse(v).clean for v in bench.verbalization].count(True) == len(bench) and all(instruction(SPECS[name], r, 4, None) for _, r in bench.head(3).iterrows())
        assert pd.read_csv(whole/"tables"/f"{table}.csv").n.sum() == len(bench) == pd.read_csv(whole/"tables"/f"{own}_statistics.csv")["all"][0]


def test_going_again_runs_nothing(whole):
    before = {o: (whole/o).stat().st_mtime_ns for s in load_stages(scale="smoke").values() for o in s.outputs}
    assert " s\n" not in run(whole).split("Done in")[0]
    assert before == {o: (whole/o).stat().st_mtime_ns for o in before}


def killed_at(folder, sign):
    "Start the command, and kill -9 everything once a file of this name is there."
    run = subprocess.Popen([*COMMAND, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 600
    while not list(folder.glob(sign)):
        assert run.poll() is None and time.time() < deadline, sign
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(1)  # the others notice


def test_killed_in_the_middle_of_four_stages_and_started_again(whole, tmp_path):
    "The same command after each kill -9 of everything ends in byte-equal tables: BoigLLM, DDPO and the preference model had begun to save, its questions were half answered."
    folder, signs = tmp_path/"results", ("runs/boig_llm/*/checkpoint-*", "runs/boig_sd/*/**/checkpoint.pt", "runs/preference_models/*/**/checkpoint.safetensors", "runs/preference_tables/*/once/*.parquet")
    killed_at(folder, signs[0])
    assert not (folder/TABLES[0]).exists()
    for sign in signs[1:]: killed_at(folder, sign)
    page = (folder/"index.html").read_text(encoding="utf-8")
    assert "finetuned llama" in page.lower() and not (folder/"tables/preference_table1.csv").exists()  # the first tables are on the page before the last are made
    run(folder)
    tables = {p.name: p.read_bytes() for p in sorted((whole/"tables").glob("*.csv"))}
    assert len(tables) > 30 and tables == {p.name: p.read_bytes() for p in sorted((folder/"tables").glob("*.csv"))}
    leftovers = [p for p in folder.rglob("*.tmp*") if ".snakemake" not in p.parts]
    assert len(leftovers) <= len(signs), leftovers  # each kill may catch a write, which leaves its temporary file, never a final name
