"CSD, DINO and CLIP-I: the authors' numbers, the mean over pairs, what the backbones see, files, inputs."
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_image_reward import fill, noise
from transformers import (CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig,
                          ViTImageProcessorPil, ViTModel)

from boig.core import BoigError
from boig.perception.pixels import CLIP_MEAN, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from boig.rewards import similarity as si

GOLDEN = json.loads((Path(__file__).parent/"data"/"golden_csd_dino_tiny.json").read_text())
STATE = {name: {k: fill(k, s) for k, s in g["shapes"].items()} for name, g in GOLDEN.items()}
SHAPE = {name: g["cfg"] for name, g in GOLDEN.items()}
PIXELS = {name: noise(g["pixel_seed"], 2, g["cfg"]["image_size"]) for name, g in GOLDEN.items()}
PORT = {"csd": si.csd_from_original, "dino": si.dino_from_original}
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)


def port(name, shape={}, state={}): return PORT[name](STATE[name] | state, SHAPE[name] | shape)

def make(kind: str):
    torch.manual_seed(len(kind))
    if kind == "vit": model = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)
    elif kind == "clip_vision_model": model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, projection_dim=24))
    else:
        text = CLIPTextConfig(**{k: v for k, v in SMALL.items() if "size" not in k or k.startswith(("hidden", "inter"))}, vocab_size=20)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=SMALL, projection_dim=12))  # vision_config says nothing of 12
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model.eval()

KINDS = ("vit", "clip_vision_model", "clip")

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "One small model of each class with its preprocessor, as the hub has them."
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        make(kind).save_pretrained(made[kind])
        processor = ViTImageProcessorPil if kind == "vit" else CLIPImageProcessorPil
        size = {"height": 32, "width": 32} if kind == "vit" else {"shortest_edge": 32}
        processor(size=size, **({} if kind == "vit" else {"crop_size": 32})).save_pretrained(made[kind])
    return made

def load(folder, name="test", **options): return si.load_similarity(str(folder), name, "cpu", **options)


# The authors' numbers

@torch.no_grad()
def test_csd_equals_the_authors():
    g, model = GOLDEN["csd"], port("csd")
    z = si.features(model, PIXELS["csd"])
    assert z[0, :6].tolist() == pytest.approx(g["style"], abs=1e-6)
    assert (z[0] @ z[1]).item() == pytest.approx(g["sim"], abs=1e-6)
    pooled = model.vision_model(PIXELS["csd"]).pooler_output
    assert pooled[0, :4].tolist() == pytest.approx(g["feat"], abs=1e-6)

@torch.no_grad()
def test_dino_equals_the_authors():
    g, z = GOLDEN["dino"], port("dino")(PIXELS["dino"]).last_hidden_state[:, 0]
    assert z[0, :6].tolist() == pytest.approx(g["feat"], abs=1e-6)
    both = si.features(port("dino"), PIXELS["dino"])
    assert (both[0] @ both[1]).item() == pytest.approx(g["cos"], abs=1e-6)

@torch.no_grad()
def test_the_golden_numbers_would_notice():
    def style(model): return (si.features(model, PIXELS["csd"])[0, :6] - torch.tensor(GOLDEN["csd"]["style"])).abs().max()
    gelu = CLIPVisionModelWithProjection(CLIPVisionConfig(**SHAPE["csd"], hidden_act="gelu")).eval()
    gelu.load_state_dict(port("csd").state_dict())
    assert style(gelu) > 1e-3, "gelu for quick_gelu"
    assert style(port("csd", {"num_attention_heads": 4})) > 1e-3
    assert style(port("csd", state={"last_layer_style": STATE["csd"]["last_layer_content"]})) > 1e-3, "content for style"
    eps = ViTModel(ViTConfig(**SHAPE["dino"], layer_norm_eps=1e-5), add_pooling_layer=False).eval()
    eps.load_state_dict(port("dino").state_dict())
    z = eps(PIXELS["dino"]).last_hidden_state[0, 0]
    assert (z[:6] - torch.tensor(GOLDEN["dino"]["feat"])).abs().max() > 1e-6, "ε 1e-5 for 1e-6"

def test_the_real_ones_shapes():
    "OpenAI's ViT-L/14 with its projection, DINO's ViT-S/16."
    with torch.device("meta"):
        csd = CLIPVisionModelWithProjection(CLIPVisionConfig(**si.CSD_VIT))
        dino = ViTModel(ViTConfig(**si.DINO_VIT), add_pooling_layer=False)
    assert [sum(p.numel() for p in m.parameters()) for m in (csd, dino)] == [303_966_208, 21_665_664]

@pytest.mark.parametrize("name", ["csd", "dino"])
def test_weights_that_do_not_fit_are_named(name):
    key = next(k for k in STATE[name] if "attn.in_proj_weight" in k or "attn.qkv.weight" in k)
    with pytest.raises(BoigError, match=f"1 missing: {key}"): PORT[name]({k: v for k, v in STATE[name].items() if k != key}, SHAPE[name])
    with pytest.raises(BoigError, match=f"1 of another shape: {key}"): port(name, state={key: STATE[name][key][1:]})
    with pytest.raises(BoigError, match="1 left over: head.weight"): port(name, state={"head.weight": torch.zeros(1)})
    with pytest.raises(BoigError, match="left over"): port(name, {"num_hidden_layers": 1})


# The score

@pytest.fixture
def reward(): return si.Similarity(make("vit"), Preprocess((32, 32)), "test")

@torch.no_grad()
def test_a_score_is_the_mean_over_all_pairs(reward):
    images, refs = torch.rand(3, 3, 32, 32), torch.rand(4, 3, 32, 32)
    score = reward(images, ["not", "read", "at all"], {"references": refs})
    by_hand = [np.mean([F.cosine_similarity(reward.embed(i[None]), reward.embed(r[None])).item() for r in refs]) for i in images]
    assert score.tolist() == pytest.approx(by_hand, abs=1e-5) and score.dtype == torch.float32

@torch.no_grad()
def test_pooling_changes_the_scale_only(reward):
    images, refs = torch.rand(5, 3, 32, 32), {"references": torch.rand(4, 3, 32, 32)}
    mean = reward(images, None, refs)
    reward.pooled = True
    ratio = reward(images, None, refs) / mean
    assert (ratio > 1).all() and torch.allclose(ratio, ratio[:1].expand(5), atol=1e-5)
    assert ratio[0].item() == pytest.approx(1 / reward.embed(refs["references"]).mean(0).norm().item(), rel=1e-5)

@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True])
def test_a_copy_scores_one_and_nothing_more(reward, pooled):
    reward.pooled = pooled
    images = torch.rand(6, 3, 32, 32)
    assert reward(images[:1], context={"references": images[:1]}).item() == pytest.approx(1, abs=1e-5)
    assert (reward(images, context={"references": images}).abs() <= 1 + 1e-5).all()

@torch.no_grad()
def test_references_of_any_size(reward, tmp_path):
    first, second = torch.rand(3, 40, 60), torch.rand(3, 7, 7)
    Image.fromarray((first * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path/"first.png")
    images = torch.rand(2, 3, 32, 32)
    each = torch.stack([reward(images, context={"references": r[None]}) for r in (first, second)])
    assert torch.allclose(reward(images, context={"references": [first, second]}), each.mean(0), atol=1e-5)
    assert torch.allclose(reward(images, context={"references": [str(tmp_path/"first.png"), second]}), each.mean(0), atol=1e-2)

def test_in_half_precision_training_scores_stay_whole(reward):
    images, context = torch.rand(2, 3, 32, 32), {"references": torch.rand(3, 3, 32, 32)}
    with torch.autocast("cpu", torch.bfloat16): half, z = reward(images, context=context), reward.embed(images)
    assert half.dtype == z.dtype == torch.float32 and torch.equal(half, reward(images, context=context)) and torch.equal(z, reward.embed(images))

def test_gradients_reach_the_pixels_and_nothing_else(folders):
    reward = load(folders["vit"])
    images, refs = torch.rand(2, 3, 48, 48, requires_grad=True), torch.rand(2, 3, 32, 32, requires_grad=True)
    reward(images, context={"references": refs}).sum().backward()
    assert reward.differentiable and (images.grad.abs().sum(1) > 0).all()
    assert refs.grad is None and all(p.grad is None for p in reward.model.parameters())

@pytest.mark.parametrize("context", [None, {}, {"references": None}, {"references": []}, {"references": torch.zeros(0, 3, 8, 8)}])
def test_no_references_is_one_clear_line(reward, context):
    with pytest.raises(BoigError, match="reference pictures"): reward(torch.rand(1, 3, 8, 8), context=context)

@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), -1.0)])
def test_bad_pictures_are_one_clear_line(reward, images):
    with pytest.raises(BoigError, match="Pictures must be"): reward(images, context={"references": torch.rand(1, 3, 8, 8)})
    with pytest.raises(BoigError, match="Pictures must be"): reward(torch.rand(1, 3, 8, 8), context={"references": images})

@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (1500, 2000)])
def test_any_size(folders, size):
    refs = {"references": torch.rand(1, 3, 32, 32)}
    for kind, pixels in (("vit", "folder"), ("clip", "folder"), ("vit", "dino")):
        assert load(folders[kind], pixels=pixels)(torch.rand(1, 3, *size), context=refs).isfinite().all()

def test_no_pictures_no_scores(reward): assert reward(torch.zeros(0, 3, 8, 8), [], {"references": torch.rand(1, 3, 8, 8)}).shape == (0,)


# What a backbone sees

def test_dinos_authors_cut_224_out_of_256():
    assert si.PIXELS["dino"](224) == Preprocess((224, 224), IMAGENET_MEAN, IMAGENET_STD, "bicubic", 256)
    assert si.PIXELS["clip"](224) == Preprocess((224, 224), CLIP_MEAN, shortest=224)

def test_the_hubs_dino_squeezes(tmp_path):
    (tmp_path/"preprocessor_config.json").write_text(json.dumps({  # the file on the hub
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD,
        "resample": 2, "size": 224}))
    assert si.preparation("folder", tmp_path, 224) == Preprocess((224, 224), IMAGENET_MEAN, IMAGENET_STD, "bilinear", 0)
    with pytest.raises(BoigError, match="224×224 for a model of 32×32"): si.preparation("folder", tmp_path, 32)
    with pytest.raises(BoigError, match="Did you mean 'dino'"): si.preparation("dinno", tmp_path, 224)

@torch.no_grad()
def test_the_choice_changes_the_score(folders):
    wide, refs = torch.rand(1, 3, 32, 96), {"references": torch.rand(2, 3, 32, 32)}
    assert (load(folders["vit"])(wide, context=refs) - load(folders["vit"], pixels="dino")(wide, context=refs)).abs() > 1e-4


# Files

@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_what_scores(folders, kind):
    reward, x = load(folders[kind]), torch.rand(2, 3, 32, 32)
    model, pixel_values = make(kind), reward.prepare(x)
    z = {"vit": lambda: model(pixel_values).last_hidden_state[:, 0], "clip_vision_model": lambda: model(pixel_values).image_embeds,
         "clip": lambda: model.get_image_features(pixel_values).pooler_output}[kind]()
    assert type(reward.model) is type(model)
    assert torch.allclose(reward.embed(x), F.normalize(z, dim=-1), atol=1e-6)

@torch.no_grad()
def test_half_precision_weights_score_in_single_precision(folders, tmp_path):
    for kind in KINDS:
        make(kind).half().save_pretrained(tmp_path/kind)
        half, x = load(tmp_path/kind, pixels="clip"), torch.rand(2, 3, 32, 32)
        assert half.model.dtype == torch.float32
        assert torch.allclose(half.embed(x), load(folders[kind], pixels="clip").embed(x), atol=1e-2)

@torch.no_grad()
def test_the_hubs_dino_has_older_names(folders, tmp_path):
    "facebook/dino-vits16 was saved before transformers 5 renamed the parts of a ViT."
    old = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
           "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layers.": "encoder.layer."}
    state = {}
    for name, t in make("vit").state_dict().items():
        for new, before in old.items(): name = name.replace(new, before)
        state[name] = t
    torch.save(state, tmp_path/"pytorch_model.bin")
    (tmp_path/"config.json").write_bytes((folders["vit"]/"config.json").read_bytes())
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(load(tmp_path, pixels="dino").embed(x), load(folders["vit"], pixels="dino").embed(x), atol=1e-6)

@torch.no_grad()
@pytest.mark.parametrize("name, file", [("csd", "checkpoint.pth"), ("csd", "model.safetensors"), ("dino", "dino_deitsmall16_pretrain.pth")])
def test_the_authors_own_files(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr(PORT[name], "__defaults__", (SHAPE[name],))  # the small shape instead of the real one
    if file.endswith(".safetensors"):
        save_file({k: v.contiguous() for k, v in STATE[name].items()}, tmp_path/file)
        (tmp_path/"config.json").write_text('{"name": "vit_large", "content_proj_head": "default"}')
    else: torch.save({"model_state_dict": {f"module.{k}": v for k, v in STATE[name].items()}, "epoch": 3} if name == "csd" else STATE[name], tmp_path/file)
    expected = si.features(port(name), PIXELS[name])
    for path in (tmp_path, tmp_path/file): assert torch.equal(si.features(load(path, pixels="clip").model, PIXELS[name]), expected)

@torch.no_grad()
def test_csds_file_on_the_hub_also_holds_notes_of_its_training(tmp_path, monkeypatch):
    "The settings in an argparse.Namespace and the best loss as a scalar of NumPy 1: those are allowed, anything else is not."
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"ran"),)
    monkeypatch.setattr(PORT["csd"], "__defaults__", (SHAPE["csd"],))
    notes = {"model_state_dict": {f"module.{k}": v for k, v in STATE["csd"].items()}, "args": Namespace(lr=0.1, arch="vit"), "best": np.float64(0.25)}
    file = tmp_path/"pytorch_model.bin"
    def save(content):
        torch.save(content, file, _use_new_zipfile_serialization=False)
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))  # as NumPy 1 called it
    save(notes)
    assert b"cnumpy.core.multiarray" in file.read_bytes() and b"argparse" in file.read_bytes()
    assert torch.equal(si.features(load(tmp_path, pixels="clip").model, PIXELS["csd"]), si.features(port("csd"), PIXELS["csd"]))
    save(notes | {"more": Evil()})
    with pytest.raises(BoigError, match="more than plain tensors"): load(tmp_path, pixels="clip")
    assert not (tmp_path/"ran").exists()

def broken(folder, target, change):
    target.mkdir(exist_ok=True)
    for f in folder.iterdir(): (target/f.name).write_bytes(f.read_bytes())
    save_file(change(load_file(folder/"model.safetensors")), target/"model.safetensors", metadata={"format": "pt"})
    return target

@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_random_parts_are_refused(folders, tmp_path, kind):
    def without(state): return {k: v for k, v in state.items() if k != max(state)}
    def more(state): return state | {"extra.weight": torch.zeros(3)}
    def narrow(state): return {k: v[..., :-1].contiguous() if k == max(state) else v for k, v in state.items()}
    for change, said in ((without, "1 missing"), (more, "1 left over: extra.weight"), (narrow, "1 of another shape")):
        with pytest.raises(BoigError, match=said): load(broken(folders[kind], tmp_path/change.__name__, change))

def test_what_holds_no_backbone(folders, tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(BoigError, match="holds no weights. If .* pickle"): load(tmp_path/"empty")
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pth")
    with pytest.raises(BoigError, match="neither CSD nor DINO; its first tensors are a"): load(tmp_path/"other.pth", pixels="clip")
    bert = broken(folders["vit"], tmp_path/"bert", dict)
    (bert/"config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BoigError, match="type 'bert'; similarity needs one of clip, clip_vision_model, vit"): load(bert)

def test_a_folder_in_the_cache_goes_by_its_name(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    (tmp_path/"facebook").mkdir()
    (tmp_path/"facebook/dino-vits16").symlink_to(folders["vit"])
    assert si.load_similarity("facebook/dino-vits16", "dino", "cpu", pixels="dino").name == "dino"


# Names, and the pocket zoo's embeddings

def test_the_registry_knows_them(folders):
    from boig.rewards.base import load_reward, registered
    assert {n for n, r in registered().items() if r.needs == "references"} >= {"csd", "dino", "clip-i", "pocket-style", "pocket-subject", "pocket-clip-i"}
    assert load_reward("dino", str(folders["vit"]), device="cpu").prepare.shortest == 36  # 32 · 256 / 224
    assert load_reward("clip-i", str(folders["clip"]), device="cpu", pooled=True).pooled

def test_a_pocket_model_keeps_its_name():
    assert si.load_similarity("pocket-eval", "pocket-clip-i", "cpu").name == "pocket-clip-i"
    assert si.load_similarity("pocket-eval", "clip-i", "cpu").name == "pocket-eval (clip-i)"

@torch.no_grad()
@pytest.mark.parametrize("of", ["style", "subject"])
def test_the_pocket_zoos_own_similarity_is_the_same(tmp_path, of):
    from boig.pocket import embeddings
    model = embeddings.make_embedding(of, {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 8}, 16).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil if of == "subject" else CLIPImageProcessorPil
    processor(size={"height": 64, "width": 64}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    images, refs = torch.rand(3, 3, 64, 64), torch.rand(2, 3, 64, 64)
    ours = load(tmp_path)(images, context={"references": refs})
    assert torch.allclose(ours, embeddings.similarity(model, images, refs), atol=1e-6)
