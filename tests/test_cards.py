"Cards against the data they speak of, and Croissant as a reader of it sees it."
import io
import json
import re

import pandas as pd
import pytest
from PIL import Image

import boig.benches.market as market
from boig.benches.cards import (card_path, check_croissant, croissant, emoji_facts, fill, market_facts, plain, read_card, read_croissant, size_of, table_facts, write_card,
                                write_croissant)
from boig.benches.market import make_stock, make_tweets, write_market
from boig.benches.pickapic import HistoryRules, build_histories
from boig.benches.subjects import write_pocket_subjects
from boig.benches.tastes import TasteRules, make_tastes
from boig.core import BoigError
from boig.data.emoji import load_emojibench
from boig.data.verbalization import Verbalization
from boig.zoo import resolve

NAMES = ("emojibench", "pocket-ads", "pocket-subjects", "boigbench", "stock", "pocket-preferences", "pick-a-pic")


def text_of(name): return card_path(name).read_text(encoding="utf-8")
def needs_mlcroissant(): return pytest.importorskip("mlcroissant", reason="mlcroissant is not installed: pip install 'boig[cards]'")


@pytest.fixture(scope="module")
def table():
    "Four pictures of three tweets, as the builder of BoigBench writes them."
    Image.new("RGB", (6, 4), "red").save(out := io.BytesIO(), format="PNG")
    v = Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"cat": (0, 0, 2, 2)}).to_json()
    rows = [(t, m, n, b) for t, m, n, b in [("11", "3_1", 40, "high"), ("11", "3_2", 40, "high"), ("12", "3_3", 2, "low"), ("13", "3_4", 0, "low")]]
    t = pd.DataFrame(rows, columns=["tweet_id", "media_key", "likes", "bucket"])
    return t.assign(id=t.tweet_id + "_" + t.media_key, account="nordhus", created_at=pd.to_datetime("2021-05-04 10:00"), text="Wörds 🎉", url=None, type="photo", number=[1, 2, 1, 1], subgroup=t.tweet_id, alt_text=[None, "a cat", None, None],
                    width=6, height=4, split="train", captions="a cat", keywords="cat", verbalization=v, image=[{"bytes": out.getvalue(), "path": "p.png"}] * 4, **{"image resolution": "(6, 4)"})


@pytest.mark.parametrize("name", NAMES)
def test_every_card_says_what_it_must(name):
    card = read_card(name)
    assert card.about and len(card.sections["Who could be harmed"]) > 150 and len(card.sections["Limits"]) > 150
    for line in text_of(name).splitlines():  # Markdown takes a line that begins with a comment for HTML
        assert not line.startswith("<!--") or re.fullmatch(r"<!-- (statistics|/) -->", line), line


def test_emojibench_card_and_data_agree():
    text = text_of("emojibench")
    assert fill(text, emoji_facts(load_emojibench())) == text, "run python bench/cards.py"
    assert "Drawings, <!-- rows -->747<!-- / --> of them" in text and "| pictures | 747 | 249 | 244 | 254 |" in text
    columns, = read_card("emojibench").columns
    assert [c for c, *_ in columns.rows] == list(load_emojibench().columns)


def test_a_card_that_disagrees_is_noticed(tmp_path):
    data = load_emojibench()
    text = text_of("emojibench")
    assert fill(text, emoji_facts(data.iloc[1:])) != text
    more = data.assign(uses=data.uses + (data.hexcode == data.hexcode[700]))
    assert fill(text, emoji_facts(more)) != text
    (tmp_path/"card.md").write_text(text.replace("747", "748"), encoding="utf-8")
    assert fill((tmp_path/"card.md").read_text(encoding="utf-8"), emoji_facts(data)) == text  # filling mends it
    assert write_card("emojibench", data, tmp_path/"card.md").read_text(encoding="utf-8") == text


def blind(monkeypatch):
    "What is seen in a picture decides about KPIs only, which the card doesn't state; so nothing is looked at, which is three times as fast."
    monkeypatch.setattr(market, "seen", lambda scenes: [Verbalization({}, {}, {})] * len(list(scenes)))
    monkeypatch.setattr(market, "explain", lambda view, context: {"account": 0.0})
    monkeypatch.setattr(market, "expected", lambda view, context, kpi: {"impressions": 100.0, "forwards": 10.0, "downloads": 1.0}[kpi])


def test_pocket_ads_card_and_sources_agree(monkeypatch):
    "At the default size and seed."
    blind(monkeypatch)
    text, facts = text_of("pocket-ads"), market_facts((make_tweets(), make_stock()))
    assert fill(text, facts) == text, "run python bench/cards.py"
    assert "| tweets | 4,000 |" in text and "| stock pictures | 3,000 |" in text
    assert fill(text, market_facts((make_tweets(40), make_stock(10)))) != text


def test_pocket_ads_facts_do_not_hang_on_what_is_seen(monkeypatch):
    true = market_facts((make_tweets(60, seed=5), make_stock(20, seed=5)))
    blind(monkeypatch)
    assert market_facts((make_tweets(60, seed=5), make_stock(20, seed=5))) == true and market_facts((make_tweets(60, seed=6), make_stock(20, seed=5))) != true


def test_pocket_ads_card_describes_the_files(tmp_path):
    folder = write_market(tmp_path/"m", tweets=40, stock=5, seed=2)
    pages, assets = read_card("pocket-ads").columns
    assert {c for c, *_ in assets.rows} == set(pd.read_csv(folder/assets.file, nrows=1).columns)
    page = json.loads((folder/pages.file).read_text(encoding="utf-8").splitlines()[0])
    described = {c.split(".")[1].split("[")[0] for c, *_ in pages.rows if c.startswith("data[]")}
    assert {k for tweet in page["data"] for k in tweet} <= described | {"lang", "edit_history_tweet_ids"} and described <= {k for tweet in page["data"] for k in tweet}


@pytest.mark.parametrize("name", ["boigbench", "stock"])
def test_cards_of_what_is_not_shipped_hold_no_numbers(name):
    block = re.search(r"<!-- statistics -->(.*?)<!-- / -->", text_of(name), re.S)[1]
    assert "come from your own build" in block and not re.search(r"\d", block)
    assert "may ship it" in text_of(name) and "build" in read_card(name).sections["How to rebuild it"]


def test_a_build_writes_its_own_card(table, tmp_path):
    empty = text_of("boigbench")
    card = write_card("boigbench", table, tmp_path/"boigbench.md", source="a test")
    text = card.read_text(encoding="utf-8")
    assert "| pictures | 4 | 2 | 2 |" in text and "| likes, mean | 14 | 40 | 1 |" in text and "size_categories: [n<1K]" in text and "**Source of this build:** <!-- source -->a test<!-- / -->." in text
    assert text_of("boigbench") == empty and fill(text, table_facts(table) | {"source": "a test"}) == text
    assert {c for c, *_ in read_card(card).columns[0].rows} == set(table.columns)


def test_what_a_card_lacks_is_said(tmp_path):
    whole = text_of("stock")
    def refused(text, what):
        (tmp_path/"c.md").write_text(text, encoding="utf-8")
        with pytest.raises(BoigError, match=what): read_card(tmp_path/"c.md")
    refused(re.sub(r"## Who could be harmed\n.*?(?=## )", "", whole, flags=re.S), "lacks the section 'Who could be harmed'")
    refused(re.sub(r"(## Limits\n).*?(?=## )", r"\1\n", whole, flags=re.S), "lacks the section 'Limits'")
    refused(whole.replace("license: other", "license: nonsense-1.0"), "Unknown licence 'nonsense-1.0'")
    refused(whole.replace("10K<n<100K", "lots"), "Unknown size category 'lots'")
    refused(whole.replace("version: 1.0.0\n", ""), "'version' in the front matter")
    refused(whole.replace("---\n", "", 1), "front matter")
    refused(whole.replace("| `downloads` | int | sales |", "| `downloads` | int |"), "a name, a type and a meaning")
    with pytest.raises(BoigError, match="Unknown place in the card 'row'"): fill("<!-- row -->1<!-- / -->", {"rows": "1"})
    with pytest.raises(BoigError, match="Did you mean 'stock'"): read_card("stocks")


def test_sizes_and_plain_words():
    assert [size_of(n) for n in (0, 999, 1000, 79728, 168 * 10**6)] == ["n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "100M<n<1B"]
    assert plain("A **b** `c`\n<!-- x -->1<!-- / --> [d](https://e)") == "A b c 1 d (https://e)"


@pytest.mark.parametrize("name", NAMES)
def test_croissant_is_made_from_the_card(name):
    path = card_path(name).with_suffix(".croissant.json")
    shipped = json.loads(path.read_text(encoding="utf-8"))
    assert shipped == croissant(name, resolve("emojibench") if name == "emojibench" else None), "run python bench/cards.py"
    assert check_croissant(shipped)["rai:dataSocialImpact"] == plain(read_card(name).sections["Who could be harmed"])
    assert shipped.get("isLiveDataset", False) == (name != "emojibench") == ("sha256" not in shipped["distribution"][0])


def test_our_own_check_of_croissant():
    good = croissant("emojibench", resolve("emojibench"))
    for key in ("license", "name", "rai:dataBiases", "citeAs"):
        with pytest.raises(BoigError, match=f"lack {key}"): check_croissant({k: v for k, v in good.items() if k != key})
    file, = good["distribution"]
    with pytest.raises(BoigError, match="sha256 of emojibench.parquet"): check_croissant(good | {"distribution": [{k: v for k, v in file.items() if k != "sha256"}]})


def test_a_column_without_explanation_is_refused(table, tmp_path):
    table.assign(mystery=1).to_parquet(tmp_path/"b.parquet")
    with pytest.raises(BoigError, match="doesn't explain the columns mystery of b.parquet"): croissant("boigbench", tmp_path/"b.parquet")
    with pytest.raises(BoigError, match="no file"): croissant("boigbench", tmp_path/"c.parquet")


def test_records_of_emojibench():
    needs_mlcroissant()
    records = read_croissant(card_path("emojibench").with_suffix(".croissant.json"), n=2)["drawings"]
    assert [r["drawings/name"].decode() for r in records] == ["face with tears of joy", "red heart"] and records[1]["drawings/uses"] == 8050
    assert records[0]["drawings/image"].size == (64, 64) and records[1]["drawings/tags"] == [b"emotion", b"heart", b"love", b"red"]


@pytest.mark.parametrize("name", ["boigbench", "stock"])
def test_records_of_a_build(name, table, tmp_path):
    needs_mlcroissant()
    if name == "stock":
        table = table[["id", "captions", "keywords", "image", "image resolution", "verbalization", "bucket", "split"]].assign(
            contributor="x", downloads=1, forwards=[5, 4, 3, 2], impressions=9, subgroup="s", **{"release date": "2020-01-02"})
    table.to_parquet(tmp_path/f"pocket_{name}.parquet")
    card = write_card(name, table, tmp_path/f"{name}.md")
    path = write_croissant(card, tmp_path/f"{name}.croissant.json", tmp_path/f"pocket_{name}.parquet")
    (kind, records), = read_croissant(path, n=9).items()
    assert len(records) == 4 and [r[f"{kind}/id"].decode() for r in records] == table.id.tolist()
    assert records[0][f"{kind}/image"].getpixel((0, 0)) == (255, 0, 0) and records[3][f"{kind}/verbalization"].decode() == table.verbalization[3]
    if name == "boigbench":
        assert [r["pictures/likes"] for r in records] == [40, 40, 2, 0] and records[1]["pictures/text"].decode() == "Wörds 🎉" and records[0]["pictures/alt_text"] is None
        assert records[2]["pictures/created_at"] == pd.Timestamp("2021-05-04 10:00")
    else: assert [r["assets/forwards"] for r in records] == [5, 4, 3, 2] and records[0]["assets/release_date"] == b"2020-01-02"
    live = read_croissant(card_path(name).with_suffix(".croissant.json"), {f"{name}.parquet": tmp_path/f"pocket_{name}.parquet"}, n=9)
    assert [r[f"{kind}/id"] for r in live[kind]] == [r[f"{kind}/id"] for r in records] and live[kind][0].keys() == records[0].keys()


def test_changed_data_are_refused(table, tmp_path):
    needs_mlcroissant()
    table.to_parquet(tmp_path/"b.parquet")
    path = write_croissant("boigbench", tmp_path/"b.croissant.json", tmp_path/"b.parquet")
    table.head(3).to_parquet(tmp_path/"b.parquet")
    with pytest.raises(BoigError, match="cannot be read"): read_croissant(path)


def test_records_of_pocket_ads(tmp_path):
    needs_mlcroissant()
    folder = write_market(tmp_path/"m", tweets=40, stock=5, seed=2)
    files = {f: folder/f for f in ("twitter/pages.jsonl", "stock/assets.csv")}
    found = read_croissant(card_path("pocket-ads").with_suffix(".croissant.json"), files, n=100)
    pages = [json.loads(line) for line in files["twitter/pages.jsonl"].read_text(encoding="utf-8").splitlines()]
    assert [[i.decode() for i in r["tweets/id"]] for r in found["tweets"]] == [[t["id"] for t in p["data"]] for p in pages]
    assert [r["tweets/public_metrics_like_count"] for r in found["tweets"]] == [[t["public_metrics"]["like_count"] for t in p["data"]] for p in pages]
    assert [r["assets/forwards"] for r in found["assets"]] == pd.read_csv(files["stock/assets.csv"]).forwards.tolist()
    own = read_croissant(write_croissant("pocket-ads", folder/"ads.croissant.json", folder), n=1)
    assert own["assets"] == found["assets"][:1]


def test_records_of_pocket_subjects(tmp_path):
    needs_mlcroissant()
    write_pocket_subjects(tmp_path, ["cup", "mascot"], n=3)
    records = read_croissant(card_path("pocket-subjects").with_suffix(".croissant.json"), {"pictures.csv": tmp_path/"pictures.csv"}, n=9)["pictures"]
    assert [r["pictures/file"].decode() for r in records] == [f"{s}/{k:02}.png" for s in ("cup", "mascot") for k in range(3)]
    assert all((tmp_path/r["pictures/file"].decode()).is_file() for r in records) and records[5]["pictures/noun"] == b"monster toy"
    assert all(r["pictures/x1"] < r["pictures/x2"] <= 64 for r in records)


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    "Simulated choices, read back as histories."
    folder = tmp_path_factory.mktemp("histories")
    make_tastes(folder, TasteRules(users=6, prompts=12))
    build_histories(folder/"choices.parquet", folder/"h", HistoryRules(test_users=0.34, valid_users=0.0), threads=1)
    return folder/"h"


@pytest.mark.parametrize("name", ["pocket-preferences", "pick-a-pic"])
def test_records_of_preferences(name, histories, tmp_path):
    needs_mlcroissant()
    assert not re.search(r"\d", re.search(r"<!-- statistics -->(.*?)<!-- / -->", text_of(name), re.S)[1])
    for file in histories.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    card = write_card(name, tmp_path, tmp_path/f"{name}.md", "a test")
    triples, cases = (pd.read_parquet(histories/f"{f}.parquet") for f in ("triples", "cases"))
    text, n = card.read_text(encoding="utf-8"), {k: len(v) for k, v in cases.groupby(["kind", "split", "seen"])}
    assert f"| triples | {len(triples):,} |" in text and f"| … of training | {(triples.split == 'train').sum():,} |" in text and "size_categories: [n<1K]" in text and ("a test" in text) == (name == "pick-a-pic")
    for (kind, split, seen), k in n.items(): assert f"| questions: {kind} {split} {'seen' if seen else 'unseen'} | {k:,} |" in text
    path = write_croissant(card, tmp_path/f"{name}.croissant.json", tmp_path)
    found, raw = read_croissant(path, n=5), json.loads(path.read_text(encoding="utf-8"))
    assert not any("key" in r for r in raw["recordSet"] if r["name"] != "pictures") and all("sha256" in f for f in raw["distribution"])
    assert [r["triples/liked"].decode() for r in found["triples"]] == list(triples.liked[:5]) and [r["cases/kind"].decode() for r in found["cases"]] == list(cases.kind[:5])
    assert [[u.decode() for u in r["cases/disliked"]] for r in found["cases"]] == [list(u) for u in cases.disliked[:5]]
    if name == "pocket-preferences": assert found["pictures"][0]["pictures/image"].size == (64, 64)
