"The rivals, the controls and the looks inside of the preference experiments."
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from boig.behaviour.incontext import Budget, Price, ServerConfig, answer_by_server
from boig.benches.cards import read_card
from boig.benches.pickapic import HistoryRules, build_histories
from boig.benches.tastes import TasteRules, make_tastes, oracle_scores
from boig.core import BoigError, project_root
from boig.pocket.choosers import GROUPS, PARTS
from boig.preference.baselines import (PictureServer, guess, pick_cases, read_index, score_by_reward, server_pairs, server_question, server_scores, train_pickscore,
                                     viper_training)
from boig.preference.loss import LossConfig
from boig.preference.model import PreferenceConfig, PreferenceModel, save_preference, tiny_idefics
from boig.preference.training import Histories, TrainConfig, _drawn, same_prompt, train_preference
from boig.preference.users import another_history, compare, couple, divergences, nearest_agree, rows_of_table, token_profiles, user_states
from boig.rewards.clip_scores import load_clip
from boig.scales import load_scale
from boig.stages import code_cells

RULES = TasteRules(users=24, prompts=10, shared=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tastes")
    make_tastes(folder, RULES)
    build_histories(folder/"choices.parquet", folder/"h", HistoryRules(test_users=0.4), threads=1)
    return folder, Histories(folder/"h")


def test_shared_captions_are_shared_and_kept_apart(made):
    "Users of a turn see few captions; no test question has a picture that training saw."
    folder, data = made
    rows = pq.read_table(folder/"choices.parquet", columns=["caption", "image_0_uid", "image_1_uid", "created_at"]).to_pandas()
    assert rows.caption.nunique() <= 2 * 10 and len(set(rows.image_0_uid) | set(rows.image_1_uid)) <= 2 * 10 * 6
    known = set(data.train.liked) | set(data.train.disliked)
    for c in data.cases.itertuples(): assert not {c.liked, *c.disliked} & known and not {c.liked, *c.disliked} & {*c.reference_list, *c.reference_list_bad}
    opposite = data.train.merge(data.train, left_on=["liked", "disliked"], right_on=["disliked", "liked"])
    assert len(opposite) > 10  # the same two pictures, another choice


def test_oracle_by_hand(made):
    folder, data = made
    seen, cases = pd.read_parquet(folder/"parts.parquet"), data.cases[data.cases.kind == "four"].head(3)
    found, x = oracle_scores(RULES, seen, cases), seen.set_index("uid")
    for n, c in enumerate(cases.itertuples()):
        user = RULES.crowd()[int(c.user_id)]
        assert found["own utility"][n][0] == pytest.approx(float(x.loc[c.liked, list(PARTS)].to_numpy(float) @ user.weights))
        weight = {}
        for g, (share, looks, sign) in GROUPS.items():
            w = pd.Series(0.0, PARTS); w["alignment"], w["layout"], w["harmony"], w[looks] = RULES.alignment, RULES.layout, RULES.harmony, sign * RULES.taste
            log = math.log(share)
            for a, b in zip(c.reference_list, c.reference_list_bad): log -= math.log(1 + math.exp(float((x.loc[b, list(PARTS)].astype(float) - x.loc[a, list(PARTS)].astype(float)) @ w)))
            weight[g] = (math.exp(log), w)
        total = sum(p for p, _ in weight.values())
        mean = sum(p / total * w for p, w in weight.values())
        assert found["group read from the history"][n][1] == pytest.approx(float(x.loc[c.disliked[0], list(PARTS)].astype(float) @ mean), abs=1e-6)


def test_targets_of_a_prompt_share_a_history_that_knows_none_of_them(made):
    data, config = made[1], TrainConfig(batch=4, micro=4, targets=4, pairs=3)
    histories, owner, good, bad, texts = _drawn(data, config, [0, 9, 20, 33], np.random.default_rng(0))
    assert len(histories) == 4 and max(np.bincount(owner)) > 1 and max(np.bincount(owner)) <= 4
    for o, g, b, t in zip(owner, good, bad, texts):
        assert t not in {r.caption for r in histories[o]} and t == texts[owner.index(o)]
        for r in histories[o]: assert not any(torch.equal(r.picture, data.pictures[u]) for u in (g, b))
    assert same_prompt(data, 5, 1, None) == [5] and len(set(same_prompt(data, 5, 9, np.random.default_rng(0)))) >= 2


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def test_muon_and_many_targets_resume_to_the_same_weights(made, tmp_path, one_thread):  # on several threads, Muon's products may differ in the last bits
    data, base = made[1], tiny_idefics(latents=4, vision=24, text=32, layers=1)
    def model():
        import copy
        return PreferenceModel(copy.deepcopy(base[0]), base[1], PreferenceConfig(tokens=2))
    def dies(m, step): return {} if step < 3 else 1 / 0
    config = TrainConfig(steps=4, batch=2, micro=2, targets=3, lr=1e-3, muon_lr=1e-2, pairs=2, plain_attention=True, save_every=2)
    torch.manual_seed(0); one = model()
    torch.manual_seed(0); two = model()
    torch.manual_seed(0); three = model()
    train_preference(one, data, tmp_path/"a", config, progress=False)
    with pytest.raises(ZeroDivisionError): train_preference(two, data, tmp_path/"b", config, watch=dies, progress=False)
    train_preference(three, data, tmp_path/"b", config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters()))
    assert one.idefics.config._attn_implementation == base[0].config._attn_implementation


def test_questions_rivals_and_controls(made):
    data = made[1]
    pairs = pick_cases(data, "pair", 12)
    assert len(pairs) == 12 and 0 < pairs.seen.sum() < 12 and (pairs.split == "test").all() and pick_cases(data, "pair", 12).index.equals(pairs.index)
    assert [len(pick_cases(data, "pair", n)) for n in (1, 3, 5)] == [1, 3, 5]  # odd numbers lose none
    class Mean:
        name = "mean"
        def __call__(self, x, prompts, context=None): return x.mean((1, 2, 3))
    for c, s in zip(pairs.itertuples(), score_by_reward(Mean(), data, pairs, at_once=5)):
        assert s == pytest.approx([data.pictures[u].mean().item() for u in (c.liked, *c.disliked)], abs=1e-6)
    assert [g.tolist() for g in guess(pairs)] == [[0.0, 0.0]] * 12
    other, cases = another_history(data, pairs), pairs.drop_duplicates("user_id")
    for c in cases.itertuples():
        theirs = [r.caption for r in other(c)]
        assert theirs != [r.caption for r in data.history(c)] and len(theirs) == 16
    assert viper_training(TrainConfig(loss=LossConfig("binary"))) == replace(TrainConfig(), shuffle=False, loss=LossConfig("binary", "none"))
    with pytest.raises(BoigError, match="two users"): another_history(data, pairs[pairs.user_id == pairs.user_id.iloc[0]])


def test_pickscore_in_parts_learns_the_same(made, tmp_path, monkeypatch):
    "A few pairs at once: the same weights, and never more pictures in memory than asked for."
    import boig.preference.baselines as module
    monkeypatch.setattr("boig.pocket.training.bf16_pays", lambda *device: False)  # whose rounding would drown the comparison
    seen = []
    monkeypatch.setattr(module, "embed_images", lambda model, preprocess, pictures, embed=module.embed_images: seen.append(len(pictures)) or embed(model, preprocess, pictures))
    whole, parts = (train_pickscore("pocket-clip", made[1], tmp_path/str(micro), 2, 8, 1e-3, 2e-3, micro=micro, device="cpu").model.state_dict() for micro in (0, 3))
    assert seen[:2] == [16, 16] and max(seen[2:]) == 6
    start, far = load_clip("pocket-clip")[0].state_dict(), lambda a, b: sum((a[n] - b[n]).abs().sum() for n in a)
    assert 0 < far(whole, parts) < 1e-2 * far(whole, start)  # but for the order of additions


def test_compare_is_paired_and_by_user():
    good, bad = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    asked = pd.DataFrame({"user_id": list("aabbccddeeff"), "prompt": list("uuvvwwxxyyzz")})
    found = compare([[good, good, bad, good] * 3], [[good, bad, bad, good] * 3], asked)  # each other user gains a half
    half = 100 * stats.t.ppf(0.975, 5) * np.std([0, 0.5] * 3, ddof=1) / 6**0.5
    assert found["difference"] == 25 and found["low"] == pytest.approx(25 - half) and found["high"] == pytest.approx(25 + half) and found["verdict"] == "undecided" and found["n"] == 12
    three = [np.array([0.5, a, b]) for a, b in ((0.9, 0.1), (0.9, 0.8), (0.1, 0.2))]
    swapped = [t[[1, 0, 2]] for t in three]  # the first: theirs in two of three; among two: both in two of three
    assert [compare([three * 4], [swapped * 4], asked, k)["difference"] for k in (1, 2)] == pytest.approx([-100 / 3, 0])
    cases = pd.DataFrame({"user_id": list("aabb"), "prompt": list("wxyz"), "seen": [True, True, False, False]})
    table = rows_of_table({"m": [good, good, bad, good]}, cases, (1,)).set_index("Users")["top-1"]
    assert table.to_dict() == {"all": 75, "seen": 100, "new": 50}


def test_the_interval_of_several_trainings_holds_each_of_them():
    good, bad = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    asked = pd.DataFrame({"user_id": [str(i) for i in range(400)], "prompt": [str(i) for i in range(400)]})
    ours = [[good] * n + [bad] * (400 - n) for n in (240, 248, 232)]
    each, both = [compare([o], [[bad] * 400], asked) for o in ours], compare(ours, [[bad] * 400], asked)  # theirs was trained once
    assert [e["difference"] for e in each] == pytest.approx([60, 62, 58]) and both["difference"] == pytest.approx(60) and (both["n"], both["trainings"]) == (400, 3)
    share = np.array([1.0] * 232 + [2 / 3] * 8 + [1 / 3] * 8 + [0.0] * 152)
    questions, trainings = 1.966 * share.std(ddof=1) / 20, stats.t.ppf(0.975, 2) * np.std([0.60, 0.62, 0.58], ddof=1) / 3**0.5
    assert both["high"] - 60 == pytest.approx(100 * np.hypot(questions, trainings), rel=2e-3) and both["low"] < 58 and both["high"] > 62
    with pytest.raises(BoigError, match="2 trainings cannot be paired with 3"): compare(ours[:2], ours, asked)

def test_a_server_is_asked_with_the_appendixs_words_and_never_without_a_price(made, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    asked, at = server_pairs(made[1], pick_cases(made[1], "pair", 3))
    text = " ".join(p["text"] for p in asked[0][0]["content"] if p["type"] == "text")
    assert "are liked, and those in are disliked." in text and text.endswith("with explanation.") and sum(p["type"] == "image_url" for p in asked[0][0]["content"]) == 18
    server = PictureServer(ServerConfig("m"), tmp_path, None)
    assert server.most(server.request(asked[0]))[0] > 18 * 2000
    status, table = answer_by_server(server, asked)
    assert status.startswith("not run") and "price" in status and not len(table)
    status, _ = answer_by_server(PictureServer(ServerConfig("m"), tmp_path, Price(1.0, 1.0), Budget(0.0)), asked)
    assert "budget" in status
    liked, first = server_question([b"a"], [True], (b"x", b"y"))[0]["content"], server_pairs(made[1], pick_cases(made[1], "pair", 3), 1)[1]
    assert [p["image_url"]["url"][-4:] for p in liked if p["type"] == "image_url"] == ["YQ==", "eA==", "eQ=="] and set(first) <= {0, 1}
    assert [read_index(a) for a in ("Image 1 is warmer.", "0", "10", "0.5 and 1", "")] == [1, 0, None, 1, None]
    assert [read_index(a) for a in ("1, for image 0 is cold", "The index: 0. Not 1.", "Comparing image 0 with image 1, the user would prefer image 1.", "Both are warm; I'd say 1.")] == [1, 0, 1, 1]
    for answer in ("Image 0 is dark and noisy, which this user dislikes, so they would prefer image 1.", "0 or 1? I choose 1.", "Image 0 and image 1 both show cats; answer: 1", "The user would prefer image 1 over image 0.",
                   "**1**", "Image 1. Image 0 is cold.", "Image 0, which is dark, isn't it: they'd pick 1.", "The user would not prefer image 0; index 1", "The preferred image is 1\n\nImage 0 is cold."): assert read_index(answer) == 1
    for answer in ("They like warm colours, which image 0 lacks, and image 1 has.", "Based on the preferences, image 0 or image 1 may do."): assert read_index(answer) is None
    assert server_scores(["1", "1"], np.array([1, 0]))[0].tolist() == [1, 0] and server_scores(["1"], np.array([0]))[0].tolist() == [0, 1]


def test_paid_answers_outlive_a_change_of_code_or_budget():
    for name in ("preference_tables", "boig_shots"):
        code = "\n".join(code_cells(project_root()/"nbs"/"90_experiments"/f"{name}.ipynb"))
        assert "results / 'runs' / 'answers'" in code and "run_dir / 'answers'" not in code  # run_dir carries the stage's key


def test_looks_inside(made):
    data, base = made[1], tiny_idefics(latents=4, vision=24, text=32, layers=2)
    model = PreferenceModel(*base, PreferenceConfig(tokens=3)).eval()
    people = data.cases[data.cases.split == "test"].drop_duplicates("user_id").head(4)
    face = data.pictures[people.liked.iloc[0]]
    x = user_states(model, data, people, face, "a cat", at_once=3)
    assert x.shape == (4, 32) and np.abs(x - user_states(model, data, people, face, "a cat", at_once=1)).max() < 1e-4
    a = token_profiles(model, data, people, face, "a cat")
    one = token_profiles(model, data, people, face, "a cat", layer=0, head=1)
    assert a.shape == (4, 3) and np.allclose(a.sum(1), 1) and np.abs(a - one).max() > 1e-4
    d = divergences(a)
    p, q = a[1], a[3]
    assert d[1, 3] == pytest.approx(0.5 * sum(p * np.log(p / q) + q * np.log(q / p)), abs=1e-12) and np.allclose(d, d.T)
    found = nearest_agree(np.array([[0, 1, 9], [1, 0, 9], [9, 8, 0.0]]), ["x", "x", "y"])
    assert (found["share"], found["by chance"], found["gain"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3)) and np.isnan(found["low"])
    across = nearest_agree(np.array([[0, 1, 9], [1, 0, 9], [9, 8, 0.0]]), ["x", "x", "y"], [True, False, False])
    assert (across["share"], across["by chance"]) == (pytest.approx(2 / 3), pytest.approx(1 / 2))  # of the third user the only seen one is of another group
    assert couple(np.array([[0, 1, 5], [1, 0, 4], [5, 4, 0.0]]), [True, True, False]) == (1, 2)


def code_of_tables(word):
    "The cell of the experiment's notebook that holds a word."
    cells = json.loads((project_root()/"nbs/90_experiments/preference_tables.ipynb").read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "code" and word in "".join(c["source"]))


def test_the_untrained_model_is_asked_as_the_trained_ones(tmp_path):
    "With the resize and side that they were trained with."
    model = PreferenceModel(*tiny_idefics(latents=4, layers=1), PreferenceConfig(resize=48, side=32))
    save_preference(model, tmp_path/"preference_base", "a base")
    names = dict(json=json, models=tmp_path, mllm="a base", quantize="", load_idefics=lambda *a, **k: (model.idefics, model.processor), PreferenceModel=PreferenceModel, PreferenceConfig=PreferenceConfig)
    exec(code_of_tables("def untrained").split("def untrained")[1].split("\nanswer(")[0].join(("def untrained", "")), names)
    assert names["untrained"]().config == model.config
    assert code_of_tables("stages =").count('"untrained": [untrained()]') == 1


@pytest.mark.parametrize("scale", ("pocket", "reference", "paper"))
def test_each_judge_stands_beside_its_number_of_the_paper(scale):
    exec(code_of_tables("PAPER1 =").split("def table_of")[0], names := {})
    one, two = ([names["paper"](names[table], judge) for judge in load_scale(scale).preference_tables.judges.split(",")] for table in ("PAPER1", "PAPER2"))
    assert [x and x[0] for x in one] == [28.11, 30.04, 31.42, None, None] and two == [49.96, 53.13, 55.64, 56.85, None]
    assert names["paper"](names["PAPER2"], "pickscore, same data") == 57.72 and names["paper"](names["PAPER2"], "ours, another user's history") is None


@pytest.mark.parametrize("name", ("pocket-preferences", "pick-a-pic"))
def test_cards_say_what_they_must(made, name):
    card = read_card(str(project_root()/"data_cards"/f"{name}.md"))
    for columns in card.columns:
        assert {n for n, *_ in columns.rows} == set(pq.read_schema(made[0]/"h"/columns.file).names)
