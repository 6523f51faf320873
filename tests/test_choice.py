"Top-k with ties and clustering scores, against brute force and formulas written out."
from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from hypothesis import given, settings
from hypothesis import strategies as st

from boig.core import BoigError
from boig.metrics.choice import adjusted_rand, choice_row, cluster_row, davies_bouldin, k_means, mean_interval, pairwise, silhouette, top_k


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.data())
def test_top_k_is_the_mean_over_all_fair_orders(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    orders = [o for o in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in zip(o, o[1:]))]
    assert top_k([scores], k)[0] == pytest.approx(np.mean([0 in o[:k] for o in orders]))


def test_top_k_by_hand():
    assert top_k([[1, 2, 3, 0], [5, 5, 1, 1]], 1).tolist() == [0, 0.5]
    assert top_k([[1, 2, 3, 0]], 3).tolist() == [1] and pairwise([[0.2, 0.7]]).tolist() == [0]
    assert top_k([[-1e300, 1e300]], 2).tolist() == [1]


@pytest.mark.parametrize("bad", [[1, 2], [[1]], [[np.nan, 1]], [[np.inf, 1]]])
def test_top_k_refuses(bad):
    with pytest.raises(BoigError): top_k(bad)
    with pytest.raises(BoigError): top_k([[1, 2]], 3)


def test_row_is_percent_with_intervals_over_users():
    scores = np.array([[1.0, 0]] * 6 + [[0, 1]] * 6)
    row = choice_row(scores, users=np.arange(12) // 2)  # three users with all right, three with all wrong
    assert row["top-1"] == 50 and row["top-1 low"] == 0 and row["top-1 high"] == 100 and row["n"] == 12 and "top-2" not in row
    assert np.isnan(choice_row(scores, users=np.arange(12) // 3)["top-1 low"])  # four users tell nothing of a fifth
    same = choice_row(np.repeat([[1.0, 0], [0, 1]], 50, 0))
    assert 30 < same["top-1 low"] < 50 < same["top-1 high"] < 70


def test_mean_interval_is_that_of_pairs_who_share_a_user_or_a_caption():
    rng = np.random.default_rng(0)
    for n, users, captions in ((60, 7, 40), (200, 30, 9), (90, 90, 6)):
        x, u, c = rng.normal(size=n), rng.permutation(np.arange(n) % users), rng.permutation(np.arange(n) % captions)
        e, g = x - x.mean(), lambda same: len(set(map(tuple, same)))
        alike = [(u[:, None] == u, users), (c[:, None] == c, captions), ((u[:, None] == u) & (c[:, None] == c), g(np.stack([u, c], 1)))]
        v = [sum(e[i] * e[j] for i in range(n) for j in range(n) if same[i, j]) * k / (k - 1) for same, k in alike]
        half = stats.t.ppf(0.975, min(users, captions) - 1) * np.sqrt(max(v[0], v[1], v[0] + v[1] - v[2])) / n
        assert mean_interval(x, u, c) == pytest.approx((x.mean(), x.mean() - half, x.mean() + half), abs=1e-12)
        assert mean_interval(x, c, u) == pytest.approx(mean_interval(x, u, c), abs=1e-12)


def by_hand(x, labels):
    "Silhouette, point by point."
    d, values = lambda i, j: float(np.linalg.norm(x[i] - x[j])), []
    for i in range(len(x)):
        groups = {c: [d(i, j) for j in range(len(x)) if labels[j] == c and j != i] for c in set(labels)}
        own = groups.pop(labels[i])
        if not own: values.append(0.0); continue
        a, b = np.mean(own), min(np.mean(g) for g in groups.values())
        values.append((b - a) / max(a, b))
    return np.mean(values)


def test_silhouette_and_davies_bouldin_point_by_point():
    rng = np.random.default_rng(0)
    for k in (2, 3, 4):
        x, labels = rng.normal(size=(17, 3)), np.array([*range(k), *rng.integers(0, k, 17 - k)])
        assert silhouette(x, labels) == pytest.approx(by_hand(x, labels.tolist()), abs=1e-9)
        c = [x[labels == j].mean(0) for j in range(k)]
        s = [np.mean([np.linalg.norm(p - c[j]) for p in x[labels == j]]) for j in range(k)]
        worst = [max((s[i] + s[j]) / np.linalg.norm(c[i] - c[j]) for j in range(k) if j != i) for i in range(k)]
        assert davies_bouldin(x, labels) == pytest.approx(np.mean(worst), abs=1e-9)
        assert silhouette(x, labels) == pytest.approx(silhouette(10 * x + 5, labels))  # of no unit, and of no place


def test_clusters_that_cannot_be_rated():
    for labels in ([0, 0, 0], [0, 1, 2], [0, 1]):
        with pytest.raises(BoigError): silhouette(np.eye(3), labels)
    assert davies_bouldin([[0.0], [2], [0], [2]], [0, 0, 1, 1]) == np.inf
    with pytest.raises(BoigError): k_means([[0.0], [0.0]], 2)


def test_adjusted_rand_against_pairs():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(0, 3, 12), rng.integers(0, 4, 12)
        i, j = np.triu_indices(12, 1)
        both, one, other = ((a[i] == a[j]) & (b[i] == b[j])).sum(), (a[i] == a[j]).sum(), (b[i] == b[j]).sum()
        chance = one * other / 66
        assert adjusted_rand(a, b) == pytest.approx((both - chance) / ((one + other) / 2 - chance)) == pytest.approx(adjusted_rand(b, a))
    assert adjusted_rand(list("xxyy"), [1, 1, 0, 0]) == 1
    with pytest.raises(BoigError, match="2 of 4 points have no label"): adjusted_rand([0, 0, 1, 1], ["a", "a", None, None])
    with pytest.raises(BoigError, match="1 of 4 points have no label"): silhouette(np.eye(4), [0, 0, 1, np.nan])


def test_k_means_finds_what_is_there_whatever_the_seed():
    rng = np.random.default_rng(2)
    truth = np.repeat(range(4), 20)
    x = 10 * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])[truth] + rng.normal(size=(80, 2))
    for seed in range(3):
        row = cluster_row(x, 4, truth, seed)
        assert row["adjusted rand"] == 1 and row["silhouette"] > 0.6 and row["davies-bouldin"] < 0.5
    assert np.isnan(cluster_row(x, 2)["adjusted rand"]) and (k_means(x, 4, seed=5) == k_means(x, 4, seed=5)).all()


def test_nothing_is_lost_in_differences_of_large_numbers():
    "Far from the origin, near each other: two clusters with one centre are not told apart, and k-means finds the six points."
    x = np.random.default_rng(0).normal(size=(4, 50))[[0, 1, 0, 1]] + 3
    assert davies_bouldin(x, [0, 0, 1, 1]) == np.inf
    near = 1e4 + np.arange(6)[:, None] * 1e-6 * np.ones((1, 2))
    assert len(set(k_means(near, 6))) == 6


def test_no_case_and_unknown_users():
    assert np.isnan(choice_row(np.zeros((0, 4)))["top-1"])
    users = ["a", "b", "c", "d", "e", None, None]  # those that nobody names are one more user
    assert mean_interval(np.arange(7.0), users) == mean_interval(np.arange(7.0), [u or "f" for u in users])
