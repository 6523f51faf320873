"From raw pages to a benchmark's file: by hand, killed again and again, opened by others, shown on the page."
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from boig.benches.boigbench import Rules, choose_pictures
from boig.benches.build import Picture, look, write_benchmark
from boig.benches.cards import read_card, read_croissant, write_card, write_croissant
from boig.benches.instructions import BOIGBENCH, STOCK, desired, wished
from boig.benches.media import collect_media
from boig.benches.x_api import write_posts
from boig.core import BoigError, sha256_file
from boig.data.verbalization import Verbalization


def packed(n, size=(8, 6)):
    Image.new("RGB", size, (n % 256, n // 256, 99)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@dataclass
class Fake:
    "A verbalizer that answers from the first pixel; slow if asked, with a diary of one byte a picture."
    seconds: float = 0
    diary: Path | None = None
    counts: Counter = field(default_factory=Counter)
    def describe(self): return {"name": "fake"}
    def caption(self, pictures): return [f"a thing of {len(p)} bytes" for p in pictures]
    def __call__(self, pictures):
        for _ in pictures:
            time.sleep(self.seconds)
            if self.diary:
                with open(self.diary, "ab") as f: f.write(b".")
        reds = [Image.open(io.BytesIO(p)).getpixel((0, 0))[0] for p in pictures]
        return [Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"thing": (0, 0, 1 + r % 7, 6), "other": (0, 0, 1, 1)}) for r in reds]


def build(folder, rules, verbalizer, shard_rows=512):
    "What the notebook does with pages.jsonl and media/ of a folder."
    write_posts(folder/"pages.jsonl", folder/"posts.parquet")
    choose_pictures(folder/"posts.parquet", folder/"chosen.parquet", rules, threads=1)
    chosen = pd.read_parquet(folder/"chosen.parquet")
    media = collect_media(chosen, folder/"media", unpack=False)
    files = {i: media.files[k] for i, k in zip(chosen.id, chosen.media_key) if k in media.files}
    bench, left_out = look(chosen, files, folder/"seen", verbalizer, shard_rows=shard_rows)
    write_benchmark(bench, folder/"bench.parquet", group=64)
    write_card("boigbench", bench, folder/"bench.md", "a test", file="bench.parquet")
    return media, left_out


def page(tweets, gone=()):
    "Tweets (id, likes, media keys, text) as a page of X's API; 7_ is a video, 16_ a GIF."
    kinds = {"3": "photo", "7": "video", "16": "animated_gif"}
    keys = sorted({k for _, _, ks, _ in tweets for k in ks if k not in gone})
    return {"data": [{"id": i, "author_id": "1", "created_at": f"2021-05-{1 + int(i) % 28:02}T10:00:00.000Z", "text": text, "public_metrics": {"like_count": likes}, "attachments": {"media_keys": ks}}
                     for i, likes, ks, text in tweets],
            "includes": {"users": [{"id": "1", "username": "BrandOne"}], "media": [{"media_key": k, "type": kinds[k.split("_")[0]]} for k in keys]}, "meta": {}}

# -- by hand -----------------------------------------------------------------------------------------------------------------------------

ODD = "👩\u200d🚀 שלום e\u0301 'q' \"w\"; --"
TWEETS = [ # ten that count: by percentiles among them, 10 is high, 1 to 6 are low
    ("1", 0, ["3_1"], "nobody liked it"), ("2", 1, ["3_2"], ODD), ("3", 2, ["7_3"], "a video"), ("4", 3, ["16_4", "3_4"], "a GIF and a photo"), ("5", 4, ["3_5"], "its file is lost"),
    ("6", 5, ["3_6"], "its medium is not on the page"), ("7", 6, ["3_7"], "between"), ("8", 7, ["3_8"], "between"), ("9", 8, ["3_9"], "between"), ("10", 99, ["3_10", "3_11", "3_12", "3_13"], "four pictures")]


def test_a_hand_made_page_becomes_the_right_rows(tmp_path):
    first, again, gone = page(TWEETS, gone=("3_6",)), page([("10", 100, ["3_10", "3_11", "3_12", "3_13"], "four pictures")]), page([("11", 1000, ["3_1"], "whose author is gone")])
    gone["includes"]["users"] = []
    lines = [json.dumps(first), json.dumps(first)[:90], json.dumps(again), '{"errors": [{"title": "Too Many Requests"}]}', json.dumps(gone)]
    (tmp_path/"pages.jsonl").write_text("\n".join(lines))
    (tmp_path/"media").mkdir()
    for n in (1, 2, 4, 7, 8, 9, 10, 11, 12, 13): (tmp_path/"media"/f"3_{n}.png").write_bytes(packed(n, (8 + n, 6)))
    Image.effect_noise((20, 6), 99).save(tmp_path/"media"/"3_12.png")
    os.truncate(tmp_path/"media"/"3_12.png", 100)  # a download that broke off
    media, left_out = build(tmp_path, Rules(min_tweets=10, accounts=0, pictures=0, test=0, valid=0, balance=False), Fake())
    bench = pd.read_parquet(tmp_path/"bench.parquet")
    rows = [(r.id, r.bucket, r.likes, r.number, r["image resolution"]) for _, r in bench.iterrows()]
    assert rows == [("1_3_1", "low", 0, 1, "(9, 6)"), ("2_3_2", "low", 1, 1, "(10, 6)"), ("4_3_4", "low", 3, 1, "(12, 6)"),
                    ("10_3_10", "high", 100, 1, "(18, 6)"), ("10_3_11", "high", 100, 2, "(19, 6)"), ("10_3_13", "high", 100, 4, "(21, 6)")]
    assert bench.text[1] == ODD and set(bench.account) == {"brandone"} and set(bench.split) == {"train"} and list(bench.subgroup) == list(bench.tweet_id)
    assert list(bench.keywords.unique()) == ["thing"] and bench.captions.str.startswith("a thing of").all()  # of thing and other, what the caption names
    assert [x["bytes"] for x in bench.image] == [(tmp_path/"media"/f"3_{n}.png").read_bytes() for n in (1, 2, 4, 10, 11, 13)]
    assert media.summary().pictures.to_dict() == {"there before": 7, "fetched": 0, "left out: no file": 1}  # the cut-off one looks like a picture until it is opened
    assert left_out == {"there is no picture": 1, "the picture is damaged": 1}


def test_nothing_to_look_at_is_said(tmp_path):
    rows = pd.DataFrame({"id": ["a", "b"]})
    (tmp_path/"b.png").write_bytes(b"<html>")
    with pytest.raises(BoigError, match=r"None of 2 pictures can be used: there is no picture \(1\), .*in no format.* \(1\)"): look(rows, {"b": tmp_path/"b.png"}, tmp_path/"seen", Fake())

# -- killed ------------------------------------------------------------------------------------------------------------------------------

RULES = Rules(min_tweets=5, accounts=0, pictures=0, test=0.2)


def kill_often(folder, times=10, step=8):
    "Whole builds that get SIGKILL while they look at pictures; then one that may end."
    rng, diary = random.Random(int(time.time())), folder/"diary"
    diary.touch()
    for n in range(times + 1):
        before = diary.stat().st_size
        if (pid := os.fork()) == 0:
            build(folder, RULES, Fake(0.002 * (n < times), diary), shard_rows=4)
            os._exit(0)
        if n < times:
            until = before + 1 + rng.randrange(step)
            while diary.stat().st_size < until: time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"killed": os.WIFSIGNALED(status), "ended well": status == 0, "file": (folder/"bench.parquet").exists()}), flush=True)


def test_kill_nine_ten_times(tmp_path):
    rng = np.random.default_rng(3)
    tweets = [(str(i), int(rng.integers(0, 500)), [f"3_{i}_{k}" for k in range(1 + i % 2)], f"tweet {i}") for i in range(1, 401)]
    for name in ("killed", "undisturbed"):
        (tmp_path/name/"media").mkdir(parents=True)
        (tmp_path/name/"pages.jsonl").write_text(json.dumps(page(tweets)))
        for i, (_, _, keys, _) in enumerate(tweets):
            for key in keys: (tmp_path/name/"media"/f"{key}.png").write_bytes(packed(i))
    out = subprocess.run([sys.executable, __file__, str(tmp_path/"killed")], capture_output=True, text=True, timeout=240, check=True).stdout
    story = [json.loads(line) for line in out.splitlines()]
    assert [s["killed"] for s in story] == [True] * 10 + [False] and story[-1]["ended well"] and [s["file"] for s in story] == [False] * 10 + [True], out
    build(tmp_path/"undisturbed", RULES, Fake(), shard_rows=4)
    for name in ("bench.parquet", "bench.md", "chosen.parquet"): assert sha256_file(tmp_path/"killed"/name) == sha256_file(tmp_path/"undisturbed"/name), name
    rows = len(pd.read_parquet(tmp_path/"killed"/"bench.parquet", columns=["id"]))
    assert rows > 90 and rows <= (tmp_path/"killed"/"diary").stat().st_size < 2 * rows  # what was seen before a kill stayed seen

# -- the file ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def table():
    rows = 7
    return pd.DataFrame({"id": [f"{i}" for i in range(rows)], "likes": range(rows), "created_at": pd.to_datetime("2021-05-04 10:00"), "alt_text": None, "text": "Wörds 🎉", "bucket": ["high", "low"] * 3 + ["low"], "split": "train",
                         "image": [{"bytes": packed(i), "path": f"{i}.png"} for i in range(rows)]})


def test_datasets_opens_it_with_pictures(table, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'boig[dev]'")
    write_benchmark(table, tmp_path/"b.parquet", group=3)
    data = datasets.load_dataset("parquet", data_files=str(tmp_path/"b.parquet"), split="train", cache_dir=str(tmp_path/"cache"))
    assert data.features["image"] == datasets.Image() and data[4]["image"].getpixel((0, 0)) == (4, 0, 99) and data[4]["text"] == "Wörds 🎉" and data["likes"][:] == list(range(7))


def test_large_pictures_make_small_groups(tmp_path):
    "Arrow reads no group with more than 2 GB of pictures: neither pandas nor datasets could open it."
    sizes, groups = [600] * 3 + [5000] + [100] * 600, lambda p: [p.metadata.row_group(i).num_rows for i in range(p.num_row_groups)]
    table = pd.DataFrame({"id": range(len(sizes)), "image": [{"bytes": bytes(n), "path": "x.png"} for n in sizes]})
    write_benchmark(table, tmp_path/"a.parquet", size=1500)
    assert groups(pq.ParquetFile(tmp_path/"a.parquet"))[:5] == [2, 1, 1, 15, 15] and pd.read_parquet(tmp_path/"a.parquet").image.map(lambda x: len(x["bytes"])).tolist() == sizes
    write_benchmark(table, tmp_path/"b.parquet")
    assert groups(pq.ParquetFile(tmp_path/"b.parquet")) == [256, 256, len(sizes) - 512]


def test_the_file_is_whole_typed_and_repeatable(table, tmp_path):
    for name, group in (("a", 3), ("b", 3)): write_benchmark(table, tmp_path/f"{name}.parquet", group=group)
    assert sha256_file(tmp_path/"a.parquet") == sha256_file(tmp_path/"b.parquet")
    assert pq.ParquetFile(tmp_path/"a.parquet").num_row_groups == 3 and pq.read_schema(tmp_path/"a.parquet").field("alt_text").type == pa.string()
    back = pd.read_parquet(tmp_path/"a.parquet")
    assert back.likes.tolist() == list(range(7)) and back.alt_text.isna().all() and (back.created_at == pd.Timestamp("2021-05-04 10:00")).all()
    for i in range(7): (tmp_path/f"{i}.png").write_bytes(packed(i))
    write_benchmark(table.assign(image=[Picture(tmp_path/f"{i}.png") for i in range(7)]), tmp_path/"c.parquet", group=3)
    assert sha256_file(tmp_path/"c.parquet") == sha256_file(tmp_path/"a.parquet")
    (tmp_path/"5.png").unlink()
    with pytest.raises(FileNotFoundError): write_benchmark(table.assign(image=[Picture(tmp_path/f"{i}.png") for i in range(7)]), tmp_path/"d.parquet", group=3)
    assert not (tmp_path/"d.parquet").exists() and not list(tmp_path.glob(".*tmp*"))


def test_a_card_of_another_file_name(tmp_path):
    pytest.importorskip("mlcroissant", reason="mlcroissant is not installed: pip install 'boig[cards]'")
    data = pd.DataFrame({"id": ["1", "2"], "contributor": "x", "captions": "c", "keywords": "k", "release date": "2020-01-02", "downloads": 1, "forwards": [9, 2], "impressions": 9, "image resolution": "(8, 6)",
                         "verbalization": Fake()([packed(1)])[0].to_json(), "bucket": ["high", "low"], "subgroup": ["1", "2"], "split": "train", "image": [{"bytes": packed(i), "path": "p.png"} for i in (1, 2)]})
    write_benchmark(data, tmp_path/"pocket_stock.parquet")
    card = write_card("stock", data, tmp_path/"pocket_stock.md", "a test", file="pocket_stock.parquet")
    read = read_card(card)
    assert read.front["configs"][0]["data_files"] == read.columns[0].file == "pocket_stock.parquet" and "| pictures | 2 | 1 | 1 |" in card.read_text()
    records = read_croissant(write_croissant(card, tmp_path/"pocket_stock.croissant.json", tmp_path/"pocket_stock.parquet"))["assets"]
    assert [r["assets/id"] for r in records] == [b"1", b"2"] and records[0]["assets/image"].size == (8, 6)

# -- wishes ------------------------------------------------------------------------------------------------------------------------------

def test_a_wish_takes_the_place_of_what_happened():
    stock = pd.DataFrame({"downloads": [9, 5, 1, 0], "forwards": [90, 50, 10, 3], "impressions": [900, 500, 100, 30], "bucket": ["high", "high", "low", "low"], "split": ["train", "train", "train", "test"]})
    asked = wished(stock[stock.split == "test"], stock, STOCK)
    assert STOCK.behaviour(asked.iloc[0]) == desired(stock, STOCK) == {"downloads": 7, "forwards": 70, "impressions": 700} and stock.forwards[3] == 3
    tweets = pd.DataFrame({"account": ["a", "a", "b", "b", "a", "b"], "likes": [1000, 1, 10, 0, 2, 1], "bucket": ["high", "low"] * 2 + ["low"] * 2, "split": ["train"] * 4 + ["test"] * 2})
    rows = tweets[tweets.split == "test"]
    assert wished(rows, tweets, BOIGBENCH)[["likes", "bucket"]].values.tolist() == [[505, "high"]] * 2
    assert wished(rows, tweets, BOIGBENCH, by="account")[["likes", "bucket"]].values.tolist() == [[1000, "high"], [10, "high"]]
    assert wished(rows, tweets, BOIGBENCH, bucket="low", by="account").likes.tolist() == [1, 0]
    with pytest.raises(BoigError, match="No training row"): wished(rows.assign(account="c"), tweets, BOIGBENCH, by="account")

# -- the page ----------------------------------------------------------------------------------------------------------------------------

def test_the_page_shows_the_data_sets(tmp_path):
    from boig.report import write_report
    (tmp_path/"tables").mkdir()
    (tmp_path/"figures").mkdir()
    (tmp_path/".boig.lock").touch()  # as a run leaves it
    assert "The data: Stock" in write_report(tmp_path).read_text() and "Table 4 of BOIG" not in write_report(tmp_path).read_text()
    pd.DataFrame({"line": ["pictures", "likes, mean"], "all": [4000, 12.5], "high": [2000, 99.25], "paper, high": [35649, None], "scale": "pocket", "seed": 42, "n": 4000}).to_csv(tmp_path/"tables"/"boigbench_statistics.csv", index=False)
    pd.DataFrame({"KPI": ["high"], "n": [2000], "# objects": [2.31], "pocket-aesthetic <b>": [0.1], "scale": "pocket", "seed": 42}).to_csv(tmp_path/"tables"/"boig_table3.csv", index=False)
    (tmp_path/"figures"/"boig_figure8.png").write_bytes(packed(1))
    page = write_report(tmp_path).read_text()
    assert "<td>4,000</td>" in page and "<td>35,649</td>" in page and "Table 3 of BOIG: the true pictures" in page and "<td>2.31</td>" in page
    assert "pocket-aesthetic &lt;b&gt;" in page and "(Fig. 8)" in page and "(Fig. 9)" not in page and page.count("data:image/png") == 1


if __name__ == "__main__": kill_often(Path(sys.argv[1]))
