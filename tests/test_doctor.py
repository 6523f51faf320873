"boig doctor: the roles of every scale, what they weigh, and whether they are here."
import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from boig import doctor as dr
from boig.core import BoigError
from boig.doctor import Part, bytes_text, commands, count_parameters, doctor, lacking, look, machine, parts
from boig.scales import scale_names
from boig.zoo import entries

# What the pages of the repositories list: all safetensors of a model, or its one file
PUBLISHED = {"Stable Diffusion 1.5": 3.44e9 + 492e6 + 335e6, "SD-Turbo": 5.21e9, "IDEFICS2 8B": (4.64 + 4.99 + 4.9 + 5 + 5 + 4.83 + 4.25) * 1e9,
             "Llama 2 13B": (9.95 + 9.9 + 6.18) * 1e9, "LLaVA 1.5 7B": (4.99 + 4.96 + 4.18) * 1e9, "BLIP captioning large": 1.88e9, "RAM (Swin-L)": 5.63e9,
             "Grounding DINO base": 933e6, "U²-Net": 176e6, "CLIP ViT-B/32": 605e6, "CLIP ViT-L/14": 1.71e9, "CLIP ViT-H/14 (LAION-2B)": 3.94e9,
             "LAION aesthetic predictor v2": 3_714_759, "PickScore v1": 3.94e9, "HPS v2": 1_972_484_501, "HPS v2.1": 1_972_490_005, "ImageReward": 1.79e9,
             "CSD ViT-L": 2.44e9, "DINO ViT-S/16": 86.7e6}


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    "A machine with empty caches and no network."
    def no_network(*args, **kw): raise OSError("no network")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path/"boig"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    return tmp_path

def paper(model): return next(p for p in parts("paper") if p.model == model)

def fill_hub(part, names, at, commit="c0ffee"):
    "A snapshot in the hub's own layout: links to blobs."
    repo = at/"hub"/f"models--{part.hub.replace('/', '--')}"
    for i, name in enumerate(names):
        blob, link = repo/"blobs"/f"b{len(list(repo.rglob('*')))}", repo/"snapshots"/commit/name
        for p in (blob, link, repo/"refs"/"main"): p.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text('{"weight_map": {}}')
        link.symlink_to(blob)
        (repo/"refs"/"main").write_text(commit)
    return repo


# The table

def test_every_scale_has_its_models():
    assert {p.model for p in parts("smoke")} == {p.model for p in parts("pocket")} == {p.model for p in parts("reference")}
    for scale in scale_names(): assert len(parts(scale)) > 10
    with pytest.raises(BoigError, match="Did you mean 'paper'"): parts("papre")

def test_roles_of_the_paper_are_complete():
    all_ = parts("paper")
    assert len({p.model for p in all_}) == len(all_)
    for p in all_:
        assert p.licence and p.parameters and p.files and bool(p.hub) != bool(p.fetch), p.model
        if p.hub:
            assert p.hub.count("/") == 1 and any(f.endswith((".safetensors", "/*")) for f in p.files) and not any(".bin" in f or ".pt" in f for f in p.files)
        else:
            fetched = " ".join(p.fetch)
            assert all(f in fetched for f in p.files) and "{cache}" in fetched and all(c.startswith(("hf download ", "curl -L ")) for c in p.fetch)
            assert all(f"{{cache}}/{p.folder}" in c for c in p.fetch) or not p.folder
    assert {p.model for p in all_ if p.gated} == {"FLUX.1-schnell", "Llama 2 13B"}

def test_the_scales_own_language_model_is_among_them():
    from boig.scales import load_scale
    assert load_scale("paper").boig_llm.llm in {p.hub for p in parts("paper")} and load_scale("pocket").boig_llm.llm in {p.model for p in parts("pocket")}

@pytest.mark.parametrize("model, size", PUBLISHED.items())
def test_disk_is_what_the_pages_list(model, size): assert paper(model).size == pytest.approx(size, rel=0.015)

def test_memory_is_parameters_times_bytes():
    assert paper("Llama 2 13B").memory == 4 * 13_015_864_320 and paper("IDEFICS2 8B").memory == 2 * 8_402_768_112
    assert "208 GB" in paper("Llama 2 13B").note and bytes_text(16 * 13_015_864_320) == "208 GB"

def test_parameters_of_shipped_models_are_counted_in_their_files(tmp_path):
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.float16), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path/"x.safetensors", {"format": "pt"})
    assert count_parameters(tmp_path/"x.safetensors") == 12 + 5 + 1
    p = next(p for p in parts() if p.model == "pocket-eval")
    assert p.memory == 4 * sum(t.numel() for t in load_file(p.shipped/"model.safetensors").values())
    assert p.size == sum(f.stat().st_size for f in p.shipped.iterdir())

@pytest.mark.parametrize("n, text", [(0, "0 kB"), (1500, "2 kB"), (3_714_759, "3.7 MB"), (123e6, "123 MB"), (33.72e9, "33.7 GB"), (208.25e9, "208 GB"), (1.5e12, "1.5 TB")])
def test_bytes_for_people(n, text): assert bytes_text(n) == text


# Here or not

def test_a_hub_model_from_nothing_to_whole(bare):
    part = paper("Stable Diffusion 1.5")
    assert look(part, {}) == ("not fetched", list(part.files))
    names = [f.replace("*", "x") for f in part.files]
    fill_hub(part, names[:4], bare)
    state, absent = look(part, {})
    assert state == "incomplete" and "unet/diffusion_pytorch_model.safetensors" in absent
    repo = fill_hub(part, names[4:], bare)
    assert look(part, {}) == ("here", [])
    os.remove(os.path.realpath(next(repo.rglob("unet/diffusion_pytorch_model.safetensors"))))  # the link points nowhere now
    assert look(part, {}) == ("incomplete", ["unet/diffusion_pytorch_model.safetensors"])

def test_a_download_that_only_began_is_incomplete(bare):
    (bare/"hub"/"models--stabilityai--sd-turbo"/"blobs").mkdir(parents=True)
    (bare/"hub"/"models--stabilityai--sd-turbo"/"blobs"/"x.incomplete").write_text("half")
    assert look(paper("SD-Turbo"), {})[0] == "incomplete"

def test_shards_are_counted_by_their_list(tmp_path):
    (tmp_path/"a").mkdir()
    (tmp_path/"a"/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "m-1.safetensors", "y": "m-2.safetensors", "z": "m-1.safetensors"}}))
    (tmp_path/"pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model-1.bin"}}))  # pickles are not asked for
    (tmp_path/"a"/"m-1.safetensors").write_text("")
    assert lacking(tmp_path, ["*.json", "*.safetensors"]) == ["a/m-2.safetensors"]
    (tmp_path/"a"/"m-2.safetensors").write_text("")
    assert lacking(tmp_path, ["*.json", "*.safetensors"]) == []
    (tmp_path/"a"/"model.safetensors.index.json").write_text('{"weight')
    assert lacking(tmp_path, ["*.json"]) == ["a/model.safetensors.index.json"]
    assert lacking(tmp_path/"nowhere", ["x"]) == ["x"]

def test_a_hub_model_may_lie_in_boigs_cache(bare):
    part = paper("PickScore v1")
    for f in part.files:
        (bare/"boig"/part.hub).mkdir(parents=True, exist_ok=True)
        (bare/"boig"/part.hub/f.replace("*", "")).write_text("")
    assert look(part, {}) == ("here", [])

def test_files_in_boigs_cache(bare):
    part, alone = paper("ImageReward"), paper("FID Inception")
    (bare/"boig"/part.folder).mkdir(parents=True)
    assert look(part, {})[0] == look(alone, {})[0] == "not fetched"
    (bare/"boig"/part.folder/"vocab.txt").write_text("")
    assert look(part, {}) == ("incomplete", ["ImageReward.pt", "med_config.json"])
    (bare/"boig"/alone.files[0]).write_text("")
    assert look(alone, {}) == ("here", [])

def test_where_files_belong_is_where_they_are_looked_for():
    from boig.metrics.fid import INCEPTION, INCEPTION_URL
    from boig.rewards.base import registered
    from boig.rewards.image_reward import FILES
    rewards = registered()
    assert paper("FID Inception").files == (INCEPTION,) and INCEPTION_URL in paper("FID Inception").fetch[0]
    assert paper("ImageReward").folder == rewards["image-reward"].weights and set(paper("ImageReward").files) == set(FILES)
    assert {paper(m).files[0] for m in ("HPS v2", "HPS v2.1", "LAION aesthetic predictor v2")} == {rewards[n].weights for n in ("hps-v2", "hps-v2.1", "aesthetic")}
    assert [paper(m).folder for m in ("CSD ViT-L", "DINO ViT-S/16", "CLIP ViT-B/32")] == [rewards[n].weights for n in ("csd", "dino", "clip-score")]
    assert paper("PickScore v1").hub == rewards["pickscore"].weights

@pytest.mark.parametrize("model, loader", [("RAM (Swin-L)", "ram.load_ram"), ("U²-Net", "saliency.load_saliency")])
def test_loaders_ask_for_the_same_files(model, loader, bare):
    import importlib
    module, function = loader.split(".")
    with pytest.raises(BoigError) as e: getattr(importlib.import_module(f"boig.perception.{module}"), function)()
    assert all(f in str(e.value) for f in paper(model).files) and str(bare/"boig"/paper(model).folder) in str(e.value)


# The report

def test_report_of_a_bare_machine(bare):
    text, broken = doctor("paper")
    assert not broken and not (bare/"hub").exists() and not (bare/"boig").exists()  # it leaves nothing behind
    for p in parts("paper"):
        row = next(l for l in text.splitlines() if p.model in l)
        assert "not fetched" in row and p.role in row
        assert all(c in text for c in commands(p))
    assert f"To fetch ({bytes_text(sum(p.size for p in parts('paper')))} in all)" in text
    assert re.search(r"# Llama 2 13B \(.*accept it at huggingface.co/meta-llama/Llama-2-13b-hf and set HF_TOKEN", text) and "{cache}" not in text

def test_what_is_here_is_not_asked_for(bare):
    part = paper("FID Inception")
    (bare/"boig").mkdir()
    (bare/"boig"/part.files[0]).write_text("")
    text, _ = doctor("paper")
    assert commands(part)[0] not in text and re.search(r"FID Inception +here", text)

def test_report_of_the_pocket_scale():
    text, broken = doctor()
    assert broken == [] and "To fetch" not in text and re.search(r"pocket-eval +here +2\.\d MB +5\.\d MB", text)
    for p in parts():
        if p.model not in entries(): assert re.search(rf"{p.model} +not shipped yet", text)

def test_changed_weights_are_broken_at_every_scale(monkeypatch):
    monkeypatch.setattr(dr, "check", lambda: {"pocket-eval": "changed", "pocket-clip": "missing", "smollm2": "not fetched"})
    for scale in ("pocket", "paper"):
        text, broken = doctor(scale)
        assert broken == ["pocket-eval", "pocket-clip"]
    assert re.search(r"pocket-eval +changed", doctor("pocket")[0]) and re.search(r"pocket-clip +missing", doctor("pocket")[0])

def test_commands_survive_odd_folders(monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", "/data/my models")
    assert "-o '/data/my models'/u2net.pth " in commands(paper("U²-Net"))[0]
    monkeypatch.setenv("BOIG_CACHE", str(Path.home()/".cache"/"boig"))
    assert "-o ~/.cache/boig/u2net.pth " in commands(paper("U²-Net"))[0]

def test_hub_commands_quote_their_patterns():
    part = Part("x", "x", "x", hub="a/b", files=("*.json", "model.safetensors"))
    assert commands(part) == ["hf download a/b --include '*.json' --include model.safetensors"]

def test_this_machine():
    disk, memory, gpu = machine()
    assert disk.count("B in ") == 2 and "of it free" in memory and gpu.startswith("GPU: ")
