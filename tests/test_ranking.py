"Whether scores rank outcomes: statistics against formulas by hand, and scores that are known to rank or not."
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from boig.behaviour.evaluate import shuffled_kpis
from boig.behaviour.finetune import load_llm
from boig.behaviour.ranking import behaviour_worth, llm_scores, look_features, rank_overall, rank_within, ranking_table, ridge_scores, score_rows, word_features
from boig.behaviour.reward import score_plainly
from boig.benches.emojibench import build_benchmark
from boig.benches.instructions import EMOJIBENCH, listing1
from boig.core import BoigError, project_root
from boig.data.verbalization import Verbalization, parse


def ranks(x): return np.array([sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x])


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    account = np.repeat(["a", "b", "c", "d", "e"], [12, 7, 15, 3, 10])
    kpi = rng.poisson(np.exp(rng.normal(size=47) + np.repeat([0.0, 4, 2, 6, 1], [12, 7, 15, 3, 10])))
    bucket = np.where(kpi > pd.Series(kpi).groupby(account).transform("median"), "high", "low")
    return kpi, bucket, account, rng.normal(size=47) + 0.3 * np.log1p(kpi)


def test_one_account_is_spearman_with_ties(data):
    kpi, bucket, _, score = data
    by_hand = np.corrcoef(ranks(kpi), ranks(np.round(score)))[0, 1]
    assert abs(rank_within(np.round(score), kpi, bucket, np.zeros(47))["Spearman"] - by_hand) < 1e-12


def test_accounts_of_one_picture_have_no_order():
    "Nothing to rank is a row of gaps, not a crash; a table of few pictures still has its other rows."
    found = rank_within([0.1, 0.2, 0.3], [1, 2, 3], ["low", "medium", "high"], ["a", "b", "c"], 20)
    assert np.isnan([found[k] for k in ("Spearman", "Spearman low", "Spearman high", "AUC", "AUC low", "AUC high")]).all()
    assert (found["n"], found["accounts"], found["pairs"]) == (3, 0, 0)


def test_auc_counts_pairs_within_accounts(data):
    kpi, bucket, account, score = data
    score = np.round(score)
    pairs = [(score[i], score[j]) for i in range(47) for j in range(47) if account[i] == account[j] and bucket[i] == "high" and bucket[j] == "low"]
    found = rank_within(score, kpi, bucket, account)
    assert found["pairs"] == len(pairs) and found["accounts"] == 5
    assert abs(found["AUC"] - np.mean([(h > l) + 0.5 * (h == l) for h, l in pairs])) < 1e-12
    assert found["AUC low"] <= found["AUC"] <= found["AUC high"] and found["Spearman low"] <= found["Spearman"] <= found["Spearman high"]


def test_any_increasing_map_within_accounts_changes_nothing(data):
    kpi, bucket, account, score = data
    shift = pd.Series({"a": 100.0, "b": -7, "c": 0, "d": 3, "e": 50})[account].to_numpy()
    a, b = (rank_within(s, kpi, bucket, account, 50) for s in (score, np.exp(score / 9) + shift))
    assert a == b
    assert rank_within(kpi, kpi, bucket, account, 50)["AUC"] == 1 and abs(rank_within(kpi, kpi, bucket, account, 50)["Spearman"] - 1) < 1e-12
    assert rank_within(-kpi, kpi, bucket, account, 50)["AUC"] == 0


def test_a_score_of_accounts_ranks_nothing_within_them(data):
    kpi, bucket, account, _ = data
    size = pd.Series({"a": 0, "b": 4, "c": 2, "d": 6, "e": 1})[account].to_numpy()
    within, overall = (f(size, kpi, bucket, account, 50) for f in (rank_within, rank_overall))
    assert np.isnan(within["Spearman"]) and within["AUC"] == 0.5 and overall["Spearman"] > 0.7


def test_intervals_cover_the_truth(data):
    "Of many worlds without any relation, about 95 % of the intervals hold chance."
    rng, account = np.random.default_rng(3), np.repeat(np.arange(30), 8)
    hits = []
    for seed in range(60):
        kpi, score = rng.normal(size=(2, 240))
        r = rank_within(score, kpi, np.where(kpi > 0, "high", "low"), account, 200, seed)
        hits += [r["Spearman low"] < 0 < r["Spearman high"], r["AUC low"] < 0.5 < r["AUC high"]]
    assert 0.87 < np.mean(hits) < 1


def test_nothing_to_compare_and_broken_scores(data):
    kpi, bucket, account, score = data
    same = rank_within(score, kpi, np.full(47, "high"), account, 20)
    assert same["pairs"] == 0 and np.isnan(same["AUC"])
    few = rank_within(score, kpi, bucket, np.where(account == "a", "a", np.arange(47).astype(str)), 20)
    assert few["accounts"] == 1 and np.isnan(few["AUC low"]) and not np.isnan(few["AUC"])  # lone pictures are no accounts, and one account has no interval
    with pytest.raises(BoigError, match="1 of 47 scores are not finite"): rank_within(np.r_[np.inf, score[1:]], kpi, bucket, account)


def test_ridge_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    n = 400
    table = pd.DataFrame({"account": rng.integers(0, 5, n).astype(str), "split": np.resize(["train"] * 6 + ["valid", "test"], n)})
    warm = rng.random(n)
    table["kpi"] = np.exp(3 * warm + table.account.astype(int) + 0.3 * rng.normal(size=n))
    test = table[table.split == "test"]
    def quality(features): return rank_within(ridge_scores(table, features, "kpi", "account"), test.kpi, np.where(test.kpi > test.kpi.median(), "high", "low"), test.account, 50)["Spearman"]
    assert quality([{"warm": w} for w in warm]) > 0.85
    assert abs(quality([{"noise": w} for w in rng.random(n)])) < 0.35


def test_accounts_are_drawn_whole():
    "Six accounts of ten equal pictures say less than sixty pictures by themselves."
    rng, few = np.random.default_rng(2), np.repeat(np.arange(6), 10)
    kpi = np.repeat(rng.permutation(6), 10)
    score = kpi + np.repeat(rng.normal(size=6), 10) * 3
    def width(account): return (lambda r: r["Spearman high"] - r["Spearman low"])(rank_overall(score, kpi, np.where(kpi > 2, "high", "low"), account, 500))
    assert width(few) > 2 * width(np.arange(60))


def test_ridge_never_looks_at_the_tests_outcomes():
    "Neither the accounts' means nor the penalty: other outcomes of the test pictures leave each score as it is, to the bit."
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"account": rng.integers(0, 5, 120).astype(str), "split": np.resize(["train"] * 3 + ["valid", "test"], 120), "kpi": rng.poisson(50, 120)})
    features = [{f"f{i}": x for i, x in enumerate(r)} for r in rng.random((120, 30))]
    test = (table.split == "test").to_numpy()
    found = ridge_scores(table, features, "kpi", "account")
    for factor in (0, 10, 1000): assert np.array_equal(found, ridge_scores(table.assign(kpi=np.where(test, factor * table.kpi, table.kpi)), features, "kpi", "account"))
    # outcomes that suit a bold fit, and outcomes that suit none
    bold = np.exp(10 + 5 * np.array([f["f0"] for f in features]))
    for kpi in (bold, bold[::-1]): assert np.array_equal(found, ridge_scores(table.assign(kpi=np.where(test, kpi, table.kpi)), features, "kpi", "account"))


def test_features_say_what_is_in_the_text():
    v = Verbalization({"Red": 0.75, "Blue": 0.25}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"cat": (0, 0, 32, 16)})
    f = look_features(v, 64, 64)
    assert f["colour Red"] == 0.75 and f["tone warm"] == 1.0 and f["object cat"] == 1 and f["area cat"] == 0.125 and f["objects"] == 0.2
    assert word_features(["A red, RED cat!"]) == [{"word a": 1.0, "word red": 1.0, "word cat": 1.0}]


def test_a_share_of_the_picture_is_of_its_own_size():
    for size in ((1200, 675), (300, 300)):
        assert look_features(Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"cat": (0, 0, *size)}), *size)["area cat"] == 1


@pytest.fixture(scope="module")
def llm(): return load_llm("pocket-llama", "cpu")


@pytest.fixture(scope="module")
def bench(): return build_benchmark(60)


def test_scores_are_the_rewards_of_the_texts(llm, bench):
    "The sum of probabilities that a plain forward pass gives; the twin is asked without behaviour."
    model, tok = llm
    rows = bench.head(3)
    found = score_rows(model, tok, rows, EMOJIBENCH.told(False))
    question = [tok.bos_token_id] + tok(listing1(EMOJIBENCH.told(False), rows.iloc[1]), add_special_tokens=False).input_ids
    answer = tok(rows.verbalization[1], add_special_tokens=False).input_ids
    with torch.no_grad(): p = model.eval()(torch.tensor([question + answer])).logits[0].softmax(-1)
    by_hand = sum(p[len(question) + t - 1, a].item() for t, a in enumerate(answer))
    assert abs(found.sum_prob[1] - by_hand) < 1e-3 and found.tokens[1] == len(answer)


def test_table_has_two_rows_a_score(llm, bench):
    rows = bench[bench.split == "test"].head(9).reset_index(drop=True)
    scores = llm_scores(llm, llm, rows, bench, EMOJIBENCH, bench.verbalization[0])
    assert all(len(s) == len(rows) and np.isfinite(s).all() for s in scores.values())
    assert len(set(scores["tokens of the verbalisation"])) > 1 and parse(bench.verbalization[0]).value
    table = ranking_table(scores, rows, "uses", "group", 20)
    assert len(table) == 2 * (len(scores) + 1) and set(table.Compared) == {"within account", "overall"} and {"with objects", "with tokens"} <= set(table)


def test_worth_of_behaviour_by_hand(llm, bench):
    "Differences of plain log-probabilities; a KPI that is every picture's own cannot be worth anything."
    rows = bench.head(4)
    def logp(row, behaviour, said):
        question, answer = listing1(EMOJIBENCH.told(behaviour), row), rows.verbalization[said]
        return score_plainly(*llm, question, [answer])[0].sum().item()
    found = behaviour_worth(llm, llm, rows, EMOJIBENCH, seed=3)
    other = shuffled_kpis(rows, EMOJIBENCH.behaviour_columns, 3)
    for i in range(4):
        told = logp(rows.iloc[i], True, i)
        assert np.allclose(found.iloc[i], [told - logp(other.iloc[i], True, i), told - logp(rows.iloc[i], False, i)], atol=2e-3)
    same = rows.assign(**{k: rows[k].iloc[0] for k in EMOJIBENCH.behaviour_columns})
    assert np.allclose(behaviour_worth(llm, llm, same, EMOJIBENCH).iloc[:, 0], 0, atol=1e-4)


def test_the_notebook_holds_two_language_models_at_once():
    "BoigLLM and its twin, each of 13B at paper scale; those of one benchmark go before those of the next come."
    cells = json.loads((project_root()/"nbs"/"90_experiments"/"boig_ranking.ipynb").read_text(encoding="utf-8"))["cells"]
    cell = next("".join(c["source"]) for c in cells if "load_llm(str(" in "".join(c["source"]))
    class Model:
        def parameters(self): return []
    alive, most = weakref.WeakSet(), []
    def load(name):
        alive.add(model := Model())
        most.append(len(alive))
        return model, None
    table = pd.DataFrame({"id": ["a"], "split": ["train"], "verbalization": ["{}"]})
    exec(cell, dict(tests={b: table for b in ("x", "y", "z")}, data={b: table for b in ("x", "y", "z")}, ENDINGS=dict.fromkeys("xyz", ""), SPECS=dict.fromkeys("xyz"), results=Path(), run_dir=Path(), seed=0, pd=pd,
                    perf_counter=lambda: 0, load_llm=load, parse=lambda v: SimpleNamespace(value=v), constant_answer=lambda v: SimpleNamespace(to_json=lambda: ""),
                    fingerprint=lambda p: "", once=lambda folder, name, make, *of: table))
    assert len(most) == 6 and max(most) == 2
