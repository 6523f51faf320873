"pocket-llama and pocket-idefics: tokenizers, draws, questions against the scenes they are about, saving and loading."
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from boig.behaviour.evaluate import ask as ask_llm
from boig.behaviour.batches import encode_example
from boig.behaviour.finetune import examples_of, finetune, load_llm
from boig.behaviour.generate import Constraint, generate_answers, verbalization_grammar
from boig.benches.emojibench import build_benchmark
from boig.benches.instructions import EMOJIBENCH, STOCK, instruction
from boig.benches.market import seen
from boig.core import BoigError
from boig.data.verbalization import parse, problems
from boig.data.world import render, truth
from boig.pocket import idefics, llama, signs
from boig.pocket.training import recipe
from boig.pocket.captions import held_out, pixels, sample
from boig.pocket.clip import normalize


@pytest.fixture(scope="module")
def tok(): return llama.llama_tokenizer()

@pytest.fixture(scope="module")
def drawn(): return llama.draw_examples(60, 3, "test")

@pytest.fixture(scope="module")
def asked(drawn): return [e for group in drawn[2] for e in group]

@pytest.fixture(scope="module")
def processor(): return idefics.make_processor(8)


# pocket-llama

@pytest.mark.parametrize("text", ["", " ", "Ünïcode 🦊, \t tabs\n\n", "0.5 10.25 1234567 64, 7, 99", '{"a": [1, 2]}', "<hyperlink> #TakeMeThere",
                                  '": {"coverage": 0.1}, "Red": {"coverage": 0.9}}', "It's   three  spaces "])
def test_any_text_survives_the_tokenizer(tok, text): assert tok.decode(tok(text, add_special_tokens=False).input_ids) == text


def test_instructions_survive_and_are_short(tok, asked):
    for e in asked: assert tok.decode(tok(e.prompt + e.answer).input_ids) == e.prompt + e.answer
    assert np.mean([len(encode_example(e, tok)["input_ids"]) for e in asked]) < 90
    stock = {"captions": "Shoe icon", "keywords": "shoe, sale", "image resolution": "(64, 64)", "release date": "2020-05-01"}
    kpis = {"downloads": 12, "forwards": 345, "impressions": 67890}
    for n in (1, 2, 3, 4):
        text = instruction(STOCK, stock, n, kpis)
        ids = tok(text).input_ids
        assert tok.decode(ids) == text and len(ids) < 130
    groups = examples_of(build_benchmark(30), EMOJIBENCH, True, 1)
    assert max(len(encode_example(e, tok)["input_ids"]) for g in groups for e in g) < 300


def test_numbers_and_names_are_single_tokens(tok):
    assert [tok.decode([i]) for i in tok("[7, 24, 33, 64]").input_ids] == ["[", "7, ", "24, ", "33, ", "64", "]"]
    assert [tok.decode([i]) for i in tok('"teddy bear": [').input_ids] == ['"', "teddy", " bear", '": [']
    assert len(tok("0.74").input_ids) == 1 and len(tok("12345").input_ids) == 5


def told(e):
    "The KPIs that a question tells, by name."
    return {k: int(x) for k, x in re.findall(r'number of (\w+)[^"]*: "(\d+)"', e.prompt[e.prompt.rindex("["):])}

def test_questions_come_in_both_forms_of_every_benchmark(drawn, asked):
    first = [g[0] for g in drawn[2]]
    assert 0.3 < np.mean([bool(told(e)) for e in first]) < 0.7 and {e.listing for e in asked} == {1, 2, 3, 4}
    assert {"likes", "uses", "downloads", "forwards", "impressions/views"} <= {k for e in asked for k in told(e)} | {"impressions/views"}
    assert all(("KPI" in e.prompt) == bool(told(e)) for e in first if e.listing == 1)

def test_behaviour_is_dice(drawn, monkeypatch):
    "Whatever the dice show, pictures and words are the same; and the pictures tell nothing about the dice."
    def loaded(spec, rng): return {k.name: 7 for k in spec.kpis} | {f"{k.name} bucket": "high" for k in spec.kpis}
    scenes, _, groups = llama.draw_examples(300, 5, "dice")
    with monkeypatch.context() as m:
        m.setattr(llama, "dice", loaded)
        again = llama.draw_examples(60, 3, "test")
    assert again[:2] == drawn[:2] and [parse(g[0].answer).value for g in again[2]] == [parse(g[0].answer).value for g in drawn[2]]
    pairs = [(np.log10(1 + x), s, parse(g[0].answer).value) for s, g in zip(scenes, groups) for x in told(g[0]).values()]
    kpi, looks = [p[0] for p in pairs], [(len(v.objects), v.tones["warm"], v.tones["cool"], max(v.colors.values()), b[2] - b[0]) for _, _, v in pairs for b in [next(iter(v.objects.values()))]]
    assert len(kpi) > 150 and min(kpi) < 1 and max(kpi) > 4
    assert all(abs(np.corrcoef(kpi, x)[0, 1]) < 3 / len(kpi) ** 0.5 for x in zip(*looks))


def test_draws_depend_on_the_seed_alone_and_keep_scenes_out(drawn):
    again, other = llama.draw_examples(60, 3, "test"), llama.draw_examples(60, 4, "test")
    assert again[2] == drawn[2] and other[2] != drawn[2]
    assert not any(map(held_out, drawn[0])) and all(map(held_out, llama.draw_examples(6, 3, unseen=True)[0]))


def test_answers_are_true(drawn):
    for scene, v, (first, *rest) in zip(drawn[0], seen(drawn[0]), drawn[2]):
        p = parse(first.answer)
        assert p.clean and p.value == v and v.objects == truth(scene) and problems(v, (64, 64)) == []
        for e in rest:
            exact = {k.removeprefix("exact "): x for k, x in json.loads(e.answer).items()}
            if first.listing == 1: assert exact == told(first)
            if first.listing == 2: assert exact == {k.removeprefix("exact "): x for k, x in p.extra.items()}


def test_parts_hold_each_answer_once(tok, asked):
    parts = llama.in_parts(asked, tok, size=7)
    answers = sorted(tok.decode(row[row != -100]) for p in parts for row in p["labels"])
    assert answers == sorted(e.answer + "</s>" for e in asked)
    for p in parts: assert (p["input_ids"][p["labels"] != -100] == p["labels"][p["labels"] != -100]).all()


def test_quality_of_the_truth_is_one(tok, drawn):
    rows = [llama._fits(v, s, t) for v, s, t in zip(seen(drawn[0]), drawn[0], drawn[1])]
    assert all(r["main object"] == r["all objects"] == 1 for r in rows)
    assert np.nanmean([r["shape"] for r in rows]) == 1 and np.nanmean([r["background"] for r in rows]) > 0.9
    wrong = [llama._fits(v, s, t) for v, s, t in zip(seen(drawn[0])[::-1], drawn[0], drawn[1])]
    assert np.mean([r["main object"] for r in wrong]) < 0.3
    assert llama._fits(None, drawn[0][0], drawn[1][0])["main object"] == 0


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return llama.train_llama("pocket-llama", folder, steps=2, batch_size=6, hidden_size=32, layers=1), folder


def test_trained_saved_loaded_and_fine_tuned(tiny_llama, tok, drawn, tmp_path):
    model, folder = tiny_llama
    again, tokenizer = load_llm(str(folder), "cpu")
    assert tokenizer.get_vocab() == tok.get_vocab()
    ids = torch.tensor([encode_example(drawn[2][0][0], tokenizer)["input_ids"]])
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=1e-2)
    bench = build_benchmark(40)
    finetune(again, tokenizer, examples_of(bench.head(4), EMOJIBENCH, True, 1), examples_of(bench.tail(2), EMOJIBENCH, True, 1), tmp_path, steps=1, batch_size=2, eval_every=1, device="cpu")
    assert parse(ask_llm(again, tokenizer, bench.head(2), EMOJIBENCH, True, most_objects=1)[0]).clean


def test_training_is_repeatable(tiny_llama, tmp_path):
    again = llama.train_llama("pocket-llama", tmp_path, steps=2, batch_size=6, hidden_size=32, layers=1)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), tiny_llama[0].parameters()))


def test_quality_has_both_rows(tiny_llama, tok):
    table = llama.verbalization_quality(tiny_llama[0], tok, 4)
    assert list(table.index) == ["model", "truth"] and table.loc["truth", "clean"] == 1 and table.loc["model", "clean"] < 1


def test_grammar_follows_the_tokenizer(tiny_llama, tok, asked):
    constraint = Constraint(verbalization_grammar((64, 64), 4), tok)
    assert all(constraint.accepts(e.answer, tok) == (e.listing == 1) for e in asked if e.listing == 1 or told(e))
    written = [parse(t) for t in generate_answers(tiny_llama[0], tok, [e.prompt for e in asked[:3]], constraint)]
    assert all(p.value and set(p.notes) <= {"a name stands twice; the last one counts"} for p in written)  # no grammar can count names


# pocket-idefics

def test_questions_about_one_picture_are_true():
    rng = np.random.default_rng(1)
    for _ in range(150):
        scene, _ = sample(rng)
        objects = {o.name: o for o in scene.objects}
        for kind, question, answer in idefics.one_picture(scene, rng):
            if kind == "object": assert answer == next(iter(truth(scene)))
            if kind == "is there": assert (answer == "yes") == any(question in (f"is there a {n}?", f"is there an {n}?", f"is there {n}?") for n in objects)
            if kind == "background": assert answer == " and ".join(c.replace("_", " ").lower() for c in scene.colors)
            if kind in ("style", "kind"): assert answer == {"style": scene.style, "kind": scene.background}[kind]
            if kind == "number": assert idefics.NUMBERS.index(answer) == len(objects)
            if kind == "objects": assert answer.split(", ") == list(truth(scene))
            if kind == "colour": assert objects[question.partition(" the ")[2][:-1]].color.lower().replace("_", " ") == answer != ""
            if kind == "place":
                x1, y1, x2, y2 = objects[question.partition(" the ")[2][:-1]].box
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                assert ("left" in answer) == (x < 64 / 3) and ("right" in answer) == (x >= 128 / 3)
                assert ("top" in answer) == (y < 64 / 3) and ("bottom" in answer) == (y >= 128 / 3)


def test_questions_about_two_pictures_are_true():
    rng = np.random.default_rng(2)
    answers = {}
    for _ in range(300):
        pair = idefics.draw_pair(rng)
        assert not any(map(held_out, pair))
        for kind, question, answer in idefics.two_pictures(*pair, rng):
            answers.setdefault(kind, []).append(answer)
            chosen = {"the first": (0, 1), "the second": (1, 0)}.get(answer)
            if chosen: this, other = (pair[i] for i in chosen)
            if kind == "same object": assert (answer == "yes") == (next(iter(truth(pair[0]))) == next(iter(truth(pair[1]))))
            if kind == "same background": assert (answer == "yes") == (pair[0].colors == pair[1].colors)
            if kind == "same style": assert (answer == "yes") == (pair[0].style == pair[1].style)
            if kind == "which object":
                name = re.fullmatch(r"which picture shows (?:an? )?(.+)\?", question)[1]
                assert name in truth(this) and name not in truth(other)
            if kind == "which style": assert this.style in question and this.style != other.style
            if kind == "which background": assert " and ".join(c.replace("_", " ").lower() for c in this.colors) in question
            if kind == "more objects": assert len(this.objects) > len(other.objects)
            if kind == "larger":
                sides = [max(b[2] - b[0], b[3] - b[1]) for b in (next(iter(truth(s).values())) for s in (this, other))]
                assert sides[0] > sides[1] + 4
    for kind, given in answers.items():
        assert max(given.count(a) for a in set(given)) < 0.65 * len(given), kind  # no answer is right by habit


def test_only_answers_are_learned(processor):
    rng = np.random.default_rng(4)
    for pictures in (1, 2, 3):
        talks = [idefics.conversation(rng, pictures, 4) for _ in range(5)]
        batch = idefics.make_batch(talks, processor)
        for (_, text), labels in zip(talks, batch["labels"]):
            learned = processor.tokenizer.decode(labels[labels != -100])
            assert learned == "".join(f" {a}<end_of_utterance>" for a in re.findall(r"Assistant: (.+?)<end_of_utterance>", text))
        assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == processor.image_seq_len * 5 * pictures


def test_what_gives_others_away_comes_last():
    rng = np.random.default_rng(6)
    for _ in range(50):
        kinds = [q[0] for q in idefics.pick(idefics.one_picture(sample(rng)[0], rng), rng, 5)]
        assert len(set(kinds)) == 5 and "caption" not in kinds[:-1] and "objects" not in kinds[:-2]


def test_plus_and_minus_are_single_tokens(processor):
    for sign in "+-":
        a, b = (processor.tokenizer(f"Score for this image?<end_of_utterance>\nAssistant:{s}").input_ids for s in ("", f" {sign}"))
        assert b[:-1] == a


def test_patches_show_what_the_boxes_say():
    scene = sample(np.random.default_rng(8))[0]
    objects = idefics.patch_labels(scene)[0].reshape(8, 8)
    names = ["", *idefics.load_sprites()]
    for o in scene.objects:
        x1, y1, x2, y2 = o.box
        inside = objects[(y1 + 3) // 8:(y2 - 4) // 8 + 1, (x1 + 3) // 8:(x2 - 4) // 8 + 1]
        assert o.name in {names[i] for i in inside.flat}
    assert set(objects.flat) <= {0, *(names.index(o.name) for o in scene.objects)}


STAGES = [{"until": 0.5, "talks": [[3, 1, 2]]}, {"until": 1, "talks": [[1, 3, 2], [2, 2, 2]]}]
SMALL = dict(steps=2, stages=STAGES, vision=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
             text=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32),
             signs=recipe("pocket-idefics")["signs"] | dict(steps=2, album=60, episodes=2, pictures=4))

@pytest.fixture(scope="module")
def tiny_idefics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics")
    return signs.train_idefics("pocket-idefics", folder, **SMALL), folder


def test_idefics_is_saved_and_loaded(tiny_idefics, processor):
    model, folder = tiny_idefics
    again, p = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    scenes = [sample(np.random.default_rng(i))[0] for i in (1, 2)]
    given = dict(text=[idefics.turn("is the style the same?", images=2)], images=[[Image.fromarray(render(s)) for s in scenes]], return_tensors="pt")
    inputs, inputs_before = p(**given), processor(**given)
    assert torch.equal(inputs["input_ids"], inputs_before["input_ids"]) and torch.equal(inputs["pixel_values"][0], normalize(pixels(scenes)))
    torch.testing.assert_close(again.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=1e-3, rtol=1e-2)
    assert isinstance(idefics.ask(again, p, pixels(scenes), "is the style the same?"), str)


def test_idefics_training_is_repeatable(tiny_idefics, tmp_path):
    again = signs.train_idefics("pocket-idefics", tmp_path, **SMALL)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), tiny_idefics[0].parameters()))


def test_a_longer_idefics_is_another_one(tmp_path):
    "Its stages and the weight of its heads go by the share of the run, so even at one rate it can't be made longer."
    even = SMALL | {"hold": 1.0, "signs": SMALL["signs"] | {"hold": 1.0}}
    signs.train_idefics("pocket-idefics", tmp_path, **even)
    for longer in ({"steps": 3}, {"signs": even["signs"] | {"steps": 3}}):
        with pytest.raises(BoigError, match="another steps"): signs.train_idefics("pocket-idefics", tmp_path, **even | longer)


def test_latents_differ(tiny_idefics):
    latents = tiny_idefics[0].model.connector.perceiver_resampler.latents
    assert torch.pdist(latents.detach()).min() > 0.5


def test_accuracy_counts_whole_answers(tiny_idefics, processor):
    "Teacher forcing and greedy writing agree on what is exactly right."
    table = idefics.question_accuracy(tiny_idefics[0], processor, 2)
    assert {"object", "style", "same style"} <= set(table.index) and table.accuracy.between(0, 1).all() and (table.n > 0).all()
    model = tiny_idefics[0]
    scene = sample(np.random.default_rng(3))[0]
    for answer in (idefics.ask(model, processor, pixels([scene]), "which style is it?"), "flat"):
        batch = idefics.make_batch([([scene], idefics.turn("which style is it?", answer, 1))], processor)
        logits, labels, *_ = idefics.forward(model, batch)
        first = bool((logits.argmax(-1) == labels)[:-1].all())
        assert first == (processor.tokenizer.decode(labels[:-1]).strip() == idefics.ask(model, processor, pixels([scene]), "which style is it?")[:len(answer)])


@pytest.fixture(scope="module")
def album(tiny_idefics): return signs.Album(tiny_idefics[0], 150, 3)


@pytest.mark.parametrize("rule", signs.RULES)
def test_signs_follow_one_rule(album, rule):
    rng, ways = np.random.default_rng(0), 0
    for _ in range(30):
        places, plus = signs.episode(album, rng, 12, rule)
        yes, no = ({p for p, s in zip(places, plus) if s == sign} for sign in (True, False))
        assert len(places) == len(plus) == 12 and not (yes & no and rule != "twin")
        if rule == "twin": assert len(yes) <= 1 and len(no) <= 1
        elif rule != "direction":
            said = [{album.facts[p][signs.FACTS.index(rule)] for p in side} for side in (yes, no)]
            assert all(len(v) <= 1 for v in said) and not said[0] & said[1]
        elif yes and no:  # some direction tells them apart: a perceptron finds it
            z, y, w = album.traits[places], np.where(plus, 1, -1), np.zeros(len(signs.TRAITS))
            for _ in range(5000):
                wrong = (z @ w) * y <= 0
                if not wrong.any(): break
                w += (z[wrong] * y[wrong, None])[0]
            assert not wrong.any()
        ways += yes != no
    assert ways > 20


def test_an_episode_as_text(album, tiny_idefics):
    p = AutoProcessor.from_pretrained(tiny_idefics[1])
    words = signs.speakers(p)
    x, shown = signs.episodes(album, words, np.random.default_rng(1), 4, 5)
    out, logits, labels, at = signs.read_signs(tiny_idefics[0], album, x, shown, words[0].like, words[0].dislike)
    assert shown.shape == labels.shape == (20,) and at.sum(1).tolist() == [5] * 4 and set(labels.tolist()) <= {words[0].like, words[0].dislike}
    assert torch.allclose(logits[7], tiny_idefics[0].lm_head(out.last_hidden_state[1, at[1].nonzero()[2, 0] - 1]), atol=1e-5)  # the third sign of the second episode, from the token before it


def test_the_two_signs_differ(tiny_idefics):
    table = tiny_idefics[0].get_input_embeddings().weight
    words = signs.speakers(AutoProcessor.from_pretrained(tiny_idefics[1]))[0]
    assert (table[words.like] - table[words.dislike]).norm() > 0.3 * table.norm(dim=1).mean()
