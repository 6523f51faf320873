"Listings 1 to 4 against the paper's own text (BOIG appendix A.2), and the twins against each other."
import datetime
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from boig.benches.instructions import (BOIGBENCH, EMOJIBENCH, ENDINGS, SPECS, STOCK, Example, answer, desired, examples, instruction, listing1,
                                       noisy_behaviour, read_instruction, template, token_lengths)
from boig.core import BoigError
from boig.data.emoji import describe, load_emojibench
from boig.data.palette import COLOR_NAMES, TONE_NAMES
from boig.data.verbalization import Verbalization, parse, round_to_one

LISTINGS = json.loads((Path(__file__).parent/"data"/"boig_listings.json").read_text(encoding="utf-8"))


def fields(text):
    "The data that a listing quotes, by label."
    data = re.search(r"following image: \[(captions: .*?)\]\.? Answer", text, re.S)[1]
    return dict(re.findall(r'([a-z][a-z /]*?): "([^"]*)"', data))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_questions_are_the_papers(n):
    found = fields(LISTINGS[str(n)]["input"])
    content = {k: found[k] for k, _ in STOCK.content}
    told = {k.name: next((v for label, v in found.items() if f"number of {k.name}" in label), None) for k in STOCK.kpis}
    assert instruction(STOCK, content, n, told) == LISTINGS[str(n)]["input"]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_answers_are_the_papers(n):
    text = LISTINGS[str(n)]["output"]
    read = parse(text) if n < 3 else None
    exact = {k.name: json.loads(text).get(f"exact {k.name}") for k in STOCK.kpis}
    assert answer(STOCK, n, read and read.value, exact) == text


def row():
    v = Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"cat": (1, 2, 3, 4)})
    return {"captions": "a", "keywords": "b, c", "image resolution": "(64, 64)"}, v


@pytest.mark.parametrize("seed", range(20))
def test_twins_differ_in_behaviour_only(seed):
    content, v = row()
    boig, twin = (examples(EMOJIBENCH, content, v, {"uses": 31337}, b, seed) for b in (True, False))
    assert len(boig) == 2 and len(twin) == 1 and boig[0].listing == twin[0].listing and boig[1].listing in (3, 4)
    assert parse(boig[0].answer).value == parse(twin[0].answer).value == v
    assert " uses" not in twin[0].prompt + twin[0].answer and not re.search(r"\d{5}", twin[0].prompt + twin[0].answer)
    assert "31337" in boig[0].prompt or boig[0].listing == 2


def test_noise_is_within_a_fifth_and_can_be_off():
    rng = np.random.default_rng(0)
    for value in (0, 1, 15, 885, 14622):
        drawn = [noisy_behaviour({"x": value}, rng)["x"] for _ in range(200)]
        assert min(drawn) >= round(0.8 * value) - 1 and max(drawn) <= round(1.2 * value) + 1
    assert noisy_behaviour({"x": 885}, rng, noise=0) == {"x": 885}


def test_errors_say_what_to_do():
    with pytest.raises(BoigError, match="no Listing 5"): template(STOCK, 5)
    with pytest.raises(BoigError, match="'uniform' or 'samples'"): noisy_behaviour({"x": 1}, np.random.default_rng(0), kind="gauss")


def test_texts_of_emojibench_and_stock_stay_as_they_are():
    "Keys of finished stages and the shipped language model hang on these bytes."
    v, emoji, stock = row()[1], hashlib.sha256(), hashlib.sha256()
    for i, r in load_emojibench().iterrows():
        content = dict(zip(("captions", "keywords"), describe(r))) | {"image resolution": "(64, 64)"}
        for b in (True, False):
            for e in examples(EMOJIBENCH, content, v, {"uses": int(r.uses)}, b, i): emoji.update((e.prompt + e.answer).encode())
    for n in range(300):
        content = {"captions": f"caption {n}, é ’", "keywords": "a, b", "image resolution": f"({n}, 64)", "release date": "2019-12-02"}
        for b in (True, False):
            for e in examples(STOCK, content, v, dict(downloads=n, forwards=3 * n, impressions=50 * n), b, n): stock.update((e.prompt + e.answer).encode())
    assert emoji.hexdigest() == "7adb64277c217eb82749d4f8f5e8dd8caa4410fa1a1250d32436feb852c74ad0"
    assert stock.hexdigest() == "645dd75e8cd0f4e829c890e2c065a43cd8057b2e1ffea3c8a12c4acb347f59c9"


# Random rows. Texts hold what people write, and what would break a careless format: quotes, brackets, newlines, the labels themselves.
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
                 st.lists(st.sampled_from(['"', "\\", "\n", "]", '", keywords: "', "number of likes", "🎉", "\u2028", " Answer properly", "{}"]), max_size=6).map("".join))
SHARES = st.lists(st.integers(10, 40), min_size=1, max_size=5)


@st.composite
def verbalizations(draw):
    weights = draw(SHARES)
    colors = draw(st.lists(st.sampled_from(COLOR_NAMES), min_size=len(weights), max_size=len(weights), unique=True))
    shares = round_to_one(dict(zip(colors, weights)))
    if min(shares.values()) < 0.1: shares = {colors[0]: 1.0}
    tones = round_to_one(dict(zip(TONE_NAMES, draw(st.tuples(*[st.integers(0, 9)] * 3).filter(any)))))
    box = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(31, 64), st.integers(31, 64))
    return Verbalization(shares, tones, draw(st.dictionaries(TEXT.filter(lambda t: len(t) < 40), box, max_size=3)))


@st.composite
def rows(draw, spec):
    row = {label: draw(TEXT) for label, _ in spec.content}
    for label, column in spec.columns: row[column] = row.pop(label)
    if spec is BOIGBENCH: row["created_at"] = pd.Timestamp(draw(st.datetimes(datetime.datetime(2007, 1, 1), datetime.datetime(2023, 1, 1))))
    row |= {k.name: draw(st.integers(0, 10**7)) for k in spec.kpis} | {"bucket": draw(st.sampled_from(["high", "medium", "low"]))}
    return pd.Series(row, dtype=object) if draw(st.booleans()) else row


@pytest.mark.parametrize("spec", [BOIGBENCH, STOCK, EMOJIBENCH], ids=["boigbench", "stock", "emojibench"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), with_behaviour=st.booleans())
def test_every_text_reads_back(spec, data, seed, with_behaviour):
    row, v = data.draw(rows(spec)), data.draw(verbalizations())
    exact, told_spec = spec.behaviour(row), spec.told(with_behaviour)
    for e in examples(spec, row, v, exact, with_behaviour, seed):
        content, told = read_instruction(told_spec, e.prompt, e.listing)
        assert content == {label: str(spec.field(row, label)) for label, _ in spec.content}
        if not with_behaviour or e.listing == 4: assert told == {}
        elif e.listing == 1: assert told == exact
        else:
            assert set(told) == set(exact)
            for key, value in told.items(): assert value == exact[key] if isinstance(value, str) else abs(value - exact[key]) <= 0.2 * exact[key] + 0.5
        said = parse(e.answer)
        if e.listing < 3: assert said.clean and said.value == v
        numbers = {f"exact {k.name}": exact[k.name] for k in spec.kpis} if with_behaviour and e.listing > 1 else {}
        assert said.extra == numbers


def tweet(**other):
    return {"account": "nordhus", "text": "New in.", "captions": "a chair", "keywords": "chair", "image resolution": "(64, 64)",
            "created_at": datetime.datetime(2021, 5, 4, 23, 59), "likes": 512, "bucket": "high"} | other


def test_boigbench_lists_account_date_text_and_both_forms_of_likes():
    for n, asked in [(1, 2), (2, 3), (3, 1), (4, 1)]:
        text = instruction(BOIGBENCH, tweet(), n, BOIGBENCH.behaviour(tweet()))
        given_, wanted = text.split("You have to predict", 1)
        numbered = [int(i) for i in re.findall(r"\((\d)\) ", given_.split(" Note that")[0])]
        assert numbered == list(range(1, 7 if n == 4 else 9))
        assert [int(i) for i in re.findall(r"\((\d)\) ", wanted)] == list(range(1, asked + 1))
        assert 'company: "nordhus", tweet text: "New in.", captions: "a chair"' in text and 'date: "2021-05-04"' in text
        assert ('bucket' in text) == ("512" in text) == (n < 4)
    assert "Note that (7) and (8) are Key" in listing1(BOIGBENCH, tweet())
    assert answer(BOIGBENCH, 3, behaviour=BOIGBENCH.behaviour(tweet())) == '{"exact likes": 512}'


def test_boigbench_twin_learns_nothing_about_likes():
    text = "".join(e.prompt + e.answer for s in range(9) for e in examples(BOIGBENCH, tweet(), row()[1], BOIGBENCH.behaviour(tweet()), False, s))
    assert "like" not in text and "512" not in text and "bucket" not in text


def test_specs_and_endings_name_the_same_benchmarks():
    assert SPECS.keys() == ENDINGS.keys() and len(set(ENDINGS.values())) == len(ENDINGS)
    assert SPECS["pocket_boigbench"].behaviour_columns == ["likes", "bucket"] and STOCK.behaviour_columns == ["downloads", "forwards", "impressions"]


def test_desired_is_the_training_bucket():
    table = pd.DataFrame({"split": ["train"] * 5 + ["test"], "bucket": ["high"] * 3 + ["low"] * 2 + ["high"], "likes": [10, 20, 90, 1, 2, 10**6]})
    assert desired(table, BOIGBENCH) == {"likes": 20, "likes bucket": "high"}
    assert desired(table, BOIGBENCH, how="mean")["likes"] == 40 and desired(table, BOIGBENCH, how="min")["likes"] == 10
    assert desired(table.rename(columns={"likes": "uses"}), EMOJIBENCH, "low") == {"uses": 2}
    with pytest.raises(BoigError, match="No training row is in the bucket 'medium'; there are: high, low"): desired(table, BOIGBENCH, "medium")
    with pytest.raises(BoigError, match="Did you mean 'median'"): desired(table, BOIGBENCH, how="medium")
    with pytest.raises(BoigError, match="lacks the column uses"): desired(table, EMOJIBENCH)


def test_token_lengths_are_those_of_training():
    from transformers import AutoTokenizer
    from boig.behaviour.batches import encode_example
    from boig.zoo import resolve
    tokenizer = AutoTokenizer.from_pretrained(resolve("pocket-llama"))
    some = [e for s in range(12) for e in examples(BOIGBENCH, tweet(text="word " * s), row()[1], BOIGBENCH.behaviour(tweet()), True, s)]
    lengths = [len(encode_example(e, tokenizer)["input_ids"]) for e in some]
    cut = int(np.median(lengths))
    table = token_lengths(some, tokenizer, cut)
    assert table.loc["all"].tolist() == [24, cut, int(np.quantile(lengths, 0.95)), max(lengths), sum(n > cut for n in lengths)]
    assert table.examples.iloc[:-1].sum() == 24 and 0 < table.refused["all"] < 24
    refused = 0
    for e in some:
        try: encode_example(e, tokenizer, cut)
        except BoigError: refused += 1
    assert refused == table.refused["all"]
    assert token_lengths([], tokenizer).empty and token_lengths([Example(1, "", "")], tokenizer).most["all"] == 2


def test_what_is_missing_is_named():
    with pytest.raises(BoigError, match="list 'keywords'"): instruction(EMOJIBENCH, {"captions": "a"}, 4)
    with pytest.raises(BoigError, match="has no 'created_at'"): instruction(BOIGBENCH, {k: x for k, x in tweet().items() if k != "created_at"}, 4)
    with pytest.raises(BoigError, match="tells likes bucket, likes"): instruction(BOIGBENCH, tweet(), 1)
    with pytest.raises(BoigError, match="not Listing 1"): read_instruction(STOCK, listing1(BOIGBENCH, tweet()), 1)
    with pytest.raises(BoigError, match="not Listing 1"): read_instruction(BOIGBENCH, listing1(BOIGBENCH, tweet()).replace("nordhus", 'nord"hus'), 1)
