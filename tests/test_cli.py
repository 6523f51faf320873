"The command line: help that teaches, and one line for a mistake."
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from boig.cli import app
from boig.core import BoigError


def run(*args): return CliRunner().invoke(app, [str(a) for a in args])


def test_help_shows_what_to_type():
    assert "boig reproduce" in run("--help").output
    text = run("reproduce", "--help").output
    for word in ("--scale", "--seed", "--llm", "--set", "--only", "--from", "--again", "--jobs", "--results", "--dry-run", "boig reproduce --set boig_llm.steps=50"):
        assert word in text
    for command in ("report", "zoo", "status", "verify", "prune", "plan"): assert run(command, "--help").exit_code == 0

def test_help_is_quick():
    code = "import sys; from boig.cli import app; assert not {'torch', 'transformers', 'pandas', 'papermill', 'snakemake'} & set(sys.modules)"
    start = time.time()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.time() - start < 5 # the promise is one second; a busy CI machine gets slack

def test_a_terminal_with_a_small_alphabet_stops_no_run(tmp_path):
    "Latin-1, as some logins still have it: what it cannot show is a question mark."
    code = "from boig.cli import app; app(['reproduce', '--scale', 'smoke', '--dry-run', '--results', 'none'])"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert out.returncode == 0 and b" ? would run: " in out.stdout, out.stderr

@pytest.mark.parametrize("args, message", [
    (["--scale", "poket"], "Unknown scale 'poket'. Did you mean 'pocket'?"),
    (["--set", "boig_llm.step=3"], "Unknown parameter 'boig_llm.step'. Did you mean 'boig_llm.steps'?"),
    (["--set", "boig_llm.steps=many"], "boig_llm.steps must be int, not 'many'."),
    (["--set", "boig_llm.steps"], "--set wants KEY=VALUE"),
    (["--only", "boig_tabel1"], "Unknown stage 'boig_tabel1'. Did you mean 'boig_table1'?"),
    (["--llm", "gpt5"], "Unknown language model 'gpt5'."),
    (["--jobs", "0"], "--jobs must be 1 or more"),
])
def test_mistakes_are_one_line(args, message):
    out = run("reproduce", *args)
    assert out.exit_code == 2 and out.stdout == ""
    assert message in out.stderr and len(out.stderr.strip().splitlines()) == 1

def test_what_is_not_there_yet_is_one_line(tmp_path):
    for command in ("status", "verify", "prune", "report"):
        out = run(command, tmp_path/"nowhere")
        assert out.exit_code == 2 and "yet. Run: boig reproduce" in out.stderr and len(out.stderr.strip().splitlines()) == 1
    out = run("plan", "--scale", "papr")
    assert out.exit_code == 2 and "Did you mean 'paper'?" in out.stderr

def test_a_folder_of_somebody_else_is_one_line(tmp_path):
    (tmp_path/"index.html").write_text("My site.")
    for command in ("status", "verify", "prune", "report"):
        out = run(command, tmp_path)
        assert out.exit_code == 2 and "no results of a run. Name a folder that `boig reproduce` wrote." in out.stderr and len(out.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"] and (tmp_path/"index.html").read_text() == "My site."

def test_unwritable_folder(tmp_path):
    (tmp_path/"file").write_text("")
    out = run("reproduce", "--scale", "smoke", "--results", tmp_path/"file/x")
    assert out.exit_code == 2 and "Cannot write in" in out.stderr and len(out.stderr.strip().splitlines()) == 1

def test_interrupt_says_how_to_go_on(monkeypatch):
    def stop(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr("boig.reproduce.reproduce", stop)
    out = run("reproduce")
    assert out.exit_code == 130 and "the same command goes on from here" in out.stderr

def test_arguments_arrive(monkeypatch):
    got = {}
    monkeypatch.setattr("boig.reproduce.reproduce", lambda scale, **kw: got.update(kw, scale=scale))
    assert run("reproduce", "--scale", "smoke", "--set", "seed=7", "--set", "table1.bootstrap=9", "--only", "a,b", "--only", "c", "--from", "d", "--again", "e,f", "--dry-run").exit_code == 0
    assert got["overrides"] == {"seed": "7", "table1.bootstrap": "9"} and got["only"] == ["a", "b", "c"] and got["start"] == ["d"] and got["again"] == ["e", "f"] and got["dry_run"] and got["jobs"] is None

def test_failure_of_a_stage_is_shown_without_traceback(monkeypatch):
    def fail(*args, **kw): raise BoigError("Stage x failed.\n  see y")
    monkeypatch.setattr("boig.reproduce.reproduce", fail)
    out = run("reproduce")
    assert out.exit_code == 2 and out.stderr == "Stage x failed.\n  see y\n"
