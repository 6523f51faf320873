"Verbalisation in keyed shards: killed at any moment, changed in any way, the table is right."
import hashlib
import io
import json
import os
import random
import shlex
import signal
import struct
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from boig.core import BoigError
from boig.data.verbalization import Verbalization, parse
from boig.perception import executors, shards as module
from boig.perception.executors import verbalize_with
from boig.perception.pixels import open_rgb
from boig.perception.shards import ROWS, Shards, content_hash, cut, pictures_of, verbalize_rows, verbalize_table, weights_hash


def packed(n, size=(5, 4)):
    Image.new("RGB", size, (n % 256, n // 256, 7)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()

def frame_of(n): return pd.DataFrame({"id": [f"{1000 + i}_3_{i}" for i in range(n)], "image": [{"bytes": packed(i), "path": None} for i in range(n)]})


@dataclass
class Fake:
    "A verbalizer whose answer is a hash of the file; slow if asked, and it keeps a diary of what it looked at."
    setting: int = 1
    seconds: float = 0 # a picture
    diary: Path | None = None # one line a picture
    counts: Counter = field(default_factory=Counter)
    def __post_init__(self): self.asked = []
    def describe(self): return {"setting": self.setting, "counts": dict(self.counts)}
    def caption(self, pictures): return [f"{len(p)} bytes" for p in pictures]
    def __call__(self, pictures):
        for p in pictures:
            time.sleep(self.seconds)
            if self.diary:
                with open(self.diary, "a") as f: f.write(content_hash(p) + "\n")
        self.asked += pictures
        self.counts["pictures"] += len(pictures)
        return [self.answer(p) for p in pictures]
    def answer(self, p):
        x = int(hashlib.sha256(p).hexdigest()[:4], 16) % 60
        return Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"thing": (0, 0, x + 1, self.setting)})

# -- killed ------------------------------------------------------------------------------------------------------------------------------

def kill_often(folder, times=10, step=20):
    "Builds that get SIGKILL at random moments: in the planning, in a picture, in a file's writing. Then one that may end."
    rng, diary = random.Random(int(time.time())), folder/"diary"
    diary.touch()
    seen = lambda: diary.read_text().count("\n")
    real = os.fsync
    for n in range(times + 1):
        before, until = seen(), rng.randrange(step)
        if (pid := os.fork()) == 0:
            os.fsync = lambda fd: (time.sleep(0.01 * (n < times)), real(fd))  # a slow disk: half of the kills meet a file that is half on its way
            verbalize_table(folder/"pictures.parquet", folder/"killed", Fake(seconds=0.002 * (n < times), diary=diary), shard_rows=4)
            os._exit(0)
        if n < times:
            while seen() < before + until: time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        files = [p.name for p in folder.glob("killed/**/*")]
        print(json.dumps({"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "code": status, "looked": seen() - before, "done": sum(".tmp" not in f and len(f) == 40 for f in files),
                          "half": sum(".tmp" in f for f in files), "manifest": "manifest.json" in files}), flush=True)


def test_kill_nine_ten_times(tmp_path):
    table = frame_of(320)
    table.loc[[3, 77], "image"] = [{"bytes": packed(3)[:40], "path": None}, {"bytes": None, "path": None}]
    table.to_parquet(tmp_path/"pictures.parquet", row_group_size=50)
    out = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=240, check=True).stdout
    story = [json.loads(line) for line in out.splitlines()]
    assert [s["killed"] for s in story] == [True] * 10 + [False] and story[-1]["code"] == 0, out
    assert not any(s["manifest"] for s in story[:-1]) and story[-1]["manifest"]
    whole = verbalize_table(table, tmp_path/"undisturbed", Fake(), shard_rows=4)
    for name in ("verbalizations.parquet", "manifest.json", "plan.parquet"): assert (tmp_path/"killed"/name).read_bytes() == (tmp_path/"undisturbed"/name).read_bytes(), name
    assert len({tuple(sorted(p.name for p in (tmp_path/d).rglob("*"))) for d in ("killed", "undisturbed")}) == 1  # no litter
    assert whole.error.notna().sum() == 2
    # what was done stayed done: a kill costs the shard that was being looked at, no more
    done = [s["done"] for s in story]
    assert done == sorted(done) and done[-1] == len(json.loads((tmp_path/"killed"/"manifest.json").read_text())["shards"])
    largest = max(s["rows"] for s in json.loads((tmp_path/"killed"/"manifest.json").read_text())["shards"])
    assert 318 <= sum(s["looked"] for s in story) <= 318 + 10 * largest


def test_old_files_go_last(tmp_path, monkeypatch):
    "A build that ends before its manifest leaves everything that the old manifest names."
    table, home = frame_of(40), tmp_path/"seen"
    verbalize_table(table, home, Fake(), shard_rows=8)
    old = json.loads((home/"manifest.json").read_text())
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", stop)
        with pytest.raises(KeyboardInterrupt): verbalize_table(table, home, Fake(2), shard_rows=8)
    assert json.loads((home/"manifest.json").read_text()) == old
    assert all(hashlib.sha256((home/s["file"]).read_bytes()).hexdigest() == s["sha256"] for s in old["shards"])
    again = Fake(2)
    verbalize_table(table, home, again, shard_rows=8)
    assert not again.asked  # all shards were there
    new = json.loads((home/"manifest.json").read_text())
    assert {p.name for p in (home/"shards").iterdir()} == {Path(s["file"]).name for s in new["shards"]} and not {s["key"] for s in new["shards"]} & {s["key"] for s in old["shards"]}


def test_what_is_not_ours_stays(tmp_path):
    "A folder that holds more: only old shards and halves of our own files go."
    theirs = [tmp_path/"shards"/"00000.tar", tmp_path/"shards"/"part-0.parquet", tmp_path/"shards"/".a.tmp.parquet", tmp_path/".tags.tmpl", tmp_path/f".b.{'0' * 16}.tmp.json"]
    ours = [tmp_path/"shards"/f"{'a' * 32}.parquet", tmp_path/"shards"/f".{'a' * 32}.{'0' * 16}.tmp.parquet", tmp_path/f".manifest.{'0' * 16}.tmp.json", tmp_path/f".plan.{'0' * 16}.tmp.parquet"]
    (tmp_path/"shards"/f"{'b' * 32}.parquet").mkdir(parents=True)
    for p in (*theirs, *ours): p.write_text("x")
    verbalize_table(frame_of(3), tmp_path, Fake())
    assert all(p.read_text() == "x" for p in theirs) and not any(p.exists() for p in ours) and (tmp_path/"shards"/f"{'b' * 32}.parquet").is_dir()


@pytest.mark.parametrize("plan", ["text", "table", "folder"])
def test_a_plan_of_somebody_else_is_not_written_over(tmp_path, plan):
    path = tmp_path/"plan.parquet"
    {"text": lambda: path.write_text("mine"), "table": lambda: pd.DataFrame({"id": ["a"], "content": ["b"]}).to_parquet(path), "folder": path.mkdir}[plan]()
    before = path.read_bytes() if path.is_file() else None
    work = Shards(frame_of(3), tmp_path, Fake())
    for step in (work.plan, work.shards):
        with pytest.raises(BoigError, match="is no plan of shards; choose another folder"): step()
    assert sorted(tmp_path.iterdir()) == [path] and (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("harm", ["cut", "flip", "other rows", "empty"])
def test_a_spoilt_shard_is_made_again(tmp_path, harm):
    table, fake = frame_of(60), Fake()
    first = verbalize_table(table, tmp_path, fake, shard_rows=30)
    a, b = sorted((tmp_path/"shards").iterdir())[:2]
    data = bytearray(a.read_bytes())
    data[60] ^= 255  # inside the first page
    {"cut": lambda: a.write_bytes(data[:-9]), "flip": lambda: a.write_bytes(data), "other rows": lambda: a.write_bytes(b.read_bytes()), "empty": lambda: a.write_bytes(b"")}[harm]()
    fake.asked.clear()
    assert verbalize_table(table, tmp_path, fake, shard_rows=30).equals(first)
    assert 0 < len(fake.asked) < 60

# -- changed -----------------------------------------------------------------------------------------------------------------------------

IDS = st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=60)

@settings(max_examples=60, deadline=None)
@given(IDS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_keys(ids, most, rng):
    contents = [content_hash(i.encode()) for i in ids]
    parts = cut(ids, contents, {"a": 1}, most)
    keys = {s.key for s in parts}
    assert sorted(r for s in parts for r in s.rows) == list(range(len(ids))) and len(keys) == len(parts)
    assert all([ids[r] for r in s.rows] == s.ids == sorted(s.ids) and [contents[r] for r in s.rows] == s.contents for s in parts)
    # the order of the rows has no part in it
    order = rng.sample(range(len(ids)), len(ids))
    moved = cut([ids[r] for r in order], [contents[r] for r in order], {"a": 1}, most)
    assert [(s.key, s.ids) for s in moved] == [(s.key, s.ids) for s in parts]
    # another picture, or none: one shard is new
    at = rng.randrange(len(ids))
    for new in (content_hash(b"new"), ""):
        assert len(keys - {s.key for s in cut(ids, contents[:at] + [new] + contents[at + 1:], {"a": 1}, most)}) == 1
    # another verbalizer: all are
    assert not keys & {s.key for s in cut(ids, contents, {"a": 2}, most)}
    # a row less: one is new or gone, unless the number of shards has changed
    fewer = cut(ids[:at] + ids[at + 1:], contents[:at] + contents[at + 1:], {"a": 1}, most)
    def doublings(n): return max(0, int(np.ceil(np.log2(max(n, 1) / most))))
    if doublings(len(ids)) == doublings(len(ids) - 1): assert len(keys - {s.key for s in fewer}) == 1 and len({s.key for s in fewer} - keys) <= 1


def test_shards_have_their_size():
    "On average at most `shard_rows`, at least half of it; none much larger."
    for n, most in ((5000, 50), (5000, 79), (4096, 64)):
        sizes = [len(s.rows) for s in cut([f"id {i}" for i in range(n)], [""] * n, {}, most)]
        assert most / 2 < np.mean(sizes) <= most and max(sizes) < 2 * most


def test_what_changed_is_looked_at(tmp_path):
    table = frame_of(64)
    def looked(table, fake=None, **options):
        fake = fake or Fake()
        result = verbalize_table(table, tmp_path, fake, shard_rows=8, **options)
        assert list(result.id) == list(table.id)
        assert [parse(v).value for v in result.verbalization] == [fake.answer(x["bytes"]) for x in table.image]  # never an old one
        return set(fake.asked)
    assert len(looked(table)) == 64 and not looked(table)
    assert not looked(table.sample(frac=1, random_state=1)) and not looked(table.reset_index(drop=True).set_index(pd.RangeIndex(100, 164)))
    other = table.copy()
    other.at[9, "image"] = {"bytes": packed(999), "path": "x"}
    assert packed(999) in (again := looked(other)) and 1 <= len(again) <= 20
    assert looked(table) == again - {packed(999)} | {packed(9)}  # it was removed as stale, and is made again
    assert len(looked(table, Fake(2))) == 64 and not looked(table, Fake(2)) and len(looked(table, Fake())) == 64
    assert len(looked(table, captions=False)) == 64 and len(looked(table, code="2")) == 64
    assert looked(table.iloc[:63], code="2") < set(x["bytes"] for x in table.image)


def test_weights_and_settings_are_in_the_key():
    @dataclass
    class Part:
        net: torch.nn.Module
        tags: list
        limits: torch.Tensor
    def made(seed=0, tags=("a", "b"), limits=0.5, dtype=torch.float32):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).to(dtype)  # with an integer of no dimension among its numbers
        return weights_hash(Part(net, list(tags), torch.full((2,), limits)))
    assert made() == made() and len({made(), made(1), made(tags=("b", "a")), made(limits=0.4), made(dtype=torch.bfloat16)}) == 5
    fake = Fake()
    runs = module.what_runs(fake)
    fake([packed(1)])
    assert module.what_runs(fake) == runs and fake.counts  # its counts are no setting
    assert {k for k in runs if runs[k] != module.what_runs(Fake(2), False, "x")[k]} == {"verbalizer", "captions", "code"}


def test_code_is_in_the_key(tmp_path, monkeypatch):
    "Any change in the files that look is another code; other files are not."
    (tmp_path/"perception").mkdir()
    (tmp_path/"__init__.py").touch()
    (tmp_path/"perception"/"colors.py").write_text("a = 1")
    monkeypatch.setattr(module.boig, "__file__", str(tmp_path/"__init__.py"))
    first = module.code_hash()
    (tmp_path/"cli.py").write_text("x")
    assert module.code_hash() == first
    (tmp_path/"perception"/"colors.py").write_text("a = 2")
    assert module.code_hash() != first
    monkeypatch.undo()
    home = Path(module.boig.__file__).parent
    assert all(list(home.glob(p)) for p in module._CODE)  # what it names is there

# -- pictures ----------------------------------------------------------------------------------------------------------------------------

def test_what_cannot_be_read(tmp_path):
    rows = [("ok", packed(1, (30, 20))), ("none", None), ("cut", packed(2)[:50]), ("text", b"<html>"), ("empty", b""), ("grey", packed(3))]
    fake = Fake()
    table = verbalize_rows(rows, fake).to_pandas().set_index("id")
    assert fake.asked == [rows[0][1], rows[5][1]]
    assert list(table.index[table.error.isna()]) == ["ok", "grey"] and (table.loc["ok", "width"], table.loc["ok", "height"]) == (30, 20)
    assert table.verbalization.isna().equals(table.error.notna()) and table.caption.isna().equals(table.error.notna())
    assert table.error["none"] == "there is no picture" and "damaged" in table.error["cut"] and "no format" in table.error["text"]
    assert verbalize_rows(rows, fake, captions=False)["caption"].null_count == 6
    seen = verbalize_table([i for i, _ in rows], tmp_path, fake, read=dict(rows).get)
    assert seen.error.notna().sum() == 4 and seen.width.dtype == "Int32"
    assert json.loads((tmp_path/"manifest.json").read_text())["left out"] == {"the picture is in no format that can be read.": 2, "there is no picture": 1, "the picture is damaged": 1}


@pytest.mark.parametrize("tag, data", [(0x100, b"ab\0\0"), (0x201, b"a\0\0\0")])
def test_odd_exif_costs_one_picture(tag, data):
    "A turned JPEG whose next tag is text where a number belongs: Pillow breaks in its own ways, the table does not."
    entries = [struct.pack("<HHI4s", 0x112, 3, 1, b"\6\0\0\0"), struct.pack("<HHI4s", tag, 2, 2, data)]
    Image.new("RGB", (8, 6)).save(file := io.BytesIO(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entries) + bytes(4))
    odd, fine = verbalize_rows([("odd", file.getvalue()), ("fine", packed(1))], Fake()).to_pylist()
    assert fine["error"] is None and odd["error"].startswith("the picture is damaged (")


def test_a_thin_picture_costs_one_row(tmp_path):
    "With the paper's grounder, which refuses it."
    from boig.perception.grounding import load_grounder, tiny_grounder
    from boig.perception.verbalizer import Verbalizer
    grounder = load_grounder(tiny_grounder(tmp_path/"dino"), device="cpu")
    sizes = {"fine": (8, 8), "thin": (1000, 20), "tall": (1, 41), "widest": (40, 1)}
    seen = verbalize_table(pd.DataFrame({"id": list(sizes), "image": [packed(1, s) for s in sizes.values()]}), tmp_path/"seen", Verbalizer(lambda x: grounder(x, [["cat"]] * len(x)))).set_index("id")
    assert list(seen.index[seen.error.isna()]) == ["fine", "widest"] == list(seen.index[seen.verbalization.notna()])
    assert seen.error["thin"] == "the picture is too long and thin to be looked at (1000×20; at most 1:40)."
    assert json.loads((tmp_path/"seen"/"manifest.json").read_text())["left out"] == {"the picture is too long and thin to be looked at": 2}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "MPO"])
def test_what_is_on_the_web_is_read(format):
    Image.new("RGB", (6, 4), "red").save(file := io.BytesIO(), format)
    assert open_rgb(file.getvalue()).size == (6, 4)


def test_no_program_is_started_by_a_picture(tmp_path, monkeypatch):
    "PostScript is a program, and Pillow hands it to Ghostscript."
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a: pytest.fail("Ghostscript was started"))
    Image.new("RGB", (6, 4)).save(eps := tmp_path/"x.eps", "EPS")
    Image.new("RGB", (6, 4)).save(tmp_path/"x.ppm", "PPM")
    for source in (eps, eps.read_bytes(), (tmp_path/"x.ppm").read_bytes()):
        with pytest.raises(BoigError, match="is in no format that can be read.$"): open_rgb(source)


def test_a_broken_verbalizer_is_no_pictures_fault(tmp_path):
    class Broken(Fake):
        def __call__(self, pictures): raise BoigError("the weights are gone")
    class Short(Fake):
        def __call__(self, pictures): return super().__call__(pictures)[1:]
    with pytest.raises(BoigError, match="weights are gone"): verbalize_table(frame_of(3), tmp_path, Broken())
    with pytest.raises(ValueError, match="shorter"): verbalize_table(frame_of(3), tmp_path, Short())
    assert not list(tmp_path.glob("shards/*"))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 170), st.data())
def test_a_parquet_file_is_read_in_pieces(tmp_path_factory, n, group, data):
    path = tmp_path_factory.mktemp("p")/"a=1.parquet"
    frame = pd.DataFrame({"id": [str(i) for i in range(n)], "image": [None if i % 7 == 3 else {"bytes": None if i % 5 == 3 else b"%d" % i, "path": "x"} for i in range(n)], "likes": 1})
    frame.to_parquet(path, row_group_size=group)
    wanted = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    expected = [(i, None if i % 7 == 3 or i % 5 == 3 else b"%d" % i) for i in wanted]
    for table in (path, frame): assert list(pictures_of(table).at(wanted)) == expected and pictures_of(table).ids == list(frame.id)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("path", pa.string()), ("bytes", pa.binary()), ("width", pa.int32())])], ids=str)
def test_plain_bytes_are_pictures_too(tmp_path, kind):
    files = [packed(1), None, packed(2)]
    cells = [{"path": "x", "bytes": f, "width": 5} for f in files] if pa.types.is_struct(kind) else files
    pq.write_table(pa.table({"id": ["a", "b", "c"], "image": pa.array(cells, kind)}), tmp_path/"t.parquet")
    for table in (tmp_path/"t.parquet", pd.read_parquet(tmp_path/"t.parquet")): assert list(pictures_of(table).at([0, 1, 2])) == list(enumerate(files))
    assert verbalize_table(tmp_path/"t.parquet", tmp_path/"seen", Fake()).error.isna().tolist() == [True, False, True]


def test_bad_tables(tmp_path):
    with pytest.raises(BoigError, match="Ids must be texts"): pictures_of(pd.DataFrame({"id": [1], "image": [None]}))
    with pytest.raises(BoigError, match="Ids must be texts"): pictures_of(["a", None], {}.get)
    with pytest.raises(BoigError, match="1 ids stand more than once, the first is 'a'"): pictures_of(["a", "b", "a"], {}.get)
    with pytest.raises(BoigError, match="lacks the columns image"): pictures_of(pd.DataFrame({"id": ["a"]}))
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path/"x.parquet")
    with pytest.raises(BoigError, match="lacks the columns id, image"): pictures_of(tmp_path/"x.parquet")
    with pytest.raises(BoigError, match="no file"): pictures_of(tmp_path/"nowhere.parquet")
    with pytest.raises(BoigError, match="at least one row"): verbalize_table(frame_of(2), tmp_path/"s", Fake(), shard_rows=0)
    empty = verbalize_table([], tmp_path/"e", Fake(), read={}.get)
    assert list(empty.columns) == ROWS.names and len(empty) == 0 and json.loads((tmp_path/"e"/"manifest.json").read_text())["rows"] == 0

# -- executors ---------------------------------------------------------------------------------------------------------------------------

STUB = """import hashlib, json, sys, types
class Fake:
    def describe(self): return {"setting": 1}
    def caption(self, pictures): return [f"{len(p)} bytes" for p in pictures]
    def __call__(self, pictures):
        texts = [json.dumps({"seen": hashlib.sha256(p).hexdigest()}) for p in pictures]
        return [types.SimpleNamespace(to_json=lambda t=t: t) for t in texts]
stub = types.ModuleType("boig.perception.verbalizer")
stub.load_verbalizer = lambda name, captions=True: Fake()
"""

@pytest.fixture
def quick(tmp_path, monkeypatch):
    "A table of 60 pictures, and a verbalizer that needs no models, here and in the processes that are started; one process's files."
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"sitecustomize.py").write_text(STUB + "sys.modules[stub.__name__] = stub\n")
    ours = Path(module.__file__).parents[2]  # which need not be the one that is installed
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path/"site"), str(ours), os.environ.get("PYTHONPATH")])))
    exec(STUB, scope := {})
    monkeypatch.setitem(sys.modules, "boig.perception.verbalizer", scope["stub"])
    for cache in (executors._models, executors._open): cache.cache_clear()
    table = frame_of(60)
    table.at[7, "image"] = {"bytes": b"<html>", "path": None}
    table.to_parquet(tmp_path/"pictures.parquet", row_group_size=25)
    verbalize_table(tmp_path/"pictures.parquet", tmp_path/"alone", scope["Fake"](), shard_rows=8)
    yield tmp_path
    for cache in (executors._models, executors._open): cache.cache_clear()

def same(quick, executor, name):
    "Whether an executor leaves, to the byte, what one process leaves."
    verbalize_with(executor, quick/"pictures.parquet", quick/name, shard_rows=8)
    files = [p.relative_to(quick/"alone") for p in (quick/"alone").rglob("*") if p.is_file()]
    assert len(files) > 5 and all((quick/name/f).read_bytes() == (quick/"alone"/f).read_bytes() for f in files)

def test_local_processes_give_the_same_files(quick, monkeypatch):
    "And run nothing that lies where they were started."
    (quick/"here").mkdir()
    (quick/"here"/"typer.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(quick/"here")
    same(quick, "here", "here")
    same(quick, partial(executors.local, processes=2), "local")
    (some := sorted((quick/"local"/"shards").iterdir())[0]).unlink()
    executors.Run(str(quick/"local")).task(0, 1)  # one that is lacking, as a later call would
    assert some.read_bytes() == (quick/"alone"/"shards"/some.name).read_bytes()

def test_local_processes_take_a_gpu_each(monkeypatch):
    started = []
    class Process:
        args = []
        def __init__(self, command, env): started.append((command[-2:], env.get("LOCAL_RANK")))
        def wait(self): return 0
        def kill(self): pass
    monkeypatch.setattr(executors.subprocess, "Popen", Process)
    monkeypatch.setattr(executors.os, "cpu_count", lambda: 3)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    def on(gpus, **options):
        started.clear()
        monkeypatch.setattr(executors.torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: gpus)
        executors.local(executors.Run("x"), list(range(9)), **options)
        return started
    assert on(2) == [(["0", "2"], "0"), (["1", "2"], "1")]
    assert [rank for _, rank in on(2, processes=4)] == ["0", "1", "0", "1"] and [rank for _, rank in on(0)] == [None] * 3

def test_a_slurm_array_gives_the_same_files(quick, monkeypatch):
    "bash runs the array's script, once for each SLURM_ARRAY_TASK_ID that its --array names, from another folder."
    (quick/"bin").mkdir()
    sbatch = quick/"bin"/"sbatch"
    sbatch.write_text('#!/bin/bash\n[ "$1" = --wait ] && cd / || exit 9\nrange=$(sed -n "s/^#SBATCH --array=//p" "$2")\n'
                      'for k in $(seq ${range#*-} -1 ${range%-*}); do SLURM_ARRAY_TASK_ID=$k bash "$2" || exit 1; done\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{quick/'bin'}{os.pathsep}{os.environ['PATH']}")
    same(quick, partial(executors.slurm, tasks=2, options=["--gpus=1"]), "my pictures")
    script = (quick/"my pictures"/"slurm"/"array.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --gpus=1\n" in script
    said = [shlex.split(line) for line in script.splitlines() if "--output" in line]
    assert said == [["#SBATCH", f"--output={quick}/my pictures/slurm/%a.log"]]

def test_ray_gives_the_same_files(quick):
    "Real Ray, where it is installed."
    pytest.importorskip("ray")
    same(quick, "ray", "ray")

def test_ray_is_asked_as_it_wants_to_be(quick, monkeypatch):
    "A stand-in with Ray's three words, that carries each call through a pickle as Ray does; it is not Ray."
    import pickle
    asked = []
    class Call:
        def __init__(self, f): self.f = f
        def remote(self, *args): return pickle.dumps((self.f, args))
    def get(calls):
        for f, args in map(pickle.loads, reversed(calls)): f(*args)
    ray = types.SimpleNamespace(is_initialized=lambda: True, remote=lambda **want: asked.append(want) or Call, get=get)
    monkeypatch.setitem(sys.modules, "ray", ray)
    same(quick, partial(executors.on_ray, gpus=0.5), "ray")
    for gpu in (False, True):
        monkeypatch.setattr(executors.torch.cuda, "is_available", lambda: gpu)
        same(quick, "ray", f"with a GPU: {gpu}")
    assert asked == [{"num_cpus": 1, "num_gpus": n} for n in (0.5, 0, 1)]

def test_what_executors_say(quick, monkeypatch):
    pictures = quick/"pictures.parquet"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BoigError, match="pip install ray"): verbalize_with("ray", pictures, quick/"x", shard_rows=8)
    with pytest.raises(BoigError, match="Unknown executor 'dusk'"): verbalize_with("dusk", pictures, quick/"x")
    with pytest.raises(BoigError, match="write it to a Parquet file"): verbalize_with("here", frame_of(2), quick/"x")
    with pytest.raises(BoigError, match="there is no part 2"): executors.Run(str(quick/"x")).task(2, 2)
    with pytest.raises(BoigError, match="holds no job"): executors.Run(str(quick/"nowhere"))(0)
    monkeypatch.setattr(executors.shutil, "which", lambda name: None)
    with pytest.raises(BoigError, match="sbatch --wait .*array.sh"): verbalize_with("slurm", pictures, quick/"x", shard_rows=8)

def test_an_executor_is_given_what_is_lacking(quick):
    asked = []
    def one_only(run, shards):
        asked.append(shards)
        run(shards[-1])
    with pytest.raises(BoigError, match="shards are not done"): verbalize_with(one_only, quick/"pictures.parquet", quick/"x", shard_rows=8)
    with pytest.raises(BoigError, match="shards are not done"): verbalize_with(one_only, quick/"pictures.parquet", quick/"x", shard_rows=8)
    assert len(asked[0]) > 2 and asked[1] == asked[0][:-1]
    same(quick, "here", "x")
    verbalize_with(one_only, quick/"pictures.parquet", quick/"x", shard_rows=8)  # nothing is lacking: not called
    assert len(asked) == 2

# -- a cluster ---------------------------------------------------------------------------------------------------------------------------

def test_steps_by_several_processes(tmp_path):
    table = frame_of(40)
    def work(table=table, fake=None, **options): return Shards(table, tmp_path, fake or Fake(), **{"shard_rows": 8} | options)
    with pytest.raises(BoigError, match="no plan"): work().run(0)
    n = len(work().plan())
    with pytest.raises(BoigError, match=f"no shard {n}; there are {n}"): work().run(n)
    with pytest.raises(BoigError, match=f"{n} of {n} shards are not done"): work().assemble()
    for stranger in (work(fake=Fake(2)), work(shard_rows=9), work(captions=False), work(code="x"), work(table.iloc[::-1])):
        with pytest.raises(BoigError, match="made for other rows or another verbalizer"): stranger.run(0)
    with pytest.raises(BoigError, match="have changed since the plan"): work(table.assign(image=table.image.iloc[::-1].values)).run(0)
    for i in random.Random(1).sample(range(n), n): work().run(i)
    twice = Fake()
    work(fake=twice).run(2)
    assert not twice.asked
    work().assemble()
    verbalize_table(table, tmp_path/"alone", Fake(), shard_rows=8)
    assert (tmp_path/"verbalizations.parquet").read_bytes() == (tmp_path/"alone"/"verbalizations.parquet").read_bytes()


def test_the_pocket_verbalizer(tmp_path):
    "The same answers as without shards, and its second call looks at nothing."
    from boig.data.world import random_scene, render
    from boig.perception.verbalizer import load_verbalizer
    rng, verbalizer = np.random.default_rng(4), load_verbalizer("pocket", device="cpu")
    scenes = [Image.fromarray(render(random_scene(rng), 64 + 32 * (i % 2))) for i in range(12)]
    def png(p):
        p.save(file := io.BytesIO(), "PNG")
        return file.getvalue()
    table = pd.DataFrame({"id": [f"{i}" for i in range(12)], "image": [{"bytes": png(s), "path": None} for s in scenes]})
    seen = verbalize_table(table, tmp_path, verbalizer, shard_rows=4)
    assert list(seen.verbalization) == [v.to_json() for v in verbalizer(scenes)] and list(seen.caption) == verbalizer.caption(scenes)
    assert list(seen.width) == [s.width for s in scenes]
    before = verbalizer.counts["pictures"]
    assert verbalize_table(table, tmp_path, verbalizer, shard_rows=4).equals(seen) and verbalizer.counts["pictures"] == before
    assert pq.read_schema(tmp_path/"verbalizations.parquet").names == ROWS.names


if __name__ == "__main__": kill_often(Path(sys.argv[1]))
