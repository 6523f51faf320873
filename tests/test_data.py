"Palette, perception and EmojiBench."
import re

import numpy as np
import pandas as pd
import pytest
import torch

from boig.benches.emojibench import build_benchmark, drawing_box
from boig.core import BoigError
from boig.data.emoji import describe, gives_away, load_emojibench, split_by_subgroup, use_buckets
from boig.data.palette import COLOR_NAMES, palette_rgb, rgb_to_lab, tone_of_lab
from boig.data.verbalization import parse, problems
from boig.perception.colors import color_shares, verbalize_colors


@pytest.fixture(scope="module")
def data(): return load_emojibench()


def test_lab_of_known_colours():
    "Reference values of the sRGB primaries (D65), from the CIE definitions."
    rgb = torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    lab = torch.tensor([[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [53.39, 0, 0]])
    torch.testing.assert_close(rgb_to_lab(rgb), lab, atol=0.03, rtol=0)


def test_tones_by_hand():
    "Below a chroma of 12 there is no hue; from pink to yellow it is warm."
    def at(chroma, hue): return [70.0, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))]
    lab = torch.tensor([at(11.9, 40), at(11.9, 250), at(12.1, 40), at(12.1, 250), at(40, -29), at(40, -31), at(40, 109), at(40, 111)])
    assert tone_of_lab(lab).tolist() == [1, 1, 0, 2, 0, 2, 0, 2]

def test_shares_by_counting_one_pixel_at_a_time():
    g = torch.Generator().manual_seed(0)
    images, masks = torch.rand(3, 3, 9, 7, generator=g), torch.rand(3, 9, 7, generator=g) > 0.4
    colors, tones = color_shares(images, masks)
    lab, palette = rgb_to_lab(images.permute(0, 2, 3, 1)), rgb_to_lab(palette_rgb())
    for b in range(3):
        count = torch.zeros(40)
        for pixel in lab[b][masks[b]]: count[(palette - pixel).norm(dim=1).argmin()] += 1
        torch.testing.assert_close(colors[b], count / masks[b].sum())
    torch.testing.assert_close(tones.sum(1), torch.ones(3))


def test_any_picture_obeys_the_schema():
    g = torch.Generator().manual_seed(1)
    coarse = torch.nn.functional.interpolate(torch.rand(64, 3, 3, 3, generator=g), size=(32, 32))
    for colors, tones in verbalize_colors(torch.cat([coarse, torch.rand(16, 3, 32, 32, generator=g)])):
        from boig.data.verbalization import Verbalization
        assert problems(Verbalization(colors, tones)) == []


def test_perception_says_what_is_wrong():
    with pytest.raises(BoigError, match=r"\[B, 3, H, W\]"): color_shares(torch.rand(3, 8, 8))
    with pytest.raises(BoigError, match="divide 8-bit pictures by 255"): color_shares(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(BoigError, match="floats in"): color_shares(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(BoigError, match="mask is empty"): color_shares(torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))


def test_emojibench_is_the_documented_join(data):
    assert len(data) == 747 and data.hexcode.is_unique and data.uses.sum() == 148_454
    assert (data.uses == data.negative + data.neutral + data.positive).all()
    assert (data.uses >= 5).sum() == 623 and (data.uses >= 20).sum() == 406
    top = data.iloc[0]
    assert (top["name"], top.uses, top.negative, top.neutral, top.positive) == ("face with tears of joy", 14622, 3614, 4163, 6845)


def test_datasets_opens_it_with_pictures(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from boig.zoo import resolve
    rows = datasets.load_dataset("parquet", data_files=str(resolve("emojibench")), split="train", cache_dir=str(tmp_path))
    assert rows[1]["image"].size == (64, 64) and rows[1]["name"] == "red heart"


def test_no_word_of_the_name_in_what_is_asked(data):
    "By another rule than the code's: no shared word, and no shared first five letters of longer words."
    split = lambda text: {w for w in re.split(r"[^a-z0-9]+", text.lower()) if w}
    for _, r in data.iterrows():
        asked, name = split(" ".join(describe(r))), split(r["name"])
        assert not asked & name, (r["name"], asked & name)
        assert not {w[:5] for w in asked if len(w) > 5} & {w[:5] for w in name if len(w) > 5}, (r["name"], asked)


@pytest.mark.parametrize("text, name", [("smile", "smiling face"), ("wave", "waving hand"), ("winks", "winking face"), ("raised", "raising hands"), ("plane", "airplane"),
                                        ("flower", "sunflower"), ("burger", "hamburger"), ("running", "person running"), ("babies", "baby"), ("boxes", "box")])
def test_stems_give_away(text, name): assert gives_away(text, name)


def test_buckets_are_ordered_and_keep_ties_together():
    uses = np.random.default_rng(0).geometric(0.1, 500)
    bucket = use_buckets(uses)
    assert pd.DataFrame({"u": uses, "b": bucket}).groupby("u").b.nunique().max() == 1
    tops = [uses[bucket == b].max() for b in ("low", "medium", "high")]
    assert tops == sorted(tops) and all((bucket == b).mean() > 0.2 for b in ("low", "medium", "high"))


@pytest.mark.parametrize("seed", range(5))
def test_splits_move_whole_subgroups(data, seed):
    held = split_by_subgroup(data, 0.3, seed)
    assert not set(zip(data.group[held], data.subgroup[held])) & set(zip(data.group[~held], data.subgroup[~held]))
    assert 0.2 < held.mean() < 0.4


def test_benchmark_is_the_same_every_time_and_valid():
    a, b = build_benchmark(100, seed=1), build_benchmark(100, seed=1)
    pd.testing.assert_frame_equal(a.drop(columns=["image", "tags"]), b.drop(columns=["image", "tags"]))
    assert (build_benchmark(100, seed=2).split != a.split).any()
    for text in a.verbalization:
        assert parse(text).clean and problems(parse(text).value, (64, 64)) == []


def test_nothing_is_held_out_of_nothing(data):
    assert not split_by_subgroup(data, 0, 1).any()
    with pytest.raises(BoigError, match="leave nothing for"): build_benchmark(4)


def test_box_of_a_drawing():
    alpha = np.zeros((10, 12), np.uint8)
    alpha[2:5, 3:9] = 255
    assert drawing_box(alpha) == (3, 2, 9, 5)


def test_palette_names_are_listing_ones():
    import json
    from pathlib import Path
    text = json.loads((Path(__file__).parent/"data"/"boig_listings.json").read_text(encoding="utf-8"))["1"]["input"]
    assert f"Allowed colours: {list(COLOR_NAMES)}" in text


def test_croissant_describes_the_shipped_file():
    import json
    from boig.core import project_root, sha256_file
    from boig.zoo import resolve
    path = project_root()/"data_cards"/"emojibench.croissant.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    file, = card["distribution"]
    assert file["sha256"] == sha256_file(resolve("emojibench")) and (path.parent/file["contentUrl"]).resolve().samefile(resolve("emojibench"))
    assert [f["source"]["extract"]["column"] for f in card["recordSet"][0]["field"]] == list(pd.read_parquet(resolve("emojibench")).columns)
    for key in ("name", "description", "license", "citeAs", "rai:dataBiases", "rai:dataLimitations", "rai:personalSensitiveInformation"): assert card[key]
    mlcroissant = pytest.importorskip("mlcroissant")
    first = next(iter(mlcroissant.Dataset(jsonld=str(path)).records("drawings")))
    assert first["drawings/name"] == b"face with tears of joy" and first["drawings/uses"] == 14622
