"FID: the distance in closed forms, statistics that add up, and Inception against the original's numbers."
import hashlib
import json
import warnings
import weakref
from functools import reduce
from operator import add
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from boig.core import BoigError
from boig.metrics import fid
from boig.metrics.fid import (FID_INPUTS, ClipFeatures, FeatureStatistics, Inception, InceptionFeatures, distance, frechet_distance, load_features,
                              load_inception, load_statistics, save_statistics, statistics)
from boig.perception import pixels
from boig.perception.pixels import to_tensor

GOLDEN = json.loads((Path(__file__).parent/"data"/"golden_fid_inception.json").read_text())


def gaussian(seed, d=6, rank=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, rank or 2 * d))
    return rng.normal(size=d), x @ x.T / x.shape[1]


# The distance

def test_commuting_covariances():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(7, 7)))
    a, b, move = rng.uniform(0.1, 5, 7), rng.uniform(0.1, 5, 7), rng.normal(size=7)
    by_hand = (move**2).sum() + ((np.sqrt(a) - np.sqrt(b))**2).sum()
    assert frechet_distance(np.zeros(7), q * a @ q.T, move, q * b @ q.T) == pytest.approx(by_hand, rel=1e-12)

def test_one_dimension_and_a_shift():
    assert frechet_distance([1.0], [[9.0]], [3.0], [[0.25]]) == pytest.approx(4 + 2.5**2, rel=1e-12)
    mean, cov = gaussian(1)
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(6 * 4, rel=1e-9)

def test_rank_one_by_hand():
    "Σ = uuᵀ and vvᵀ: the root's trace is |u·v|, though the product is as singular as can be."
    u, v = np.random.default_rng(2).normal(size=(2, 50))
    by_hand = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(np.zeros(50), np.outer(u, u), np.zeros(50), np.outer(v, v)) == pytest.approx(by_hand, rel=1e-9)

def test_general_case_against_the_product_of_covariances():
    for seed in range(5):
        (m, a), (k, b) = gaussian(seed), gaussian(seed + 50)
        root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
        assert frechet_distance(m, a, k, b) == pytest.approx(((m - k)**2).sum() + np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)

@pytest.mark.parametrize("rank", [1, 3, 12])
def test_symmetric_not_negative_and_zero_on_itself(rank):
    (m, a), (k, b) = gaussian(3, rank=rank), gaussian(4, rank=rank)
    there, back = frechet_distance(m, a, k, b), frechet_distance(k, b, m, a)
    assert there == pytest.approx(back, rel=1e-9) and there > 0 and 0 <= frechet_distance(m, a, m, a) < 1e-9

def test_equal_pictures_are_a_point():
    point = FeatureStatistics.of(torch.ones(3, 4))
    _, cov = gaussian(5, d=4)
    assert frechet_distance(point.mean, point.covariance, np.zeros(4), cov) == pytest.approx(4 + np.trace(cov))

def test_what_is_no_covariance():
    with pytest.raises(BoigError, match="negative eigenvalue"): frechet_distance(np.zeros(2), np.diag([1, -1.0]), np.zeros(2), np.eye(2))


# Statistics

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 10**6), st.sampled_from([0, 1e4]))
def test_parts_in_any_order_are_the_whole(sizes, seed, offset):
    rng = np.random.default_rng(seed)
    f = torch.from_numpy(rng.normal(size=(sum(sizes), 3)) @ rng.normal(size=(3, 3)) + offset)
    parts = [FeatureStatistics.of(p) for p in f.split(sizes)]
    whole = FeatureStatistics.of(f)
    for order in (parts, [parts[i] for i in rng.permutation(len(parts))]):
        total = reduce(add, order)
        assert total.n == whole.n and torch.allclose(total.mean, whole.mean, rtol=1e-12)
        assert torch.allclose(total.scatter, whole.scatter, rtol=1e-7, atol=1e-6)
    if len(f) > 1: assert np.allclose(whole.covariance, np.cov(f.T), rtol=1e-7, atol=1e-8)

def test_mistakes_are_one_line():
    one, other = FeatureStatistics.of(torch.zeros(1, 3)), FeatureStatistics.of(torch.randn(9, 4))
    for wrong, said in ((lambda: one.covariance, "two or more"), (lambda: one + other, "not the same features"), (lambda: distance(one, other), "not the same"),
                        (lambda: distance(one, one), "two or more"), (lambda: FeatureStatistics.of(torch.zeros(0, 3)), "N ≥ 1"),
                        (lambda: FeatureStatistics.of(torch.zeros(3)), "N ≥ 1"), (lambda: FeatureStatistics.of(torch.tensor([[1.0], [float("nan")]])), "not finite"),
                        (lambda: distance(other, FeatureStatistics.of(torch.randn(9, 4), "FID (clean-fid)")), "FID")):
        with pytest.raises(BoigError, match=said) as e: wrong()
        assert "\n" not in str(e.value)

def test_too_few_pictures_are_a_warning_with_numbers():
    many, few = FeatureStatistics.of(torch.randn(100, 8), "pocket-eval-FD"), FeatureStatistics.of(torch.randn(8, 8), "pocket-eval-FD")
    with pytest.warns(UserWarning, match="pocket-eval-FD: 8 pictures are too few, 8 features need at least 9"): result = distance(many, few)
    assert result.name == "pocket-eval-FD" and result.n == (100, 8) and str(result).startswith("pocket-eval-FD ") and float(result) == result.value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(many, FeatureStatistics.of(torch.randn(9, 8), "pocket-eval-FD"))

def test_files_there_and_back(tmp_path):
    s = FeatureStatistics.of(torch.randn(20, 4), "FID (clean-fid)")
    again = load_statistics(save_statistics(tmp_path/"s.npz", s))
    assert (again.name, again.n) == (s.name, s.n) and torch.allclose(again.scatter, s.scatter, rtol=1e-12) and torch.equal(again.mean, s.mean)
    np.savez(tmp_path/"theirs.npz", mu=s.mean, sigma=s.covariance)
    theirs = load_statistics(tmp_path/"theirs.npz", "FID (clean-fid)", 20)
    assert float(distance(theirs, s)) < 1e-9

def test_bad_files_are_one_line(tmp_path):
    np.savez(tmp_path/"theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path/"other.npz", x=1)
    np.savez(tmp_path/"pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1), n=5, name="x")
    np.savez(tmp_path/"shapes.npz", mu=np.zeros(3), sigma=np.eye(2), n=5, name="x")
    (tmp_path/"text.npz").write_text("no")
    (tmp_path/"half.npz").write_bytes((tmp_path/"theirs.npz").read_bytes()[:200])
    for name, said in (("theirs", "how many"), ("other", "no statistics"), ("pickle", "no statistics"), ("shapes", "damaged"), ("text", "no statistics"),
                       ("half", "no statistics"), ("absent", "no file")):
        with pytest.raises(BoigError, match=said): load_statistics(tmp_path/f"{name}.npz")


# Inception

def fill(name, shape):
    x = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    if name.endswith("bn.weight"): x = 1 + 0.1 * x
    elif name.endswith("running_var"): x = np.exp(0.1 * x)
    else: x = 0.1 * x if len(shape) < 2 else x * 1.5 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))

def shapes():
    with torch.device("meta"): return Inception().state_dict()

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A file like pytorch-fid's, its tensors filled from their names."
    path = tmp_path_factory.mktemp("fid")/"inception.pth"
    torch.save({k: fill(k, tuple(v.shape)) if v.is_floating_point() else torch.tensor(0) for k, v in shapes().items()}, path)
    return path

@pytest.fixture(scope="module")
def net(checkpoint): return load_inception(str(checkpoint))

@pytest.fixture(scope="module")
def pictures():
    x = np.random.RandomState(0).randint(0, 256, (2, 48, 64, 3)).astype(np.uint8)
    x[1] = np.linspace(0, 255, 64)[None, :, None].astype(np.uint8)
    return torch.from_numpy(x).permute(0, 3, 1, 2) / 255

def assert_golden(features, golden):
    for f, first, mean, std in zip(features, golden["first"], golden["mean"], golden["std"], strict=True):
        np.testing.assert_allclose(f[:len(first)], first, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose([f.mean(), f.std()], [mean, std], rtol=1e-4)

def test_names_and_shapes_are_the_checkpoints():
    state = shapes()
    assert len(state) == GOLDEN["tensors"]
    assert hashlib.sha256("\n".join(f"{k} {list(state[k].shape)}" for k in sorted(state)).encode()).hexdigest() == GOLDEN["keys_sha256"]
    counted = sum(v.numel() for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked")))
    assert counted == GOLDEN["parameters"] == 27_161_264 - 3_326_696 + 8 * 2049  # torchvision's, without its auxiliary head, 8 classes more

def test_filling_by_name_is_repeatable(net):
    assert torch.equal(net.state_dict()["Mixed_7c.branch3x3dbl_3b.conv.weight"], fill("Mixed_7c.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)))

def test_every_layer_is_the_originals(net, pictures):
    with torch.no_grad(): maps = net.maps(FID_INPUTS["pytorch-fid"](pictures))
    assert {c: tuple(m.shape) for c, m in maps.items()} == {64: (2, 64, 73, 73), 192: (2, 192, 35, 35), 768: (2, 768, 17, 17), 2048: (2, 2048, 8, 8)}
    for channels, golden in GOLDEN["layers"].items(): assert_golden(maps[int(channels)].mean((2, 3)), golden)

def test_clean_fid_is_the_originals(net, pictures):
    assert_golden(InceptionFeatures(net, "clean-fid")(pictures), GOLDEN["clean_fid"])
    seen = FID_INPUTS["clean-fid"](pictures[:1])[0] * 128 + 128
    np.testing.assert_allclose(seen[:, 100, 100:103], GOLDEN["clean_fid"]["pixels"], atol=1e-3)

def test_pooling_leaves_the_border_out():
    x = torch.rand(1, 1, 5, 4)
    def around(y): return torch.nn.functional.conv2d(y, torch.ones(1, 1, 3, 3), padding=1)
    assert torch.allclose(fid._mean(x), around(x) / around(torch.ones_like(x)))
    assert [pool for pool, _ in fid._BLOCKS.values()].count(fid._max) == 1 and fid._BLOCKS["Mixed_7c"][0] is fid._max

@pytest.mark.parametrize("size", [(299, 299), (64, 64), (17, 400), (500, 301), (1, 1)])
def test_clean_fids_resize_is_pils(size):
    x = torch.randint(256, (1, 3, *size), generator=torch.Generator().manual_seed(0))
    pil = [np.asarray(Image.fromarray(c.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in x[0]]
    seen = (FID_INPUTS["clean-fid"](x / 255) * 128 + 128)[0].numpy()
    assert np.abs(seen - np.stack(pil)).max() < 0.02 and seen.min() >= 0 and seen.max() <= 255

@pytest.mark.parametrize("variant", FID_INPUTS)
def test_a_float_picture_is_seen_as_its_file(variant, tmp_path):
    x = torch.rand(3, 40, 30)
    Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path/"x.png")
    assert torch.equal(FID_INPUTS[variant](x[None]), FID_INPUTS[variant](to_tensor(tmp_path/"x.png")[None]))

def test_results_are_named_after_their_variant(checkpoint, pictures):
    means = {}
    for variant in FID_INPUTS:
        seen = statistics(load_features(variant, weights=str(checkpoint), device="cpu"), pictures)
        assert seen.name == f"FID ({variant})" and seen.n == 2
        means[variant] = seen.mean
    assert not torch.allclose(means["pytorch-fid"], means["clean-fid"], rtol=0.05)

def test_wrong_files_are_errors(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path/"cache"))
    with pytest.raises(BoigError, match="curl .*6726825d.pth"): load_inception()
    state = torch.load(checkpoint, weights_only=True)
    files = {"missing": ({k: v for k, v in state.items() if k != "fc.bias"}, "missing.pth does not fit Inception: 1 missing: fc.bias"), "list": ([1], "holds a list"),
             "shape": (state | {"fc.weight": torch.zeros(1000, 2048)}, r"1 of another shape: fc.weight \(\[1000, 2048\], not \[1008, 2048\]\)"),
             "more": (state | {"epoch": 3}, "not a checkpoint of tensors")}
    for name, (content, said) in files.items():
        torch.save(content, tmp_path/f"{name}.pth")
        with pytest.raises(BoigError, match=said) as e: load_inception(str(tmp_path/f"{name}.pth"))
        assert "\n" not in str(e.value)
    (tmp_path/"code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a command
    with pytest.raises(BoigError, match="not read"): load_inception(str(tmp_path/"code.pth"))
    (tmp_path/fid.INCEPTION).write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(BoigError, match="SHA-256"): load_inception(str(tmp_path/fid.INCEPTION))
    with pytest.raises(BoigError, match="clean-fid"): InceptionFeatures(None, "cleanfid")


# CLIP's features

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    folder = tmp_path_factory.mktemp("clip")/"tiny-clip"
    CLIPModel(CLIPConfig(text_config={**tower, "vocab_size": 10}, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder

def test_clip_features_are_the_models_own(clip):
    look = load_features(str(clip), device="cpu")
    assert look.name == "tiny-clip-FD"
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad(): own = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=look.preprocess(x)).pooler_output
    assert torch.allclose(look(x), own, atol=1e-6)

def test_old_preprocessor_files_are_read_as_rewards_read_them(clip, tmp_path):
    for file in clip.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    (tmp_path/"preprocessor_config.json").write_text('{"do_resize": true, "size": 32, "crop_size": 32, "image_mean": [0.5, 0.5, 0.5]}')
    assert load_features(str(tmp_path), device="cpu").preprocess.std == pixels.CLIP_STD  # what transformers takes for it

def test_pictures_of_all_sizes_and_kinds_in_any_order(clip, tmp_path):
    look, rng = load_features(str(clip), device="cpu"), np.random.default_rng(0)
    kinds = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((32, 32), (1, 1), (40, 64), (32, 32), (90, 33))]
    kinds += [kinds[0].convert("L"), kinds[2].convert("CMYK"), to_tensor(kinds[3])]
    kinds[4].save(tmp_path/"a.png")
    kinds.append(tmp_path/"a.png")
    one, two = statistics(look, kinds, batch_size=3), statistics(look, iter(kinds[::-1]), batch_size=64)
    assert one.n == two.n == 9 and torch.allclose(one.mean, two.mean, atol=1e-6) and torch.allclose(one.scatter, two.scatter, atol=1e-6)
    with pytest.raises(BoigError, match="no pictures"): statistics(look, [])
    with pytest.raises(BoigError, match=r"\[0, 1\]"): statistics(look, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))

def test_large_pictures_are_not_all_in_memory_and_batches_of_many_sizes_are_full(monkeypatch):
    monkeypatch.setattr(pixels, "_MOST_NUMBERS", 12 * 3 * 128)
    alive, most, seen = weakref.WeakSet(), 0, []
    def drawn():
        nonlocal most
        for k in range(144):
            alive.add(picture := torch.rand(3, *((16, 8), (8, 16), (4, 32), (32, 4))[k % 4]))
            most = max(most, len(alive))
            yield picture
    def look(images):
        seen.append(len(images))
        return images.mean((2, 3))
    look.name = "means"
    assert statistics(look, drawn(), batch_size=3).n == 144 and most <= 2 * 12 + 1
    assert set(seen) == {3}  # not one

def test_half_a_clip_is_an_error(clip, tmp_path):
    from safetensors.torch import load_file, save_file
    for file in clip.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    state = load_file(clip/"model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises(BoigError, match="visual_projection"): load_features(str(tmp_path), device="cpu")
    (tmp_path/"model.safetensors").unlink()
    with pytest.raises(BoigError, match="no CLIPModel"): load_features(str(tmp_path), device="cpu")

def test_the_features_are_those_that_judge():
    from boig.pocket.captions import pixels, samples
    from boig.zoo import resolve
    look, x = load_features("pocket-eval", device="cpu"), pixels(samples(4, 1, "fid test")[0])
    with torch.no_grad(): judged = CLIPModel.from_pretrained(resolve("pocket-eval"), dtype=torch.float32).get_image_features(pixel_values=x * 2 - 1).pooler_output
    assert isinstance(look, ClipFeatures) and look.name == "pocket-eval-FD"
    assert torch.allclose(look(x), judged, atol=1e-4)
