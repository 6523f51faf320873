"The whole compendium at the smoke scale, through papermill: once undisturbed, once killed with -9 in the middle of a training."
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

from boig.metrics.verbalization_metrics import METRICS
from boig.stages import load_stages

COMMAND = [sys.executable, "-c", "from boig.cli import app; app()", "reproduce", "--scale", "smoke", "--results"]
TABLES = [f"tables/boig_table1{end}.csv" for end in ("", "_differences", "_stock", "_stock_differences")]


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
    for stage in load_stages().values():
        assert all((whole/o).stat().st_size > 0 for o in stage.outputs)
        record = json.loads((whole/"provenance"/f"{stage.name}.json").read_text())
        assert record["parameters"]["scale"] == "smoke" and record["provenance"]["packages"]["torch"] and record["seconds"] > 0
        notebook = nbformat.read(whole/"notebooks"/f"{stage.name}.ipynb", 4)
        assert not any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))


def test_table1_has_its_rows_and_columns(whole):
    table = pd.read_csv(whole/TABLES[0])
    assert list(table.Model.unique()) == ["Finetuned Llama", "Finetuned Llama (BoigLLM)", "Finetuned Llama (BoigLLM), shuffled KPI", "Random training picture", "Constant answer"]
    assert list(table.KPI.unique()) == ["High", "Medium", "Low", "All"] and len(table) == 20
    assert {*METRICS, "scale", "seed", "llm", "n", "unreadable", "objects named in the question", "objects seen in training"} <= set(table.columns)
    assert (table.unreadable == 0).all() and (table.n[table.KPI == "All"] == 12).all() and (table.scale == "smoke").all()
    for m in METRICS:
        interval = table[[f"{m} low", m, f"{m} high"]].dropna()
        assert (interval[f"{m} low"] <= interval[f"{m} high"]).all()


def test_the_page_shows_pictures_and_what_ran(whole):
    page = (whole/"index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") >= 4 and page.count("<svg") >= 9 and "not run" not in page
    assert "pocket-llama" in page and "smoke" in page and "http-equiv" not in page and "<script" not in page


def test_going_again_runs_nothing(whole):
    before = {o: (whole/o).stat().st_mtime_ns for s in load_stages().values() for o in s.outputs}
    assert " s\n" not in run(whole).split("Done in")[0]
    assert before == {o: (whole/o).stat().st_mtime_ns for o in before}


def test_killed_in_training_and_started_again(whole, tmp_path):
    "The same command after kill -9 of everything ends in byte-equal tables."
    folder = tmp_path/"results"
    first = subprocess.Popen([*COMMAND, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not list(folder.glob("runs/boig_llm/*/checkpoint-*")):  # the training has begun to save
        assert first.poll() is None and time.time() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (folder/TABLES[0]).exists()
    run(folder)
    for table in TABLES: assert (folder/table).read_bytes() == (whole/table).read_bytes()
    leftovers = [p for p in folder.rglob("*.tmp*") if ".snakemake" not in p.parts]
    assert len(leftovers) <= 1, leftovers  # a killed write may leave its temporary file, never a final name
