"RAM's tagger: equal to the original's numbers, strict about its checkpoint, tags by their own thresholds."
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boig.checkpoints import load_original
from boig.core import BoigError
from boig.perception.pixels import Preprocess, to_tensor
from boig.perception.ram import Ram, RamShape, load_ram, tiny_ram, to_ours, to_theirs

GOLDEN = json.loads((Path(__file__).parent/"data/golden_ram_tiny.json").read_text())
SMALL = {"image_size": 64, "embed": 16, "depths": (2, 2), "heads": (2, 4), "window": 4, "tags": 7, "text": 20, "width": 24, "inner": 48}


def fill(name, shape):
    "A tensor that follows from its name: the rule that the golden numbers were made with."
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if ("norm" in name or "LayerNorm" in name) and name.endswith("weight"): x = 1 + 0.1 * x
    elif name.endswith("bias"): x = 0.1 * x
    else: x = x * 1.5 / math.sqrt(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name else 0.5 * x
    return torch.tensor(x, dtype=torch.float32)

@pytest.fixture(scope="module")
def weights(): return {n: fill(n, s) for n, s in GOLDEN["shapes"].items()}

@pytest.fixture(scope="module")
def noise(): return torch.tensor(np.random.RandomState(GOLDEN["seed"]).standard_normal((2, 3, 64, 64)), dtype=torch.float32)

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_ram(tmp_path_factory.mktemp("ram"))

@pytest.fixture(scope="module")
def tagger(folder): return load_ram(folder, device="cpu")


# The numbers

@torch.no_grad()
def test_logits_and_cells_are_the_originals(weights, noise):
    model = load_original(Ram(RamShape(**SMALL)), to_ours(weights))
    assert torch.allclose(model(noise), torch.tensor(GOLDEN["logits"]), atol=1e-5)
    assert torch.allclose(model.look(noise)[0, 0, :6], torch.tensor(GOLDEN["cells"]), atol=1e-5)

@torch.no_grad()
@pytest.mark.parametrize("trap", [{"label_heads": 2}, {"heads": (2, 4), "window": 4, "label_heads": 12}])
def test_a_wrong_number_of_heads_loads_and_would_show(weights, noise, trap):
    model = load_original(Ram(RamShape(**SMALL | trap)), to_ours(weights))
    assert not torch.allclose(model(noise), torch.tensor(GOLDEN["logits"]), atol=1e-3)

def test_a_picture_comes_in_as_ram_was_trained(tagger):
    "RAM's transform: squashed to a square, bilinear, normalised by ImageNet's numbers."
    with torch.device("meta"): real = replace(tagger, model=Ram()).preprocess
    assert real == Preprocess((384, 384), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0)
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    theirs = (np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert np.abs(tagger.preprocess(to_tensor(picture)[None])[0].permute(1, 2, 0).numpy() - theirs).max() < 0.02  # PIL rounds to 8 bits

def test_the_published_shapes():
    with torch.device("meta"): shapes = {n: tuple(t.shape) for n, t in to_theirs(Ram().state_dict()).items()}
    assert shapes["label_embed"] == (4585, 512) and shapes["image_proj.weight"] == (512, 1536)
    assert shapes["tagging_head.encoder.layer.1.crossattention.self.key.weight"] == (768, 512)
    assert shapes["tagging_head.encoder.layer.0.intermediate.dense.weight"] == (3072, 768)
    assert shapes["visual_encoder.layers.2.blocks.17.attn.qkv.weight"] == (3 * 768, 768)
    assert shapes["visual_encoder.layers.3.blocks.1.attn.relative_position_bias_table"] == (529, 48)
    assert not any("swin" in n or "tagging." in n for n in shapes)


# Names

def test_names_there_and_back(weights):
    ours = to_ours(weights)
    assert set(ours) == set(Ram(RamShape(**SMALL)).state_dict())
    again = to_theirs(ours)
    assert again.keys() == weights.keys() and all(torch.equal(again[n], weights[n]) for n in weights)

def test_what_the_tagger_does_not_have_is_left_out(weights):
    more = ["text_decoder.bert.encoder.layer.0.attention.self.query.weight", "tag_encoder.encoder.layer.0.output.dense.weight",
            "tagging_head.embeddings.LayerNorm.weight", "tagging_head.encoder.layer.0.attention.self.query.weight",
            "visual_encoder.layers.0.blocks.1.attn_mask", "visual_encoder.layers.0.blocks.0.attn.relative_position_index"]
    assert to_ours(weights | {n: torch.zeros(1) for n in more}).keys() == to_ours(weights).keys()

def test_the_older_name_of_the_tagging_head(weights):
    old = {n.replace("tagging_head.", "vision_multi."): t for n, t in weights.items()}
    assert old.keys() != weights.keys() and to_ours(old).keys() == to_ours(weights).keys()


# Strict loading

@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("fc.bias"), "x.pth does not fit Ram: 1 missing: fc.bias"), (lambda s: s.update(reweight_scale=torch.zeros(1)), "1 left over: reweight_scale"),
    (lambda s: s.update(label_embed=torch.zeros(8, 20)), r"1 of another shape: label_embed \(\[8, 20\], not \[7, 20\]\)"), (lambda s: s.update(epoch=3), "not a checkpoint of tensors")])
def test_a_checkpoint_that_does_not_fit(weights, change, says):
    model, state = Ram(RamShape(**SMALL)), dict(to_ours(weights))
    before = model.fc.weight.clone()
    change(state)
    with pytest.raises(BoigError, match=says): load_original(model, state, what="x.pth")
    assert torch.equal(model.fc.weight, before)

def test_a_file_that_holds_more_is_not_used(tmp_path, folder):
    class Evil:
        def __reduce__(self): return Path.touch, (tmp_path/"ran",)
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    torch.save({"model": Evil()}, tmp_path/"ram_swin_large_14m.pth")
    with pytest.raises(BoigError, match="more than plain tensors"): load_ram(tmp_path, device="cpu")
    assert not (tmp_path/"ran").exists()

def test_missing_files_are_named_with_where_they_come_from(tmp_path, folder):
    files = "ram_swin_large_14m.pth, ram_tag_list.txt, ram_tag_list_threshold.txt"
    with pytest.raises(BoigError, match=f"RAM needs {files}.*recognize_anything_model"): load_ram(tmp_path)
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/"ram_tag_list_threshold.txt").write_text("0.5\n0.5\n")
    with pytest.raises(BoigError, match="8 tags and 2 thresholds; both must be 8"): load_ram(tmp_path)

def test_without_a_config_it_must_be_the_published_one(tmp_path, folder):
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/"config.json").unlink()
    with pytest.raises(BoigError, match="both must be 4585"): load_ram(tmp_path)


# Tags

def test_a_tag_is_given_above_its_own_threshold(tagger):
    x = torch.rand(3, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): p = torch.sigmoid(tagger.model(tagger.preprocess(x)))
    old = tagger.thresholds
    try:
        tagger.thresholds = p[0].clone()  # at the threshold is not above it
        assert tagger(x)[0] == {}
        tagger.thresholds = p[0] - torch.tensor([1e-4] * 4 + [-1e-4] * 4)
        found = tagger(x)[0]
    finally: tagger.thresholds = old
    assert set(found) == set(tagger.tags[:4]) and list(found.values()) == sorted(found.values(), reverse=True)
    assert all(np.isclose(v, p[0, tagger.tags.index(t)].item()) for t, v in found.items())

def test_a_tag_does_not_depend_on_the_batch_or_on_other_tags(tagger):
    x = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    for alone, together in zip([tagger(p[None])[0] for p in x], tagger(x)): assert alone == pytest.approx(together, abs=1e-5)
    few = Ram(RamShape(**SMALL | {"tags": 3})).eval()
    few.load_state_dict(tagger.model.state_dict() | {"label_embed": tagger.model.label_embed[:3]})
    with torch.no_grad(): assert torch.allclose(few(tagger.preprocess(x)), tagger.model(tagger.preprocess(x))[:, :3], atol=1e-5)

def test_any_size_and_bad_pictures(tagger):
    for h, w in ((1, 1), (1, 300), (700, 500)): assert len(tagger(torch.rand(2, 3, h, w))) == 2
    for bad in (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.full((1, 3, 8, 8), 2.0)):
        with pytest.raises(BoigError): tagger(bad)

def test_the_tiny_one_says_that_it_is_random(tagger): assert tagger.name == "random-ram" and "random-ram" in repr(tagger)
