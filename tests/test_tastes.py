"Simulated users and agents."
from io import BytesIO

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from boig.benches.pickapic import FIELDS, HistoryRules, Pictures, build_histories
from boig.benches.tastes import (DIMENSIONS, POCKET_DIMENSIONS, PALETTES, Agent, TasteRules, agent_prompt, agent_scene, ask_for, best_possible, candidate,
                                 jaccard_distance, make_agents, make_tastes, picture_parts, write_agents)
from boig.core import BoigError, png_record
from boig.data.verbalization import Verbalization
from boig.pocket.captions import pixels
from boig.pocket.choosers import asked, parts

FEW = TasteRules(users=4, prompts=3, rounds=3)


@pytest.fixture(scope="module")
def tastes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tastes")
    return folder, make_tastes(folder, FEW)


def test_the_format_is_the_releases(tastes):
    folder, users = tastes
    table = pq.read_table(folder/"choices.parquet")
    assert table.schema.equals(FIELDS) and len(table) == 4 * 3 * 3 and len(users) == 4
    rows = table.to_pandas()
    assert (rows.groupby(["user_id", "ranking_id"]).caption.nunique() == 1).all()
    for _, chain in rows.sort_values("created_at").groupby(["user_id", "ranking_id"]):
        best = chain.image_0_uid.iloc[0]
        for r in chain.itertuples():  # the winner stays
            assert r.image_0_uid == best
            if r.has_label and r.label_0 == 0: best = r.image_1_uid


def test_the_same_again(tastes, tmp_path):
    make_tastes(tmp_path, FEW)
    assert pq.read_table(tmp_path/"choices.parquet").equals(pq.read_table(tastes[0]/"choices.parquet"))


def test_candidates_show_what_was_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(20):
        text, names = ask_for(rng)
        assert {n for n, _ in asked(text).objects} == set(names)
        assert names[0] in {o.name for o in candidate(names, rng).objects}


def test_generated_pictures_are_judged_by_what_is_seen(tmp_path):
    "With true boxes, colours and number as for drawn scenes; the verbalizer is what finds objects."
    rng = np.random.default_rng(1)
    scenes, asks = zip(*((candidate((n := ask_for(rng))[1], rng), asked(n[0])) for _ in range(6)))
    seen = [Verbalization({}, {}, {o.name: o.box for o in s.objects}) for s in scenes]
    ours, theirs = picture_parts(pixels(scenes), asks, lambda images: seen), parts(scenes, asks, pixels(scenes))
    np.testing.assert_allclose(ours[:, 1:], theirs[:, 1:], atol=1e-9)
    calls = []
    def grey(captions, seed): calls.append(captions); return torch.full((len(captions), 3, 64, 64), 0.5)
    make_tastes(tmp_path, TasteRules(users=1, prompts=2, rounds=2), grey, lambda images: [Verbalization({}, {}, {})] * len(images))
    rows = pd.read_parquet(tmp_path/"choices.parquet")
    assert [len(c) for c in calls] == [3, 3] and all(len(set(c)) == 1 for c in calls) and (rows[rows.has_label].label_0 == 0.5).all()  # equal pictures are ties


def test_taste_decides():
    strong, none = best_possible(TasteRules(taste=6.0), 60), best_possible(TasteRules(taste=0.0), 60)
    assert strong["own utility"] > 0.9 > 0.75 > strong["the crowd's mean utility"] and none["own utility"] - none["the crowd's mean utility"] < 0.05


@pytest.mark.parametrize("dimensions, each", [(POCKET_DIMENSIONS, 2), (DIMENSIONS, 4)])
def test_thirty_agents_are_far_apart(dimensions, each):
    agents = make_agents(dimensions, 30, each)
    far = [jaccard_distance(a, b) for i, a in enumerate(agents) for b in agents[:i]]
    assert len(agents) == 30 and len(dimensions) == 7 and min(far) >= 0.8
    for a in agents:
        assert not a.likes & a.dislikes and {d for d, _ in a.likes} == {d for d, _ in a.dislikes} == set(dimensions) and len(a.likes) == len(a.dislikes)


def test_jaccard_by_hand():
    a, b = Agent(frozenset({("d", 1)}), frozenset({("d", 2)})), Agent(frozenset({("d", 2)}), frozenset({("d", 1)}))
    c = Agent(frozenset({("d", 1)}), frozenset({("d", 3)}))
    assert jaccard_distance(a, a) == 0 and jaccard_distance(a, b) == 1 and jaccard_distance(a, c) == pytest.approx(1 - 1 / 3)


def test_agents_that_cannot_be():
    with pytest.raises(BoigError, match="Only"): make_agents({"a": ("x", "y", "z")}, 9, 1, tries=20)


def test_an_agents_pictures_show_its_attributes(tmp_path):
    rng, agents = np.random.default_rng(3), make_agents(n=3)
    for a in agents:
        for own in (a.likes, a.dislikes):
            s, by = agent_scene("cat", own, rng), {d: {v for e, v in own if e == d} for d in POCKET_DIMENSIONS}
            assert s.objects[-1].name == "cat" and s.style in by["art style"] and s.background in by["medium"]
            assert set(s.colors) <= {c for p in by["color palette"] for c in PALETTES[p]}
            assert all(not o.color or o.color in by["hue"] for o in s.objects)
    profiles = write_agents(tmp_path/"agents.parquet", agents, 12)
    build_histories(tmp_path/"agents.parquet", tmp_path/"out", HistoryRules(test_users=1, valid_users=0), threads=1)
    triples, store = pd.read_parquet(tmp_path/"out/triples.parquet"), Pictures(tmp_path/"out")
    assert len(triples) == 36 and len(store) == 72 and triples.liked.str.endswith("+").all() and triples.disliked.str.endswith("-").all()
    assert [sorted(map(tuple, p["likes"])) for p in profiles] == [sorted(a.likes) for a in agents]


def test_prompts_of_the_paper():
    agent = make_agents(DIMENSIONS, 1, 4)[0]
    text = agent_prompt("a cat", agent.likes, np.random.default_rng(0))
    assert text.startswith("a cat, ") and text.count(",") == 7


def test_rules_are_checked(tmp_path):
    with pytest.raises(BoigError): TasteRules(users=0)
    with pytest.raises(BoigError, match="verbalizer"): make_tastes(tmp_path, FEW, draw=lambda c, s: None)


def test_agents_of_the_papers_attributes_are_drawn_by_a_generator(tmp_path):
    "Each prompt names the subject and one liked (or disliked) attribute of each dimension; each picture says what made it."
    agents, asked = make_agents(DIMENSIONS, 2, each=4), []
    def draw(prompts, seed): asked.append((tuple(prompts), seed)); return torch.rand(len(prompts), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    write_agents(tmp_path/"agents.parquet", agents, 3, draw=draw, model="a generator")
    assert len(asked) == 6 and len({seed for _, seed in asked}) == 6
    for k, (prompts, _) in enumerate(asked):
        for prompt, own in zip(prompts, (agents[k // 3].likes, agents[k // 3].dislikes)):
            said = prompt.split(", ")[1:]
            assert len(said) == len(DIMENSIONS) and all(any(s == f"{v} {d}" for d, v in own) for s in said)
    rows = pd.read_parquet(tmp_path/"agents.parquet")
    record = png_record(BytesIO(rows.jpg_0[0]))
    assert record["generated"] and record["model"] == "a generator"
