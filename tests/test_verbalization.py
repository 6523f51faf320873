"The schema between images and language: round trips, mending, and thousands of mangled model outputs."
import json
import random

import pytest
from hypothesis import given, settings, strategies as st

from boig.data.palette import COLOR_NAMES, TONE_NAMES
from boig.data.verbalization import MAX_COLORS, Parsed, Verbalization, parse, problems, round_to_one

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
side = st.integers(1, 5000)


@st.composite
def verbalizations(draw):
    colors = draw(st.lists(st.sampled_from(COLOR_NAMES), min_size=1, max_size=MAX_COLORS, unique=True))
    spare = [draw(st.integers(0, 50)) for _ in colors]
    left = 100 - 10 * len(colors)
    total = sum(spare) or 1
    units = [10 + left * s // total for s in spare]
    units[0] += 100 - sum(units)
    tones = round_to_one(dict(zip(TONE_NAMES, draw(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))))))
    objects = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        x, y, w, h = draw(st.tuples(side, side, side, side))
        objects[name] = (x, y, x + w, round(y + h + 0.25, 2))
    return Verbalization({c: u / 100 for c, u in zip(colors, units)}, tones, objects)


@given(verbalizations())
def test_what_is_written_is_read(v):
    read = parse(v.to_json())
    assert read.clean and read.value == v and read.value.to_json() == v.to_json()
    assert problems(v) == []


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1e6), min_size=1).filter(lambda d: sum(d.values()) > 1e-3))
def test_rounded_shares_sum_to_one(shares):
    rounded = round_to_one(shares)
    assert sum(round(100 * x) for x in rounded.values()) == 100
    total = sum(shares.values())
    assert all(abs(rounded[k] - s / total) < 0.01 + 1e-9 for k, s in shares.items())


def test_small_colours_are_dropped_and_the_rest_rescaled():
    d = {"color and tones": {"colors": {c: {"coverage": x} for c, x in zip(COLOR_NAMES, [0.5, 0.3, 0.11, 0.06, 0.03])},
                             "tones": {"warm": 1.0, "neutral": 0, "cool": 0}}, "objects": {}}
    read = parse(json.dumps(d))
    assert list(read.value.colors) == list(COLOR_NAMES[:3]) and "small or surplus colours dropped" in read.notes
    assert problems(read.value) == []


@pytest.mark.parametrize("text, has", [
    ("```json\n%s\n```", True), ("Sure! Here it is: %s Hope that helps.", True), ("%s %s", True), ("%s,", True), ("", False), ("null", False),
    ("[]", False), ("{}", False), ("I'm sorry, I can't see images.", False), ('{"objects": {}}', False)])
def test_wrappings(text, has):
    v = Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"cat": (1, 2, 3, 4)})
    read = parse(text.replace("%s", v.to_json()))
    assert (read.value == v) if has else (read.value is None and read.reason)


def test_a_name_that_stands_twice_is_noted():
    text = '{"color and tones": {"colors": {"Red": {"coverage": 1.0}}, "tones": {"warm": 1.0, "neutral": 0, "cool": 0}}, "objects": {"cat": [1, 2, 3, 4], "cat": [5, 6, 7, 8]}}'
    read = parse(text)
    assert read.value.objects == {"cat": (5, 6, 7, 8)} and not read.clean and "twice" in read.notes[0]


def test_python_dict_with_single_quotes():
    text = "{'color and tones': {'colors': {'Red': {'coverage': 1.0}}, 'tones': {'warm': 1.0, 'neutral': 0, 'cool': 0}}, 'objects': {\"the dog's bowl\": [1, 2, 3, 4]}}"
    assert parse(text).value.objects == {"the dog's bowl": (1, 2, 3, 4)}


@pytest.mark.parametrize("bad", [True, "many", None, [], {}, float("nan"), float("inf"), -0.2, "1e999", 10**400])
def test_what_is_no_coverage(bad):
    d = {"color and tones": {"colors": {"Red": {"coverage": bad}, "Blue": {"coverage": 0.5}}, "tones": {"warm": 1}}, "objects": {"cat": [1, 2, bad, 4]}}
    read = parse(json.dumps(d))
    assert read.value.colors == {"Blue": 1.0} and read.notes
    assert problems(Verbalization(read.value.colors, read.value.tones)) == []


@pytest.mark.parametrize("x", [None, 3, b"{}", ["{}"]])
def test_not_text(x):
    assert parse(x).value is None and "not text" in parse(x).reason


def mangle(text: str, rng: random.Random) -> str:
    "What happens to JSON on its way out of a language model, several times over."
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        kind = rng.randrange(11)
        if kind == 0: text = text[:i]
        elif kind == 1: text = text[:i] + text[min(i + rng.randint(1, 6), len(text)):]
        elif kind == 2: text = text[:i] + rng.choice(list("{}[]\",:'\\\n0-.eNaN\u0000\u2019é🐙")) * rng.randint(1, 3) + text[i:]
        elif kind == 3: text = text.replace('"', "'")
        elif kind == 4: text = text[:j] + text[i:j] + text[j:]
        elif kind == 5: text = "".join(rng.sample(text, len(text))) if rng.random() < 0.1 else text[j:] + text[:i]
        elif kind == 6: text = rng.choice(["```json\n", "Answer: ", "<think>{", "[[[[", "{" * 50, '{"a":' * 300]) + text
        elif kind == 7: text = text + rng.choice(["```", "\n\nNote: {x}", "}}}}", text])
        elif kind == 8: text = text.replace(rng.choice(["coverage", "colors", "tones", "objects", "warm"]), rng.choice(["COVERAGE", "colours", "", "null"]))
        elif kind == 9: text = text.replace(rng.choice("0123456789"), rng.choice(["-1", "1e400", "NaN", "true", "99999999999999999999", '"0.3"', "∞"]))
        else: text = text.replace(", ", rng.choice([",", ";", ", , ", " "]))
    return text


def test_fuzz_of_mangled_model_outputs():
    rng, values, reasons = random.Random(0), 0, 0
    sources = [Verbalization(round_to_one(dict.fromkeys(rng.sample(COLOR_NAMES, k), 1)), round_to_one({"warm": 1, "neutral": k, "cool": 0}),
                             {f"object {i}": (i, 2 * i, 10 + i, 40.5) for i in range(k)}).to_json() for k in range(1, 6)]
    for _ in range(6000):
        read = parse(mangle(rng.choice(sources), rng))
        assert isinstance(read, Parsed) and (read.value is None) == bool(read.reason)
        if read.value is None: reasons += 1; continue
        values += 1
        assert problems(Verbalization(read.value.colors, read.value.tones)) == []
        assert all(len(b) == 4 and b[0] <= b[2] and b[1] <= b[3] for b in read.value.objects.values())
        again = parse(read.value.to_json())  # what was mended once needs no mending
        assert again.value == read.value and again.clean
    assert values > 1000 and reasons > 500  # both outcomes are really met


@settings(max_examples=300)
@given(st.text(max_size=300))
def test_any_text_gives_a_value_or_a_reason(text):
    read = parse(text)
    assert (read.value is None) == bool(read.reason)
