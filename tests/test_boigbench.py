"From pages of X's API to BoigBench: reading, thresholds, balance, split; handles and the full archive."
import gc
import gzip
import importlib.util
import json
import logging
import re
import tracemalloc
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import duckdb
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boig.benches import x_api
from boig.benches.boigbench import MIX, RANKS, RULES, Rules, choose_pictures, find_thresholds, spin
from boig.benches.x_api import POSTS, Summary, own_handles, page_rows, pull, wikidata_handles, write_posts
from boig.core import BoigError, derive_seed

# --- A page file by hand ---------------------------------------------------------------------------------------------------------------------------------

HAND = [
    # A tweet with four pictures; a video; a GIF beside a picture; no media and no like; an author who is gone
    rb'''{"data": [
{"id": "101", "author_id": "1", "created_at": "2020-05-01T10:00:00.000Z", "text": "Four", "public_metrics": {"like_count": 40}, "attachments": {"media_keys": ["3_1", "3_2", "3_3", "3_4"]}},
{"id": "102", "author_id": "1", "created_at": "2020-05-02T10:00:00.000Z", "text": "Film", "public_metrics": {"like_count": 7}, "attachments": {"media_keys": ["7_1"]}},
{"id": "103", "author_id": "2", "created_at": "2020-05-03T12:00:00.000+02:00", "text": "Both", "public_metrics": {"like_count": 8}, "attachments": {"media_keys": ["16_1", "3_5"]}},
{"id": "104", "author_id": "2", "created_at": "2020-05-04T10:00:00.000Z", "text": "Nothing", "public_metrics": {"like_count": 0}},
{"id": "105", "author_id": "9", "created_at": "2020-05-05T10:00:00.000Z", "text": "Gone", "public_metrics": {"like_count": 5}, "attachments": {"media_keys": ["3_5"]}}],
"includes": {"users": [{"id": "1", "username": "BrandOne", "name": "One"}, {"id": "2", "username": "brand_two", "name": "Two"}],
"media": [{"media_key": "3_1", "type": "photo", "url": "https://pbs.twimg.com/media/a.jpg", "width": 1200, "height": 675, "alt_text": "A"},
{"media_key": "3_2", "type": "photo", "url": "https://pbs.twimg.com/media/b.jpg"}, {"media_key": "3_3", "type": "photo", "url": "https://pbs.twimg.com/media/c.jpg"},
{"media_key": "3_4", "type": "photo", "url": "https://pbs.twimg.com/media/d.jpg"}, {"media_key": "3_5", "type": "photo", "url": "https://pbs.twimg.com/media/e.jpg"},
{"media_key": "7_1", "type": "video", "preview_image_url": "https://pbs.twimg.com/preview/f.jpg"}, {"media_key": "16_1", "type": "animated_gif"}]},
"meta": {"result_count": 5, "next_token": "x"}}''',
    # Broken: cut off
    b'{"data": [{"id": "901", "author_id": "1", "text": "cut o',
    # The first tweet again, with more likes; a picture that only another page includes; odd text, no like, no url; the last one a second time
    rb'''{"data": [
{"id": "101", "author_id": "1", "created_at": "2020-05-01T10:00:00.000Z", "text": "Four", "public_metrics": {"like_count": 44}, "attachments": {"media_keys": ["3_1", "3_2", "3_3", "3_4"]}},
{"id": "106", "author_id": "1", "created_at": "2020-05-06T10:00:00.000Z", "text": "Lost one", "public_metrics": {"like_count": 3}, "attachments": {"media_keys": ["3_5", "3_1"]}},
{"id": "107", "author_id": "1", "created_at": "2020-05-07T10:00:00.000Z", "text": "\ud83d\udc69\u200d\ud83d\ude80 \u05e9\u05dc\u05d5\u05dd e\u0301 \ud83d! \u0000a\nb 'q' \"w\" ; --", "public_metrics": {"like_count": 0}, "attachments": {"media_keys": ["3_6"]}},
{"id": "106", "author_id": "1", "created_at": "2020-05-06T10:00:00.000Z", "text": "Lost one", "public_metrics": {"like_count": 4}, "attachments": {"media_keys": ["3_5", "3_1"]}}],
"includes": {"users": [{"id": "1", "username": "BrandOne", "name": "One"}],
"media": [{"media_key": "3_1", "type": "photo", "url": "https://pbs.twimg.com/media/a.jpg", "width": 1200, "height": 675, "alt_text": "A"},
{"media_key": "3_2", "type": "photo", "url": "https://pbs.twimg.com/media/b.jpg"}, {"media_key": "3_3", "type": "photo", "url": "https://pbs.twimg.com/media/c.jpg"},
{"media_key": "3_4", "type": "photo", "url": "https://pbs.twimg.com/media/d.jpg"}, {"media_key": "3_6", "type": "photo"}]},
"meta": {"result_count": 4}}''',
    # Broken: not even text
    b'\xff\xfe\x00 ("data": [1, 2]',
    b'{"meta": {"result_count": 0}}',
]
ODD = "👩\u200d🚀 שלום e\u0301 \ufffd! a\nb 'q' \"w\" ; --"
ROWS = [ # tweet, media, number, account, day of May 2020, likes, url
    ("101", "3_1", 1, "brandone", 1, 44, "a"), ("101", "3_2", 2, "brandone", 1, 44, "b"), ("101", "3_3", 3, "brandone", 1, 44, "c"), ("101", "3_4", 4, "brandone", 1, 44, "d"),
    ("102", None, 0, "brandone", 2, 7, None), ("103", "3_5", 1, "brand_two", 3, 8, "e"), ("104", None, 0, "brand_two", 4, 0, None), ("106", "3_1", 1, "brandone", 6, 4, "a"),
    ("107", "3_6", 1, "brandone", 7, 0, None)]


def hand(): return b"\n".join(page.replace(b"\n", b" ") for page in HAND) + b"\n"


def table(path): return pd.read_parquet(path).astype(object).where(lambda t: t.notna(), None).sort_values(["tweet_id", "number"], ignore_index=True)


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hand")
    (folder/"pages.jsonl").write_bytes(hand())
    return folder/"posts.parquet", write_posts(folder/"pages.jsonl", folder/"posts.parquet")


def test_the_hand_made_pages_give_the_right_rows(posts):
    found = table(posts[0])
    rows = [(r.tweet_id, r.media_key, r.number, r.account, r.created_at, r.likes, r.url) for r in found.itertuples()]
    assert rows == [(t, m, n, a, datetime(2020, 5, day, 10), l, u and f"https://pbs.twimg.com/media/{u}.jpg") for t, m, n, a, day, l, u in ROWS]
    assert found.text[8] == ODD and found.alt_text[0] == "A" and found.alt_text[1] is None
    assert (found.width[0], found.height[0], found.width[1]) == (1200, 675, None)
    assert list(found.type) == ["photo"] * 4 + [None, "photo", None, "photo", "photo"]
    assert pq.read_schema(posts[0]).names == POSTS.names


def test_the_summary_counts_everything(posts):
    s = posts[1]
    read = dict(files=1, malformed=2, pages=3, tweets=9, unreadable=0, retweets=0, deleted=1, unnamed=0, repeated=2, missing=2, videos=1, gifs=1, others=0)
    written = dict(kept=6, bare=2, several=1, zero=2, accounts=2, pictures=7)
    assert {k: getattr(s, k) for k in read | written} == read | written
    assert s.tweets == s.kept + sum(s.skipped().values()) + s.repeated
    assert [re.search(r"jsonl:(\d)", p)[1] for p in s.places] == ["2", "4"] and all(p in str(s) for p in s.places)
    assert re.search(r"\b2  lines .*skipped\n", str(s)) and re.search(r"\b1  videos\n", str(s))


def test_broken_lines_are_logged_with_their_place(tmp_path, caplog):
    (tmp_path/"pages.jsonl").write_bytes(hand())
    with caplog.at_level(logging.WARNING, "boig.benches.x_api"): write_posts(tmp_path, tmp_path/"posts.parquet")
    assert [bool(re.search(rf"pages\.jsonl:{n}: .*; skipped", m)) for n, m in zip((2, 4), caplog.messages)] == [True, True] and len(caplog.messages) == 2


def test_previews_take_the_place_of_videos(tmp_path):
    (tmp_path/"pages.jsonl").write_bytes(hand())
    s = write_posts(tmp_path/"pages.jsonl", tmp_path/"posts.parquet", previews=True)
    found = table(tmp_path/"posts.parquet")
    assert found[found.tweet_id == "102"][["media_key", "url", "type", "number"]].values.tolist() == [["7_1", "https://pbs.twimg.com/preview/f.jpg", "video", 1]]
    assert list(found[found.tweet_id == "103"].media_key) == ["3_5"] and (s.videos, s.gifs) == (1, 1)  # the GIF has no still frame


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "folder"])
def test_packed_and_in_pieces_is_the_same(tmp_path, posts, ending):
    if ending == "folder":
        for n, page in enumerate(HAND):
            folder = tmp_path/"pages"/f"part*[{n}]'s"
            folder.mkdir(parents=True)
            with pa.output_stream(str(folder/("p.jsonl.zst" if n % 2 else "p.json")), compression="zstd" if n % 2 else None) as f: f.write(page.replace(b"\n", b" "))
    else:
        (tmp_path/"pages").mkdir()
        with pa.output_stream(str(tmp_path/"pages"/f"p.{ending}"), compression=ending[6:].replace("gz", "gzip").replace("zst", "zstd")) as f: f.write(hand())
    s = write_posts(tmp_path/"pages", tmp_path/"posts.parquet")
    assert table(tmp_path/"posts.parquet").equals(table(posts[0]))
    assert {**vars(s), "files": 1, "places": []} == {**vars(posts[1]), "places": []} and len(s.places) == 2


def test_what_came_last_counts(tmp_path):
    pages = [json.loads(HAND[0]) for _ in range(3)]
    pages[1]["data"] = [d | {"public_metrics": {"like_count": 99}, "attachments": {"media_keys": ["3_2"]}} for d in pages[1]["data"][:1]]
    for n, page in enumerate(pages[:2]): (tmp_path/f"{n}.jsonl").write_text(json.dumps(page))
    write_posts(tmp_path, tmp_path/"posts.parquet")
    found = table(tmp_path/"posts.parquet")
    assert found[found.tweet_id == "101"][["media_key", "likes"]].values.tolist() == [["3_2", 99]]


def test_an_account_is_its_number(tmp_path):
    "One that changed its name has the last one; who took the old name is another."
    def page(author, name, first): return {"data": [{"id": str(first + i), "author_id": author, "text": "a", "created_at": "2021-03-01T09:30:00.000Z", "public_metrics": {"like_count": i}} for i in range(10)],
                                           "includes": {"users": [{"id": author, "username": name}]}}
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps(page(*p)) for p in (("7", "OldName", 10), ("8", "Another", 40), ("7", "NewName", 20), ("9", "OldName", 30))))
    s = write_posts(tmp_path, tmp_path/"posts.parquet")
    assert s.accounts == 3 and table(tmp_path/"posts.parquet").account.tolist() == ["newname"] * 20 + ["oldname"] * 10 + ["another"] * 10


def test_a_file_that_breaks_off_gives_what_came_before(tmp_path):
    whole = gzip.compress(b"\n".join(HAND[0].replace(b"\n", b" ") for _ in range(40)), mtime=0)
    (tmp_path/"a.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path/"b.jsonl").write_bytes(hand())
    s = write_posts(tmp_path, tmp_path/"posts.parquet")
    assert s.malformed == 3 and any("a.jsonl.gz" in p and "cannot be read" in p for p in s.places) and s.kept == 6


def test_nothing_to_read_is_said_in_one_line(tmp_path):
    with pytest.raises(BoigError, match="no file or folder"): write_posts(tmp_path/"nowhere", tmp_path/"posts.parquet")
    with pytest.raises(BoigError, match="No tweets"): write_posts(tmp_path, tmp_path/"posts.parquet")
    (tmp_path/"a.jsonl").write_text("<html>")
    with pytest.raises(BoigError, match=r"No tweets.*a\.jsonl:1"): write_posts(tmp_path, tmp_path/"posts.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_line_that_is_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(x_api, "LONGEST", 5000)
    (tmp_path/"a.jsonl").write_bytes(b"x" * 30_000 + b"\n" + hand())
    s = write_posts(tmp_path, tmp_path/"posts.parquet")
    assert (s.malformed, s.pages, s.kept) == (3, 3, 6) and "longer" in s.places[0]


@pytest.mark.parametrize("change", [{"id": "12a"}, {"id": ""}, {"id": str(2**63)}, {"id": None}, {"public_metrics": None}, {"public_metrics": {"like_count": -1}},
                                    {"public_metrics": {"like_count": 1.5}}, {"public_metrics": {"like_count": True}}, {"public_metrics": {"like_count": 10**30}},
                                    {"created_at": "yesterday"}, {"created_at": None}, {"created_at": "0001-01-01T00:00:00+23:00"}])
def test_an_unreadable_tweet_is_counted(change):
    page, s = json.loads(HAND[0]), Summary()
    page["data"][0] |= change
    assert len(list(page_rows(page, s))) == 3 and (s.unreadable, s.deleted) == (1, 1)


@pytest.mark.parametrize("change, skipped", [({"referenced_tweets": [{"type": "replied_to", "id": "1"}, {"type": "retweeted", "id": "2"}]}, True), ({"text": "RT @fan: Four"}, True),
                                             ({"referenced_tweets": [{"type": "quoted", "id": "1"}], "text": "RT @fan: so true"}, False), ({"text": "RT this and win"}, False)])
def test_retweets_are_no_tweets_of_the_account(change, skipped):
    page, s = json.loads(HAND[0]), Summary()
    page["data"][0] |= change
    assert len(list(page_rows(page, s))) == 4 - skipped and (s.tweets, s.retweets, s.deleted) == (5, skipped, 1)


def test_text_is_read_as_x_escapes_it():
    page = json.loads(HAND[0])
    page["data"][0]["text"] = "A &amp;amp; B &lt;3 C&amp;A"
    assert next(page_rows(page, Summary()))[0][POSTS.names.index("text")] == "A &amp; B <3 C&A"


@pytest.mark.parametrize("part, name", [("includes", "users"), ("data", "author_id")])
def test_pages_asked_for_without_authors_are_said(tmp_path, part, name):
    "Not the authors are gone: the question was another."
    page = json.loads(HAND[0])
    for x in page["data"] if part == "data" else [page["includes"]]: x.pop(name)
    (tmp_path/"a.jsonl").write_text(json.dumps(page))
    with pytest.raises(BoigError, match=r"None of 5 tweets in .* can be used: 5 that came without authors \(ask with expansions=author_id\)\.$"): write_posts(tmp_path, tmp_path/"posts.parquet")
    assert not (tmp_path/"posts.parquet").exists()
    (tmp_path/"b.jsonl").write_bytes(hand())
    s = write_posts(tmp_path, tmp_path/"posts.parquet")
    assert (s.tweets, s.unnamed, s.deleted, s.kept) == (14, 5, 1, 6) and s.tweets == s.kept + sum(s.skipped().values()) + s.repeated


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["3_1", "1", "photo", "101"]),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["id", "media_key", "users", "media", "type", "username", "media_keys", "like_count"]), v, max_size=3), max_leaves=6)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["data", "includes", "attachments", "referenced_tweets", "author_id", "text", "users", "media", "type", "username", "url", "alt_text", "width"]), values)
def test_no_page_is_fatal(where, value):
    def put(node):
        if isinstance(node, dict): return {k: value if k == where else put(v) for k, v in node.items()}
        return [put(v) for v in node] if isinstance(node, list) else node
    rows = [(*row, 0, "1") for rows in page_rows(put(json.loads(HAND[0])), Summary(), previews=True) for row in rows]
    pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(zip(*rows), x_api._RAW)], schema=x_api._RAW) if rows else None


def test_memory_does_not_grow_with_the_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(x_api, "ROWS", 200)
    def peak(n):
        rows = ((str(i), f"3_{i}", "a", datetime(2020, 1, 1), f"text {i}" * 20, i, None, "photo", None, 1, 1, 1, i, "1") for i in range(n))
        gc.collect()
        tracemalloc.start()
        x_api._write_rows(tmp_path/f"{n}.parquet", rows)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(400)  # what a first use allocates for good
    assert peak(20_000) < 2 * peak(800)  # 25 times the rows; kept in memory they would be 20 times the bytes
    assert pq.ParquetFile(tmp_path/"20000.parquet").num_row_groups == 100


@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["a page over many lines", "an array", "an array over many lines"])
def test_a_json_file_may_be_one_document(tmp_path, posts, form, pack):
    page = json.loads(HAND[0])
    one, text = tmp_path/"one.jsonl", {"a page over many lines": json.dumps(page, indent=1), "an array": json.dumps([page, page]), "an array over many lines": "\n" + json.dumps([page, page], indent=2)}[form]
    one.write_text("\n".join([json.dumps(page)] * (1 + ("array" in form))))
    with pa.output_stream(str(tmp_path/f"p.json{pack}"), compression={"": None, ".gz": "gzip", ".zst": "zstd"}[pack]) as f: f.write(text.encode())
    expected, found = write_posts(one, tmp_path/"one.parquet"), write_posts(tmp_path/f"p.json{pack}", tmp_path/"found.parquet")
    assert vars(found) == vars(expected) and found.malformed == 0 and table(tmp_path/"found.parquet").equals(table(tmp_path/"one.parquet"))


def test_what_is_no_page_in_a_document_is_counted(tmp_path):
    pages = [json.loads(HAND[0]), None, {"errors": []}, [], json.loads(HAND[2])]
    (tmp_path/"p.json").write_text(json.dumps(pages))
    s = write_posts(tmp_path/"p.json", tmp_path/"posts.parquet")
    assert (s.pages, s.malformed) == (2, 3) and [p.split(":")[1] for p in s.places[:3]] == ["2", "3", "4"]
    (tmp_path/"p.json").write_bytes(b"cut off\n" + hand())  # a page a line after all
    s = write_posts(tmp_path/"p.json", tmp_path/"posts.parquet")
    assert (s.pages, s.malformed) == (3, 3)


# --- Tables as a source ----------------------------------------------------------------------------------------------------------------------------------

def test_posts_are_a_source_too(tmp_path, posts):
    found = table(posts[0])
    write_posts([posts[0], posts[0]], tmp_path/"again.parquet")
    assert table(tmp_path/"again.parquet").equals(found)
    mixed = pd.read_parquet(posts[0]).drop(columns="number").assign(account=lambda t: t.account.str.upper(), created_at=lambda t: t.created_at.dt.tz_localize("UTC"))
    mixed.loc[(mixed.tweet_id == "101") & (mixed.media_key == "3_1"), "tweet_id"] = "not a number"
    mixed.loc[mixed.tweet_id == "102", "likes"] = -3
    mixed.sample(frac=1, random_state=0).to_parquet(tmp_path/"mixed.parquet", index=False)
    s = write_posts(tmp_path/"mixed.parquet", tmp_path/"again.parquet")
    assert s.unreadable == 2 and s.tweets == s.kept + s.unreadable
    left = table(tmp_path/"again.parquet")
    assert set(left.media_key.dropna()) == {"3_2", "3_3", "3_4", "3_5", "3_1", "3_6"} and set(left.account) == {"brandone", "brand_two"}
    assert sorted(left[left.tweet_id == "101"].number) == [1, 2, 3] and left.created_at.min() == datetime(2020, 5, 1, 10)


def test_a_table_s_last_row_counts(tmp_path):
    "A tweet collected again, its pictures in any rows: the last row's likes and text for all of them, and no row without a picture beside them."
    rows = [("1", "3_1", 5, "old"), ("1", "3_2", 5, "old"), ("2", None, 1, "old"), ("3", None, 2, "old"), ("4", "3_4", 3, "once"), ("2", "3_9", 7, "new"), ("1", "3_1", 900, "new"), ("3", None, 1, None)]
    pd.DataFrame(rows, columns=["tweet_id", "media_key", "likes", "text"]).assign(account="A", created_at=pd.Timestamp("2020-01-01"), url=lambda t: t.text, type="photo", alt_text=None, width=1, height=1).to_parquet(tmp_path/"t.parquet", row_group_size=2)
    s = write_posts(tmp_path/"t.parquet", tmp_path/"posts.parquet")
    assert [(r.tweet_id, r.media_key, r.number, r.likes, r.text, r.url) for r in table(tmp_path/"posts.parquet").itertuples()] == [
        ("1", "3_1", 1, 900, "new", "new"), ("1", "3_2", 2, 900, "new", "old"), ("2", "3_9", 1, 7, "new", "new"), ("3", None, 0, 1, None, None), ("4", "3_4", 1, 3, "once", "once")]
    assert (s.tweets, s.repeated, s.kept) == (7, 3, 4)
    twice = write_posts([tmp_path/"t.parquet"] * 2, tmp_path/"posts.parquet")
    assert (twice.tweets, twice.repeated, twice.kept) == (14, 10, 4)


def test_other_tables_are_counted(tmp_path, posts):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path/"a.parquet")
    (tmp_path/"b.parquet").write_bytes(b"no table")
    with pytest.raises(BoigError, match="lacks the columns tweet_id"): write_posts(tmp_path, tmp_path/"out"/"posts.parquet")
    s = write_posts([tmp_path, posts[0]], tmp_path/"out"/"posts.parquet")
    assert (s.malformed, s.kept) == (2, 6)


# --- Chance ----------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def con():
    con = duckdb.connect()
    con.execute(MIX)
    return con


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20), st.integers(0, 2**31 - 1))
def test_the_hash_is_the_same_in_sql_and_numpy(con, numbers, seed):
    sql = con.execute(f"SELECT list(spin(n, {seed})) FROM (SELECT unnest(?::VARCHAR[]) AS n)", [[str(n) for n in numbers]]).fetchone()[0]
    assert sql == spin(numbers, seed).tolist()


def test_the_hash_does_not_change(): assert spin([0, 1, 1234567890123456789], 42).tolist() == [by_hand(n, 42) for n in (0, 1, 1234567890123456789)]


def by_hand(n, seed):
    x = (n % 2**32) ^ (((n // 2**32) * 0x9E3779B1 + seed) % 2**32)
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("numbers", [np.arange(200_000), 15 * 10**17 + np.arange(200_000), (np.arange(200_000) * 977_000 + 2 * 10**11) << 22])
def test_the_hash_is_uniform_and_seeds_are_independent(numbers):
    a, b = spin(numbers, 1) / 2**32, spin(numbers, 2) / 2**32
    counts = np.histogram(a, 200, (0, 1))[0]
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 199) < 5 * np.sqrt(2 * 199)
    assert abs(((a < 0.1) & (b < 0.1)).mean() - 0.01) < 5 * np.sqrt(0.01 / 200_000)
    assert abs((a[:-1] < a[1:]).mean() - 0.5) < 0.01


# --- Thresholds ------------------------------------------------------------------------------------------------------------------------------------------

def naive_rank(likes, account, ties):
    "pandas' ranks within accounts, as each tie rule's share of tweets below."
    by = likes.groupby(account)
    n = by.transform("size")
    return {"min": (by.rank(method="min") - 1) / (n - 1).clip(lower=1), "mid": (by.rank() - 0.5) / n, "max": by.rank(method="max") / n}[ties]


def naive_bucket(likes, account, ties, low=0.6, high=0.9):
    rank = naive_rank(likes, account, ties)
    return np.select([rank > high if ties == "max" else rank >= high, rank <= low], ["high", "low"], "")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8) | st.integers(0, 10**6)), min_size=1, max_size=80), st.sampled_from([(0.6, 0.9), (0.5, 0.8), (0.0, 1.0)]))
def test_thresholds_are_those_of_a_naive_window(con, tweets, percentiles):
    frame = pd.DataFrame(tweets, columns=["account", "likes"])
    con.execute("CREATE OR REPLACE TABLE ranked AS SELECT account, likes, count(*) AS tweets FROM (SELECT unnest(?::VARCHAR[]) AS account, unnest(?::BIGINT[]) AS likes) GROUP BY ALL",
                [list(frame.account), list(frame.likes)])
    find_thresholds(con, *percentiles)
    found = con.execute("FROM thresholds").df().set_index("account").astype(float).loc[frame.account].reset_index()
    for ties in RANKS:
        ours = np.select([frame.likes >= found[f"high_{ties}"].fillna(np.inf), frame.likes <= found[f"low_{ties}"].fillna(-1)], ["high", "low"], "")
        expected = naive_bucket(frame.likes, frame.account, ties, *percentiles)
        assert (ours == expected).all(), ties
        for bucket in ("low", "high"):
            assert (found.groupby("account")[f"{bucket}s_{ties}"].first() == pd.Series(expected == bucket).groupby(frame.account).sum()).all()


def test_ties_by_hand(con):
    "Ten tweets without a like and ten with 1 to 10: min-rank keeps the ten together in low, max-rank too (0.5), 19 and 20 of 20 are the top tenth."
    con.execute("CREATE OR REPLACE TABLE ranked AS SELECT 'a' AS account, likes, if(likes = 0, 10, 1) AS tweets FROM range(11) t(likes)")
    find_thresholds(con)
    row = con.execute("FROM thresholds").df().iloc[0]
    # min: ranks of 0, 1, 2, … are 0, 10/19, 11/19 = .58, 12/19 = .63, …, 17/19 = .89, 18/19, 19/19; max: 10/20, 11/20, 12/20 = .6, …, 18/20 = .9, 19/20, 20/20
    assert (row.low_min, row.high_min, row.low_max, row.high_max) == (2, 9, 2, 9)
    # mid: 5/20, 10.5/20, 11.5/20, 12.5/20 = .625, …, 17.5/20 = .875, 18.5/20 = .925
    assert (row.low_mid, row.high_mid) == (2, 9)


# --- The whole -------------------------------------------------------------------------------------------------------------------------------------------

def make(n, seed=0, accounts=12):
    "Tweets with none to four pictures, in random order."
    rng = np.random.default_rng(seed)
    level = rng.lognormal(1.5, 1.5, accounts)
    account = rng.choice(accounts, n, p=rng.dirichlet(np.full(accounts, 1.0)))
    tweets = pd.DataFrame({"tweet_id": rng.choice(10**15, n, replace=False).astype(str), "account": [f"a{a}" for a in account], "likes": rng.poisson(level[account] * rng.lognormal(-0.5, 1, n)),
                           "created_at": pd.Timestamp("2018-01-01") + pd.to_timedelta(rng.integers(0, 1900 * 86400, n), "s"), "pictures": rng.choice(5, n, p=[0.2, 0.6, 0.1, 0.05, 0.05]),
                           "text": [f"word {'x' * k} https://t.co/{k}" for k in rng.integers(1, 80, n)]})
    rows = tweets.loc[tweets.index.repeat(tweets.pictures.clip(lower=1))].reset_index(drop=True)
    rows["number"] = np.where(rows.pictures > 0, rows.groupby("tweet_id").cumcount() + 1, 0)
    rows["media_key"] = [f"3_{t}{n}" if n else None for t, n in zip(rows.tweet_id, rows.number)]
    rows["type"] = np.where(rows.number > 0, "photo", None)
    return rows.sample(frac=1, random_state=seed).reset_index(drop=True)


def store(rows, path):
    columns = [pa.array(rows[f.name], f.type, from_pandas=True) if f.name in rows else pa.nulls(len(rows), f.type) for f in POSTS]
    pq.write_table(pa.table(columns, schema=POSTS), path, row_group_size=500)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = make(3000)
    return rows, store(rows, tmp_path_factory.mktemp("posts")/"posts.parquet")


PLAIN = Rules(test=0.1, min_tweets=40, accounts=0, pictures=0)


def seed_of(rules, what): return derive_seed(rules.seed, what)


def naive_choice(rows, rules):
    "The same rules in pandas, the slow and plain way; sampling by chance."
    end = rows.created_at.max().normalize() + pd.Timedelta(days=1)
    rows = rows[rows.created_at >= end - pd.DateOffset(years=5)]
    tweets = rows.drop_duplicates("tweet_id")
    tweets = tweets[tweets.groupby("account").likes.transform("size") >= rules.min_tweets]
    bucket = pd.Series(naive_bucket(tweets.likes, tweets.account, rules.ties), tweets.tweet_id.values)
    rows = rows.assign(bucket=rows.tweet_id.map(bucket).fillna(""))
    rows = rows[(rows.bucket != "") & (rows.number > 0)]
    n = rows.groupby(["account", "bucket"]).size()
    k = n.unstack().reindex(columns=["low", "high"]).min(axis=1, skipna=False).dropna()
    rows = rows[rows.account.isin(k.index)]
    share = np.array([k[a] / n[a, b] for a, b in zip(rows.account, rows.bucket)])
    return rows[spin(rows.tweet_id.astype("int64"), seed_of(rules, "balance")) < share * 2**32], k.sum()


@pytest.mark.parametrize("ties", list(RANKS))
def test_the_choice_is_that_of_plain_pandas(data, tmp_path, ties):
    rules = replace(PLAIN, ties=ties)
    report = choose_pictures(data[1], tmp_path/"out.parquet", rules, threads=1)
    expected, k = naive_choice(data[0], rules)
    found = pd.read_parquet(tmp_path/"out.parquet")
    assert dict(zip(found.id, found.bucket)) == dict(zip(expected.tweet_id + "_" + expected.media_key, expected.bucket)) and len(found) > 200
    assert set(found.columns) == {"id", *POSTS.names, "bucket", "split", "subgroup"} and (found.subgroup == found.tweet_id).all() and report.start < report.end
    for bucket in ("high", "low"):  # the test sample: the smallest hashes, whole tweets, a tenth of what was wanted
        own = found[found.bucket == bucket].assign(h=lambda t: spin(t.tweet_id.astype("int64"), seed_of(rules, "split"))).sort_values("h")
        upto = own.groupby("h").size().cumsum()
        test = round(0.1 * k)
        assert set(own[own.split == "test"].h) == set(upto.index[upto <= test])
        assert set(own[own.split != "train"].h) == set(upto.index[upto <= test + round(0.05 * (k - test))])


@pytest.mark.parametrize("change", [lambda t: t.assign(tweet_id="t" + t.tweet_id), lambda t: t.assign(likes=t.likes.astype(str)), lambda t: t.assign(created_at=pd.NaT), lambda t: t.assign(created_at=t.created_at.astype(str)),
                                    lambda t: t.assign(account=None), lambda t: t.assign(account=t.account.mask(t.index == 5)), lambda t: t.assign(created_at=t.created_at.mask(t.index == 5)), lambda t: t.assign(likes=-1)])
def test_a_table_of_something_else_is_one_clear_line(data, tmp_path, change):
    change(pd.read_parquet(data[1])).to_parquet(tmp_path/"posts.parquet")
    with pytest.raises(BoigError, match="posts.parquet' (holds|has) .*: pass it through write_posts first.$"): choose_pictures(tmp_path/"posts.parquet", tmp_path/"out.parquet", PLAIN)


def test_columns_of_a_near_kind_will_do(data, tmp_path):
    "Tables that went through pandas: numbers as int32, times in ns."
    choose_pictures(data[1], tmp_path/"one.parquet", PLAIN)
    pd.read_parquet(data[1]).assign(likes=lambda t: t.likes.astype("int32"), created_at=lambda t: t.created_at.astype("datetime64[ns]")).to_parquet(tmp_path/"posts.parquet")
    choose_pictures(tmp_path/"posts.parquet", tmp_path/"two.parquet", PLAIN)
    assert set(pd.read_parquet(tmp_path/"one.parquet").id) == set(pd.read_parquet(tmp_path/"two.parquet").id)


def test_exact_sampling_is_exact(data, tmp_path):
    choose_pictures(data[1], tmp_path/"out.parquet", replace(PLAIN, exact=True))
    found = pd.read_parquet(tmp_path/"out.parquet")
    wanted = naive_choice(data[0], PLAIN)[0]
    counts = found.groupby(["account", "bucket"]).size().unstack()
    assert set(counts.index) == set(wanted.account) and ((counts.max(axis=1) - counts.min(axis=1)) <= 3).all()  # a tweet has four pictures: three may be missing
    assert (found.groupby("tweet_id").size() == data[0][data[0].number > 0].groupby("tweet_id").size()[sorted(set(found.tweet_id))]).all()


def test_no_tweet_is_in_two_places(data, tmp_path):
    report = choose_pictures(data[1], tmp_path/"out.parquet", PLAIN)
    found = pd.read_parquet(tmp_path/"out.parquet")
    assert found.id.is_unique and (found.groupby("tweet_id")[["split", "bucket"]].nunique() == 1).all(axis=None)
    assert set(found.split) == {"train", "valid", "test"} and report.buckets.pictures.sum() == len(found)
    some = choose_pictures(data[1], tmp_path/"few.parquet", replace(PLAIN, test=30, valid=0)).buckets
    assert set(some.split) == {"train", "test"} and some[some.split == "test"].pictures.between(27, 30).all()


def test_no_picture_is_in_two_splits(data, tmp_path):
    "Every second picture is another's, in chains and across buckets; tweets that show none again are split as if no one did."
    again, rng = data[0].copy(), np.random.default_rng(3)
    shown = np.flatnonzero(again.number > 0)
    later = rng.choice(shown, len(shown) // 2, replace=False)
    again.loc[later, "media_key"] = again.media_key[rng.choice(shown, len(later))].values
    for rows, name in ((data[0], "plain"), (again, "again")): choose_pictures(store(rows, tmp_path/f"{name}.posts"), tmp_path/f"{name}.parquet", PLAIN)
    plain, found = (pd.read_parquet(tmp_path/f"{name}.parquet") for name in ("plain", "again"))
    groups = []  # the plain way: sets of tweets that grow together
    for own in found.groupby("media_key").tweet_id.agg(set):
        near = [g for g in groups if g & own]
        groups = [g for g in groups if not g & own] + [set().union(own, *near)]
    first = {t: min(g, key=int) for g in groups for t in g}
    assert (found.subgroup == found.tweet_id.map(first)).all() and (found.groupby("media_key").split.nunique() == 1).all() and (found.groupby("subgroup").split.nunique() == 1).all()
    assert max(map(len, groups)) > 3 and found.groupby("subgroup").bucket.nunique().max() == 2 and set(found.split) == {"train", "valid", "test"}
    alone = found[found.subgroup.map(found.groupby("subgroup").tweet_id.nunique()) == 1]
    split = plain.drop_duplicates("tweet_id").set_index("tweet_id").split
    assert len(alone) > 200 and (alone.split == alone.tweet_id.map(split)).all()
    assert all(found.split[found.tweet_id == t].iloc[0] == split[first[t]] for t in found.tweet_id)  # where its group's first tweet goes


def test_order_files_and_threads_do_not_matter(data, tmp_path):
    rows, path = data
    other = rows.sample(frac=1, random_state=9)
    parts = [store(other[:1000], tmp_path/"a.parquet"), store(other[1000:], tmp_path/"b*[1].parquet")]
    first = choose_pictures(path, tmp_path/"one.parquet", PLAIN, threads=1)
    choose_pictures(path, tmp_path/"two.parquet", PLAIN, threads=2)
    third = choose_pictures(parts, tmp_path/"three.parquet", PLAIN, threads=2)
    assert (tmp_path/"one.parquet").read_bytes() == (tmp_path/"two.parquet").read_bytes()
    one, three = (pd.read_parquet(tmp_path/f"{f}.parquet").sort_values("id", ignore_index=True) for f in ("one", "three"))
    assert one.equals(three) and first.steps.equals(third.steps)
    choose_pictures(path, tmp_path/"four.parquet", replace(PLAIN, seed=1))
    assert set(pd.read_parquet(tmp_path/"four.parquet").id) != set(one.id)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_steps_add_up(data, tmp_path):
    report = choose_pictures(data[1], tmp_path/"out.parquet", replace(PLAIN, only=tuple(f"a{i}" for i in range(9)), without=("A3",), accounts=4, pictures=150))
    steps, found = report.steps, pd.read_parquet(tmp_path/"out.parquet")
    assert steps.pictures.iloc[0] - steps["pictures dropped"].sum() == len(found) == steps.pictures.iloc[-1]
    assert steps.tweets.iloc[0] == data[0].tweet_id.nunique() and steps.tweets.iloc[-1] == found.tweet_id.nunique()
    assert (steps["tweets dropped"] >= 0).all() and steps.accounts.is_monotonic_decreasing
    assert found.account.nunique() <= 4 and "a3" not in set(found.account) and 100 < len(found) < 200
    assert "not drawn" in str(report) and list(report.ties.ties) == list(RANKS)


def test_the_follow_up_papers_filters(tmp_path):
    rows = make(6000, seed=2, accounts=4)
    rules = replace(RULES["engagingimagenet"], min_tweets=1001, max_tweets=1200, without=("a0",), test=0.2, likes=(1, 3, 5))
    assert RULES["engagingimagenet"].likes == (21, 31, 41) and RULES["engagingimagenet"].min_text == 50 and RULES["engagingimagenet"].max_tweets == 2000
    choose_pictures(store(rows, tmp_path/"posts.parquet"), tmp_path/"out.parquet", rules)
    found = pd.read_parquet(tmp_path/"out.parquet")
    sizes = rows[rows.created_at < "2023-02-01"].drop_duplicates("tweet_id").account.value_counts()
    assert set(found.account) == set(sizes[sizes > 1000].index) - {"a0"}
    before = rows[(rows.created_at < "2023-02-01") & rows.account.isin(found.account)]
    hashes = pd.Series(spin(before.tweet_id.astype("int64"), seed_of(rules, "tweets of an account")), before.tweet_id.values).groupby(level=0).first()
    tweets = before.drop_duplicates("tweet_id").assign(h=lambda t: t.tweet_id.map(hashes))
    tweets = tweets[tweets.groupby("account").h.rank() <= 1200]
    tweets = tweets[(tweets.text.str.len() >= 50) & (tweets.pictures > 0)]
    rank = naive_rank(tweets.likes, tweets.account, "min")
    bucket = np.select([(rank >= 0.9) & (tweets.likes >= 5), (rank <= 0.6) & (tweets.likes >= 1), (rank > 0.6) & (rank < 0.9) & (tweets.likes >= 3)], ["high", "low", "medium"], "")
    expected = {t: b for t, b in zip(tweets.tweet_id, bucket) if b}
    assert dict(zip(found.tweet_id, found.bucket)) == expected and set(expected.values()) == {"low", "medium", "high"}
    assert found.text.str.fullmatch(r"word x+ <hyperlink>").all()


def test_bad_rules_and_data_are_said_in_one_line(data, tmp_path):
    for wrong, why in ((dict(ties="mean"), "tie rule"), (dict(low=0.95), "low < high"), (dict(min_tweets=-1), "negative"), (dict(start="soon"), "2018-01-31"), (dict(valid=1), "valid")):
        with pytest.raises(BoigError, match=why): Rules(**wrong)
    out = tmp_path/"out.parquet"
    for rules, why in ((Rules(), "Lower test"), (replace(PLAIN, min_tweets=10**6), "fewer than 1,000,000"), (replace(PLAIN, only=("nobody",)), "not asked for"),
                       (replace(PLAIN, end="2001-01-01"), "posted before"), (replace(PLAIN, start="2030-01-01"), "must be before")):
        with pytest.raises(BoigError, match=why): choose_pictures(data[1], out, rules)
    with pytest.raises(BoigError, match="no file"): choose_pictures(tmp_path/"none.parquet", out)
    with pytest.raises(BoigError, match="lacks the columns number"): choose_pictures(store_without_number(data[0], tmp_path/"old.parquet"), out)
    with pytest.raises(BoigError, match="no rows"): choose_pictures(store(data[0][:0], tmp_path/"empty.parquet"), out)
    (tmp_path/"text.parquet").write_text("no table")
    with pytest.raises(BoigError, match="no Parquet"): choose_pictures(tmp_path/"text.parquet", out)
    with pytest.raises(BoigError, match="DuckDB"): choose_pictures(data[1], out, memory="much")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def store_without_number(rows, path):
    rows[[f.name for f in POSTS if f.name in rows and f.name != "number"]].assign(url=None, alt_text=None, width=1, height=1).to_parquet(path)
    return path


def test_one_tweet_an_account(tmp_path):
    rows = pd.DataFrame({"tweet_id": ["1", "2"], "media_key": ["3_1", "3_2"], "number": [1, 1], "account": ["a", "b"], "likes": [3, 4], "created_at": pd.Timestamp("2020-01-01"), "text": "x"})
    path = store(rows, tmp_path/"posts.parquet")
    with pytest.raises(BoigError, match="nothing in one of the buckets"): choose_pictures(path, tmp_path/"out.parquet", replace(PLAIN, min_tweets=0))
    report = choose_pictures(path, tmp_path/"out.parquet", replace(PLAIN, min_tweets=0, balance=False))
    assert report.buckets[["bucket", "split", "pictures"]].values.tolist() == [["low", "train", 2]]


def test_the_benchmark_script(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_boigbench", Path(__file__).parents[1]/"bench"/"boigbench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.make_posts(tmp_path/"posts.parquet", 60_000, chunk=25_000)
    bench.RULE = replace(bench.RULE, min_tweets=3, test=10)
    record = bench.measure(tmp_path/"posts.parquet", tmp_path/"out.parquet", "200MB", 1, False)
    assert pq.ParquetFile(tmp_path/"posts.parquet").metadata.num_rows == 60_000 and record["peak_rss_mb"] > 50
    assert 0.9 < record["pictures"]["low"] / record["pictures"]["high"] < 1.1 and record["test"] == {"high": 10, "low": 10}


# --- Handles ---------------------------------------------------------------------------------------------------------------------------------------------

def test_own_handles(tmp_path):
    (tmp_path/"mine.txt").write_text("\ufeff# brands\nAdobe\n@adobe  # again\n\nhttps://twitter.com/Photoshop\nx.com/nike_24/\n", encoding="utf-8")
    assert own_handles(tmp_path/"mine.txt") == own_handles(["Adobe", "photoshop", "NIKE_24", "nike_24"]) == ["adobe", "photoshop", "nike_24"]
    for wrong in ("a b", "sixteen_letters_", "café", "https://evil.example/adobe", ""):
        with pytest.raises(BoigError, match="no handle"): own_handles([wrong])
    with pytest.raises(BoigError, match="Cannot read"): own_handles(tmp_path/"none.txt")


def client(answer): return httpx.Client(transport=httpx.MockTransport(answer))


def test_wikidata_is_asked_by_pages_and_once(tmp_path):
    names, log = [f"Brand_{i:02d}" for i in range(7)] + ["brand_00", "no handle!"], []
    def service(request):
        log.append(request)
        query = request.url.params["query"]
        if len(log) == 2: return httpx.Response(503)
        if len(log) == 3: return httpx.Response(429, headers={"retry-after": "7"})
        start, limit = (int(re.search(rf"{w} (\d+)", query)[1]) for w in ("OFFSET", "LIMIT"))
        return httpx.Response(200, json={"results": {"bindings": [{"c": {"value": "Q1"}, "x": {"value": n}, "cLabel": {"value": n.title()}} for n in names[start:start + limit]]}})
    slept = []
    found = wikidata_handles(tmp_path, limit=4, client=client(service), sleep=slept.append)
    assert list(found) == [f"brand_{i:02d}" for i in range(7)] and found["brand_03"] == "Brand_03" and slept == [2, 8]
    assert "P2002" in log[0].url.params["query"] and "wdt:P279*" in log[0].url.params["query"] and log[0].headers["user-agent"].startswith("boig/") and log[0].url.params["format"] == "json"
    asked = len(log)
    assert wikidata_handles(tmp_path, limit=4, client=client(service)) == found and len(log) == asked
    wikidata_handles(tmp_path, limit=4, direct=True, client=client(service))
    assert len(log) > asked and "P279" not in log[-1].url.params["query"]


def test_wikidata_goes_on_where_it_stopped(tmp_path):
    down = []
    def service(request):
        if "OFFSET 2" in request.url.params["query"] and not down: raise httpx.ConnectError("no route")
        rows = ["a", "b"] if "OFFSET 0" in request.url.params["query"] else ["c"]
        return httpx.Response(200, json={"results": {"bindings": [{"x": {"value": n}} for n in rows]}})
    with pytest.raises(BoigError, match="does not answer"): wikidata_handles(tmp_path, limit=2, client=client(service), sleep=lambda s: None)
    assert len(list(tmp_path.glob("*.json"))) == 1
    down.append(True)
    assert wikidata_handles(tmp_path, limit=2, client=client(service)) == {"a": "", "b": "", "c": ""}
    with pytest.raises(BoigError, match="400"): wikidata_handles(tmp_path/"other", client=client(lambda r: httpx.Response(400, text="bad query")))


# --- The full archive ------------------------------------------------------------------------------------------------------------------------------------

SECRET = "AAAA-very-secret-token"


class X:
    "A stand-in for the full-archive search: `pages` pages for each handle."
    def __init__(self, pages=3, trouble=None): self.pages, self.trouble, self.seen = pages, trouble or {}, []

    def __call__(self, request):
        self.seen.append(request)
        if trouble := self.trouble.get(len(self.seen)): return trouble(request) if callable(trouble) else trouble
        assert request.headers["authorization"] == f"Bearer {SECRET}" and request.url.host == "api.x.com"
        handle, n = re.match(r"from:(\w+) -is:retweet", request.url.params["query"])[1], int(request.url.params.get("next_token", "t0")[1:])
        page = json.loads(HAND[0]) | {"meta": {"result_count": 5} | ({"next_token": f"t{n + 1}"} if n + 1 < self.pages else {})}
        page["data"] = [d | {"id": f"{n + 1}{len(handle)}{d['id']}", "author_id": handle if d["author_id"] == "1" else d["author_id"]} for d in page["data"]]
        page["includes"]["users"][0] |= {"id": handle, "username": handle}
        return httpx.Response(200, json=page)


@pytest.fixture
def token(monkeypatch): monkeypatch.setenv("X_BEARER_TOKEN", SECRET)


def go(x, folder, handles=("Adobe", "nike"), slept=None): return pull(handles, "2018-01-01", "2023-01-01", folder, client(x), (slept if slept is not None else []).append, lambda: 1000.0)


def test_pull_pages_resumes_and_is_a_source(tmp_path, token):
    whole = X()
    assert go(whole, tmp_path/"whole") == {} and len(whole.seen) == 6
    assert whole.seen[0].url.params["start_time"] == "2018-01-01T00:00:00Z" and whole.seen[0].url.params["expansions"] == "attachments.media_keys,author_id"
    assert whole.seen[0].url.params["max_results"] == "500" and "referenced_tweets" in whole.seen[0].url.params["tweet.fields"]  # the most that a page may hold
    files = {p.name: p.read_bytes() for p in (tmp_path/"whole").iterdir()}
    assert len(files) == 2 and all(data.count(b"\n") == 3 for data in files.values())
    def dies(request): raise KeyboardInterrupt
    for at in (1, 2, 4, 6):
        with pytest.raises(KeyboardInterrupt): go(X(trouble={at: dies}), tmp_path/f"{at}")
        for half in (tmp_path/f"{at}").iterdir(): half.write_bytes(half.read_bytes() + b'{"data": [{"id": "1", "te')
        rest = X()
        go(rest, tmp_path/f"{at}")
        assert {p.name: p.read_bytes() for p in (tmp_path/f"{at}").iterdir()} == files and len(rest.seen) == 6 - (at - 1)
    again = X()
    go(again, tmp_path/"whole")
    assert not again.seen
    assert write_posts(tmp_path/"whole", tmp_path/"posts.parquet").accounts == 3


def test_an_own_tweet_that_begins_as_a_retweet_is_kept(tmp_path, token):
    "What was pulled says what each tweet refers to: X leaves out an empty list, `pull` writes it."
    page = json.loads(HAND[0]) | {"meta": {"result_count": 5}}
    page["data"][0] |= {"text": "RT @us to win a shoe!"}
    page["data"][1] |= {"text": "RT @fan: so true", "referenced_tweets": [{"type": "retweeted", "id": "1"}]}
    go(lambda r: httpx.Response(200, json=page), tmp_path/"pulled", ["nike"])
    s = write_posts(tmp_path/"pulled", tmp_path/"posts.parquet")
    assert s.retweets == 1 and "RT @us to win a shoe!" in set(table(tmp_path/"posts.parquet").text)


def test_pull_waits_and_tries_again(tmp_path, token):
    def breaks(request): raise httpx.ReadTimeout("slow")
    x, slept = X(trouble={2: httpx.Response(429, headers={"x-rate-limit-reset": "1300"}), 3: httpx.Response(503), 4: breaks, 5: httpx.Response(200, text="<html>"), 7: httpx.Response(429)}), []
    go(x, tmp_path, slept=slept)
    assert [s for s in slept if s != 1] == [301, 2, 8, 30, 61] and len(x.seen) == 6 + 5
    assert slept.count(1) == 6


def test_the_monthly_cap_ends_a_pull(tmp_path, token):
    "X answers 429 then too, and says no time; what came is kept."
    cap, slept = {"title": "UsageCapExceeded", "type": "https://api.twitter.com/2/problems/usage-capped", "period": "Monthly"}, []
    with pytest.raises(BoigError, match="monthly cap is reached. Run again when it resets"): go(X(trouble={3: httpx.Response(429, json=cap)}), tmp_path, slept=slept)
    assert slept == [1, 1] and (tmp_path/"adobe_2018-01-01_2023-01-01.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("headers", [{}, {"x-rate-limit-reset": "900"}])  # the second: this machine's clock is ahead
def test_a_service_that_stays_busy_is_given_up(tmp_path, token, caplog, headers):
    asked, slept = [], []
    def busy(request):
        asked.append(request)
        return httpx.Response(429 if len(asked) < 50 else 400, headers=headers)
    with pytest.raises(BoigError, match="does not answer .429 Too Many Requests"): go(busy, tmp_path, slept=slept)
    assert len(asked) == x_api.BUSY + 1 and slept == sorted(slept) and 900 < sum(slept) < 3600  # X counts in quarters of an hour
    assert caplog.text.count("429 Too Many Requests; trying again in") == x_api.BUSY


def test_the_token_goes_nowhere(tmp_path, token, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    echo = httpx.Response(400, text=f"Invalid username. Your token {SECRET}.")
    refused = go(X(trouble={1: echo}), tmp_path)
    assert list(refused) == ["adobe"] and "Invalid username" in refused["adobe"]
    for status in (401, 403):
        with pytest.raises(BoigError, match="does not accept the token") as error: go(X(trouble={1: httpx.Response(status, text=SECRET)}), tmp_path/str(status))
        assert SECRET not in str(error.value) and error.value.__suppress_context__
    def breaks(request): raise httpx.ConnectError("gone")
    with pytest.raises(BoigError, match="does not answer") as error: go(lambda r: breaks(r), tmp_path/"down")
    moved = X(trouble={1: httpx.Response(302, headers={"location": "https://evil.example/"})})
    assert "302" in go(moved, tmp_path/"moved", ("a",))["a"] and len(moved.seen) == 1
    out = capsys.readouterr()
    assert SECRET not in caplog.text + out.out + out.err + str(error.getrepr(style="short")) + str(refused)
    assert not any(SECRET.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_pull_needs_a_token_and_days(tmp_path, monkeypatch):
    monkeypatch.delenv("X_BEARER_TOKEN", raising=False)
    with pytest.raises(BoigError, match="X_BEARER_TOKEN"): pull(["a"], "2018-01-01", "2023-01-01", tmp_path)
    monkeypatch.setenv("X_BEARER_TOKEN", SECRET)
    for days in (("2018", "2023-01-01"), ("2023-01-01", "2018-01-01")):
        with pytest.raises(BoigError): pull(["a"], *days, tmp_path)
    with pytest.raises(BoigError, match="no handle"): pull(["a OR from:b"], "2018-01-01", "2023-01-01", tmp_path)
