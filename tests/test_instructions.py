"Listings 1 to 4 against the paper's own text (BOIG appendix A.2), and the twins against each other."
import json
import re
from pathlib import Path

import numpy as np
import pytest

from boig.benches.instructions import EMOJIBENCH, STOCK, answer, examples, instruction, noisy_behaviour, template
from boig.core import BoigError
from boig.data.verbalization import Verbalization, parse

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
