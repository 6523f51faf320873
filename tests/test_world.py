"The pocket world, its oracle and its market."
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from boig.core import BoigError
from boig.benches import market, x_api
from boig.data import world
from boig.benches.market import FUNNEL, make_stock, make_tweets, seen, snowflake, write_market
from boig.data.palette import COLOR_NAMES, PALETTE_HEX, nearest_color
from boig.data.verbalization import Verbalization, problems
from boig.data.world import (BACKGROUNDS, KPIS, STYLES, Context, Placed, Scene, accounts, caption, expected, explain, load_sprites, oracle_constants,
                             overlap, pixel_box, random_scene, recolor, render, season_of_tones, season_table, sprite_layer, trait, truth)
from boig.perception.colors import verbalize_colors

BRANDS = [a for a, r in accounts().items() if r["kind"] == "brand"]
DAY = datetime.date(2021, 6, 15)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(400)]

@pytest.fixture(scope="module")
def tweets(): return make_tweets(4000, seed=3)

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_market(tmp_path_factory.mktemp("market")/"pocket", tweets=900, stock=300, seed=5)

def pages_of(folder): return [json.loads(l) for l in (folder/"twitter"/"pages.jsonl").read_text().splitlines()]


# The world

def test_the_world_is_large_enough():
    sprites = load_sprites()
    assert len(sprites) >= 48 and {"cat", "dog", "teddy bear", "monster toy", "pot", "cup", "motorbike", "bike"} <= set(sprites)
    assert all(len(n.split()) <= 2 for n in sprites) and {m for s in sprites.values() for m in s.months} == set(range(1, 13))
    sectors = pd.Series([accounts()[a]["sector"] for a in BRANDS]).value_counts()
    assert len(BRANDS) >= 24 and len(sectors) == 6 and sectors.min() >= 4
    assert all(c in PALETTE_HEX for r in accounts().values() for c in r.get("colors", ()))
    assert sorted(c for names in oracle_constants()["families"].values() for c in names) == sorted(COLOR_NAMES)

def test_a_recoloured_sprite_has_that_colour():
    for s in load_sprites().values():
        for c in s.colors:
            fill = world.fill_color(recolor(s.image, c))
            assert COLOR_NAMES[nearest_color(torch.tensor(fill / 255, dtype=torch.float32))] == c or c == "Black", (s.name, c, fill)

def test_boxes_are_those_of_the_opaque_pixels(scenes):
    for scene in scenes[:150]:
        for size in (64, 37, 128):
            for o in scene.objects:
                x1, y1, x2, y2 = pixel_box(o.box, size)
                _, alpha = sprite_layer(o.name, o.color, scene.style, x2 - x1, y2 - y1)
                canvas = np.zeros((size, size)); canvas[y1:y2, x1:x2] = alpha[..., 0]
                ys, xs = np.nonzero(canvas > 0.5 * 254 / 255)
                assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == truth(scene, size)[o.name]

def test_objects_overlap_little(scenes):
    def iou(a, b):
        inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        return inter / (sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)) - inter)
    for s in scenes:
        boxes = [o.box for o in s.objects]
        assert 1 <= len(boxes) <= 4
        assert all(iou(a, b) <= 0.2 and overlap(a, b) <= 0.2 for i, a in enumerate(boxes) for b in boxes[:i])

def test_drawing_is_deterministic_and_every_style_differs(scenes):
    again = np.random.default_rng(0)
    assert [random_scene(again) for _ in range(20)] == scenes[:20]
    for background in BACKGROUNDS:
        colors = ("Light_Blue",) if background == "plain" else ("Light_Blue", "Pink")
        drawn = [render(Scene(background, colors, s, (Placed("car", "Red", (10, 20, 50, 40)),))) for s in STYLES]
        assert all(d.shape == (64, 64, 3) and d.dtype == np.uint8 for d in drawn)
        assert len({d.tobytes() for d in drawn}) == len(STYLES)

def test_a_plain_background_is_the_palettes_colour():
    for c in COLOR_NAMES: assert "#" + bytes(render(Scene("plain", (c,), "plain", ()))[0, 0]).hex() == PALETTE_HEX[c]

def test_a_caption_says_everything(scenes):
    for s in scenes:
        text = caption(s)
        assert all(o.name in text and o.color.replace("_", " ").lower() in text for o in s.objects)
        assert all(c.replace("_", " ").lower() in text for c in s.colors) and (s.style == "plain" or s.style in text)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text

@pytest.mark.parametrize("arguments, message", [
    (("plian", ("Red",), "plain", ()), "Did you mean 'plain'"), (("plain", ("Rde",), "plain", ()), "Unknown colour"),
    (("plain", ("Red", "Blue"), "plain", ()), "takes 1 colour, not 2"), (("plain", ("Red",), "oil", ()), "Unknown style"),
    (("plain", ("Red",), "plain", (Placed("cta", "", (0, 0, 9, 9)),)), "Did you mean 'cat'"), (("plain", ("Red",), "plain", (Placed("cat", "Blue", (0, 0, 9, 9)),)), "colour of cat"),
    (("plain", ("Red",), "plain", (Placed("cat", "", (0, 0, 9, 70)),)), "not in the picture"), (("plain", ("Red",), "plain", (Placed("cat", "", (0, 0, 9, 9)),) * 2), "twice")])
def test_a_wrong_scene_says_why(arguments, message):
    with pytest.raises(BoigError, match=message): Scene(*arguments)

def test_drawing_is_fast():
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    for _ in range(600): render(random_scene(rng))
    assert time.perf_counter() - start < 6  # 12,000 in two minutes, on a machine that does something else too


# The oracle

def test_the_terms_sum_to_the_oracle(scenes):
    for v in seen(scenes[:40]):
        for kpi, kind in KPIS.items():
            who = next(a for a, r in accounts().items() if r["kind"] == kind)
            terms = explain(v, Context(who, DAY), kpi)
            assert math.isclose(sum(terms.values()), math.log(expected(v, Context(who, DAY), kpi)))
            assert set(terms) >= {"account", "colours", "tones", "objects", "season", "layout"} and not any("aesthetic" in t for t in terms)

def test_constants_are_fixed():
    "Whoever changes the oracle must raise its version, and these numbers."
    v = Verbalization({"Red": 0.6, "White": 0.4}, {"warm": 0.6, "neutral": 0.4, "cool": 0}, {"teddy bear": (10, 10, 50, 50), "gift": (45, 2, 62, 20)})
    assert world.ORACLE_VERSION == oracle_constants()["version"] == 1
    assert trait("demo") == pytest.approx(0.184226744969, abs=1e-9)
    assert expected(v, Context("toybarn", datetime.date(2020, 12, 1))) == pytest.approx(35.1144700265, rel=1e-9)

def test_what_nobody_knows_adds_nothing():
    v = Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"car": (5, 5, 40, 40)})
    more = Verbalization({"Red": 1.0, "Blurple": 0.5}, v.tones | {"spicy": 1.0}, v.objects | {"zeppelin": (0, 0, 64, 64), "whatever": (1, 1, 2, 2), "third": (3, 3, 4, 4)})
    for a in BRANDS: assert explain(v, Context(a, DAY)) == explain(more, Context(a, DAY))
    empty = explain(Verbalization({}, {}, {}), Context("toybarn", DAY))
    assert all(x == 0 for t, x in empty.items() if t != "account")

def test_resolution_does_not_matter(scenes):
    v = seen(scenes[:1])[0]
    large = Verbalization(v.colors, v.tones, {n: tuple(50 * x for x in b) for n, b in v.objects.items()})
    a, b = expected(v, Context("toybarn", DAY)), expected(large, Context("toybarn", DAY, (3200, 3200)))
    assert math.isclose(a, b, rel_tol=1e-9)

def test_season_is_centred(scenes):
    for o in load_sprites(): assert abs(sum(season_table()[o, m] for m in range(1, 13))) < 1e-9
    for m in range(1, 13): assert abs(sum(season_table()[o, m] for o in load_sprites())) < 1e-9
    for t in ("warm", "neutral", "cool"): assert abs(sum(season_of_tones({t: 1.0}, m) for m in range(1, 13))) < 1e-9

def test_no_month_is_better_as_such():
    "The mean season term of a month differs from zero by less than 2% of the spread of the content, for random content."
    rng = np.random.default_rng(8)
    views = seen([random_scene(rng) for _ in range(4000)])
    months = [datetime.date(2021, m, 1) for m in range(1, 13)]
    terms = np.array([[sum(world.content(v, Context(BRANDS[i % len(BRANDS)], d)).values()) for d in months] for i, v in enumerate(views)])
    assert np.abs(terms.mean(0) - terms.mean()).mean() < 0.02 * terms.std()

def test_season_changes_which_content_does_well():
    def ad(name): return Verbalization({"White": 1.0}, {"warm": 0, "neutral": 1.0, "cool": 0}, {name: (16, 16, 48, 48)})
    def gain(name, month): return explain(ad(name), Context("toybarn", datetime.date(2021, month, 1)))["season"]
    assert gain("Christmas tree", 12) > 0.5 > 0 > gain("Christmas tree", 6) and gain("sunglasses", 7) > 0.3 > gain("sunglasses", 1)

def test_the_oracle_says_what_is_wrong():
    v = Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0})
    with pytest.raises(BoigError, match="toybarn"): expected(v, Context("toybran", DAY))
    with pytest.raises(BoigError, match="Did you mean 'likes'"): expected(v, Context("toybarn", DAY), "like")
    with pytest.raises(BoigError, match="belong to a contributor"): expected(v, Context("toybarn", DAY), "downloads")


# The market

def test_the_market_sees_what_perception_sees(scenes):
    found = seen(scenes)
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2) / 255
    assert [(v.colors, v.tones) for v in found] == verbalize_colors(images)
    assert not any(problems(v, (64, 64)) for v in found) and all(v.objects == truth(s) for v, s in zip(found, scenes))

def test_likes_are_counts_with_a_heavy_tail(tweets):
    likes = pd.Series([t.likes for t in tweets])
    assert all(isinstance(t.likes, int) and t.likes >= 0 for t in tweets)
    assert likes.nlargest(len(likes) // 10).sum() > 0.4 * likes.sum()
    medians = likes.groupby([t.account for t in tweets]).median().sort_values()
    assert len(medians) == len(BRANDS) and medians.iloc[-1] > 20 * medians.iloc[2]

def test_luck_has_mean_one(tweets):
    ratio = np.array([t.likes / math.exp(sum(t.terms.values())) for t in tweets if sum(t.terms.values()) > 2])
    assert abs(ratio.mean() - 1) < 0.06

def test_content_and_luck_both_matter(tweets):
    frame = pd.DataFrame([dict(a=t.account, log=math.log1p(t.likes), content=sum(t.terms.values())) for t in tweets if t.media == "photo"])
    within = frame[["log", "content"]] - frame.groupby("a").transform("mean")
    assert 0.25 < within.log.corr(within.content) ** 2 < 0.5
    rank = frame.groupby("a").log.rank(pct=True)
    assert within.content[rank > 0.9].mean() - within.content[rank <= 0.6].mean() > 0.5

def test_the_market_has_no_seasonal_level(tweets):
    frame = pd.DataFrame([dict(a=t.account, m=t.time.month, log=math.log1p(t.likes)) for t in tweets])
    above = frame.log - frame.groupby("a").log.transform("mean")
    assert above.groupby(frame.m).mean().var() < 0.02 * above.var()

def test_texts_leave_looks_open(tweets):
    looks = {c.replace("_", " ").lower() for c in COLOR_NAMES} - {"orange", "gold"} | {"warm", "cool", "gradient", "outline"}
    for t in tweets:
        text = " " + re.sub(r"[^a-z ]", " ", t.text.split("#")[0].lower().replace("ice cream", "")) + " "
        assert not any(f" {c} " in text for c in looks - {"black"}) and text.count(" black ") == text.count(" black friday ")
        if t.scenes: assert next(iter(truth(t.scenes[0]))).lower() in t.text.lower()
    for a in make_stock(200, seed=2):
        words = re.sub("black friday|(ice )?cream", "", f"{a.caption}, {a.keywords}".lower())
        assert not any(re.search(rf"\b{c}\b", words) for c in looks)

def test_kinds_of_tweets(tweets):
    share = pd.Series([t.media for t in tweets]).value_counts(normalize=True)
    assert set(share.index) == {"photo", "video", "animated_gif", ""} and share["photo"] > 0.7 and share.min() > 0.02
    assert {len(t.scenes) for t in tweets if t.media == "photo"} == {1, 2, 3, 4} and any(t.repeats for t in tweets)
    assert min(t.time for t in tweets).year == 2018 and max(t.time for t in tweets).year == 2022

def test_pages_are_those_of_the_api(folder):
    seen_media, ids, handles, repeats = {}, [], set(), 0
    for page in pages_of(folder):
        assert set(page) == {"data", "includes", "meta"} and 1 <= page["meta"]["result_count"] == len(page["data"]) <= 100
        media = page["includes"].get("media", [])
        here, users = {m["media_key"]: m for m in media}, {u["id"]: u["username"] for u in page["includes"]["users"]}
        assert len(here) == len(media)
        stamps = [t["created_at"] for t in page["data"]]
        assert stamps == sorted(stamps, reverse=True)
        for t in page["data"]:
            ids.append(t["id"]); handles.add(users[t["author_id"]])
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.000Z", t["created_at"]) and t["lang"] == "en"
            assert isinstance(t["public_metrics"]["like_count"], int) and t["public_metrics"]["like_count"] >= 0
            assert t["attachments"]["media_keys"] if "attachments" in t else True
            for key in t.get("attachments", {}).get("media_keys", []):
                m = here[key]
                repeats += key in seen_media and seen_media[key] != t["id"]; seen_media[key] = t["id"]
                assert m["type"] in ("photo", "video", "animated_gif") and ("url" in m) == (m["type"] == "photo") and m["width"] == 64
                assert (folder/"twitter"/"media"/f"{key}.png").is_file() == (m["type"] == "photo")
            for kind, name in (("urls", "url"), ("hashtags", "tag")):
                for e in t["entities"].get(kind, []): assert t["text"][e["start"]:e["end"]] == ("#" if kind == "hashtags" else "") + e[name]
            assert "{link}" not in t["text"]
    assert len(ids) == len(set(ids)) == 900 and handles == set(BRANDS) and repeats > 0
    assert len(list((folder/"twitter"/"media").iterdir())) == sum(k.startswith("3_") for k in seen_media)

def test_next_token_chains_the_pages_of_an_account(tweets):
    rows = market.to_api([t for t in tweets if t.account == "toybarn"], seed=3)
    book = market.pages("toybarn", rows)
    assert len(book) > 2 and all("next_token" in p["meta"] for p in book[:-1]) and "next_token" not in book[-1]["meta"]
    assert [d["id"] for p in book for d in p["data"]] == [r[0]["id"] for r in rows[::-1]]

def test_texts_are_escaped_as_x_does(tweets):
    own = [t for t in tweets if "&" in t.text][:1]
    (row, _, _), = market.to_api(own, seed=3)
    assert own and "&amp;" in row["text"] and not re.search("&(?!amp;|lt;|gt;)", row["text"])
    ((_, _, _, _, text, *_), *_), = x_api.page_rows(market.pages(own[0].account, market.to_api(own, seed=3))[0], x_api.Summary())
    assert text.startswith(own[0].text.split("{link}")[0])

def test_snowflakes_carry_the_time():
    t = datetime.datetime(2022, 12, 5, 14, 3)
    assert (int(snowflake(t, 7)) >> 22) + 1288834974657 == t.replace(tzinfo=datetime.timezone.utc).timestamp() * 1000

def test_stock_table(folder):
    table = pd.read_csv(folder/"stock"/"assets.csv", dtype={"asset_id": str})
    assert list(table) == ["asset_id", "file", "contributor", "caption", "keywords", "width", "height", "release_date", "downloads", "forwards", "impressions"]
    assert len(table) == 300 and table.asset_id.is_unique and all((folder/"stock"/f).is_file() for f in table.file)
    assert (table.impressions >= table.forwards).all() and (table.forwards >= table.downloads).all() and (table.downloads >= 0).all()
    assert table.release_date.between("2018-01-01", "2022-12-31").all() and set(table.contributor) <= set(accounts())

def test_expectations_narrow_too():
    for a in make_stock(300, seed=4): assert a.expected["impressions"] > a.expected["forwards"] > a.expected["downloads"] > 0 and list(a.kpis) == list(FUNNEL)

def test_truth_is_kept_apart(folder):
    facts = {f["tweet_id"]: f for f in map(json.loads, (folder/"truth"/"tweets.jsonl").read_text().splitlines())}
    assert all(facts[t["id"]]["likes"] == t["public_metrics"]["like_count"] for p in pages_of(folder) for t in p["data"])
    assert not any("scene" in p.read_text() for p in (folder/"twitter"/"pages.jsonl", folder/"stock"/"assets.csv"))
    assert json.loads((folder/"truth"/"about.json").read_text())["oracle_version"] == world.ORACLE_VERSION

def test_equal_arguments_equal_bytes(tmp_path):
    def content(path): return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    a, b, c = (content(write_market(tmp_path/n, tweets=60, stock=30, seed=s, malformed=2)) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b and a != c

def test_malformed_lines_lose_no_page(tmp_path):
    good = pages_of(write_market(tmp_path/"good", tweets=80, stock=0, seed=1))
    lines = (write_market(tmp_path/"bad", tweets=80, stock=0, seed=1, malformed=6)/"twitter"/"pages.jsonl").read_text().splitlines()
    assert len(lines) == len(good) + 6 and all(json.dumps(p, ensure_ascii=False) in lines for p in good)

def test_an_empty_market_is_a_market(tmp_path):
    out = write_market(tmp_path/"none", tweets=0, stock=0, malformed=3)
    assert (out/"twitter"/"pages.jsonl").read_text() == "" and len(pd.read_csv(out/"stock"/"assets.csv")) == 0

@pytest.mark.parametrize("bad", [{"tweets": -1}, {"stock": 1.5}, {"seed": "x"}, {"malformed": True}])
def test_bad_arguments_are_told(tmp_path, bad):
    with pytest.raises(BoigError, match=next(iter(bad))): write_market(tmp_path/"m", **bad)
    assert not (tmp_path/"m").exists()

def test_it_does_not_write_over_anything(tmp_path):
    (tmp_path/"m").mkdir(); (tmp_path/"m"/"mine.txt").write_text("mine")
    with pytest.raises(BoigError, match="already there"): write_market(tmp_path/"m", tweets=1, stock=1)
    assert (tmp_path/"m"/"mine.txt").read_text() == "mine"

def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(market, "make_stock", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_market(tmp_path/"m", tweets=5, stock=5)
    assert list(tmp_path.iterdir()) == []

def test_a_killed_run_leaves_no_market(tmp_path):
    code = f"from boig.benches.market import write_market; write_market({str(tmp_path/'m')!r}, tweets=20000, stock=0)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    for _ in range(600):
        if list(tmp_path.iterdir()): break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL); process.wait()
    assert not (tmp_path/"m").exists()
    assert len(list(write_market(tmp_path/"m", tweets=5, stock=5).iterdir())) == 3
