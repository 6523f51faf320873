"The CLIP family of rewards: CLIP score, PickScore, HPS, aesthetic; against the originals' numbers, transformers' own forward pass, formulas by hand."
import json
import os
from binascii import crc32
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

import boig
from boig.core import BoigError
from boig.data.world import caption
from boig.perception.pixels import Preprocess, to_tensor
from boig.pocket import aesthetic as pocket
from boig.pocket.captions import held_out, pixels, samples
from boig.pocket.choosers import PARTS
from boig.rewards import clip_scores as cs
from boig.rewards.aesthetic import LAION, Head, direction, load_aesthetic
from boig.rewards.base import load_reward, registered
from boig.zoo import cache_dir, entries, resolve

GOLDEN = json.loads((Path(__file__).parent/"data/golden_hpsv2_tiny.json").read_text())
POCKET = ["pocket-clip", "pocket-eval", "pocket-pickscore", "pocket-hps", "pocket-image-reward"]
SHIPPED_HEAD = str(Path(boig.__file__).parent/"weights/pocket-aesthetic")
REAL_HEAD = cache_dir()/"sac+logos+ava1-l14-linearMSE.pth"


def fill(name, shape):
    "A tensor from its name: how the golden numbers were made."
    x = torch.from_numpy(np.random.RandomState(crc32(name.encode())).standard_normal(shape)).float()
    if name.endswith("logit_scale"): return torch.tensor(100.0).log()
    if name.endswith("bias"): return 0.1 * x
    if "ln_" in name: return 1 + 0.1 * x
    if len(shape) > 1 and "embed" not in name and "token" not in name: return x * 1.5 / np.prod(shape[1:]) ** 0.5
    return 0.5 * x


def tower(activation, width, layers, heads, dim=16, **more):
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": activation,
            "projection_dim": dim, **more}


def config(activation="gelu", words=64, places=12, dim=16, **text):
    special = {"bos_token_id": 0, "eos_token_id": 1} if words > 64 else {"bos_token_id": 62, "eos_token_id": 63}
    return CLIPConfig(projection_dim=dim, vision_config=tower(activation, 40, 2, 2, dim, image_size=28, patch_size=14),
                      text_config=tower(activation, 24, 2, 3, dim, vocab_size=words, max_position_embeddings=places, **special | text))


def original(): return {name: fill(name, shape) for name, shape in GOLDEN["shapes"].items()}


def save_clip(folder, half=False, **options):
    "A tiny random CLIP in the hub's layout, with the words of the pocket zoo."
    tokenizer = CLIPTokenizer.from_pretrained(resolve("pocket-clip"))
    torch.manual_seed(0)
    model = CLIPModel(config(words=len(tokenizer), **options))
    (model.half() if half else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tiny(folder): return cs.load_clip_score(folder, "tiny", "cpu")


@pytest.fixture(scope="module")
def pictures():
    scenes, _ = samples(6, 1, "clip rewards", unseen=True)
    return pixels(scenes), [caption(s) for s in scenes]


# The port of open_clip

def test_the_port_equals_the_original():
    model = cs.from_open_clip(original(), config())
    x = torch.from_numpy(np.random.RandomState(GOLDEN["pixel_seed"]).standard_normal((3, 3, 28, 28))).float()
    with torch.no_grad():
        image = F.normalize(model.get_image_features(pixel_values=x).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(input_ids=torch.tensor(GOLDEN["ids"])).pooler_output, dim=-1)
    assert (image * text).sum(-1).tolist() == pytest.approx(GOLDEN["score"], abs=1e-6)
    assert image[0, :6].tolist() == pytest.approx(GOLDEN["img"], abs=1e-6) and text[0, :6].tolist() == pytest.approx(GOLDEN["txt"], abs=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(GOLDEN["logit_scale"])


def test_every_name_is_mapped_once():
    with torch.device("meta"): wanted = CLIPModel(cs.VIT_H14).state_dict()
    names = {cs.open_clip_name(n) for n in wanted}
    assert len(names) == len(wanted) - 2 * 2 * (32 + 24)  # q, k and v, weight and bias, are one
    assert sum(t.numel() for t in wanted.values()) == pytest.approx(986.11e6, abs=5e3)  # open_clip's own figure for ViT-H-14
    small = {n.replace("resblocks.1.", "resblocks.0.") for n in names if ".resblocks." not in n or int(n.split("resblocks.")[1].split(".")[0]) < 2}
    assert small == {n.replace("resblocks.1.", "resblocks.0.") for n in GOLDEN["shapes"]}


@pytest.mark.parametrize("change, says", [
    ({"visual.proj": None}, "1 missing: visual.proj"),
    ({"score_predictor.weight": torch.zeros(2, 2)}, "1 left over: score_predictor.weight"),
    ({"visual.conv1.weight": torch.zeros(40, 3, 7, 7)}, r"of another shape: visual.conv1.weight \(\[40, 3, 7, 7\], not \[40, 3, 14, 14\]\)"),
    ({"text_projection": torch.zeros(24, 8)}, "of another shape: text_projection"),
    ({"transformer.resblocks.1.attn.in_proj_weight": torch.zeros(24, 24)}, "of another shape: transformer.resblocks.1.attn.in_proj_weight")])
def test_tensors_that_do_not_fit_are_named(change, says):
    state = {k: t for k, t in (original() | change).items() if t is not None}
    with pytest.raises(BoigError, match=says): cs.from_open_clip(state, config())


def test_a_pt_file_of_the_authors(tmp_path, folder):
    half = {k: t.half() if t.is_floating_point() else t for k, t in original().items()}
    words = len(CLIPTokenizer.from_pretrained(folder))
    half["token_embedding.weight"] = torch.randn(words, 24, generator=torch.Generator().manual_seed(0)).half()
    torch.save({"state_dict": half}, tmp_path/"HPS.pt")
    options = {"config": config(words=words), "processor": folder, "device": "cpu"}
    reward = load_reward("hps-v2.1", str(tmp_path/"HPS.pt"), **options)
    assert (reward.name, reward.scale) == ("hps-v2.1", "cos") and {p.dtype for p in reward.model.parameters()} == {torch.float32}
    x, texts = torch.rand(2, 3, 28, 28), ["a red shoe", "a cat"]
    by_hand = reward.model(pixel_values=reward.preprocess(x), **reward.tokenizer(texts, padding=True, return_tensors="pt")).logits_per_image.diag()
    assert torch.allclose(reward(x, texts), by_hand / reward.model.logit_scale.exp(), atol=1e-6)
    torch.save(half, tmp_path/"bare.pt")
    with pytest.raises(BoigError, match="no 'state_dict'"): load_reward("hps-v2", str(tmp_path/"bare.pt"), **options)


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"ran"),)
    torch.save({"state_dict": {"logit_scale": Trap()}}, tmp_path/"trap.pt")
    with pytest.raises(BoigError, match="trap.pt"): load_reward("hps-v2", str(tmp_path/"trap.pt"))
    assert not (tmp_path/"ran").exists()


def test_a_missing_file_says_where_it_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    for name, file in (("hps-v2", "HPS_v2_compressed.pt"), ("hps-v2.1", "HPS_v2.1_compressed.pt"), ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth")):
        with pytest.raises(BoigError, match="no file") as e: load_reward(name)
        assert file in str(e.value) and ("xswu/HPSv2" in str(e.value)) == (name != "aesthetic") and str(tmp_path) in str(e.value)


def test_of_the_processor_no_weights_are_fetched(tmp_path, folder, monkeypatch):
    "openai/clip-vit-base-patch32 lends a file of open_clip its words: of its 600 MB, only those are asked of the hub."
    asked = []
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, revision, allow_patterns: asked.append((repo, allow_patterns)) or folder)
    state = original() | {"token_embedding.weight": torch.zeros(len(CLIPTokenizer.from_pretrained(folder)), 24)}
    torch.save({"state_dict": state}, tmp_path/"HPS.pt")
    load_reward("hps-v2", "HPS.pt", device="cpu", config=config(words=len(state["token_embedding.weight"])))
    (repo, patterns), = asked
    def fetched(file): return any(fnmatch(file, p) for p in patterns)
    assert repo == cs.PROCESSOR and not any(map(fetched, ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")))
    assert all(map(fetched, ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "preprocessor_config.json")))


# Folders

@pytest.mark.parametrize("name, scale", [("clip-score", "cos"), ("pickscore", "logit")])
def test_hub_folders_load_under_their_names(folder, name, scale):
    reward = load_reward(name, folder, "cpu")
    assert (reward.name, reward.scale, reward.differentiable) == (name, scale, True)
    assert load_reward(name, folder, "cpu", scale="100cos").scale == "100cos"


@pytest.mark.parametrize("change, says", [
    ({"visual_projection.weight": None}, "1 missing: visual_projection.weight"), ({"extra": torch.zeros(3)}, "1 left over: extra"),
    ({"text_projection.weight": torch.zeros(16, 9)}, r"of another shape: text_projection.weight \(\[16, 9\], not \[16, 24\]\)")])
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, says, capfd):
    save_clip(tmp_path)
    state = {k: t for k, t in (load_file(tmp_path/"model.safetensors") | change).items() if t is not None}
    save_file(state, tmp_path/"model.safetensors", {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(BoigError, match=says): cs.load_clip_score(str(tmp_path), device="cpu")
    assert "REPORT" not in "".join(capfd.readouterr())  # one line, not a table as well


def test_other_folders_are_refused(tmp_path, folder):
    (tmp_path/"config.json").write_text("{}")
    with pytest.raises(BoigError, match="holds no CLIPModel"): cs.load_clip_score(str(tmp_path))
    damaged = Path(save_clip(tmp_path/"damaged"))/"model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(BoigError, match="holds no CLIPModel"): cs.load_clip_score(str(damaged.parent))


def test_pixels_and_words_must_fit(tmp_path, folder):
    save_clip(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56).save_pretrained(tmp_path)
    with pytest.raises(BoigError, match="pictures of 28 pixels"): cs.load_clip_score(str(tmp_path))
    save_clip(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<cat>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BoigError, match="words"): cs.load_clip_score(str(tmp_path))


def test_half_precision_becomes_float32(tmp_path):
    reward = cs.load_clip_score(save_clip(tmp_path, half=True), device="cpu")
    assert {p.dtype for p in reward.model.parameters()} == {torch.float32} and not any(p.requires_grad for p in reward.model.parameters())
    assert reward(torch.rand(1, 3, 28, 28).half(), ["a cat"]).dtype == torch.float32


def test_the_activation_is_checked(tmp_path, folder, tiny):
    quick = save_clip(tmp_path, activation="quick_gelu")
    with pytest.raises(BoigError, match="should have been trained with gelu, but .* quick_gelu"): load_reward("pickscore", quick, "cpu")
    x = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    other = cs.load_clip_score(quick, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(tiny.model.state_dict().values(), other.model.state_dict().values()))
    assert (tiny(x, ["a cat"] * 4) - other(x, ["a cat"] * 4)).abs().max() > 1e-5  # equal weights, other scores: nothing but the configuration tells


@pytest.mark.parametrize("fields", [{}, {"size": 30, "crop_size": 28}, {"size": 224, "image_mean": [0.5] * 3}, {"size": {"shortest_edge": 240}, "do_center_crop": True}])
def test_old_preprocessor_files_mean_what_transformers_takes_them_for(tmp_path, fields):
    (tmp_path/"preprocessor_config.json").write_text(json.dumps(fields | {"feature_extractor_type": "CLIPFeatureExtractor"}))
    picture = Image.fromarray((np.random.default_rng(0).random((5, 4, 3)) * 255).astype(np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    theirs = torch.as_tensor(np.asarray(CLIPImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"]))
    ours = cs.load_preprocess(tmp_path)(to_tensor(picture)[None])
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.05


# The score

@pytest.mark.parametrize("name", POCKET)
def test_pocket_scores_are_transformers_own(name, pictures):
    images, texts = pictures
    reward = load_reward(name, device="cpu", scale="logit")
    model, tokenizer = CLIPModel.from_pretrained(resolve(name), dtype=torch.float32), CLIPTokenizer.from_pretrained(resolve(name))
    with torch.no_grad(): by_hand = model(pixel_values=images * 2 - 1, **tokenizer(texts, padding=True, return_tensors="pt")).logits_per_image.diag()
    assert torch.allclose(reward(images, texts), by_hand, atol=1e-4) and reward.name == name


def test_scales_are_one_cosine_in_three_units(folder, pictures):
    images, texts = pictures
    cos, hundred, logit = (cs.load_clip_score(folder, device="cpu", scale=s)(images, texts) for s in cs.SCALES)
    assert cos.abs().max() <= 1 and torch.allclose(hundred, 100 * cos)
    assert torch.allclose(logit, np.exp(2.6592) * cos, rtol=1e-4)  # a fresh CLIP's logit_scale
    assert load_reward("pocket-eval", device="cpu").scale == "cos" and load_reward("pocket-hps", device="cpu").scale == "logit"


def test_a_pocket_model_keeps_its_name():
    assert load_reward("clip-score", "pocket-eval", "cpu").name == "pocket-eval"
    assert {*POCKET, "clip-score", "pickscore", "hps-v2", "hps-v2.1", "aesthetic", "pocket-aesthetic"} <= set(registered())


def test_repeated_prompts_are_read_once(tiny, monkeypatch):
    read, real = [], tiny.model.get_text_features
    monkeypatch.setattr(tiny.model, "get_text_features", lambda **batch: read.append(len(batch["input_ids"])) or real(**batch))
    x, texts = torch.rand(5, 3, 28, 28), ["a cat", "a red shoe", "a cat", "a cat", "a red shoe"]
    together = tiny(x, texts)
    assert read == [2]
    assert torch.allclose(together, torch.cat([tiny(x[i:i + 1], [t]) for i, t in enumerate(texts)]), atol=1e-6)


def test_long_texts_are_cut_and_keep_their_end(tiny):
    x, long = torch.rand(1, 3, 28, 28), "a red shoe and a cat and a dog and a burger and a watch"
    ids = tiny.tokenizer(long, truncation=True, max_length=12).input_ids
    assert len(tiny.tokenizer(long).input_ids) > 12 == len(ids) and ids[-1] == tiny.tokenizer.eos_token_id
    assert torch.equal(tiny(x, [long]), tiny(x, [long + " and words that nobody reads"]))
    states = tiny.model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
    assert torch.allclose(cs.embed_texts(tiny.model, tiny.tokenizer, [long]), F.normalize(tiny.model.text_projection(states), dim=-1), atol=1e-6)


def test_added_words_do_not_move_the_end(tmp_path):
    "With eos_token_id=2 in an old configuration, transformers reads the largest number of a text: an added word."
    save_clip(tmp_path, eos_token_id=2)
    model, tokenizer = CLIPModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<mycat>"])
    model.text_model.resize_token_embeddings(len(tokenizer))
    batch = tokenizer(["a <mycat> on a table"], return_tensors="pt")
    end = (batch.input_ids[0] == tokenizer.eos_token_id).int().argmax()
    with torch.no_grad():
        naive = F.normalize(model.get_text_features(**batch).pooler_output, dim=-1)
        reward = cs.ClipScore(model, tokenizer, Preprocess((28, 28), shortest=28), "mine")
        ours = cs.embed_texts(model, tokenizer, ["a <mycat> on a table"])
        states = model.text_model(**batch).last_hidden_state[:, end]
        by_hand = F.normalize(model.text_projection(states), dim=-1)
        assert reward(torch.rand(1, 3, 28, 28), ["a <mycat>"]).isfinite().all()
    assert torch.allclose(ours, by_hand, atol=1e-6) and not torch.allclose(naive, by_hand, atol=1e-3)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    with pytest.raises(BoigError, match="token 2"): cs.ClipScore(model, tokenizer, Preprocess((28, 28)), "mine")


@pytest.mark.parametrize("h, w", [(1, 1), (28, 28), (9, 200), (300, 100)])
def test_any_size_and_gradients_to_pixels(tiny, h, w):
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(0)).mul_(0.8).add_(0.1).requires_grad_()
    s = tiny(x, ["a cat", "a red shoe"])
    s.sum().backward()
    assert s.shape == (2,) and s.isfinite().all() and (x.grad.abs().amax((1, 2, 3)) > 0).all()
    step = 0.02 * F.normalize(x.grad.flatten(1)).view_as(x)  # along the gradient, by its length
    with torch.no_grad(): rise = (tiny(x + step, ["a cat", "a red shoe"]) - tiny(x - step, ["a cat", "a red shoe"])) / 2
    assert torch.allclose(rise, 0.02 * x.grad.flatten(1).norm(dim=1), rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("upright", [False, True])
def test_a_thread_of_a_picture_is_cut_before_it_grows(tiny, monkeypatch, upright):
    x, made, grow = torch.rand(1, 3, 2, 1001), [], F.interpolate
    if upright: x = x.mT
    to = (14014, 28) if upright else (28, 14014)
    whole = grow(x, to, mode="bicubic", antialias=True).clamp(0, 1)
    middle = whole[..., 6993:7021, :] if upright else whole[..., 6993:7021]
    monkeypatch.setattr(F, "interpolate", lambda x, to, **how: made.append(max(to)) or grow(x, to, **how))
    assert torch.allclose(tiny.preprocess.resize(x), middle, atol=1e-4) and max(made) < 41 * 28


def test_pixels_are_those_of_the_original_processor(tiny, pictures):
    picture = Image.fromarray((pictures[0][0].permute(1, 2, 0) * 255).round().byte().numpy()).resize((120, 75), Image.Resampling.LANCZOS)
    theirs = torch.as_tensor(np.asarray(CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)(picture, return_tensors="np")["pixel_values"]))
    e = F.normalize(tiny.model.get_image_features(pixel_values=theirs).pooler_output, dim=-1)
    assert F.cosine_similarity(e, cs.embed_images(tiny.model, tiny.preprocess, to_tensor(picture)[None])).item() > 0.999


@pytest.mark.parametrize("images, prompts, says", [
    (torch.zeros(2, 3, 8, 8), ["one"], "need 2 prompts"), (torch.zeros(2, 3, 8, 8), "ab", "need 2 prompts"), (torch.zeros(3, 8, 8), ["a"], "must be a tensor"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "divide"), (torch.full((1, 3, 8, 8), 2.0), ["a"], "divide"), (torch.full((1, 3, 8, 8), float("nan")), ["a"], "divide")])
def test_bad_calls(tiny, images, prompts, says):
    with pytest.raises(BoigError, match=says): tiny(images, prompts)


def test_in_half_precision_training_scores_stay_whole(tiny, pictures):
    images, captions = pictures
    for reward in (tiny, load_aesthetic(SHIPPED_HEAD, device="cpu")):
        with torch.autocast("cpu", torch.bfloat16): half = reward(images, captions)
        assert half.dtype == torch.float32 and torch.equal(half, reward(images, captions))


def test_nothing_gives_nothing(tiny):
    assert tiny(torch.zeros(0, 3, 8, 8), []).shape == (0,)
    assert load_aesthetic(SHIPPED_HEAD, device="cpu")(torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_unknown_scales_and_names():
    with pytest.raises(BoigError, match="Did you mean 'logit'"): load_reward("pocket-hps", device="cpu", scale="logits")
    with pytest.raises(BoigError, match="pickscore"): load_reward("pikscore")


# Aesthetic

def save_head(path, layers=LAION, **change):
    torch.manual_seed(1)
    torch.save({k: t for k, t in (Head(layers).state_dict() | change).items() if t is not None}, path)
    return str(path)


def test_five_layers_are_one(tmp_path):
    clip, path = save_clip(tmp_path/"clip", activation="quick_gelu", dim=768), save_head(tmp_path/"head.pth")
    reward = load_reward("aesthetic", path, "cpu", tower=clip)
    x, layers = torch.rand(3, 3, 28, 28), torch.load(path, weights_only=True)
    e = CLIPVisionModelWithProjection.from_pretrained(clip)(pixel_values=reward.preprocess(x)).image_embeds
    y = (e / e.norm(dim=-1, keepdim=True)).double()
    for n in LAION: y = y @ layers[f"layers.{n}.weight"].double().T + layers[f"layers.{n}.bias"].double()
    w, b = direction(reward.head, 768)
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    short = Head(LAION).half()
    direction(short, 768)
    assert {p.dtype for p in short.parameters()} == {torch.float16}  # looked at, and left as it is
    assert reward(x).tolist() == pytest.approx(y[:, 0].tolist(), abs=1e-6) and reward.name == "aesthetic"
    assert (F.normalize(e, dim=-1).double() @ w + b).tolist() == pytest.approx(y[:, 0].tolist(), abs=1e-6)
    assert torch.equal(reward(x, ["a", "b", "c"]), reward(x))  # it does not read
    x.requires_grad_()
    reward(x).sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()


def test_heads_that_are_not_the_published_one(tmp_path, folder):
    clip = save_clip(tmp_path/"clip", activation="quick_gelu", dim=768)
    relu = dict(zip((0, 3, 6, 9, 11), LAION.values()))  # the relative with ReLUs between its layers
    for path, says in [(save_head(tmp_path/"relu.pth", relu), "missing: layers.2"), (save_head(tmp_path/"short.pth", **{"layers.7.bias": None}), "1 missing: layers.7.bias"),
                       (save_head(tmp_path/"narrow.pth", **{"layers.7.weight": torch.zeros(1, 8)}), "another shape: layers.7.weight")]:
        with pytest.raises(BoigError, match=says): load_aesthetic(path, device="cpu", tower=clip)
    fine = save_head(tmp_path/"head.pth")
    with pytest.raises(BoigError, match="trained with quick_gelu"): load_aesthetic(fine, device="cpu", tower=folder)
    with pytest.raises(BoigError, match="reads 768 values, but .* 128"): load_aesthetic(fine, device="cpu", tower="pocket-eval")
    with pytest.raises(BoigError, match="config.json"): load_aesthetic(str(tmp_path), device="cpu")


@pytest.mark.skipif(not REAL_HEAD.is_file(), reason=f"needs {REAL_HEAD.name} of github.com/christophschuhmann/improved-aesthetic-predictor in boig's cache folder")
def test_the_published_head():
    head = Head(LAION)
    head.load_state_dict(torch.load(REAL_HEAD, map_location="cpu", weights_only=True))
    assert head(F.normalize(torch.sin(torch.arange(768.0)), dim=0)).item() == pytest.approx(5.867869, abs=1e-5)
    w, b = direction(head, 768)
    assert b.item() == pytest.approx(5.23665, abs=1e-4) and w.norm().item() == pytest.approx(17.9956, abs=1e-3)


# pocket-aesthetic

def test_ridge_is_the_least_squared_error_plus_penalty():
    g = torch.Generator().manual_seed(0)
    e, y, n, penalty = torch.randn(60, 5, generator=g, dtype=torch.float64), torch.randn(60, generator=g, dtype=torch.float64), 60, 0.1
    layer = pocket.ridge(e, y, penalty).layers["0"]
    w, b = (t.detach().double().clone().requires_grad_() for t in (layer.weight[0], layer.bias[0]))
    ((e @ w + b - y).square().sum() + penalty * n * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-4 and b.grad.abs() < 1e-4  # at the minimum


def test_rated_pictures_keep_the_held_out_apart(monkeypatch):
    drawn = []
    monkeypatch.setattr(pocket, "pixels", lambda scenes: drawn.append(scenes) or pixels(scenes))
    (images, seen), _ = pocket.rated(20, 1, "a"), pocket.rated(6, 1, "a", unseen=True)
    assert images.shape == (20, 3, 64, 64) and seen.shape == (20, 6)
    assert not any(map(held_out, drawn[0])) and all(map(held_out, drawn[1]))
    assert torch.equal(pocket.rated(20, 1, "a")[0], images) and not torch.equal(pocket.rated(20, 2, "a")[0], images)


def test_neither_text_nor_taste_is_liked():
    seen = np.random.default_rng(0).standard_normal((8, 6))
    other = seen.copy()
    other[:, [PARTS.index(p) for p in ("alignment", "warmth", "vividness", "richness")]] = 0
    assert torch.equal(pocket.liked(seen), pocket.liked(other))
    assert pocket.liked(seen).numpy() == pytest.approx(seen[:, 1] + seen[:, 2])


def test_a_head_is_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "recipe", lambda name: {"seed": 1, "tower": "pocket-eval", "scenes": 12, "penalty": 1e-3})
    head = pocket.train_aesthetic("pocket-aesthetic", tmp_path)
    again = pocket.train_aesthetic("pocket-aesthetic", tmp_path/"again")
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), again.parameters()))
    loaded, x = load_aesthetic(str(tmp_path), "tiny", "cpu"), torch.rand(2, 3, 64, 64)
    tower = CLIPModel.from_pretrained(resolve("pocket-eval"), dtype=torch.float32)
    with torch.no_grad(): e = F.normalize(tower.get_image_features(pixel_values=x * 2 - 1).pooler_output, dim=-1)
    assert torch.allclose(loaded(x), head(e), atol=0.02) and loaded.name == "tiny" and (tmp_path/"log.csv").is_file()


def test_the_shipped_head_knows_its_tower_and_something_of_beauty():
    "Also fails when pocket-eval was trained anew and the head was not."
    found = pocket.correlations(load_aesthetic(SHIPPED_HEAD, device="cpu"), n=100, seed=7)
    assert found["liked"] > 0.35 and found["harmony"] > 0.35 and found["layout"] > 0
    assert entries()["pocket-eval"].file.endswith(json.loads(Path(SHIPPED_HEAD, "config.json").read_text())["tower"])
