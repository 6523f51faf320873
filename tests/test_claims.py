"The judge of claims: hand-made tables with known answers, and the shipped claims against the shipped tables."
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import boig
from boig.claims import Claim, Number, Outcome, deciding, ends_of, judge, load_claims, n_needed, number, run_tests, select, supported, verdict
from boig.compare import cells, compare, compare_page, reference_folder, verdict_changes
from boig.core import BoigError, png_record, project_root, sha256_file
from boig.scales import scale_names
from boig.stages import load_stages

GAINS = pd.DataFrame([("up", 0.3, 0.1, 0.5), ("down", -0.3, -0.5, -0.1), ("open", 0.1, -0.1, 0.3), ("flat", 0.01, -0.02, 0.04)], columns=["Metric", "gain", "low", "high"]).assign(n=100, seed=1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path/"tables").mkdir()
    GAINS.to_csv(tmp_path/"tables"/"gains.csv", index=False)
    return tmp_path


def test(metric, sign=">", than=0, **more): return {"table": "gains", "rows": {"Metric": metric}, "column": "gain", "is": sign, "than": than} | more
test.__test__ = False

def one(folder, *tests, **kw): return judge(folder, [Claim("c", "paper", "sec. 1", "Something.", "1", ours=tests, **kw)], write=False).iloc[0]

# -- verdicts -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tests, need, said", [
    ([test("up")], "all", "holds"), ([test("down")], "all", "fails"), ([test("open")], "all", "undecided"), ([test("down", "<")], "all", "holds"),
    ([test("up", than=0.05)], "all", "holds"), ([test("up", than=0.2)], "all", "undecided"), ([test("up", than=0.9)], "all", "fails"),
    ([test("flat", "=", margin=0.05)], "all", "holds"), ([test("flat", "=", margin=0.03)], "all", "undecided"), ([test("up", "=", margin=0.05)], "all", "fails"),
    ([test(["up", "open"])], "all", "undecided"), ([test(["up", "down"])], "all", "fails"), ([test(["up", "open", "nowhere"])], "all", "not run"),
    ([test("up"), test("up", than=0.01), test("open")], "most", "holds"), ([test("up"), test("down"), test("down", than=0.1)], "most", "fails"),
    ([test("up"), test("down"), test("open")], "most", "undecided"), ([], "all", "not run")])
def test_verdicts_by_hand(folder, tests, need, said):
    r = one(folder, *tests, need=need)
    assert r.verdict == said

def test_many_tests_must_not_fail_by_chance():
    "A half interval of 1 at 5 % is one of 1.43 at 0.5 %: ten tests together may fail once in twenty."
    almost = Outcome("t", "", Number(-1.2, -2.2, -0.2, 50), Number(-1.2, -2.2, -0.2, 50))
    good = Outcome("t", "", Number(9, 8, 10, 50), Number(9, 8, 10, 50))
    assert verdict([almost]) == "fails" and verdict([almost] + [good] * 9) == "undecided"
    assert n_needed([almost] + [good] * 9) == math.ceil(50 * (2.807034 / 1.959964 / 1.2) ** 2)

def test_most_is_seldom_reached_by_chance():
    "Nine true effects of eighteen, nine of nothing: that most hold is false, and said at most once in twenty."
    rng = np.random.default_rng(0)
    def said(z): return verdict([Outcome("t", "", Number(v, v - 1.96, v + 1.96, 50), Number(v, v - 1.96, v + 1.96, 50)) for v in z], "most")
    found = [said(np.concatenate([rng.normal(6, 1, 9), rng.normal(0, 1, 9)])) for _ in range(1000)]
    assert found.count("holds") < 40 and said([3.0] * 18) == "holds" and said([2.5] * 18) == "undecided"
    assert said([-2.8] * 9 + [6.0] * 9) == "undecided" and said([-3.1] * 9 + [6.0] * 9) == "fails"  # 0.05 / 10 on either side: 2.81

def test_samples_needed_by_hand(folder):
    assert one(folder, test("open")).n_needed == 100 * 2**2  # an effect of 0.1, half an interval of 0.2
    assert one(folder, test("flat", "=", margin=0.03)).n_needed == 100 * (0.03 / 0.02) ** 2  # 0.02 to the margin, half an interval of 0.03
    assert one(folder, test(["up", "open"])).n_needed == 400 and pd.isna(one(folder, test(["up", "nowhere"])).n_needed)
    still = Outcome("t", "", Number(0, 0, 0, 5), Number(0, 0, 0, 5))
    assert math.isnan(n_needed([still])) and verdict([still]) == "undecided"
    nobody, *rest = (Outcome("t", "", None, Number(0.1, -0.1, 0.3, n)) for n in (math.nan, 20, 30))  # who knows of how many samples?
    assert all(math.isnan(n_needed(o, need)) for o in ([nobody, *rest], [*rest, nobody]) for need in ("all", "most"))

def test_more_samples_decide():
    "The promise of n_needed: shrink the interval by its rule, and the verdict falls."
    for value in (0.07, -0.07):
        half, n = 0.31, 40
        needed = n_needed([Outcome("t", "", None, Number(value, value - half, value + half, n))])
        for k, said in ((needed + 1, {True: "holds", False: "fails"}[value > 0]), (needed - 2, "undecided")):
            h = half * math.sqrt(n / k)
            assert verdict([Outcome("t", "", None, Number(value, value - h, value + h, k))]) == said

def test_against_another_row(folder):
    wide = pd.DataFrame({"Model": ["a", "b", "b*"], "x": [3.0, 1.0, 2.0], "x low": [2.4, 0.2, 1.9], "x high": [3.6, 1.8, 2.1], "x n": [30, 20, 10], "n": 99})
    wide.to_csv(folder/"tables"/"wide.csv", index=False)
    r = one(folder, {"table": "wide", "rows": {"Model": "a"}, "column": "x", "is": ">", "than": {"Model": "b"}})
    assert (r.measured, r.low, r.high, r.n) == (2, pytest.approx(1), pytest.approx(3), 20) and r.verdict == "holds"  # √(0.6² + 0.8²) = 1
    assert one(folder, {"table": "wide", "rows": {"Model": "b"}, "column": "x", "is": ">", "than": {"Model": "a"}, "times": 0.1}).measured == pytest.approx(0.7)
    assert one(folder, {"table": "wide", "rows": {"Model": "b*"}, "column": "x", "is": "<", "than": {"Model": "a"}})["row"] == "b*, x less a; claimed: < 0"  # two rows fit
    assert "several rows" in one(folder, {"table": "wide", "rows": {"Model": "a"}, "column": "x", "is": ">", "than": {"Model": "b?|b"}}).note

def test_standard_deviations_as_margin(folder):
    "Half an interval of 0.0196 from 10,000 samples is a standard deviation of 1."
    pd.DataFrame({"KPI": ["high", "low"], "x": [0.15, 0.0], "± x": [0.0196, 0.0196], "n": 10_000}).to_csv(folder/"tables"/"means.csv", index=False)
    t = {"table": "means", "rows": {"KPI": "high"}, "column": "x", "is": "=", "than": {"KPI": "low"}}
    assert one(folder, t | {"margin_sd": 0.2}).verdict == "holds" and one(folder, t | {"margin_sd": 0.1}).verdict == "fails"

def test_the_verdict_shows_the_row_that_decides(folder):
    r = one(folder, test(["up", "open", "flat"]))
    assert r["row"] == "flat; claimed: > 0" and r.tests == "1 hold, 2 undecided" and r.measured == 0.01  # a third of its half interval; open has a half
    outcomes = run_tests([test(["up", "open", "down"])], [folder])
    assert deciding(outcomes).label == "down" and deciding(outcomes, "most").label == "open"

# -- what was not run ------------------------------------------------------------------------------------------------------------

def test_a_missing_table_names_its_stage(folder):
    t = {"table": "boig_table2_differences", "rows": {"Metric": "Reward"}, "column": "gain", "is": ">", "than": 0}
    r = one(folder, t, oracle=(t,))
    assert r.verdict == r.oracle == "not run" and "boig reproduce --only boig_table2" in r.note and pd.isna(r.measured)
    assert "--scale reference" in one(folder, t | {"table": "boig_llm_ablations"}).note
    assert "no stage makes it" in one(folder, t | {"table": "elsewhere"}).note

def test_a_row_without_a_number_says_why(folder):
    GAINS.assign(gain=[0.3, None, None, None], status=[None, "not run: no key; 0 of 60 answers", None, None]).to_csv(folder/"tables"/"gains.csv", index=False)
    r = one(folder, test(["up", "down"]))
    assert r.verdict == "not run" and "not run: no key." in r.note and r.tests == "1 hold, 1 not run"

def test_one_failing_row_is_enough_though_others_were_not_run(folder):
    assert one(folder, test(["down", "nowhere"])).verdict == "fails"

# -- seeds ---------------------------------------------------------------------------------------------------------------------

def test_three_seeds_join_both_noises(tmp_path):
    for k, gain in enumerate((0.1, 0.2, 0.3)):
        (tmp_path/str(k)/"tables").mkdir(parents=True)
        pd.DataFrame({"Metric": ["up"], "gain": [gain], "low": [gain - 0.05], "high": [gain + 0.05], "n": 100, "seed": k}).to_csv(tmp_path/str(k)/"tables"/"gains.csv", index=False)
    r = judge([tmp_path/str(k) for k in range(3)], [Claim("c", "p", "", "", "", ours=(test("up"),))]).iloc[0]
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert r.seeds == 3 and r.measured == pytest.approx(0.2) and r.high - r.measured == pytest.approx(half, rel=1e-4) and r.verdict == "undecided"
    assert r["each seed"] == "0 holds; 1 holds; 2 holds"
    assert (tmp_path/"0"/"claims.csv").is_file() and not (tmp_path/"1"/"claims.csv").exists()

@pytest.mark.parametrize("shared", [True, False], ids=["same samples", "own samples"])
@pytest.mark.parametrize("training", [0, 1, 4])
def test_three_seeds_cover_the_truth(shared, training):
    "Effects of 0 with a sampling error of 1 and training's own, at two levels: the interval misses 0 hardly more often than it says."
    rng, runs = np.random.default_rng(0), 4000
    x = rng.normal(size=(runs, 1 if shared else 3)) + training * rng.normal(size=(runs, 3))
    found = [number([{"x": v, "± x": 1.959964, "n": 9, "seed": s} for s, v in enumerate(row)], "x") for row in x]
    for k in (1, 10): assert sum(low > 0 or high < 0 for low, high in (f.ends(k) for f in found)) / runs < 0.05 / k + 0.013

def test_runs_are_compared_run_by_run():
    "A world that is hard for both rows says nothing of their difference: 1, 1.1 and 0.9, whatever the worlds."
    rows = [{"m": m, "x": world + gain, "± x": 0.1, "n": 50, "seed": s} for s, (world, g) in enumerate(((0, 1), (40, 1.1), (-9, 0.9))) for m, gain in (("a", g), ("b", 0))]
    o, = run_tests_on(rows, {"table": "t", "rows": {"m": "a"}, "column": "x", "is": ">", "than": {"m": "b"}})
    assert o.found.value == pytest.approx(1) and o.found.seeds == 3 and o.found.ends()[1] == pytest.approx(1 + 4.302653 * 0.1 / math.sqrt(3)) and verdict([o]) == "holds"
    o, = run_tests_on(rows[:-1], {"table": "t", "rows": {"m": "a"}, "column": "x", "is": ">", "than": {"m": "b"}})  # the last run lacks one of them
    assert o.found.value == pytest.approx(1.05) and o.found.seeds == 2

def test_samples_do_not_decide_where_seeds_differ():
    "Means of 1, 2 and 6: more samples make a run's own interval narrower, not the runs more alike."
    rows = [{"x": x, "± x": 4.0, "n": 50, "seed": s} for s, x in enumerate((1.0, 2.0, 6.0))]
    o, = run_tests_on(rows, {"table": "t", "rows": {}, "column": "x", "is": ">", "than": 0})
    assert verdict([o]) == "undecided" and math.isnan(n_needed([o]))
    o, = run_tests_on([r | {"x": 3 + r["seed"] / 10} for r in rows], {"table": "t", "rows": {}, "column": "x", "is": ">", "than": 0})  # these agree: it is the samples
    assert verdict([o]) == "undecided" and n_needed([o]) == math.ceil(50 * (4 / 3.1) ** 2)

def run_tests_on(rows, *tests):
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame(rows).to_csv(Path(folder)/"t.csv", index=False)
        return run_tests(tests, [folder])

def test_what_was_measured_is_said_whole(folder):
    "A difference names what was taken off and how often, and which way the claim goes."
    assert one(folder, test("up")).row == "up; claimed: > 0"
    assert one(folder, test("up", than={"Metric": "d*"}, times=0.9)).row == "up less 0.9 × down; claimed: > 0"
    assert one(folder, test("up", than=0.5)).row == "up less 0.5; claimed: > 0"
    assert one(folder, {**test("up", than={"Metric": "down"}), "is": "=", "margin": 0.1}).row == "up less down; claimed: within ±0.1"

def test_only_runs_of_one_scale_and_of_a_seed_each_are_joined(tmp_path):
    for name, scale, seed in (("a", "pocket", 1), ("b", "pocket", 1), ("c", "smoke", 2), ("d", "pocket", 2)):
        (tmp_path/name/"tables").mkdir(parents=True)
        GAINS.assign(scale=scale, seed=seed).to_csv(tmp_path/name/"tables"/"gains.csv", index=False)
    for other in "bc":
        with pytest.raises(BoigError, match="of one scale and of a seed each.*--seed"): run_tests((test("up"),), [tmp_path/"a", tmp_path/other])
    assert run_tests((test("up"),), [tmp_path/"a", tmp_path/"d"])[0].found.seeds == 2

def test_standard_deviation_of_runs():
    "Fig. 8's kind: a mean of n runs and their standard deviation."
    assert number([{"x": 1.0, "sd": 0.6, "n": 9}], "x").high == pytest.approx(1 + 2.306004 * 0.6 / 3, rel=1e-4)
    assert math.isnan(number([{"x": 1.0, "sd": float("nan"), "n": 1}], "x").high)

def test_buckets_are_no_intervals():
    assert ends_of(["line", "all", "high", "medium", "low"], "medium") == ("medium low", "medium high")
    assert ends_of(["start", "gain", "low", "high"], "gain") == ("low", "high") and ends_of(["start", "gain", "low", "high"], "start") == ("start low", "start high")

def test_two_rows_of_one_seed_are_an_error():
    with pytest.raises(BoigError, match="Name more columns"): number([{"x": 1.0, "seed": 1}, {"x": 2.0, "seed": 1}], "x")

def test_patterns_lists_and_the_last():
    rows = [{"m": m, "e": e} for m in ("pocket-eval", "clip-score", "dino") for e in (0, 5)]
    assert [k for k, _ in select(rows, {"m": "*-eval|clip*", "e": "last"})] == [("pocket-eval", 5), ("clip-score", 5)]
    for some in ([{"m": "dino", "e": math.nan}, *rows], [*rows, {"m": "dino", "e": math.nan}]): assert [k for k, _ in select(some, {"m": "dino", "e": "last"})] == [("dino", 5)]
    assert [(k, len(g)) for k, g in select(rows, {"m": ["dino", "d?"]})] == [(("dino",), 2), (("d?",), 0)]

# -- the shipped claims ---------------------------------------------------------------------------------------------------------

CLAIMS = load_claims()

def test_every_paper_has_its_claims():
    n = pd.Series([c.source for c in CLAIMS]).value_counts()
    assert len(CLAIMS) >= 25 and set(n.index) == {"BOIG", "InstructBooth", "Learning User Preferences"} and n.min() >= 8
    for c in CLAIMS: assert c.says and c.where and c.numbers and (c.ours or c.about), c.id

def test_claims_ask_only_for_tables_that_a_stage_writes():
    written = {Path(o).stem for s in load_stages().values() for o in s.outputs if o.endswith(".csv")}
    assert not {t["table"] for c in CLAIMS for t in (*c.ours, *c.oracle)} - written

@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_tables_and_columns_are_there(claim):
    "Wherever the shipped results have the table, they have what the claim asks for; the paper's tables always."
    assert supported(claim) in ("yes", "no", "no numbers") or supported(claim).endswith("not)")
    for scale in (s for s in scale_names() if reference_folder(s)):
        for o in run_tests((*claim.ours, *claim.oracle), [reference_folder(scale)]):
            assert o.note in ("", "table missing") or o.note.startswith(("not run", "no value")) or (claim.id in ("sum-is-best", "boigsd-behaviour") and scale == "pocket"), (o.label, o.note) # forms of the reward that pocket does not train

def test_all_means_all():
    "What a claim's words promise, its tests ask for: both data sets' buckets, all nine metrics with the right sign."
    from boig.metrics.verbalization_metrics import METRICS
    ours = {c.id: c.ours for c in CLAIMS}
    asked = {(b, column, t["is"]) for t in ours["boigllm-beats-gpt"] for b in ("boigbench", "stock") if t["table"] == f"boig_table1_{b}" for column in t["column"]}
    assert asked == {(b, m, "<" if sign > 0 else ">") for b in ("boigbench", "stock") for m, sign in METRICS.items()} and len(METRICS) == 9  # GPT's numbers against BoigLLM's
    table = [{"Comparison": "BoigSD − Base (x)", "Data": f"pocket_{d}", "KPI": k, "Metric": "Aesthetic Score"} for d, ks in (("boigbench", ("High", "Low")), ("stock", ("High", "Medium", "Low"))) for k in ks]
    found = [g for t in ours["boigsd-aesthetics"] for _, g in select(table, t["rows"])]
    assert sorted(map(str, found)) == sorted(str([r]) for r in table)

def test_what_the_papers_own_tables_support():
    "Counted by hand in the papers' tables."
    said = {c.id: supported(c) for c in CLAIMS}
    assert said["boigllm-twin-boigbench"] == "yes"
    assert said["boigllm-twin-stock"] == "no (5 of 27 not)"  # tones (high), object similarity (low), relative position (all three)
    assert said["ib-text-best"] == "no (1 of 12 not)"  # CLIP-T 0.323 is Custom Diffusion's too
    assert said["boigllm-beats-gpt"] == "no (3 of 180 not)"  # RGB distance, BoigBench, high: 0.2795; 5-shot GPT-3.5 0.2743, GPT-4 0.2726 and 0.2702
    assert said["boigllm-low-gains-more"] == "yes (10 of 27 not)"  # most
    assert said["boigsd-loses-nothing"] == "no (2 of 15 not)"  # FID 42.999 → 49.492, 33.481 → 35.406

def test_derived_reference_table_is_the_difference():
    d = Path(boig.__file__).parent/"reference"
    full, gains = pd.read_csv(d/"boig_table1.csv").set_index(["Data", "KPI"]), pd.read_csv(d/"boig_table1_gains.csv").set_index(["Data", "KPI"])
    from boig.metrics.verbalization_metrics import METRICS
    ours, twin = (full[full.Model == m].loc[gains.index, list(METRICS)] for m in ("Finetuned Llama (BoigLLM)", "Finetuned Llama"))
    assert ((ours - twin) * list(METRICS.values()) - gains[list(METRICS)]).abs().max().max() < 1e-9

def test_unknown_keys_are_named(tmp_path):
    for text, match in (('[c]\nsays = "x"\nclaims = 1', "claims"), ('[c]\nours = [{table = "t", colum = "x", is = ">"}]', "column"), ('[c]\nours = [{table = "t", column = "x", is = ">="}]', "must be")):
        (tmp_path/"c.toml").write_text(text)
        with pytest.raises(BoigError, match=match): load_claims(tmp_path/"c.toml")

def test_nothing_is_evaluated(folder):
    "Text in a claims file is compared, never run."
    evil = "__import__('os').system('touch /tmp/boig-was-here')"
    assert one(folder, test(evil)).verdict == "not run"
    with pytest.raises(TypeError): one(folder, test("up", than=evil))

# -- comparing two runs -----------------------------------------------------------------------------------------------------------

def two(tmp_path):
    a, b = tmp_path/"a", tmp_path/"b"
    for f in (a, b): (f/"tables").mkdir(parents=True)
    table = pd.DataFrame({"Model": ["x", "y"], "IOU": [0.4, 0.3], "IOU low": [0.35, 0.28], "IOU high": [0.45, 0.32], "tokens": [20.0, 25.0], "seed": 1, "scale": "pocket"})
    table.to_csv(a/"tables"/"t.csv", index=False)
    return a, b, table

def test_equal_runs_agree(tmp_path):
    a, b, table = two(tmp_path)
    table.assign(seed=2).to_csv(b/"tables"/"t.csv", index=False)
    found, _, line = compare(a, b)
    assert found.within.all() and len(found) == 4 and "4 of 4 numbers in 1 tables" in line and "All verdicts are the same" in line

def test_tolerances_by_hand(tmp_path):
    a, b, table = two(tmp_path)
    table.assign(IOU=[0.44, 0.36], **{"IOU low": [0.42, 0.33], "IOU high": [0.46, 0.39]}, tokens=[21.0, 26.4]).to_csv(b/"tables"/"t.csv", index=False)
    found = cells(a, b).set_index(["row", "column"])
    assert found.loc[("x", "IOU"), ["within", "tolerance"]].tolist() == [True, "interval"]  # 0.44 lies in 0.35 … 0.45
    assert found.loc[("y", "IOU"), "within"] == False  # neither lies in the other's
    assert found.loc[("x", "tokens"), ["within", "tolerance"]].tolist() == [True, "5 %"]  # 1 of 21
    assert found.loc[("y", "tokens"), "within"] == False  # 1.4 of 26.4
    assert found.loc[("x", "tokens"), "difference"] == -1

def test_lost_rows_and_tables_show(tmp_path):
    a, b, table = two(tmp_path)
    table[:1].to_csv(b/"tables"/"t.csv", index=False)
    table.to_csv(b/"tables"/"more.csv", index=False)
    found, _, line = compare(a, b)
    assert found[found.row == "y"].within.tolist() == [False, False] and "Not here: more." in line
    with pytest.raises(BoigError, match="no table in common"): compare(a, tmp_path)
    with pytest.raises(BoigError, match="no results folder"): compare(a, tmp_path/"nowhere")

def test_a_fallen_verdict_is_told(tmp_path):
    a, b, _ = two(tmp_path)
    rows = pd.DataFrame({"run": "sum_prob:4:0", "what": ["reward", "oracle"], "start": 1.0, "end": 2.0, "gain": [0.4, 0.1], "low": [0.1, -0.1], "high": [0.7, 0.3], "n": 30, "seed": 1})
    rows.to_csv(a/"tables"/"boig_sd_ddpo.csv", index=False)
    rows.assign(low=[-0.1, -0.1]).to_csv(b/"tables"/"boig_sd_ddpo.csv", index=False)
    changed = verdict_changes(a, b)
    assert changed.values.tolist()[0][0] == "boigsd-curve" and changed.verdict.tolist() == ["holds"] and changed["verdict reference"].tolist() == ["undecided"]
    page, line = compare_page(a, b)
    assert "1 verdicts differ: boigsd-curve undecided → holds" in line and "boigsd-curve" in page.read_text() and page == a/"compare.html"


@pytest.mark.parametrize("scale", ["pocket", "reference"])
def test_shipped_results_are_what_their_records_say(scale):
    "Each table's bytes, each reduced figure's; what made its pictures stays in it; the verdicts follow from the tables."
    folder = project_root()/"results"/"reference"/scale
    records = [json.loads(p.read_text()) for p in sorted((folder/"provenance").glob("*.json"))]
    assert len(records) >= 26
    written = {Path(f).name: sha for r in records for f, sha in (r["outputs"] | r.get("shipped", {})).items() if f.startswith("tables/") or f in r.get("shipped", {})}
    there = {p.name: sha256_file(p) for p in [*folder.iterdir(), *folder.glob("notebooks/*.ipynb")] if p.name in written}
    assert {p.name for p in folder.glob("notebooks/*.ipynb")} <= {*written}
    assert len(there) >= 37 and there == {name: written[name] for name in there}
    if scale == "pocket": assert not any(r["provenance"]["changed_since_commit"] for r in records) and png_record(folder/"boig_figure5.png")["generated"]
    made = {f: sha for r in records for f, sha in r["outputs"].items()}
    assert not [(r["stage"], f) for r in records for f, sha in r["inputs"].items() if made.get(f, sha) != sha]  # no stage read another run's data
    shown = ["id", "claim", "measured", "low", "high", "n", "verdict", "row", "tests", "oracle", "oracle measured", "seeds"]
    again = judge([folder, *sorted(folder.glob("seed-*"))], write=False).to_csv(index=False)
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(again))[shown], pd.read_csv(folder/"claims.csv")[shown], rtol=1e-5, atol=1e-6)
