"Secrets, archives, pictures that say what made them, steps that are left out, and what a plan may claim."
import gzip
import html
import json
import math
import tarfile
import zipfile
from dataclasses import fields
from io import BytesIO
from types import SimpleNamespace
from urllib.parse import quote

import nbformat
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from boig import estimate, zoo
from boig.behaviour.finetune import _LeaveOut
from boig.core import BoigError, made_by, png_record, project_root, save_png
from boig.diffusion.tuning import step
from boig.safe import _columns, check_parameters, clean_logs, held, redact, refuse_secrets, sounds_secret
from boig.scales import SECTIONS
from boig.stages import notebook_parameters

KEY = "sk-'fake'\"\\<é>&0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch): monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_names_that_sound_secret():
    assert all(map(sounds_secret, ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db-password", "X_BEARER_TOKEN", "GITHUB_PAT", "PGPASSWORD", "GITHUBTOKEN", "MYSQL_PWD", "X_BEARER", "OPENAIAPIKEY")))
    assert not any(map(sounds_secret, ("max_new_tokens", "monkey", "PATH", "OLDPWD", "keyboard", "keywords", "pattern", "tokenizer", "TOKENIZERS_PARALLELISM")))

def test_no_parameter_of_ours_sounds_secret():
    notebooks = (project_root()/"nbs"/"90_experiments").glob("*.ipynb")
    ours = {f.name for section in SECTIONS.values() for f in fields(section)}.union(*map(notebook_parameters, notebooks))
    assert {"tokens", "max_new_tokens", "token_lr"} <= ours
    check_parameters({name: "" for name in ours})

@pytest.mark.parametrize("name", ["PGPASSWORD", "GITHUBTOKEN", "MYSQL_PWD", "X_BEARER"])
def test_secrets_under_run_together_names_are_refused_and_struck_out(monkeypatch, name):
    monkeypatch.setenv(name, "hunter2hunter2")
    assert redact("with hunter2hunter2") == f"with [{name}]"
    with pytest.raises(BoigError, match="looks like a secret"): check_parameters({name.lower(): "x"})

@pytest.mark.parametrize("name", ["DB_PASS", "SMTP_PASS", "SSHPASS", "OPENAI_API_KEYS", "API_TOKENS", "AUTHORIZATION"])
def test_variables_that_hold_several_or_are_short_for_it(monkeypatch, name):
    monkeypatch.setenv(name, "Bearer one-of-them-1" if name == "AUTHORIZATION" else "one-of-them-1,another-1")
    assert redact("with one-of-them-1") == f"with [{name}]"

@pytest.mark.parametrize("name, value", [("DATABASE_URL", "postgres://me:p%40ss-word1@host:5432/db"), ("HTTPS_PROXY", "http://me:p@ss-word1@proxy:80"), ("PIP_INDEX_URL", "https://__token__:p@ss-word1@host/simple https://b:another-1@c/")],
                         ids=["one", "not escaped", "two"]) # pytest writes values into the environment, if they are the test's name
def test_passwords_in_addresses_are_secrets(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"logged in with p@ss-word1 at {value}").count(f"[{name}]") == (3 if "another" in value else 2) and "ss-word1" not in redact(value)
    monkeypatch.setenv(name, "https://me@host:5432/no:pass-word@here")
    assert redact("pass-word 5432/no:pass-word") == "pass-word 5432/no:pass-word"

def test_each_line_of_a_key_is_struck_out_of_a_notebook(monkeypatch, tmp_path):
    lines = ["-----BEGIN OPENSSH PRIVATE KEY-----", "MIIEpAIBAAKCAQEA1234567890abcdefgh", "Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4/+", "-----END OPENSSH PRIVATE KEY-----"]
    for written in ("\n", "\\n"):
        monkeypatch.setenv("SSH_PRIVATE_KEY", written.join(lines))
        text = nbformat.writes(new_notebook(cells=[new_code_cell(outputs=[new_output("stream", text="\n".join(lines))])]))
        (tmp_path/"x.ipynb").write_text(text)
        assert held(tmp_path/"x.ipynb") == {"SSH_PRIVATE_KEY"} and not any(l in redact(text) for l in lines[1:3])
        assert redact(lines[0]) == lines[0], "every key begins so"
        with pytest.raises(BoigError, match="holds the value of SSH_PRIVATE_KEY"): check_parameters({"note": lines[1]})

def test_of_values_that_begin_alike_no_end_is_left(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh-1")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-1-rest-of-it-1234")
    assert redact("abcdefgh-1-rest-of-it-1234 abcdefgh-1") == "[B_TOKEN] [A_TOKEN]"

def test_plain_words_are_no_secrets_and_a_warning_says_so_once(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_TOKEN", "notebook")
    monkeypatch.setenv("TOY_URL", "postgres://postgres:postgres@host/db")
    (tmp_path/"record.json").write_text('{"notebook": "a", "postgres": 1}')
    with pytest.warns(UserWarning, match="JUPYTER_TOKEN, TOY_URL.*twelve characters") as told:
        clean_logs(tmp_path)
        clean_logs(tmp_path)
    assert len(told) == 1 and (tmp_path/"record.json").read_text() == '{"notebook": "a", "postgres": 1}'
    monkeypatch.delenv("TOY_URL")
    monkeypatch.setenv("JUPYTER_TOKEN", "notebook-1")
    assert redact("notebook-1, notebook") == "[JUPYTER_TOKEN], notebook"

def test_the_shells_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/ada/boig")
    assert redact("in /home/ada/boig") == "in /home/ada/boig"

@pytest.mark.parametrize("write", [str, json.dumps, lambda s: json.dumps(s, ensure_ascii=False), lambda s: json.dumps(json.dumps({"a": s})), repr, html.escape, lambda s: quote(s, safe="")])
def test_every_spelling_is_struck_out(write, tmp_path):
    text = f"before {write(KEY)} after"
    assert "0123456789" in text and "0123456789" not in redact(text) and "[OPENAI_API_KEY]" in redact(text)
    (tmp_path/"x.bin").write_text(text, encoding="utf-8")
    assert held(tmp_path/"x.bin") == held(tmp_path/"x.bin", piece=5) == {"OPENAI_API_KEY"}

def test_short_values_and_other_names_are_left_alone(monkeypatch):
    monkeypatch.setenv("TOY_KEY", "yes")
    monkeypatch.setenv("TOY_NAME", "somebody in particular")
    assert redact("yes, somebody in particular") == "yes, somebody in particular"

@pytest.mark.parametrize("column", [lambda s: s, lambda s: s.encode(), lambda s: [{"role": "user", "content": s}], lambda s: {"answer": {"text": s}}, "category"])
def test_compressed_tables_are_searched(tmp_path, column):
    form = str if column == "category" else column
    frame = pd.DataFrame({"n": range(500), "x": [form("harmless")] * 499 + [form(f"401 for {KEY}")]})
    if column == "category": frame.x = frame.x.astype("category")
    frame.to_parquet(tmp_path/"t.parquet", compression="gzip", write_statistics=False)
    assert KEY.encode() not in (tmp_path/"t.parquet").read_bytes() and held(tmp_path/"t.parquet") == {"OPENAI_API_KEY"}
    fine = frame.iloc[:499].copy()
    if column == "category": fine.x = fine.x.cat.remove_unused_categories()  # else the file still lists what no row holds
    fine.to_parquet(tmp_path/"fine.parquet")
    assert held(tmp_path/"fine.parquet") == set()
    refuse_secrets([tmp_path/"fine.parquet"])
    with pytest.raises(BoigError, match="t.parquet held the value of OPENAI_API_KEY") as e: refuse_secrets([tmp_path/"t.parquet"])
    assert not (tmp_path/"t.parquet").exists() and "0123456789" not in str(e.value)

@pytest.mark.parametrize("kind", [pa.map_(pa.string(), pa.string()), pa.map_(pa.string(), pa.list_(pa.string())), pa.string_view(), pa.binary_view(), pa.list_view(pa.string()), pa.binary(len(KEY.encode()))], ids=str)
def test_columns_of_rarer_types_are_searched(tmp_path, kind):
    def column(s): return [("a", [s] if pa.types.is_list(kind.item_type) else s)] if pa.types.is_map(kind) else [s] if pa.types.is_list_view(kind) else s if pa.types.is_string_view(kind) else s.encode()
    for name, last in (("fine", "x" * len(KEY.encode())), ("held", KEY)):
        pq.write_table(pa.table({"x": pa.array([column("x" * len(KEY.encode())), column(last)], kind)}), tmp_path/f"{name}.parquet", compression="gzip", write_statistics=False)
    assert held(tmp_path/"fine.parquet") == set() and held(tmp_path/"held.parquet") == {"OPENAI_API_KEY"}

def test_a_table_that_cannot_be_searched_is_refused(tmp_path, monkeypatch):
    with pytest.raises(BoigError, match="union.*cannot be searched.*Write it as text"): list(_columns(pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array(["a"])])))
    monkeypatch.setattr("boig.safe._parquet_holds", lambda *_: pa.array([{}]).cast(pa.struct([("a", pa.string_view())])).dictionary_encode())
    for name in ("a.parquet", "b.log", "c.log"): (tmp_path/name).write_text(KEY)
    with pytest.raises(BoigError, match="a.parquet cannot be searched"): clean_logs(tmp_path)
    assert (tmp_path/"b.log").read_text() == (tmp_path/"c.log").read_text() == "[OPENAI_API_KEY]"

def test_gz_files_and_the_texts_of_pictures_are_unpacked(tmp_path):
    info = PngInfo()
    info.add_text("asked", f"for {KEY}", zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path/"x.png", pnginfo=info)
    packed = gzip.compress(f"{'x' * 90}{KEY}{np.random.default_rng(0).bytes(9000).hex()}".encode())
    (tmp_path/"x.log.gz").write_bytes(packed)
    (tmp_path/"half.log.gz").write_bytes(packed[:len(packed) // 2])
    for path in tmp_path.iterdir(): assert KEY.encode() not in path.read_bytes() and held(path) == held(path, piece=7) == {"OPENAI_API_KEY"}, path
    for name in ("no.gz", "no.png"): (tmp_path/name).write_text("neither")
    assert held(tmp_path/"no.gz") == held(tmp_path/"no.png") == set()

def test_a_picture_whose_texts_are_not_unpacked_is_refused(tmp_path):
    info = PngInfo()
    info.add_text("asked", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1) + KEY, zip=True)
    Image.new("L", (2, 2)).save(tmp_path/"x.png", pnginfo=info)
    with pytest.raises(BoigError, match="x.png cannot be searched for secrets: Decompressed data too large.*less text"): held(tmp_path/"x.png")
    whole = (tmp_path/"x.png").read_bytes()
    for cut in (4, 12, 20, 28, 60): # half a file: nobody reads a text out of it
        (tmp_path/"half.png").write_bytes(whole[:cut])
        assert held(tmp_path/"half.png") == set()

def test_a_mistake_of_our_own_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("boig.safe._png_texts", lambda path: 1 / 0)
    (tmp_path/"x.png").write_bytes(b"")
    with pytest.raises(ZeroDivisionError): held(tmp_path/"x.png")

def test_logs_are_cleaned_and_caches_dropped(tmp_path):
    for name in ("a/log.jsonl", "a/cache.bin", "fine.txt"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text("fine" if name == "fine.txt" else KEY)
    clean_logs(tmp_path)
    assert (tmp_path/"a/log.jsonl").read_text() == "[OPENAI_API_KEY]" and not (tmp_path/"a/cache.bin").exists() and (tmp_path/"fine.txt").read_text() == "fine"


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/boig_evil.txt"])
def test_archives_stay_in_their_folder(tmp_path, name):
    wheel, npm, inside = tmp_path/"x.whl", tmp_path/"x.tgz", tmp_path/"in"/"side"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as z: z.writestr(name, "evil")
    with tarfile.open(npm, "w:gz") as t:
        member = tarfile.TarInfo(name)
        member.size = 4
        t.addfile(member, BytesIO(b"evil"))
    for archive in (wheel, npm):
        with pytest.raises(BoigError, match="leaves its folder"): zoo._unpack(archive, inside)
    assert not [p for p in tmp_path.rglob("*evil*")]


def test_only_files_are_unpacked(tmp_path):
    with tarfile.open(tmp_path/"x.tgz", "w:gz") as t:
        for name, kind in (("package", tarfile.DIRTYPE), ("package/link", tarfile.SYMTYPE), ("package/twin", tarfile.LNKTYPE), ("package/pipe", tarfile.FIFOTYPE), ("package/a.js", tarfile.REGTYPE), ("package/b/c.js", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size, member.uid = kind, "../../evil", 4 * (kind == tarfile.REGTYPE), 12345
            t.addfile(member, BytesIO(b"fine"))
    zoo._unpack(tmp_path/"x.tgz", tmp_path/"in")
    found = [p for p in (tmp_path/"in").rglob("*") if p.is_symlink() or not p.is_dir()]
    assert {str(p.relative_to(tmp_path/"in")): p.read_text() for p in found} == {"package/a.js": "fine", "package/b/c.js": "fine"}
    assert not any(p.stat().st_uid == 12345 for p in found)


def test_a_picture_says_what_made_it(tmp_path):
    x = np.random.default_rng(0).random((3, 9, 7)).astype("float32")
    save_png(tmp_path/"x.png", torch.tensor(x), made_by("pocket-sd", 7, "ein Schuh, rot: é", stage="boig_sd"))
    with Image.open(tmp_path/"x.png") as image: pixels = np.asarray(image)
    assert np.abs(pixels / 255 - x.transpose(1, 2, 0)).max() <= 0.5 / 255 + 1e-6
    record = png_record(tmp_path/"x.png")
    assert record["generated"] is True and record["model"] == "pocket-sd" and record["seed"] == 7 and record["stage"] == "boig_sd" and len(record["prompt_sha256"]) == 64
    assert "Schuh" not in (tmp_path/"x.png").read_bytes().decode("latin-1")
    Image.new("RGB", (2, 2)).save(tmp_path/"plain.png")
    assert png_record(tmp_path/"plain.png") == {}


def tuning(ema=0.9):
    "As much of a run as a step needs."
    p = torch.nn.Parameter(torch.ones(3))
    return SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), params=[p], average=[torch.ones(3)], bad=0, scaler=torch.amp.GradScaler("cpu", enabled=False),
                           optimizer=torch.optim.AdamW([p], lr=0.1), config=SimpleNamespace(grad_clip=1.0, ema=ema))

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_left_out(bad):
    run = tuning()
    for grad in (1.0, bad, 1.0):
        before = run.params[0].detach().clone()
        run.params[0].grad = torch.tensor([grad, 1.0, 1.0])
        if math.isfinite(grad): assert step(run) > 0 and not torch.equal(before, run.params[0])
        else:
            with pytest.warns(UserWarning, match="An update of epoch 3 is left out"): assert not math.isfinite(step(run, "An update of epoch 3"))
            assert torch.equal(before, run.params[0])
    assert run.bad == 0 and run.average[0].isfinite().all()
    run = tuning()
    with pytest.warns(UserWarning), pytest.raises(BoigError, match="Twenty steps in a row"):
        for _ in range(20):
            run.params[0].grad = torch.full((3,), bad)
            step(run)
    assert torch.equal(run.params[0], torch.ones(3))

def test_the_trainer_leaves_such_a_step_out_too():
    model, watch, state = torch.nn.Linear(2, 1), _LeaveOut(torch.arange(20).view(10, 2)), SimpleNamespace(global_step=4, log_history=[])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([[math.nan, 1.0]])).sum().backward()
    with pytest.warns(UserWarning, match=r"Step 5 is left out: its gradient is no finite number. Its training groups: \[8, 9\]"): watch.on_pre_optimizer_step(None, state, None, model=model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and state.log_history[0]["step"] == 5
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    watch.on_pre_optimizer_step(None, state, None, model=model)
    optimizer.step()
    assert watch.bad == 0 and not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_plan_says_where_a_number_is_from_and_invents_none(monkeypatch):
    m = dict(seconds=7200.0, peak_memory=30e9, disk=5e9, threads=8, cores=16, cpu="CPU", gpu="NVIDIA H200, 143771 MiB, 570", commit="abcdef0123", time="2026-11-21T10:00:00+00:00")
    monkeypatch.setattr(estimate, "shipped", lambda: {"paper": {"boig_llm": [m | {"time": "2026-01-01", "seconds": 1.0}, m]}, "pocket": {"boig_sd": [m | {"gpu": "", "seconds": 360.0}]}})
    lines = {l.split()[0]: l for l in estimate.plan_text("paper", "h200").splitlines() if l}
    assert "2.0 h, 30.0 GB memory, 5.0 GB disk (NVIDIA H200" in lines["boig_llm"] and "commit abcdef01, 2026-11-21" in lines["boig_llm"]
    assert "not measured; at pocket: 6 min 0 s" in lines["boig_sd"] and lines["boig_table2"].split(maxsplit=1)[1] == "not measured"
    assert estimate.measured("paper", "boig_llm", "a100") is None and estimate.measured("paper", "boig_llm") is None

def test_time_left():
    assert estimate.time_left({"a": 100.0, "b": 40.0}, {"a": 60}, 2) == " · about 40 s left"
    assert estimate.time_left({"a": 100.0, "b": 40.0}, {}, 1) == " · about 2 min 20 s left"
    assert estimate.time_left({"a": 5.0}, {"a": 60}, 2) == " · about 0.0 s left" and estimate.time_left({"a": None}, {}, 2) == ""
