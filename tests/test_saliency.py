"U²-Net: the original's tensors and numbers; masks, and the way back when there is none."
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from boig.core import BoigError
from boig.perception.saliency import Saliency, U2Net, load_saliency, tiny_saliency

GOLDEN = json.loads((Path(__file__).parent/"data/golden_u2net.json").read_text())


def fill(name, shape):
    "A tensor that follows from its name: the rule that the golden numbers were made with."
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"): x = 1 + 0.1 * np.abs(x)
    elif ".bn_" in name and name.endswith("weight"): x = 1 + 0.1 * x
    elif name.endswith(("bias", "running_mean")): x = 0.1 * x
    else: x = x * 1.5 / math.sqrt(np.prod(shape[1:]))
    return torch.tensor(x)

class Copy(nn.Module):
    "A stand-in: the map is the picture's red."
    def __init__(self): super().__init__(); self.outconv = nn.Conv2d(1, 1, 1)
    def forward(self, x): return torch.sigmoid(x[:, :1])

@pytest.fixture(scope="module")
def random_net(tmp_path_factory): return load_saliency(tiny_saliency(tmp_path_factory.mktemp("u2")/"u2netp.pth"), device="cpu", size=64)


# The network

@pytest.mark.parametrize("kind", ["u2net", "u2netp"])
def test_tensors_have_the_published_names_and_shapes(kind):
    with torch.device("meta"): state = U2Net(kind).state_dict()
    listed = "\n".join(f"{k} {tuple(v.shape)}" for k, v in sorted(state.items()) if not k.endswith("tracked"))
    assert len(state) == GOLDEN[kind]["tensors"] and zlib.crc32(listed.encode()) == GOLDEN[kind]["names_crc"]

@torch.no_grad()
def test_maps_are_the_originals():
    net = U2Net("u2netp").eval()
    net.load_state_dict({k: v if k.endswith("tracked") else fill(k, tuple(v.shape)) for k, v in net.state_dict().items()})
    maps = net(torch.tensor(np.random.RandomState(5).standard_normal((1, 3, 50, 70)), dtype=torch.float32))[0]
    assert torch.allclose(maps[0].flatten()[::251], torch.tensor(GOLDEN["u2netp"]["fused"]), atol=1e-5)
    assert torch.allclose(maps.mean((1, 2)), torch.tensor(GOLDEN["u2netp"]["sides"]), atol=1e-5)


# Masks

@torch.no_grad()
def test_the_input_is_divided_by_the_pictures_largest_value(random_net):
    x = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(random_net.pixels(x), random_net.pixels(x * torch.tensor([1, 0.3]).view(2, 1, 1, 1)), atol=1e-4)
    bright = random_net.pixels(torch.ones(1, 3, 9, 9))[0, :, 0, 0]
    assert torch.allclose(bright, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]), atol=1e-5)

def test_a_map_is_stretched_to_all_of_zero_to_one_for_each_picture():
    x = torch.zeros(2, 3, 32, 32)
    x[0, :, :, :16], x[1, :, :, 16:] = 0.2, 0.9
    maps = Saliency("copy", Copy(), size=32).maps(x)
    assert maps.amin((1, 2)).tolist() == [0, 0] and maps.amax((1, 2)).tolist() == [1, 1]

def test_masks_lie_where_the_map_is_high_in_the_pictures_own_pixels():
    x = torch.zeros(1, 3, 40, 100)
    x[:, :, 10:30, 20:60] = 1
    masks, empty = Saliency("copy", Copy(), size=320)(x)
    inside = torch.zeros(1, 40, 100, dtype=torch.bool)
    inside[:, 10:30, 20:60] = True
    assert masks.dtype == torch.bool and not empty.any() and (masks != inside).float().mean() < 0.01

def test_without_a_subject_the_whole_picture_is_taken_and_it_is_said():
    x = torch.rand(3, 3, 16, 16)
    x[1] = 0.4
    x[2] = 0
    masks, empty = Saliency("copy", Copy(), size=16)(x)
    assert empty.tolist() == [False, True, True] and masks[1:].all() and not masks[0].all()

def test_a_picture_does_not_depend_on_its_batch(random_net):
    x = torch.rand(3, 3, 30, 50, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(random_net.maps(x), torch.cat([random_net.maps(p[None]) for p in x]), atol=1e-4)

def test_any_size_and_bad_pictures(random_net):
    for h, w in ((1, 1), (1, 300), (700, 500)):
        masks, empty = random_net(torch.rand(1, 3, h, w))
        assert masks.shape == (1, h, w) and masks.any()
    for bad in (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8)):
        with pytest.raises(BoigError): random_net(bad)


# Files

def test_a_checkpoint_from_before_batch_norms_counter(tmp_path):
    state = {k: v for k, v in U2Net("u2netp").state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path/"u2netp.pth", _use_new_zipfile_serialization=False)
    loaded = load_saliency(tmp_path/"u2netp.pth", device="cpu")
    assert loaded.name == "u2netp" and torch.equal(loaded.net.outconv.weight, state["outconv.weight"]) and not loaded.net.training

def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(BoigError, match="U²-Net needs .*xuebinqin/U-2-Net"): load_saliency(tmp_path/"none.pth")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, tmp_path/"other.pth")
    with pytest.raises(BoigError, match="not a checkpoint of U²-Net"): load_saliency(tmp_path/"other.pth")
    torch.save([1, 2], tmp_path/"list.pth")
    with pytest.raises(BoigError, match="holds a list"): load_saliency(tmp_path/"list.pth")
    state = U2Net("u2netp").state_dict()
    del state["side3.bias"]
    torch.save(state, tmp_path/"half.pth")
    with pytest.raises(BoigError, match="half.pth does not fit U2Net: 1 missing: side3.bias"): load_saliency(tmp_path/"half.pth")

def test_the_tiny_one_says_that_it_is_random(random_net): assert random_net.name == "random-u2netp"
