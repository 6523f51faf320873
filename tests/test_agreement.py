"Votes, intervals and agreement against worked examples and brute force."
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from boig.core import BoigError
from boig.metrics.agreement import agreement_interval, count_answers, fleiss_kappa, krippendorff_alpha, majority_yes, preferred, wilson


def by_pairs(units):
    "Krippendorff's alpha from its definition: a coincidence matrix of ordered pairs."
    values = sorted({v for u in units for v in u})
    o = np.zeros((len(values),) * 2)
    for u in units:
        if len(u) > 1:
            for a, b in itertools.permutations(u, 2): o[values.index(a), values.index(b)] += 1 / (len(u) - 1)
    n = o.sum(1)
    expected = (n.sum()**2 - (n**2).sum()) / (n.sum() - 1)
    return 1 - (o.sum() - np.trace(o)) / expected

def test_alpha_is_that_of_the_coincidence_matrix():
    rng = np.random.default_rng(0)
    for _ in range(20):
        units = [rng.integers(0, 3, rng.integers(0, 6)).tolist() for _ in range(12)]
        counts = [[u.count(c) for c in range(3)] for u in units]
        assert krippendorff_alpha(counts) == pytest.approx(by_pairs(units), abs=1e-12)

def test_kappa_of_two_raters_by_hand():
    counts = [[2, 0], [0, 2], [1, 1], [2, 0]]  # agree in 3 of 4; yes 5 of 8, no 3 of 8
    assert fleiss_kappa(counts) == pytest.approx((3/4 - (25 + 9)/64) / (1 - (25 + 9)/64))

def test_agreement_at_its_ends():
    assert fleiss_kappa([[3, 0], [0, 3]]) == krippendorff_alpha([[3, 0], [0, 3]]) == 1
    assert np.isnan(fleiss_kappa([[3, 0], [3, 0]])) and np.isnan(krippendorff_alpha([[3, 0], [3, 0]])) and np.isnan(krippendorff_alpha([[1, 0], [0, 1]]))
    assert krippendorff_alpha([[1, 1]] * 4) < 0
    for bad in ([], [[1, 0]], [[2, 0], [2, 1]]):
        with pytest.raises(BoigError, match="as many for each question"): fleiss_kappa(np.reshape(bad, (-1, 2)))

def test_interval_holds_the_value_and_shrinks():
    rng = np.random.default_rng(1)
    yes = rng.binomial(7, rng.choice([0.2, 0.9], 400))
    counts = np.stack([yes, 7 - yes], 1)
    wide, narrow = (agreement_interval(krippendorff_alpha, c, 300) for c in (counts[:40], counts))
    assert narrow[0] < krippendorff_alpha(counts) < narrow[1] and narrow[1] - narrow[0] < wide[1] - wide[0]
    assert np.isnan(agreement_interval(krippendorff_alpha, counts[:9])).all()

@pytest.mark.parametrize("k, n", [(0, 5), (3, 7), (7, 7), (389, 400)])
def test_wilson_against_scipy(k, n):
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-7)

def test_nothing_to_count():
    assert np.isnan(wilson(0, 0)).all() and preferred(pd.Series(dtype=int)) is None

def test_votes():
    rows = [("q", f"r{k}", a) for k, a in enumerate(["yes"] * 4 + ["no", "pass", "pass"])] + [("p", f"r{k}", a) for k, a in enumerate(["yes"] * 3 + ["pass"] * 3)]
    counts = count_answers(pd.DataFrame(rows, columns=["question", "rater", "answer"]))
    assert majority_yes(counts).to_dict() == {"p": False, "q": True}
    assert not majority_yes(counts.drop(columns="yes")).any()
    with pytest.raises(BoigError, match="r0 answered the question q twice"): count_answers(pd.DataFrame([rows[0], rows[0]], columns=["question", "rater", "answer"]))
