"Weights from elsewhere: tensors only, every one in its place, under other names too."
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from boig.checkpoints import load_original, load_pretrained, local_file, read_tensors
from boig.core import BoigError


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def trap(path):
    "Something that makes a file when it is unpickled."
    class Evil:
        def __reduce__(self): return Path.touch, (path,)
    return Evil()

@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


# Reading

@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "old.pth", "a.safetensors"])
def test_tensors_come_back_as_they_were(tmp_path, name):
    tensors = {"a": torch.rand(2, 3), "b": torch.arange(4), "c": torch.rand(3).half()}
    if name.endswith("safetensors"): save_file(tensors, tmp_path/name)
    else: torch.save(tensors, tmp_path/name, _use_new_zipfile_serialization=name != "old.pth")
    assert same(read_tensors(tmp_path/name), tensors) and same(read_tensors(str(tmp_path/name)), tensors)
    if name == "a.pth":
        torch.save({"model": tensors, "epoch": 3, "name": "x"}, tmp_path/name)
        assert same(read_tensors(tmp_path/name)["model"], tensors)

@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_anything_else_is_never_run(tmp_path, zipped):
    torch.save({"model": trap(tmp_path/"ran")}, tmp_path/"evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BoigError, match="more than plain tensors"): read_tensors(tmp_path/"evil.pth")
    with pytest.raises(BoigError, match="more than plain tensors"): read_tensors(tmp_path/"evil.pth", allow=[Namespace])
    (tmp_path/"evil.safetensors").write_bytes((tmp_path/"evil.pth").read_bytes())
    with pytest.raises(BoigError, match="more than plain tensors"): read_tensors(tmp_path/"evil.safetensors")
    assert not (tmp_path/"ran").exists()
    with open(tmp_path/"evil.bin", "wb") as f: pickle.dump(trap(tmp_path/"ran"), f, protocol=2)
    with pytest.raises(BoigError, match="more than plain tensors"): read_tensors(tmp_path/"evil.bin")
    assert not (tmp_path/"ran").exists()
    pickle.loads((tmp_path/"evil.bin").read_bytes())
    assert (tmp_path/"ran").exists()  # so the trap works

def test_what_is_allowed_is_allowed_for_one_file_only(tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.save({"a": torch.ones(2), "args": Namespace(lr=0.1)}, tmp_path/"a.pth")
    assert read_tensors(tmp_path/"a.pth", allow=[Namespace])["args"] == Namespace(lr=0.1)
    assert torch.serialization.get_safe_globals() == before and Namespace not in before
    with pytest.raises(BoigError, match="more than plain tensors"): read_tensors(tmp_path/"a.pth")

@pytest.mark.parametrize("name", ["cut.pth", "empty.pth", "text.bin", "cut.safetensors", "half.pth"])
def test_damaged_files(tmp_path, name):
    torch.save({"a": torch.ones(2000)}, tmp_path/"whole.pth")
    content = {"empty.pth": b"", "text.bin": b"<html>404</html>", "half.pth": (tmp_path/"whole.pth").read_bytes()[:1000]}.get(name, b"PK\x03\x04 and no more")
    (tmp_path/name).write_bytes(content)
    with pytest.raises(BoigError, match=f"{name} is damaged") as e: read_tensors(tmp_path/name)
    assert "\n" not in str(e.value)

def test_what_is_no_file_of_names(tmp_path):
    for path in (tmp_path/"none.pth", tmp_path, tmp_path/"none.safetensors"):
        with pytest.raises(BoigError, match="no file"): read_tensors(path)
    for content, said in (([1, 2], "holds a list"), (torch.zeros(2), "holds a Tensor")):
        torch.save(content, tmp_path/"x.pth")
        with pytest.raises(BoigError, match=said): read_tensors(tmp_path/"x.pth")


# Filling

def test_the_same_names(net):
    state = {k: torch.rand(v.shape) if v.ndim else torch.tensor(7) for k, v in net.state_dict().items()}
    filled = load_original(net, state)
    assert filled is net and not net.training and all(torch.equal(net.state_dict()[k], v) for k, v in state.items() if v.ndim)

def test_a_counter_may_be_missing_on_either_side(net):
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert load_original(net, state)[1].num_batches_tracked == 0
    load_original(nn.Sequential(nn.Conv2d(3, 4, 1)), {k: v for k, v in state.items() if k[0] == "0"} | {"9.num_batches_tracked": torch.tensor(1)})

@pytest.mark.parametrize("change, says", [
    ({"0.bias": None}, "x.pth does not fit Sequential: 1 missing: 0.bias. It was not used"), ({"2.bias": torch.zeros(1)}, "1 left over: 2.bias"),
    ({"0.bias": torch.zeros(1, 4)}, r"1 of another shape: 0.bias \(\[1, 4\], not \[4\]\)"), ({"0.bias": torch.tensor(0.0)}, r"0.bias \(\[\], not \[4\]\)"),
    ({"0.bias": 3}, "not a checkpoint of tensors"), ({"epoch": 3}, "not a checkpoint of tensors"),
    ({f"more.{i}": torch.zeros(1) for i in range(5)}, "5 left over: more.0, more.1, more.2 …"),
    ({"0.bias": None, "1.bias": torch.zeros(2), "2.bias": torch.zeros(1)}, r"1 missing: 0.bias; 1 left over: 2.bias; 1 of another shape: 1.bias")])
def test_what_does_not_fit_is_named_and_nothing_is_filled(net, change, says):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: v for k, v in ({k: torch.rand(v.shape) for k, v in before.items()} | change).items() if v is not None}
    with pytest.raises(BoigError, match=says) as e: load_original(net, state, what="x.pth")
    assert same(net.state_dict(), before) and "\n" not in str(e.value)

def test_other_names_and_tensors_without_use(net):
    theirs = {f"body.{k}".replace("weight", "w"): torch.rand(v.shape) for k, v in net.state_dict().items()} | {"ema.0.w": torch.zeros(1), "epoch": 3}
    load_original(net, theirs, lambda name: f"body.{name}".replace("weight", "w"), r"^(ema|epoch)")
    assert torch.equal(net[0].weight, theirs["body.0.w"])
    with pytest.raises(BoigError, match="1 left over: ema.0.w"): load_original(net, theirs, lambda name: f"body.{name}".replace("weight", "w"), r"^epoch")

class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(2, 2, bias=False) for _ in range(3))

def test_fused_and_split_attention():
    outer = nn.ModuleDict({"a": Split()})
    load_original(outer, {"qkv": torch.arange(12.).view(6, 2)}, lambda name: "qkv")
    assert [outer["a"].get_submodule(f"{p}_proj").weight.tolist() for p in "qkv"] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    with pytest.raises(BoigError, match=r"1 of another shape: qkv \(\[4, 2\], not \[6, 2\]\)"): load_original(outer, {"qkv": torch.zeros(4, 2)}, lambda name: "qkv")

@pytest.mark.parametrize("rename", [str, lambda name: name.replace("q_proj", "query").replace("k_proj", "key").replace("v_proj", "value")])
def test_attention_that_is_split_there_too(rename):
    outer = nn.ModuleDict({"a": Split()})
    state = {rename(f"a.{p}_proj.weight"): torch.rand(2, 2) for p in "qkv"}
    load_original(outer, state, rename)
    assert all(torch.equal(outer.state_dict()[f"a.{p}_proj.weight"], state[rename(f"a.{p}_proj.weight")]) for p in "qkv")


# transformers' folders

@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)).half().save_pretrained(tmp_path)
    return tmp_path

def test_the_precision_is_the_one_that_was_asked_for(folder):
    saved = load_file(folder/"model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pretrained(CLIPVisionModel, folder, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    assert load_pretrained(CLIPVisionModel, folder).dtype == torch.float32 and {t.dtype for t in saved.values()} == {torch.float16}

def test_a_pickle_beside_the_configuration(folder):
    wanted, state = load_pretrained(CLIPVisionModel, folder).state_dict(), load_file(folder/"model.safetensors")
    (folder/"model.safetensors").unlink()
    with pytest.raises(BoigError, match="holds no CLIPVisionModel that can be read: there are no weights.* pickle .* `boig doctor --scale paper`"): load_pretrained(CLIPVisionModel, folder)
    torch.save(state, folder/"pytorch_model.bin")
    assert same(load_pretrained(CLIPVisionModel, folder).state_dict(), wanted)
    torch.save(state | {max(state): trap(folder/"ran")}, folder/"pytorch_model.bin")
    with pytest.raises(BoigError, match="holds no CLIPVisionModel") as e: load_pretrained(CLIPVisionModel, folder)
    assert not (folder/"ran").exists() and "\n" not in str(e.value)

@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop(max(s)), "does not fit CLIPVisionModel: 1 missing: "), (lambda s: s.update(extra=torch.zeros(1)), "1 left over: extra"),
    (lambda s: s.update({max(s): torch.zeros(3)}), r"1 of another shape: .* \(\[3\], not \[16\]\)")])
def test_a_folder_that_does_not_fit(folder, change, says, capfd):
    state = load_file(folder/"model.safetensors")
    change(state)
    save_file(state, folder/"model.safetensors", {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(BoigError, match=says): load_pretrained(CLIPVisionModel, folder)
    assert "REPORT" not in "".join(capfd.readouterr())  # one line, not a table as well


# Files brought by hand

def test_a_path_or_a_name_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path/"cache"))
    with pytest.raises(BoigError, match=f"no file 'a/x.pt'. Get x.pt from somewhere and put it into {tmp_path}/cache"): local_file("a/x.pt", "somewhere")
    (tmp_path/"cache").mkdir()
    (tmp_path/"cache/x.pt").touch()
    (tmp_path/"y.pt").touch()
    assert local_file("x.pt", "") == tmp_path/"cache/x.pt" and local_file(str(tmp_path/"y.pt"), "") == tmp_path/"y.pt"
