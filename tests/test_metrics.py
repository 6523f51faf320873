"The nine metrics of Table 1 against a plain double loop over the paper's equations 1 to 14."
import math
import time

import numpy as np
import pytest

from boig.core import BoigError
from boig.data.palette import COLOR_NAMES, PALETTE_HEX, TONE_NAMES
from boig.data.verbalization import Verbalization
from boig.metrics.verbalization_metrics import METRICS, bootstrap_means, score_verbalizations
from boig.metrics.word_vectors import load_vectors

WORDS = ["cat", "dog", "sofa", "couch", "teddy bear", "wrist watch", "shoe", "hamburger", "woman", "man", "cup", "zxqvjk", "safety vest", "Lamp", "dark_lamp"]


def draw(rng, objects=5):
    c = rng.choice(40, rng.integers(1, 6), replace=False)
    o = rng.choice(WORDS, rng.integers(0, objects + 1), replace=False)
    corner = rng.uniform(0, 40, (len(o), 2))
    size = rng.uniform(0, 24, (len(o), 2)) * (rng.random((len(o), 1)) > 0.15)  # some boxes without area
    return Verbalization({COLOR_NAMES[k]: float(x) for k, x in zip(c, rng.dirichlet(np.ones(len(c))))},
                         dict(zip(TONE_NAMES, map(float, rng.dirichlet([1, 1, 1])))),
                         {str(w): tuple(map(float, (*q, *(q + s)))) for w, q, s in zip(o, corner, size)})


def brute(g, p, width, height, nlp):
    "Equations 1 to 14, sum by sum."
    doc = {n: nlp.make_doc(" ".join(n.lower().replace("_", " ").split())) for v in (g, p) for n in [*v.colors, *v.objects]}
    cos = lambda a, b: doc[a].similarity(doc[b])  # spaCy's own
    rgb = lambda n: [int(PALETTE_HEX[n][i:i + 2], 16) / 255 for i in (1, 3, 5)]
    def iou(a, b): return len(a & b) / len(a | b) if a | b else math.nan
    def mean(pairs): return sum(pairs) / len(pairs) if pairs else math.nan
    def rmse(a, b):
        both = set(a) & set(b)
        return math.sqrt(sum((a[k] - b[k]) ** 2 for k in both) / len(both)) if both else math.nan
    pairs = [(a, b) for a in g.objects for b in p.objects if cos(a, b) > 0.7]
    area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
    centre = lambda b: ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)
    whole, diagonal = width * height, math.hypot(width, height)
    squared = [(area(g.objects[a]) - area(p.objects[b])) ** 2 * area(g.objects[a]) / whole / cos(a, b) for a, b in pairs]
    distance = [math.dist(centre(g.objects[a]), centre(p.objects[b])) / cos(a, b) for a, b in pairs]
    key = lambda v: {" ".join(n.lower().replace("_", " ").split()) for n in v.objects}
    return [iou(set(g.colors), set(p.colors)), mean([c for a in g.colors for b in p.colors if (c := cos(a, b)) > 0.7]),
            mean([d for a in g.colors for b in p.colors if (d := math.dist(rgb(a), rgb(b))) < 0.5]),
            rmse(g.colors, p.colors), rmse(g.tones, p.tones), iou(key(g), key(p)), mean([cos(a, b) for a, b in pairs]),
            math.sqrt(mean(squared)) / whole if pairs else math.nan, mean(distance) / diagonal if pairs else math.nan]


@pytest.mark.filterwarnings("ignore:.*W008")
def test_all_nine_against_a_double_loop():
    rng, nlp = np.random.default_rng(3), load_vectors()
    truth, guess = [draw(rng) for _ in range(150)], [draw(rng) for _ in range(150)]
    sizes = rng.integers(40, 90, (150, 2))
    fast = score_verbalizations(truth, guess, sizes).to_numpy()
    slow = np.array([brute(g, p, w, h, nlp) for g, p, (w, h) in zip(truth, guess, sizes)])
    assert (np.isnan(fast) == np.isnan(slow)).all()
    assert np.isnan(slow).any(0)[[3, 5, 6, 7, 8]].all()  # the undefined cases are really met
    np.testing.assert_allclose(fast, slow, rtol=2e-5, atol=1e-6)


def one(colors={"Red": 1.0}, objects={}):
    return Verbalization(colors, {"warm": 1.0, "neutral": 0, "cool": 0}, objects)


def test_where_nothing_can_be_measured():
    s = score_verbalizations([one(), one()], [one({"Dark_Green": 1.0}), None], (64, 64))
    assert s["Colours IOU"][0] == 0 and s["Objects IOU"].isna().all()  # no objects on both sides: 0/0
    assert np.isnan(s["Colours Coverage RMSE"][0]) and s.iloc[1].isna().all()
    one_sided = score_verbalizations([one(objects={"cat": (0, 0, 9, 9)})], [one()], (64, 64))
    assert one_sided["Objects IOU"][0] == 0 and np.isnan(one_sided["Objects Cosine Similarity"][0])


def test_names_that_differ_only_in_case_are_one():
    a, b = one(objects={"cat": (0, 0, 9, 9)}), one(objects={"Cat": (0, 0, 5, 5), "cat": (0, 0, 9, 9)})
    s = score_verbalizations([a, b], [b, b], (64, 64))
    assert s["Objects IOU"].tolist() == [1, 1] and s["Objects Relative Position Error"].tolist() == [0, 0]


def test_words_without_vectors():
    a, b = one(objects={"zxqvjk": (0, 0, 9, 9)}), one(objects={"qqjjzz": (0, 0, 9, 9)})
    s = score_verbalizations([a, a], [a, b], (64, 64))
    assert s["Objects Cosine Similarity"][0] == 1 and np.isnan(s["Objects Cosine Similarity"][1])


def test_relative_measures_do_not_depend_on_the_scale():
    rng = np.random.default_rng(5)
    truth, guess = [draw(rng) for _ in range(40)], [draw(rng) for _ in range(40)]
    def grow(v): return Verbalization(v.colors, v.tones, {k: tuple(7 * x for x in b) for k, b in v.objects.items()})
    small = score_verbalizations(truth, guess, (64, 48))
    large = score_verbalizations([grow(v) for v in truth], [grow(v) for v in guess], (7 * 64, 7 * 48))
    np.testing.assert_allclose(small, large, rtol=1e-9)


def test_ten_thousand_pairs_in_ten_seconds():
    rng = np.random.default_rng(0)
    truth = [draw(rng) for _ in range(10_000)]
    start = time.perf_counter()
    score_verbalizations(truth, truth[::-1], (64, 64))
    assert time.perf_counter() - start < 10


def test_bad_calls():
    with pytest.raises(BoigError, match="2 true but 1 predicted"): score_verbalizations([one(), one()], [one()], (64, 64))
    with pytest.raises(BoigError, match="resolution"): score_verbalizations([one()], [one()], (0, 64))


def test_no_rows_is_an_empty_table():
    assert list(score_verbalizations([], [], (64, 64)).columns) == list(METRICS)
    assert np.isnan(bootstrap_means(np.zeros((0, 9)), 10, 0)[:3]).all()


def test_bootstrap_covers_the_truth():
    "The 95% interval of a mean holds the true mean in about 95 of 100 draws."
    rng, hits = np.random.default_rng(0), 0
    for s in range(200):
        x = rng.exponential(2.0, (120, 1))
        x[rng.random(120) < 0.2] = np.nan
        _, low, high, n = bootstrap_means(x, 400, s)[:, 0]
        hits += low <= 2.0 <= high
        assert n == (~np.isnan(x)).sum()
    assert 176 <= hits <= 199


def test_too_few_values_have_no_interval():
    x = np.full((50, 1), np.nan)
    x[:4] = 0.5
    mean, low, high, n = bootstrap_means(x, 100, 0)[:, 0]
    assert mean == 0.5 and np.isnan([low, high]).all() and n == 4
