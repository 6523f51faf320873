"ImageReward's port, against numbers from the authors' own code; its files, its traps, its inputs."
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from boig.core import BoigError
from boig.perception.pixels import Preprocess, open_rgb, to_tensor
from boig.rewards import image_reward as ir

DATA = Path(__file__).parent/"data"
GOLDEN = json.loads((DATA/"golden_imagereward_tiny.json").read_text())
C = GOLDEN["cfg"]
MED = dict(vocab_size=C["vocab"], hidden_size=C["tw"], intermediate_size=C["tff"], num_hidden_layers=C["tdepth"], num_attention_heads=C["theads"],
           max_position_embeddings=C["maxpos"], hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0)
VIT = dict(image_size=C["image_size"], patch_size=16, hidden_size=C["vw"], intermediate_size=4 * C["vw"], num_hidden_layers=C["vdepth"],
           num_attention_heads=C["vheads"])
# The published med_config.json, as far as it is read
REAL = dict(vocab_size=30524, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512,
            hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0)


def fill(name: str, shape) -> torch.Tensor:
    "Weights made of nothing but the original's name for them, so that both sides have the same ones."
    x = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32))
    if name.endswith("weight") and any(n in name for n in ("norm", "LayerNorm", "ln_")): return 1 + 0.1 * x
    if name.endswith("bias"): return 0.1 * x
    matrix = len(shape) >= 2 and "embed" not in name and "token" not in name
    return x * (1.5 / float(np.prod(shape[1:])) ** 0.5 if matrix else 0.5)


def noise(seed: int, n: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((n, 3, side, side)).astype(np.float32))


PUBLISHED = {k: fill(k, s) for k, s in GOLDEN["shapes"].items()} | {"blip.text_encoder.embeddings.position_ids": torch.arange(C["maxpos"])[None]}
IDS, MASK = (torch.tensor(GOLDEN[k]) for k in ("ids", "mask"))
PIXELS = noise(GOLDEN["pixel_seed"], 2, C["image_size"])


@torch.no_grad()
def golden_score(text={}, vision={}, state=PUBLISHED) -> torch.Tensor:
    return ir.from_original(state, ir.blip_config(MED | text, VIT | vision))(PIXELS, IDS, MASK)


# The authors' numbers

def test_the_network_equals_the_authors():
    net = ir.from_original(PUBLISHED, ir.blip_config(MED, VIT))
    with torch.no_grad():
        patches = net.visual_encoder(PIXELS).last_hidden_state
        words = net.text_encoder(IDS, MASK, encoder_hidden_states=patches, is_decoder=False).last_hidden_state
    for got, expected in ((patches, GOLDEN["vis"]), (words[:, 0], GOLDEN["txt"])):
        assert got.flatten()[:6].tolist() == pytest.approx(expected["first"], abs=1e-5)
        assert got.flatten()[-6:].tolist() == pytest.approx(expected["last"], abs=1e-5)
        assert got.mean().item() == pytest.approx(expected["mean"], abs=1e-6)
    assert golden_score().tolist() == pytest.approx(GOLDEN["score"], rel=1e-6)

def test_the_real_ones_shape():
    with torch.device("meta"): net = ir.ImageRewardNet(ir.blip_config(REAL))
    n, projections = sum(p.numel() for p in net.parameters()), 256 * (1024 + 1) + 256 * (768 + 1)
    assert round((n + projections) / 1e6, 1) == 446.7
    assert net.text_encoder.encoder.layer[0].crossattention.self.key.in_features == 1024
    assert net.visual_encoder.post_layernorm.eps == 1e-6 and net.text_encoder.config.num_attention_heads == 12
    assert net.text_encoder.embeddings.LayerNorm.eps == 1e-12

def test_every_name_of_the_original_is_used_once():
    names = [ir.original_name(k) for k in ir.ImageRewardNet(ir.blip_config(MED, VIT)).state_dict()]
    assert len(set(names)) == len(names) and set(GOLDEN["shapes"]) - set(names) == {f"blip.{t}_proj.{p}" for t in ("vision", "text") for p in ("weight", "bias")}


# Traps: each of these loads cleanly

@pytest.mark.parametrize("change, least", [({"text": {"num_attention_heads": 8}}, 1), ({"vision": {"layer_norm_eps": 1e-5}}, 1e-6),
                                           ({"vision": {"num_attention_heads": 8}}, 0.1), ({"text": {"hidden_act": "quick_gelu"}}, 1e-3)])
def test_wrong_settings_show_in_the_score(change, least):
    off = (golden_score(**change) - torch.tensor(GOLDEN["score"])).abs().max()
    assert off > least, "the golden number would not notice this setting"

def test_read_as_a_decoder_the_prompt_would_not_count():
    net = ir.from_original(PUBLISHED, ir.blip_config(MED, VIT))
    other = IDS.clone(); other[:, 1:4] = torch.tensor([5, 6, 7])
    def first(ids, as_decoder):
        with torch.no_grad(): return net.text_encoder(ids, encoder_hidden_states=torch.ones(2, 5, C["vw"]), is_decoder=as_decoder).last_hidden_state[:, 0]
    assert torch.allclose(first(IDS, True), first(other, True), atol=1e-5)
    assert (first(IDS, False) - first(other, False)).abs().max() > 0.1
    with torch.no_grad(): assert (net(PIXELS, IDS, MASK) - net(PIXELS, other, MASK)).abs().max() > 0.1

def test_padding_does_not_count():
    net = ir.from_original(PUBLISHED, ir.blip_config(MED, VIT))
    with torch.no_grad():
        assert net(PIXELS, IDS[:, :5], MASK[:, :5]).tolist() == pytest.approx(GOLDEN["score"], abs=1e-4)
        ids = IDS.clone(); ids[:, 6:] = 11
        assert net(PIXELS, ids, MASK).tolist() == pytest.approx(GOLDEN["score"], abs=1e-4)

def test_half_precision_files_score_in_single_precision():
    state = {k: v.half() if v.is_floating_point() else v for k, v in PUBLISHED.items()}
    score = golden_score(state=state)
    assert score.dtype == torch.float32 and score.tolist() == pytest.approx(GOLDEN["score"], abs=0.1)

def test_defaults_are_never_used():
    for key in MED:
        with pytest.raises(BoigError, match=f"lacks {key}"): ir.blip_config({k: v for k, v in MED.items() if k != key}, VIT)


# Files

@pytest.mark.parametrize("change, said", [({"mlp.layers.7.bias": None}, "1 missing: mlp.layers.7.bias"),
                                          ({"blip.itm_head.weight": torch.zeros(2)}, "1 left over: blip.itm_head.weight"),
                                          ({"blip.visual_encoder.norm.bias": torch.zeros(9)}, r"blip.visual_encoder.norm.bias \(\[9\], not \[32\]\)"),
                                          ({"blip.visual_encoder.blocks.1.attn.qkv.weight": None}, "1 missing: .*blocks.1.attn.qkv.weight")])
def test_weights_that_do_not_fit_are_named(change, said):
    state = {k: v for k, v in (PUBLISHED | change).items() if v is not None}
    with pytest.raises(BoigError, match=said): golden_score(state=state)

def test_a_shorter_tower_is_noticed():
    with pytest.raises(BoigError, match="12 left over: blip.visual_encoder.blocks.1"): golden_score(vision={"num_hidden_layers": 1})

WORDS = "[PAD] [UNK] [CLS] [SEP] a red shoe on table ##s very cafe".split()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The toy in the files that the authors publish."
    path = tmp_path_factory.mktemp("ImageReward")
    torch.save(PUBLISHED, path/"ImageReward.pt")
    (path/"med_config.json").write_text(json.dumps(MED | {"architectures": ["BertModel"], "encoder_width": 32, "add_cross_attention": True}))
    (path/"vocab.txt").write_text("\n".join(WORDS + [f"[unused{i}]" for i in range(C["vocab"] - 2 - len(WORDS))]) + "\n")
    return path

@pytest.fixture(scope="module")
def reward(folder): return ir.load_image_reward(str(folder), device="cpu", vision=VIT)

@pytest.mark.parametrize("file", list(ir.FILES))
def test_a_missing_file_is_asked_for(folder, tmp_path, file):
    for f in ir.FILES:
        if f != file: (tmp_path/f).write_bytes((folder/f).read_bytes())
    with pytest.raises(BoigError, match=f"needs {file} \\(from {ir.FILES[file]}\\) in "): ir.load_image_reward(str(tmp_path), vision=VIT)

def test_where_to_put_the_files(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    with pytest.raises(BoigError, match=f"needs ImageReward.pt .*med_config.json .*vocab.txt .* in {tmp_path}/THUDM/ImageReward; or"):
        ir.load_image_reward("THUDM/ImageReward")
    (tmp_path/"THUDM").mkdir()
    (tmp_path/"THUDM/ImageReward").symlink_to(folder)
    assert ir.load_image_reward("THUDM/ImageReward", device="cpu", vision=VIT).name == "image-reward"

def test_what_is_no_plain_tensor_file_is_refused(folder, tmp_path):
    class Bad:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"ran"),)
    for f in ("med_config.json", "vocab.txt"): (tmp_path/f).write_bytes((folder/f).read_bytes())
    for content, said in (("evil", "more than plain tensors"), ("cut", "is damaged"), ("list", "holds a list")):
        if content == "evil": torch.save({"x": Bad()}, tmp_path/"ImageReward.pt")
        elif content == "cut": (tmp_path/"ImageReward.pt").write_bytes((folder/"ImageReward.pt").read_bytes()[:1000])
        else: torch.save([1, 2], tmp_path/"ImageReward.pt")
        with pytest.raises(BoigError, match=said): ir.load_image_reward(str(tmp_path), vision=VIT)
    assert not (tmp_path/"ran").exists()

def test_another_models_vocabulary_is_refused(folder, tmp_path):
    for f in ir.FILES: (tmp_path/f).write_bytes((folder/f).read_bytes())
    (tmp_path/"vocab.txt").write_text("\n".join(WORDS))
    with pytest.raises(BoigError, match="12 word pieces, not 62"): ir.load_image_reward(str(tmp_path), vision=VIT)

def test_a_broken_configuration_is_one_line(folder, tmp_path):
    for f in ir.FILES: (tmp_path/f).write_bytes((folder/f).read_bytes())
    (tmp_path/"med_config.json").write_text('{"vocab_size": ')
    with pytest.raises(BoigError, match="is not JSON"): ir.load_image_reward(str(tmp_path), vision=VIT)


# Prompts and pictures

def test_prompts_are_encoded_as_the_original_does(reward):
    ids = ir.encode(reward.tokenizer, ["Red SHOES on a café table", "very " * 50, ""])["input_ids"]
    read = [reward.tokenizer.convert_ids_to_tokens([i for i in row if i]) for row in ids.tolist()]
    assert ids.shape == (3, 35)
    assert read[0] == ["[CLS]", "red", "shoe", "##s", "on", "a", "cafe", "table", "[SEP]"]
    assert read[1] == ["[CLS]", *["very"] * 33, "[SEP]"] and read[2] == ["[CLS]", "[SEP]"]

def test_scores_are_standardised_with_the_authors_constants(reward):
    text = {"input_ids": IDS, "attention_mask": MASK}
    before = []
    handle = reward.net.head.register_forward_hook(lambda m, i, o: before.append(o))
    with torch.no_grad(): score = reward.net(PIXELS, **text)
    handle.remove()
    assert torch.allclose(score * 1.03333950 + 0.16717363, before[0][:, 0], atol=1e-5) and score.dtype == torch.float32

def test_pictures_come_in_as_the_original_takes_them(reward):
    "Shortest side bicubic, the middle, CLIP's numbers; the golden scores are of pixels that are ready."
    side = reward.net.visual_encoder.config.image_size
    assert reward.pixels == Preprocess((side, side), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", side)

def test_pictures_do_not_depend_on_their_batch(reward):
    images, prompts = torch.rand(4, 3, 32, 32), ["a red shoe", "a table", "", "very red"]
    with torch.no_grad():
        together, alone = reward(images, prompts), torch.cat([reward(images[i:i + 1], prompts[i:i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-4) and together.std() > 0

def test_in_half_precision_training_scores_stay_whole(reward):
    images, prompts = torch.rand(2, 3, 32, 32), ["a red shoe", "a table"]
    with torch.autocast("cpu", torch.bfloat16): half = reward(images, prompts)
    assert half.dtype == torch.float32 and torch.equal(half, reward(images, prompts))

def test_gradients_reach_every_pixel_that_is_judged(reward):
    images = torch.rand(2, 3, 40, 80, requires_grad=True)
    reward(images, ["a red shoe"] * 2).sum().backward()
    seen = images.grad.abs().sum(1) > 0
    assert reward.differentiable and seen[:, :, 25:55].all() and not seen[:, :, :15].any()

@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (2000, 1500), (32, 33)])
def test_any_size(reward, shape):
    with torch.no_grad(): assert reward(torch.rand(1, 3, *shape), ["a shoe"]).isfinite().all()

def test_no_pictures_no_scores(reward): assert reward(torch.zeros(0, 3, 32, 32), []).shape == (0,)

@pytest.mark.parametrize("images, prompts, said", [(torch.zeros(2, 3, 8, 8), ["one"], "need 2 prompts"), (torch.zeros(2, 3, 8, 8), "aa", "need 2 prompts"),
                                                   (torch.zeros(3, 8, 8), ["a"], "must be a tensor"), (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "floats"),
                                                   (torch.full((1, 3, 8, 8), 2.0), ["a"], "floats in"), (torch.full((1, 3, 8, 8), np.nan), ["a"], "floats in")])
def test_bad_calls_are_one_clear_line(reward, images, prompts, said):
    with pytest.raises(BoigError, match=said): reward(images, prompts)

def test_the_registry_knows_it(folder):
    from boig.rewards.base import load_reward, registered
    assert registered()["image-reward"].needs == "prompts"
    assert load_reward("image-reward", str(folder), device="cpu", vision=VIT).name == "image-reward"


# The published scores, for those who have the files

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
PICTURES = [f"{i}.webp" for i in range(1, 5)]

def test_published_scores():
    root = Path(os.environ.get("BOIG_REAL_WEIGHTS", "nowhere"))/"image-reward"
    if absent := [f for f in (*ir.FILES, *PICTURES) if not (root/f).is_file()]:
        pytest.skip(f"needs $BOIG_REAL_WEIGHTS/image-reward with {', '.join(absent)} (pictures: assets/images of github.com/THUDM/ImageReward)")
    real = ir.load_image_reward(str(root), device="cpu")
    with torch.no_grad(): scores = [real(to_tensor(open_rgb(root/p))[None], [PROMPT]).item() for p in PICTURES]
    # Its README's; our resize works on floats, theirs on bytes
    assert scores == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=0.05)
