"The front door on throw-away notebooks: keys, guards, failures, locks, and a real kill -9."
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from boig import reproduce as module, results as results_module, stages, zoo
from boig.core import BoigError, sha256_file, write_json
from boig.reproduce import reproduce, run_stage
from boig.results import _repeatable, leftovers, planned, prune, status, verify
from boig.runs import append, only_run, running
from boig.stages import _weights, bare, check_notebook, data_parts, imported, load_stages, make_plan, module_sources, parts, results_folder
from boig.scales import load_scale

HEAD = 'results: str = ""\nrun_dir: str = ""\nscale: str = ""\nseed: int = 0\nbootstrap: int | None = 1'
LIB = "from pathlib import Path\nfrom boig.core import write_text\nfrom toylib.maths import double\n"
FIRST = LIB + "write_text(Path(results)/'data/a.txt', str(double(seed)))"
SECOND = LIB + "write_text(Path(results)/'b.txt', (Path(results)/'data/a.txt').read_text() + '!')"
OTHER = "from pathlib import Path\nfrom boig.core import write_text\nwrite_text(Path(results)/'c.txt', str(bootstrap))"
TABLE = """
[first]
notebook = "first.ipynb"
title = "doubles the seed"
outputs = ["data/a.txt"]
[second]
notebook = "second.ipynb"
title = "adds a mark"
inputs = ["data/a.txt"]
outputs = ["b.txt"]
[other]
notebook = "other.ipynb"
title = "stands alone"
section = "table1"
outputs = ["c.txt"]
"""
SLOW = LIB + """import time
Path(run_dir, "kernel.pid").write_text(str(__import__("os").getpid()))
for i in range(30):
    step = Path(run_dir, f"step{i}")
    if step.exists(): continue
    (Path(results)/"data").mkdir(exist_ok=True)
    time.sleep(0.1)
    write_text(step, "done")
write_text(Path(results)/"data/a.txt", str(double(seed)) * 1000)"""


class World:
    "A project of three tiny notebooks and a library of one module."
    def __init__(self, root: Path):
        self.root, self.results = root, root/"results"
        for folder in ("nbs", "toylib"): (root/folder).mkdir(parents=True)
        (root/"toylib/__init__.py").write_text("")
        self.lib("def double(x): return 2*x\n")
        (root/"stages.toml").write_text(TABLE)
        for name, body in dict(first=FIRST, second=SECOND, other=OTHER).items(): self.notebook(name, body)
        self.toy = dict(notebooks=root/"nbs", table=root/"stages.toml", package=root/"toylib")
        self.go = dict(self.toy, scale="smoke", results=self.results)

    def lib(self, text): (self.root/"toylib/maths.py").write_text(text)

    def notebook(self, name, body, prose="Words.", tags=("parameters",), head=HEAD, count=None):
        cells = [new_markdown_cell(prose), new_code_cell(head, metadata={"tags": list(tags)}), new_code_cell(body, execution_count=count)]
        for i, c in enumerate(cells): c.id = f"c{i}"
        nbformat.write(new_notebook(cells=cells), self.root/"nbs"/f"{name}.ipynb")

    def keys(self, **overrides):
        plan = make_plan(load_stages(self.root/"stages.toml"), load_scale("smoke", overrides=overrides), self.results, self.root/"nbs", self.root/"toylib")
        return {s.stage.name: s.key for s in plan}

    def run(self, **kw): return reproduce(**(self.go | kw))

    def why(self, capsys, **kw):
        "Stage -> reason, from the dry run."
        capsys.readouterr()
        self.run(dry_run=True, **kw)
        rows = [line.split(" · ", 2) for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
        return {r[0].split("] ")[1]: r[2].removeprefix("would run: ") for r in rows}

    def spawn(self, **kw):
        "The same run in a process of its own."
        args = {k: str(v) if isinstance(v, Path) else v for k, v in (self.go | kw).items()}
        code = f"from boig.reproduce import reproduce; reproduce(**{args!r})"
        def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C, and would pass that on
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


@pytest.fixture
def world(tmp_path): return World(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A world that has run once, and what it printed; tests put back what they change."
    import contextlib, io
    world, out = World(tmp_path_factory.mktemp("finished")), io.StringIO()
    with contextlib.redirect_stdout(out): world.run()
    return world, out.getvalue()


def differ(a, b): return sorted(k for k in a if a[k] != b[k])


# Keys

def test_prose_outputs_and_comments_change_no_key(world):
    before = world.keys()
    world.notebook("first", FIRST + "  # a remark", prose="Other words.", count=7)
    world.lib('"A library."\n\n# %% ../nbs/x.ipynb 12\ndef double(x):\n    "Twice."\n    return 2*x\n')
    assert differ(before, world.keys()) == []

def test_code_changes_its_stage_and_those_downstream(world):
    before = world.keys()
    world.notebook("first", FIRST + "\nseed += 1")
    assert differ(before, world.keys()) == ["first", "second"]
    world.notebook("first", FIRST)
    world.notebook("second", SECOND + "\nseed += 1")
    assert differ(before, world.keys()) == ["second"]

def test_a_stage_whose_code_changed_after_the_plan_does_not_start(world):
    world.run()
    before = (world.results/"data/a.txt").read_bytes()
    world.lib("def double(x): return 3*x\n")
    with pytest.raises(BoigError, match="module toylib.maths"): run_stage(world.results, "first")
    assert (world.results/"data/a.txt").read_bytes() == before
    world.run()
    assert (world.results/"data/a.txt").read_bytes() != before
    (world.root/"toylib/maths.py").unlink()
    with pytest.raises(BoigError, match="module toylib.maths"): run_stage(world.results, "first")

def test_a_stage_records_which_commits_it_got_from_the_hub(world):
    hub = "import huggingface_hub\nfrom boig import zoo\nhuggingface_hub.snapshot_download = lambda *_, revision, **__: 'snapshots/' + (revision or 'f00d')\n"
    world.notebook("first", FIRST + f"\n{hub}for ref in ('them/model', 'them/model@0123abcd', 'them/model'): zoo.resolve(ref)")
    world.run()
    def record(name): return json.loads((world.results/f"provenance/{name}.json").read_text())
    assert record("first")["hub"] == {"them/model": ["f00d"], "them/model@0123abcd": ["0123abcd"]} and record("second")["hub"] == {}
    assert not [f for f in verify(world.results, **world.toy)[0] if f.kind != "not repeatable from here"]

def test_a_stage_whose_code_changes_while_it_runs_does_not_end_well(world):
    world.notebook("first", FIRST + f"\nPath({str(world.root/'toylib/maths.py')!r}).write_text('def double(x): return 3*x\\n')")
    with pytest.raises(BoigError, match=r"Stage first failed. Code or data have changed since this run was planned \(module toylib.maths\)"): world.run(only=["first"])
    assert not [f for f in ("provenance/first.json", ".done/first.json", "runs.jsonl") if (world.results/f).exists()]

def test_a_stage_reads_what_the_planned_stages_made(world):
    "Not what a job of an earlier run has left by then, nor what somebody changed, before or while it runs."
    world.run(seed=7)
    left = {f: (world.results/f).read_bytes() for f in ("data/a.txt", ".done/first.json")}
    world.run()
    done = (world.results/".done/second.json").read_bytes()
    for file, text in (*left.items(), ("data/a.txt", b"1"), (".done/first.json", b"{")):
        before = (world.results/file).read_bytes()
        (world.results/file).write_bytes(text)
        with pytest.raises(BoigError, match="is not what this run was planned with"): run_stage(world.results, "second")
        (world.results/file).write_bytes(before)
    assert (world.results/".done/second.json").read_bytes() == done and (world.results/"b.txt").read_text() == "84!"
    run_stage(world.results, "second")  # the same bytes, written again
    world.notebook("second", f"{SECOND}\n(Path(results)/'data/a.txt').write_text('1')")
    with pytest.raises(BoigError, match="Stage second failed. data/a.txt is not what this run"): world.run()

def test_the_record_names_the_checkout_that_ran(world, tmp_path_factory, monkeypatch):
    "Wherever the results lie, and whoever it belongs to."
    def checkout(root, words):
        (root/"nbs").mkdir(exist_ok=True)
        (root/"settings.ini").write_text("lib_name = boig\n")
        def git(*args): return subprocess.run(["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *args], capture_output=True, text=True, check=True).stdout.strip()
        git("init")
        git("add", "settings.ini", "nbs")
        git("commit", "-m", words)
        return git("rev-parse", "HEAD")
    ours, _ = checkout(world.root, "ours"), checkout(theirs := tmp_path_factory.mktemp("theirs"), "theirs")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    before = dict(os.environ)
    world.run(only=["other"], results=theirs/"results/mine")
    origin = json.loads((theirs/"results/mine/provenance/other.json").read_text())["provenance"]
    assert (origin["commit"], origin["changed_since_commit"]) == (ours, False)
    monkeypatch.chdir(world.root)
    assert results_module._has_commit(ours) and not results_module._has_commit("0" * 40) and dict(os.environ) == before

def test_data_from_outside_are_in_the_key(world, capsys):
    (folder := world.root/"answers").mkdir()
    world.notebook("other", OTHER, head=HEAD + "\nanswers: str = ''")
    (world.root/"stages.toml").write_text(TABLE.replace('section = "table1"', f'section = "table1"\nparams = {{answers = "{folder}"}}'))
    (folder/"ada.json").write_text("1")
    before = world.keys()
    (folder/".DS_Store").write_text("looked at")
    assert differ(before, world.keys()) == []
    world.run(only=["other"])
    (folder/"bob.json").write_text("2")
    assert differ(before, world.keys()) == ["other"] and world.why(capsys)["other"] == "changed: data answers"
    with pytest.raises(BoigError, match="data answers"): run_stage(world.results, "other")
    (folder/"bob.json").unlink()
    assert differ(before, world.keys()) == []
    folder.rename(world.root/"away")
    with pytest.raises(BoigError, match="data answers"): run_stage(world.results, "other")
    (world.root/"away").rename(folder)
    os.utime(folder/"ada.json", ns=(0, 0))
    assert differ(before, world.keys()) == ["other"]

def test_folders_behind_links_are_data_too(tmp_path):
    "A loop of links ends, and a second link to a folder is something else than none."
    for name in ("pages", "far", "far/.git"): (tmp_path/name).mkdir()
    def content(): return data_parts(tmp_path/"nbs/x.ipynb", {"pages": "pages"})["data pages"]
    told = [content()]
    def differs(): return told[-1] != (now := content()) and not told.append(now)
    (tmp_path/"pages/2024").symlink_to(tmp_path/"far")
    (tmp_path/"far/.git/HEAD").write_text("1")
    assert not differs()  # nothing is in it
    (tmp_path/"far/1.json").write_text("1")
    assert differs()
    (tmp_path/"far/back").symlink_to(tmp_path/"pages")
    assert differs()
    (tmp_path/"pages/2025").symlink_to(tmp_path/"far")
    assert differs() and not differs()

def test_which_parameters_name_data(tmp_path):
    "Relative ones start at the project's root; what has a meaning of its own is no path."
    for name in ("pages", "paper", "pocket-sd"): (tmp_path/name).mkdir()
    (tmp_path/"handles.txt").write_text("Adobe")
    def named(**values): return list(data_parts(tmp_path/"nbs/90_experiments/x.ipynb", values))
    assert named(pages="pages", handles="handles.txt", llm=str(tmp_path/"paper")) == ["data pages", "data handles", "data llm"]
    assert named(scale="paper", verbalizer="paper", base="pocket-sd", release="", each=3, folder="nowhere") == []
    assert named(media="pages", download=False) == ["data media"] and named(media="pages", download=True) == []

def test_weights_put_into_the_cache_by_hand_count_where_a_parameter_names_them(tmp_path, monkeypatch):
    "Not before one's own of that name, as `zoo.resolve` has it."
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path/"cache"))
    (tmp_path/"cache/them/model").mkdir(parents=True)
    (weights := tmp_path/"cache/them/model/model.safetensors").write_bytes(b"1")
    def named(): return data_parts(tmp_path/"nbs/x.ipynb", {"base": "them/model", "judge": "them/other"})
    before = named()
    assert list(before) == ["weights base"]
    weights.write_bytes(b"22")
    assert list(named()) == ["weights base"] and named() != before
    (tmp_path/"them/model").mkdir(parents=True)
    assert list(named()) == ["data base"]

def test_a_plan_hashes_a_file_once(world, monkeypatch):
    world.run()
    hashed = []
    monkeypatch.setattr(stages, "sha256_file", lambda f: hashed.append(Path(f).relative_to(world.results).as_posix()) or sha256_file(f))
    world.keys()
    assert "data/a.txt" in hashed and len(hashed) == len(set(hashed)) # the second stage reads what the first has made

def test_versions_of_what_computes_are_in_the_key(world, monkeypatch):
    before, real = world.keys(), stages.version
    def upgrade(name): monkeypatch.setattr(stages, "version", lambda n: "99" if n == name else real(n))
    for name in ("torch", "numpy", "pandas", "pyarrow", "spacy"):
        upgrade(name)
        assert differ(before, world.keys()) == ["first", "other", "second"], name
    for name in ("snakemake", "papermill", "boig"):
        upgrade(name)
        assert differ(before, world.keys()) == [], name

def test_imported_module_changes_those_that_import_it(world):
    before = world.keys()
    world.lib("def double(x): return x + x\n")
    assert differ(before, world.keys()) == ["first", "second"]

def test_parameters_change_the_stages_that_have_them(world):
    before = world.keys()
    assert differ(before, world.keys(**{"table1.bootstrap": 51})) == ["other"]
    assert differ(before, world.keys(seed=43)) == ["first", "other", "second"]
    assert differ(before, world.keys(**{"boig_llm.steps": 51})) == []

def test_weights_count_where_they_are_named(world, monkeypatch):
    world.lib("def double(x): return 2 * x\ndef model(): return resolve('student')\n")
    listed = {n: zoo.Entry(n, "packaged", n, "1" * 64, "", "", base=base) for n, base in {"student": "teacher", "teacher": "", "other": ""}.items()}
    def change(name=None): monkeypatch.setattr(stages, "entries", lambda: listed | ({name: dataclasses.replace(listed[name], sha256="0" * 64)} if name else {}))
    change()
    before = world.keys()
    for name, counts in {"student": True, "teacher": True, "other": False}.items():
        change(name)
        assert differ(before, world.keys()) == (["first", "second"] if counts else [])

@pytest.mark.parametrize("value, named", [
    ("student", {"student", "teacher"}), ("pocket-sd,other", {"pocket-sd", "other"}), ("Looks=pocket-sd, CLIP Score=other", {"pocket-sd", "other"}), (["pocket-sd", "other"], {"pocket-sd", "other"}),
    ("pocket-sdxl,my-student,others", set()), (7, set()), (None, set())])
def test_weights_count_within_a_parameter(monkeypatch, value, named):
    "As whole words: pocket-sdxl is not pocket-sd."
    listed = {n: zoo.Entry(n, "packaged", n, "1" * 64, "", "", base=base) for n, base in {"student": "teacher", "teacher": "", "other": "", "pocket-sd": "", "pocket": "", "sd": ""}.items()}
    monkeypatch.setattr(stages, "entries", lambda: listed)
    assert set(_weights("", {"judges": value, "seed": 42}.values())) == named

@pytest.fixture(scope="module")
def real():
    "What makes the key of a stage of ours at the pocket scale."
    package, table = Path(stages.__file__).parent, load_stages(scale="pocket")
    return lambda name: parts(table[name], load_scale("pocket"), {}, package.parent/"nbs", package)

def test_judges_are_in_the_key_of_what_they_judge(real):
    "Their code, though it is asked for by name; and their weights, though one parameter lists them all."
    own = real("boig_ranking")
    assert {f"module boig.rewards.{m}" for m in ("similarity", "image_reward", "aesthetic", "clip_scores")} <= set(own)
    assert {f"zoo {n}" for n in own["parameter judges"].split(",")} <= set(own)

def test_prompts_of_subjects_are_in_the_key_of_what_draws_them(real):
    table = "table data/subjects/subjects.toml"
    assert table in real("instructbooth") and table not in real("boig_ranking")

def test_the_zoos_own_tables_are_in_no_key(real):
    "Another model in them is no reason to run what does not use it."
    assert not {"table zoo.toml", "table roles.toml"} & {*real("preference_models"), *real("boig_ranking")}

def test_a_table_that_a_module_names_counts(world):
    (world.root/"toylib/data").mkdir()
    for name in ("words", "unused"): (world.root/f"toylib/data/{name}.toml").write_text("a = 1")
    world.lib("def double(x): return 2 * x\ndef read(): return open('data', 'words.toml')\n")
    before = world.keys()
    (world.root/"toylib/data/words.toml").write_text("a = 1 # one")
    (world.root/"toylib/data/unused.toml").write_text("a = 2")
    assert differ(before, world.keys()) == []
    (world.root/"toylib/data/words.toml").write_text("a = 2")
    assert differ(before, world.keys()) == ["first", "second"]

def test_a_template_that_a_module_names_counts(world):
    (world.root/"toylib/templates").mkdir()
    for name in ("asked", "unused"): (world.root/f"toylib/templates/{name}.html").write_text("<p>1</p>")
    world.lib("def double(x): return 2 * x\ndef read(): return open('templates', 'asked.html')\n")
    before = world.keys()
    (world.root/"toylib/templates/unused.html").write_text("<p>2</p>")
    assert differ(before, world.keys()) == []
    (world.root/"toylib/templates/asked.html").write_text("<p>2</p>")
    assert differ(before, world.keys()) == ["first", "second"]

def test_the_questionnaire_is_in_the_key_of_what_writes_it(real):
    template = "template templates/questionnaire.html"
    assert template in real("instructbooth_tables") and template not in real("instructbooth")

def test_tables_in_a_modules_folder_count(world):
    before = world.keys()
    (world.root/"toylib/maths").mkdir()
    (world.root/"toylib/maths/constants.toml").write_text("pi = 3")
    assert differ(before, world.keys()) == ["first", "second"]

def test_table_beside_an_imported_module_counts(world):
    before = world.keys()
    for name in ("maths", "unused"): (world.root/f"toylib/{name}.toml").write_text("a = 1")
    assert differ(before, world.keys()) == ["first", "second"]
    before = world.keys()
    (world.root/"toylib/maths.toml").write_text("a = 1 # one")
    (world.root/"toylib/unused.toml").write_text("a = 2")
    assert differ(before, world.keys()) == []

def test_key_does_not_depend_on_the_place(world, tmp_path_factory):
    assert world.keys() == World(tmp_path_factory.mktemp("elsewhere")).keys()

def test_imports_are_followed(tmp_path):
    for name, text in {"__init__": "", "a": "from . import b", "b": "def f():\n    from .sub.c import x", "sub/__init__": "", "sub/c": "from ..d import y",
                       "d": "import numpy", "unused": ""}.items():
        file = tmp_path/"lib"/f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    got = module_sources(["%matplotlib inline\nfrom lib import a"], tmp_path/"lib")
    assert sorted(got) == ["lib", "lib.a", "lib.b", "lib.d", "lib.sub", "lib.sub.c"]
    assert imported("import lib.x as y, numpy") == {"lib.x", "numpy"}

def test_bare_code_keeps_what_counts():
    assert bare("x = 'text' # c") == bare('x = "text"') != bare("x = 'texts'")
    assert bare("__all__ = ['a']\nx = 1") == bare("x = 1")


# Guards: before anything runs

def test_untagged_notebook_is_refused(world):
    world.notebook("other", OTHER, tags=())
    with pytest.raises(BoigError, match="no cell tagged 'parameters'"): world.run()
    assert not (world.results/"data/a.txt").exists()

def test_unknown_parameter_is_refused(world):
    world.notebook("other", OTHER, head=HEAD.replace("bootstrap", "bootstraps"))
    with pytest.raises(BoigError, match="Unknown parameter of other.ipynb 'bootstrap'. Did you mean 'bootstraps'"): world.run()
    assert not (world.results/"data/a.txt").exists()

def test_secrets_are_no_parameters(world):
    world.notebook("other", OTHER, head=HEAD + "\napi_key: str = ''\nmax_tokens: int = 1\nnote: str = ''")
    path = world.root/"nbs/other.ipynb"
    check_notebook(path, {"max_tokens": 5, "note": "hunter2hunter2"})
    with pytest.raises(BoigError, match="looks like a secret"): check_notebook(path, {"api_key": "x"})

def test_a_secrets_value_is_no_parameter_either(world, monkeypatch):
    world.notebook("other", OTHER, head=HEAD + "\nnote: str = ''")
    monkeypatch.setenv("TOY_API_KEY", "hunter2hunter2")
    with pytest.raises(BoigError, match="'note' holds the value of TOY_API_KEY"): check_notebook(world.root/"nbs/other.ipynb", {"note": "use hunter2hunter2!"})

@pytest.mark.parametrize("wrong, message", [
    (dict(only=["secnd"]), "Did you mean 'second'"), (dict(scale="smok"), "Did you mean 'smoke'"),
    (dict(overrides={"table1.boot": 1}), "Did you mean 'table1.bootstrap'"), (dict(jobs=0), "1 or more"), (dict(llm="x"), "Unknown language model")])
def test_wrong_arguments(world, wrong, message):
    with pytest.raises(BoigError, match=message): world.run(**wrong)
    assert not world.results.exists()

def test_unwritable_folder(world):
    (world.root/"file").write_text("")
    with pytest.raises(BoigError, match="Cannot write in"): world.run(results=world.root/"file/x")

def test_wrong_tables(world):
    table = world.root/"stages.toml"
    table.write_text(TABLE.replace('inputs = ["data/a.txt"]', 'inputs = ["data/z.txt"]'))
    with pytest.raises(BoigError, match="which no earlier stage makes"): load_stages(table)
    table.write_text(TABLE.replace("section", "sectoin"))
    with pytest.raises(BoigError, match="Did you mean 'section'"): load_stages(table)

def test_a_stage_may_belong_to_some_scales_only(world, capsys):
    table = world.root/"stages.toml"
    table.write_text(TABLE.replace('title = "stands alone"', 'title = "stands alone"\nscales = ["reference"]'))
    assert list(load_stages(table)) == ["first", "second", "other"] == list(load_stages(table, "reference"))
    assert list(load_stages(table, "smoke")) == ["first", "second"] == list(world.why(capsys))
    with pytest.raises(BoigError, match="'other' runs only at --scale reference."): world.run(only=["other"])
    assert "instructbooth_ablations" in load_stages(scale="paper") and "instructbooth_ablations" not in load_stages(scale="pocket")
    table.write_text(TABLE.replace('title = "doubles the seed"', 'title = "doubles the seed"\nscales = ["reference"]'))
    with pytest.raises(BoigError, match="which no earlier stage makes"): load_stages(table, "smoke")


def test_another_copy_of_the_library_is_refused(world, tmp_path_factory):
    "Kernels import what lies beside the notebooks; keys are of what the command imports."
    elsewhere = tmp_path_factory.mktemp("installed")/"toylib"
    shutil.copytree(world.root/"toylib", elsewhere)
    for kw in ({}, {"dry_run": True}):
        with pytest.raises(BoigError, match=f"would import '{world.root}/toylib', but the library that runs is '{elsewhere}'. Run `pip install -e .` in '{world.root}'"): world.run(package=elsewhere, **kw)
    assert not world.results.exists()
    link = elsewhere.with_name("link")
    link.symlink_to(world.root/"toylib")
    world.run(package=link, dry_run=True)  # the same folder by another name

def test_our_own_library_beside_the_notebooks_is_refused_too(tmp_path, monkeypatch):
    for folder in ("nbs", "boig"): (tmp_path/folder).mkdir()
    (tmp_path/"settings.ini").write_text("lib_name = boig\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BoigError, match="would import '.*/boig', but the library that runs is"): reproduce(scale="smoke", results=tmp_path/"r", dry_run=True)


# Runs

def test_first_run_then_nothing_then_what_changed(finished, capsys):
    world, out = finished
    assert (world.results/"b.txt").read_text() == "84!" and (world.results/"c.txt").read_text() == "50"
    assert [line for line in out.splitlines() if line.startswith("[1/3]")][0] == "[1/3] first · doubles the seed …"
    index = json.loads((world.results/"provenance.json").read_text())
    ended = [json.loads(l)["stage"] for l in (world.results/"runs.jsonl").read_text().splitlines()]
    assert sorted(ended) == ["first", "other", "second"] and ended.index("first") < ended.index("second")  # "other" waits for none
    for name in ("first", "second", "other"):
        record = json.loads((world.results/f"provenance/{name}.json").read_text())
        assert record["key"] == world.keys()[name] and record["seconds"] > 0 and record["parameters"]["seed"] == 42
        assert record["outputs"] and record["provenance"]["python"] and record["state"] == "finished" and record["seed"] == 42
        assert record["cpu_seconds"] > 0 and record["peak_memory"] > 1e7 and record["notebook_sha256"] == sha256_file(world.results/f"notebooks/{name}.ipynb")
        executed = nbformat.read(world.results/f"notebooks/{name}.ipynb", 4)
        assert executed.cells[-1].execution_count and executed.metadata.boig.outputs == record["outputs"] and executed.metadata.boig.key == record["key"]
        for file, sha in record["outputs"].items(): assert index[file] == index[file] | {"stage": name, "sha256": sha, "key": record["key"]}
    stamp = (world.results/"b.txt").stat().st_mtime_ns
    world.run()
    assert capsys.readouterr().out.count("up to date") == 3 and (world.results/"b.txt").stat().st_mtime_ns == stamp
    assert world.why(capsys, overrides={"table1.bootstrap": 9}) == {
        "first": "up to date", "second": "up to date", "other": "changed: parameter bootstrap"}
    assert world.why(capsys, seed=1, only=["second"]) == {
        "first": "changed: parameter seed", "second": "changed: parameter seed, stage first"}

def test_missing_or_edited_results_are_made_again(finished, capsys):
    world, _ = finished
    (world.results/"b.txt").write_text("edited")
    (world.results/"c.txt").unlink()
    assert world.why(capsys) == {"first": "up to date", "second": "result b.txt was changed", "other": "would put back an earlier result: result c.txt is missing"}
    (world.results/"data/a.txt").write_text("1")
    assert world.why(capsys)["first"] == "result data/a.txt was changed"
    world.run()
    assert (world.results/"b.txt").read_text() == "84!" and (world.results/"c.txt").read_text() == "50"
    assert "other · stands alone · put back" in capsys.readouterr().out
    assert set(world.why(capsys).values()) == {"up to date"}

def test_failing_rerun_keeps_the_old_result_and_reports_in_few_lines(finished, capsys):
    world, _ = finished
    world.notebook("second", "print('step 7')\nraise ValueError('no such colour\\nand more')")
    with pytest.raises(BoigError) as e: world.run()
    lines = str(e.value).splitlines()
    assert lines[0] == "Stage second failed. second.ipynb, cell In [3]: ValueError: no such colour …" and len(lines) == 4
    assert "raise ValueError" in lines[1] and lines[2] == "  | step 7"
    executed = world.results/"notebooks/second.ipynb"
    assert str(executed) in lines[3] and "no such colour" in executed.read_text() and nbformat.read(executed, 4).metadata.boig.state == "failed"
    assert (world.results/"b.txt").read_text() == "84!"
    assert [(r["stage"], r["state"]) for r in status(world.results, **world.toy)] == [("first", "done"), ("second", "failed"), ("other", "done")]
    world.notebook("second", "from boig.core import BoigError\nraise BoigError('Mend this.')")
    with pytest.raises(BoigError, match="^Stage second failed. Mend this.$"): world.run()
    world.notebook("second", SECOND)
    world.run()

def test_a_stage_that_is_tried_again_has_not_failed(tmp_path, monkeypatch):
    "With Snakemake's `retries`: first both fail, then one of them ends well."
    monkeypatch.setattr(module, "expected", lambda *a: 5.0)
    told = [("a", "start"), ("b", "start"), ("a", "fail"), ("b", "fail"), ("a", "start"), ("a", "end"), ("b", "start"), ("b", "fail")]
    lines = [json.dumps(dict(run="now", stage=s, event=e, time=i, text=f"Node {i} is lost.")) for i, (s, e) in enumerate(told)]
    lines[3:3] = ['{"run": "now", "sta', "[]", *(json.dumps(dict(run="before", stage=s, event="end", time=9, text="")) for s in "bc")]  # torn, and of a job that a cluster has ended only now
    (tmp_path/".events.jsonl").write_text("".join(f"{line}\n" for line in lines[1:]))  # nobody saw a start
    drawn, steps = [], [SimpleNamespace(stage=SimpleNamespace(name=n, title=n), params={"scale": "smoke"}, why="new") for n in "ab"]
    assert module._show(SimpleNamespace(poll=lambda: 0), "now", steps, tmp_path, 1, lambda: drawn.append(1)) == ["Stage b failed. Node 7 is lost."] and drawn == [1]

@pytest.mark.skipif(sys.platform != "linux", reason="only there is `ctypes` imported")
def test_files_where_the_command_is_given_are_not_run(world, tmp_path_factory, monkeypatch):
    "A ctypes.py of the user's own, say: neither the leash nor Snakemake imports it."
    here = tmp_path_factory.mktemp("here")
    for name in ("ctypes", "snakemake", "typing_extensions"): (here/f"{name}.py").write_text(f"open({str(here/'was_run')!r}, 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(here)
    world.run(only=["other"])
    assert (world.results/"c.txt").read_text() == "50" and not (here/"was_run").exists()

def test_old_file_does_not_pass_for_a_new_one(finished):
    world, _ = finished
    world.notebook("other", "x = 1")
    with pytest.raises(BoigError, match="ended without writing c.txt"): world.run(only=["other"])
    world.notebook("other", OTHER)
    world.run()

KEY = 'sk-"fake"\\0123456789'  # a quote and a backslash: written otherwise in JSON and in a traceback

def leaks(folder): return [p for p in folder.rglob("*") if p.is_file() and b"0123456789" in p.read_bytes()]

def test_printed_secrets_are_struck_out(finished, monkeypatch):
    world, _ = finished
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    world.notebook("other", OTHER + "\nimport os, sys\nfrom pathlib import Path\nkey = os.environ['OPENAI_API_KEY']\nprint(key)\nos.write(2, key.encode())\n"
                            "(Path(run_dir)/'asked.jsonl').write_text(key)\n(Path(run_dir)/'cache.bin').write_bytes(key.encode())\nkey")
    world.run(only=["other"])
    assert not leaks(world.results) and "[OPENAI_API_KEY]" in (world.results/"notebooks/other.ipynb").read_text()

def test_a_failing_run_leaks_nothing(finished, monkeypatch, capfd):
    world, _ = finished
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    world.notebook("other", OTHER + "\nimport os\nraise ValueError(f\"401 for {os.environ['OPENAI_API_KEY']}\")")
    with pytest.raises(BoigError, match=r"401 for \[OPENAI_API_KEY\]") as e: world.run(only=["other"])
    assert "0123456789" not in str(e.value) + "".join(capfd.readouterr()) and not leaks(world.results)

def test_what_a_failing_stage_has_written_leaks_nothing(finished, monkeypatch):
    "A declared table, one that the stage table does not name, and half a Parquet file."
    world, _ = finished
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    world.notebook("other", OTHER.replace("str(bootstrap)", "(key := __import__('os').environ['OPENAI_API_KEY'])") + "\nwrite_text(Path(results)/'tables/stray.txt', key)\n"
                            "(Path(results)/'half.parquet').write_bytes(b'PAR1' + key.encode())\nraise ValueError('later')")
    with pytest.raises(BoigError, match="later"): world.run(only=["other"])
    assert not leaks(world.results) and (world.results/"tables/stray.txt").read_text() == "[OPENAI_API_KEY]" and (world.results/"data/a.txt").exists()

def test_a_stray_file_with_a_secret_is_struck_out(finished, monkeypatch):
    world, _ = finished
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    world.notebook("other", OTHER + "\nwrite_text(Path(results)/'stray.txt', __import__('os').environ['OPENAI_API_KEY'])")
    world.run(only=["other"])
    assert not leaks(world.results) and (world.results/"c.txt").read_text() == "50"

def test_a_stray_file_is_searched_whatever_this_machines_clock_says(finished, monkeypatch):
    "The file server's may be an hour behind."
    world, _ = finished
    before = (executed := world.results/"notebooks/other.ipynb").read_bytes()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    def left(*args):
        (world.results/"stray.txt").write_text(KEY)
        raise BoigError("Stopped.")
    monkeypatch.setattr(module, "execute", left)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + 3600))
    with pytest.raises(BoigError, match="Stopped."): run_stage(world.results, "other")
    assert not leaks(world.results) and "[OPENAI_API_KEY]" in (world.results/"stray.txt").read_text()
    (world.results/"stray.txt").unlink()
    executed.write_bytes(before)

def test_what_a_killed_run_has_left_is_cleaned_by_the_next(finished, monkeypatch):
    world, _ = finished
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    left = world.results/"runs/other/0123/asked.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text(KEY)
    (weights := left.with_name("weights.bin")).write_bytes(KEY.encode())
    world.run()
    assert left.read_text() == "[OPENAI_API_KEY]" and leaks(world.results) == [weights], "only texts are looked into: weights are large"
    shutil.rmtree(left.parent)

def test_a_table_that_holds_a_secret_is_removed(finished, monkeypatch):
    world, _ = finished
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    world.notebook("other", OTHER.replace("str(bootstrap)", "__import__('os').environ['OPENAI_API_KEY']"))
    with pytest.raises(BoigError, match="c.txt held the value of OPENAI_API_KEY; it was removed"): world.run(only=["other"])
    assert not leaks(world.results) and not (world.results/"c.txt").exists()
    world.notebook("other", OTHER)
    world.run()
    assert (world.results/"c.txt").read_text() == "50"


# What a folder holds

def test_going_back_costs_nothing(finished, capsys):
    world, _ = finished
    before = {f: (world.results/f).read_bytes() for f in ("data/a.txt", "b.txt", "notebooks/second.ipynb", "provenance/second.json", ".done/second.json")}
    world.run(seed=7, only=["second"])
    assert (world.results/"b.txt").read_text() == "14!"
    assert world.why(capsys)["second"] == "would put back an earlier result: changed: parameter seed, stage first"
    world.run()
    assert capsys.readouterr().out.count("put back") == 2 and before == {f: (world.results/f).read_bytes() for f in before}
    assert world.why(capsys, seed=7, only=["second"])["second"].startswith("would put back")
    assert len(leftovers(world.results, planned(world.results, **world.toy), set(load_stages(world.go["table"])))) >= 2
    gone, _ = prune(world.results, **world.toy)
    assert gone and set(world.why(capsys).values()) == {"up to date"} and not prune(world.results, **world.toy)[0]
    assert world.why(capsys, seed=7, only=["second"])["second"].startswith("changed: ")

def test_prune_removes_what_killed_writers_left_and_nothing_else(finished):
    world, _ = finished
    folder, half = next((world.results/"runs/first").iterdir()), "0123456789abcdef.tmp"
    own = ["data/.dvc/config", "data/.git/HEAD", "tables/.notes.tmp", ".cache/x.tmp.csv", "notebooks/.mine.ipynb", f"models/a.{half}.csv"]
    left = ["notebooks/.first.ipynb", f".index.{half}.html", f"runs/first/{folder.name}/once/.t.{half}.parquet", f"provenance/.gone.{half}.json"]
    whole = [f"models/.m.{half}", f"runs/first/{folder.name}/..kept.{half}"]
    for name in (*own, *left, *(f"{w}/kept/.t.{half}.csv" for w in whole)):
        (world.results/name).parent.mkdir(parents=True, exist_ok=True)
        (world.results/name).write_text("{}")
    assert not [f for f in verify(world.results, **world.toy)[0] if f.kind == "changed"]
    found, freed = prune(world.results, **world.toy)
    assert sorted(p.relative_to(world.results).as_posix() for p in found) == sorted([*left, *whole]) and freed == 2 * 6
    assert all((world.results/f).is_file() for f in own) and not any((world.results/f).exists() for f in (*left, *whole))
    for f in own: (world.results/f).unlink()

def test_prune_plans_when_nobody_else_can_run(finished, monkeypatch):
    world, _ = finished
    held = []
    monkeypatch.setattr(results_module, "planned", lambda *a, **k: held.append(running(world.results)[0]) or planned(*a, **k))
    prune(world.results, dry_run=True, **world.toy)
    assert held == [os.getpid()]

def test_prune_takes_nothing_from_under_a_job_that_outlived_its_run(finished):
    world, _ = finished
    (old := world.results/"runs/first/0123456789ab").mkdir()
    (old/"checkpoint").write_text("half way")
    job = os.open(world.results/"runs/.first.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(job, fcntl.LOCK_EX)
    with pytest.raises(BoigError, match="A job of an earlier run is still at first. Cancel it"): prune(world.results, **world.toy)
    assert (old/"checkpoint").is_file() and old in prune(world.results, dry_run=True, **world.toy)[0]
    os.close(job)
    assert old in prune(world.results, **world.toy)[0] and not old.exists()

def test_a_models_files_are_one_piece(world, capsys):
    "Weights are hashed with the tokenizer that the table names, and come back with it; a link to a model stays a link."
    (world.root/"stages.toml").write_text('[first]\nnotebook = "first.ipynb"\ntitle = "trains"\noutputs = ["models/m/tokenizer.json", "models/n/tokenizer.json"]\n')
    world.notebook("first", "from pathlib import Path\nfrom boig.core import write_text\nm = Path(results)/'models/m'\nwrite_text(m/'weights', str(seed))\nwrite_text(m/'tokenizer.json', 'words')\n"
                            "n = Path(results)/'models/n'\nn.unlink(missing_ok=True)\nn.symlink_to('m')")
    world.run(seed=1)
    world.run(seed=2)
    world.run(seed=1)
    assert "put back" in capsys.readouterr().out and (world.results/"models/n/weights").read_text() == "1" and (world.results/"models/n").is_symlink()
    (world.results/"models/m/weights").write_text("3")
    assert world.why(capsys, seed=1)["first"] == "result models/m/weights was changed"

def test_a_run_of_some_stages_is_whole(world):
    "What was not asked for is not missing."
    world.run(only=["second"])
    assert not [f for f in verify(world.results, **world.toy)[0] if f.kind == "missing"]
    (world.results/"provenance/first.json").unlink()
    assert [(f.stage, f.text) for f in verify(world.results, **world.toy)[0] if f.kind == "missing"] == [("first", "never run, or its record is lost")]

def test_somebody_elses_folder_is_left_alone(world):
    world.results.mkdir()
    (world.results/"thesis.txt").write_text("mine")
    with pytest.raises(BoigError, match="holds files but no results of a run"): world.run()
    assert [p.name for p in world.results.iterdir()] == ["thesis.txt"]

def test_a_resumed_stage_says_so(world):
    world.run(only=["first"])
    assert json.loads((world.results/"provenance/first.json").read_text())["resumed"] is False
    step = next((world.results/"runs/first").iterdir())
    (step/"step0").write_text("")
    shutil.rmtree(step/".kept")
    (world.results/"data/a.txt").unlink()
    world.run(only=["first"])
    assert json.loads((world.results/"provenance/first.json").read_text())["resumed"] is True

def test_verify_finds_what_was_touched(finished):
    world, _ = finished
    def findings(): return {(f.kind, f.stage, f.text.split(",")[0]) for f in verify(world.results, **world.toy)[0] if f.kind != "not repeatable from here"}
    assert findings() == set()
    for file, text, wanted in [("data/a.txt", "85", {("changed", "first", "data/a.txt"), ("changed", "second", "data/a.txt")}),
                               ("notebooks/second.ipynb", "{}", {("changed", "second", "notebooks/second.ipynb")}),
                               ("c.txt", None, {("missing", "other", "c.txt")}), (".done/other.json", None, {("missing", "other", "its marker: the result was dropped as stale")}),
                               ("provenance/other.json", "x", {("changed", "other", "provenance/other.json cannot be read")}),
                               ("provenance/first.json", "[1]", {("changed", "first", "provenance/first.json cannot be read")}),
                               ("runs.jsonl", "", {("changed", n, "runs.jsonl knows no such result") for n in ("first", "second", "other")})]:
        path, old = world.results/file, (world.results/file).read_bytes()
        path.unlink()
        if text is not None: path.write_text(text)
        assert findings() == wanted
        path.write_bytes(old)
    log = world.results/"runs.jsonl"
    old = log.read_bytes()
    log.write_bytes(b'{"stage": "first", "key"\n\xff\n3\n' + old + b'{"stage": "oth')  # torn, no text, no object, torn
    assert findings() == {("changed", "runs.jsonl", f"line {i} cannot be read") for i in (1, 2, 3, 4 + old.count(b"\n"))}
    log.write_bytes(old)
    record = json.loads((world.results/"provenance/other.json").read_text())
    forged = record | {"outputs": {"c.txt": "0" * 64}}
    (world.results/"provenance/other.json").write_text(json.dumps(forged))
    assert ("changed", "other", "its record and its marker differ in outputs") in findings()
    for k, v in dict(parameters=record["parameters"] | {"bootstrap": 9}, seed=1, seconds=9e9, provenance=record["provenance"] | {"commit": "0" * 40, "changed_since_commit": False}).items():
        (world.results/"provenance/other.json").write_text(json.dumps(record | {k: v}))
        assert findings() == {("changed", "other", f"its record and its line in runs.jsonl differ in {k}")}
    (world.results/"provenance/other.json").write_text(json.dumps(record | {"parts": {}}))
    assert findings() == {("changed", "other", "its record and its marker differ in parts")}
    (world.results/"provenance/other.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")

@pytest.mark.parametrize("where", ["../outside.txt", "{root}/outside.txt"])
def test_a_record_cannot_reach_outside(finished, where):
    "As that of a stage which the table does not have any more: prune would remove its files."
    world, _ = finished
    (theirs := world.root/"outside.txt").write_text("mine")
    forged = world.results/"provenance/gone.json"
    record = json.loads((world.results/"provenance/other.json").read_text())
    forged.write_text(json.dumps(record | {"stage": "gone", "outputs": {where.format(root=world.root): sha256_file(theirs)}}))
    for look in (prune, verify):
        with pytest.raises(BoigError, match="gone.json' names '.*outside.txt', which is not below the results folder. Remove this record"): look(world.results, **world.toy)
    assert theirs.read_text() == "mine"
    forged.unlink()

def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    log = tmp_path/"runs.jsonl"
    append(log, {"a": 1})
    with open(log, "a") as f: f.write('{"a": 2')
    for i in (3, 4): append(log, {"a": i})
    assert log.read_text() == '{"a": 1}\n{"a": 2\n{"a": 3}\n{"a": 4}\n'

def test_verify_says_what_cannot_be_made_again(finished):
    world, _ = finished
    record = json.loads((world.results/"provenance/other.json").read_text())
    origin = record["provenance"]
    step = next(s for s in planned(world.results, **world.toy) if s.stage.name == "other")
    def said(step=step, **changes): return [f.text for f in _repeatable(record | {"provenance": origin | {"changed_since_commit": False} | changes}, step, origin)]
    assert said() == []
    assert said(changed_since_commit=True) == ["the code had changes that no commit holds"]
    assert said(commit="0" * 40) == ["commit 00000000 is not in this checkout"]
    assert said(packages=origin["packages"] | {"torch": "1.0"}) == [f"other versions: torch 1.0 (here {origin['packages']['torch']})"]
    assert said(step=None) == ["the stage table has no such stage"]
    assert said(step=dataclasses.replace(step, key="x", parts=step.parts | {"zoo pocket-sd": "1", "parameter bootstrap": 7})) == ["changed since: parameter bootstrap, zoo pocket-sd"]

def test_files_of_somebody_else_are_left_alone(world, tmp_path_factory):
    "A folder that looks like one of ours from afar."
    theirs = tmp_path_factory.mktemp("theirs")
    for name in ("runs/tuesday/1/notes.txt", "data/.git/HEAD", "provenance/of_my_paintings.txt", "plan.json"):
        (theirs/name).parent.mkdir(parents=True, exist_ok=True)
        (theirs/name).write_text("{}")
    before = sorted(theirs.rglob("*"))
    for look in (prune, verify, status, lambda f, **toy: results_folder(f)):
        with pytest.raises(BoigError, match="holds files but no results of a run. Name a folder"): look(theirs, **world.toy)
    assert sorted(theirs.rglob("*")) == before
    assert results_folder(tmp_path_factory.mktemp("empty")).is_dir()

def test_from_takes_what_stands_on_a_stage(world, capsys):
    assert list(world.why(capsys, start=["second"])) == list(world.why(capsys, start=["first"])) == ["first", "second"]
    assert list(world.why(capsys, start=["first"], only=["other"])) == ["first", "second", "other"]
    with pytest.raises(BoigError, match="Did you mean 'second'"): world.run(start=["secnd"])

def test_a_stage_runs_again_when_asked(world, capsys, monkeypatch):
    world.notebook("first", LIB + "import os\nwrite_text(Path(results)/'data/a.txt', os.environ.get('TOY_SERVER', 'not run'))")
    world.run()
    monkeypatch.setenv("TOY_SERVER", "done")
    keys = world.keys()
    assert set(world.why(capsys).values()) == {"up to date"}  # what a server is, no key knows
    assert world.why(capsys, again=["first"]) == {"first": "asked for again", "second": "runs after first", "other": "up to date"}
    world.run(again=["first"])
    assert (world.results/"b.txt").read_text() == "done!" and world.keys() == keys and set(world.why(capsys).values()) == {"up to date"}
    (world.results/"data/a.txt").unlink()
    world.run()
    assert (world.results/"data/a.txt").read_text() == "done"  # the old result is not put back
    with pytest.raises(BoigError, match="Did you mean 'first'"): world.run(again=["frist"])
    with pytest.raises(BoigError, match="Unknown stage of this run 'other'"): world.run(only=["first"], again=["other"])


# Disks

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 3 MB."
    place = tmp_path/"disk"
    place.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode: pytest.skip("cannot mount a small disk here")
    yield place
    subprocess.run(["umount", "-l", place])

def test_full_and_read_only_disks(world, small_disk, capsys):
    "One clear line, and nothing finished is lost."
    world.results = world.go["results"] = small_disk/"results"
    world.run(only=["first"])
    world.notebook("other", OTHER.replace("str(bootstrap)", "'x' * 10_000_000"))
    with pytest.raises(BoigError, match="(?s)disk of .* is full. What is finished is kept.*No space left") as e: world.run()
    assert "other.ipynb, cell In" in str(e.value)
    world.notebook("other", OTHER)
    world.run()
    assert "first · doubles the seed · up to date" in capsys.readouterr().out and (world.results/"c.txt").read_text() == "50" and (world.results/"b.txt").read_text() == "84!"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(BoigError, match="Cannot write in .*Read-only file system. Choose a folder") as e: world.run(seed=7)
    assert len(str(e.value).splitlines()) == 1 and {r["state"] for r in status(world.results, **world.toy)} == {"done"}
    assert world.why(capsys, seed=7)["first"] == "changed: parameter seed"


# The shipped results

def test_the_run_ends_with_how_it_compares(tmp_path, monkeypatch, capsys):
    "A line where there are shipped results of the scale with a table in common; else nothing."
    own, shipped = tmp_path/"own", tmp_path/"shipped"
    for folder, score in ((own, 2.0), (shipped, 1.0)):
        (folder/"tables").mkdir(parents=True)
        (folder/"tables/toy.csv").write_text(f"model,score,other\nours,{score},5.0\n")
    def said(reference, results=own):
        monkeypatch.setattr("boig.compare.reference_folder", lambda scale: reference if scale == "smoke" else None)
        module._against(results, "smoke")
        return capsys.readouterr().out
    assert said(shipped).startswith(f"1 of 2 numbers in 1 tables agree with {shipped}")
    assert said(None) == said(own) == ""
    (shipped/"tables/toy.csv").rename(shipped/"tables/another.csv")
    assert said(shipped) == ""


def test_a_page_that_cannot_be_drawn_stops_no_run(world, monkeypatch, capsys):
    from boig import report
    def draw(results):
        if not (results/"c.txt").is_file(): raise KeyError("picture")
        return write_json(results/"index.html", {})
    monkeypatch.setattr(report, "write_report", draw)
    monkeypatch.setattr(module, "load_stages", lambda table, scale="": load_stages(world.root/"stages.toml"))
    monkeypatch.setattr(module, "resolve", lambda llm: None)
    world.run(table=None, jobs=1)
    assert "No page for now: KeyError: 'picture'" in capsys.readouterr().out and (world.results/"index.html").is_file() and (world.results/"b.txt").is_file()


# Locks and kills

def test_second_run_says_so(world):
    with only_run(world.results):
        with pytest.raises(BoigError, match=rf"Another run \(pid {os.getpid()}\) is using"): world.run()
    assert not (world.results/"plan.json").exists()

def test_a_file_system_without_locks_is_refused(world, monkeypatch):
    "Lustre mounted without `flock`, NFS without its lock daemon; looking at results there is fine."
    def no(*args): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    monkeypatch.setattr(fcntl, "flock", no)
    with pytest.raises(BoigError, match=r"has no locks \(Function not implemented\).* choose a folder elsewhere with --results"): world.run()
    assert running(world.results) == (None, set()) and not (world.results/"plan.json").exists()

def test_somebody_who_looks_in_is_no_second_run(world):
    "`running` holds the lock for a moment."
    world.results.mkdir()
    looking = os.open(world.results/".boig.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [looking]).start()
    with only_run(world.results): assert running(world.results)[0] == os.getpid()

def wait_for(what, seconds=120):
    end = time.time() + seconds
    while not (found := what()):
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)
    return found

def alive(pid):
    try: return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError: return False

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_then_the_same_command_finishes(world, tmp_path_factory):
    world.notebook("first", SLOW)
    run = world.spawn(only=["second"])
    wait_for(lambda: list(world.results.glob("runs/first/*/step5")))
    kernel = int(next(world.results.glob("runs/first/*/kernel.pid")).read_text())
    run.kill() # -9, and only the first of four processes
    wait_for(lambda: not alive(kernel), 5)
    run.wait()
    assert not (world.results/"data/a.txt").exists() and not (world.results/".done/first.json").exists()
    steps = {p: p.stat().st_mtime_ns for p in world.results.glob("runs/first/*/step*")}
    world.run(only=["second"])
    assert all(p.stat().st_mtime_ns == t for p, t in steps.items()), "finished steps were done again"
    whole = World(tmp_path_factory.mktemp("whole"))
    whole.notebook("first", SLOW)
    whole.run(only=["second"])
    for f in ("data/a.txt", "b.txt", ".done/first.json", ".done/second.json"):
        assert (world.results/f).read_bytes() == (whole.results/f).read_bytes()
    assert not list(world.results.rglob("*.tmp*"))

def test_a_kernel_may_take_minutes_to_start(tmp_path, monkeypatch):
    "From a cold disk that a cluster shares; papermill gives it one."
    import papermill
    said = {}
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **kw: said.update(kw))
    module.execute(tmp_path/"a.ipynb", tmp_path/"out/a.ipynb", {}, 1, tmp_path/"hub")
    assert said["start_timeout"] >= 600

def test_killed_kernel_is_reported(world):
    world.notebook("other", "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(BoigError, match="^Stage other failed. other.ipynb: its kernel was killed"): world.run(only=["other"])
    world.notebook("other", "import os\nos.kill(os.getppid(), 9)")
    with pytest.raises(BoigError, match="^Stage other was killed"): world.run(only=["other"])

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupt_stops_everything(world):
    world.notebook("first", SLOW)
    run = world.spawn(only=["first"])
    wait_for(lambda: list(world.results.glob("runs/first/*/step2")))
    kernel = int(next(world.results.glob("runs/first/*/kernel.pid")).read_text())
    run.send_signal(signal.SIGINT)
    assert run.wait(60) != 0
    wait_for(lambda: not alive(kernel), 5)
