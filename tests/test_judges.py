"The pocket zoo's simulated people, its judges and its embeddings."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from boig.core import BoigError
from boig.data.world import STYLES, Placed, Scene, caption, load_sprites, random_scene, truth
from boig.pocket import choosers as ch
from boig.pocket.captions import held_out, pixels, samples
from boig.pocket.choosers import (EDITS, GROUPS, PARTS, USUAL, Chooser, alignment, asked, ceiling, choices, looks, parts, people,
                                  preference, question, utility, vary)
from boig.pocket.embeddings import (embed, family, look_batch, make_embedding, nearest, similarity, subject_batch, subjects,
                                    supervised_contrast, load_embedding, train_embedding)
from boig.pocket.judges import agreement, choice_loss, clip_loss, judge_batch, presence, train_chooser
from boig.pocket.training import recipe
from boig.rewards.clip_scores import ClipScore, load_clip

REWARDS, JUDGES = ("pocket-image-reward",), ("pocket-pickscore", "pocket-hps")
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
NEUTRAL = dict(alignment=0.0, layout=0.0, harmony=0.0, taste=0.0)


def one(name, color="", box=(16, 16, 48, 48), background="Cream", style="plain", **more):
    return Scene("plain", (background,), style, (*(Placed(n, "", b) for n, b in more.items()), Placed(name, color, box)))


# What a text asks for

def test_a_full_caption_is_read_back():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_scene(rng)
        ask = asked(caption(scene))
        assert ask.objects == tuple((o.name, o.color) for o in reversed(scene.objects))
        assert ask.colors == scene.colors
        assert ask.background == scene.background.replace("plain", "") and ask.style == scene.style.replace("plain", "")
        colors_shown = scene.style != "outline" or not any(o.color for o in scene.objects)
        assert (alignment(scene, ask) == 1) == colors_shown

@pytest.mark.parametrize("source", ["world", "market"])
def test_every_text_names_its_main_object(source):
    rng = np.random.default_rng(1)
    for _ in range(200):
        text, first, second = question(rng, source)
        assert asked(text).objects, text

def test_words_inside_words_are_not_objects():
    assert asked("catalogue of suncream and bookings, #Potter&Pine #HeartBeat").objects == ()
    assert asked("a light blue bikini and a light bulb").objects == (("bikini", "Light_Blue"), ("light bulb", ""))
    assert asked("A RED shoe, a Christmas tree and a photo of a roller skate").objects == (("shoe", "Red"), ("Christmas tree", ""), ("roller skate", ""))
    assert asked("a shoe, the red shoe").objects == (("shoe", "Red"),)

def test_alignment_falls_with_every_fact_that_is_missing():
    text = "a red shoe and a cat on a blue background, flat style"
    right = one("shoe", "Red", background="Blue", style="flat", cat=(0, 0, 14, 14))
    assert alignment(right, asked(text)) == 1
    for wrong, lost in [(one("shoe", "Blue", background="Blue", style="flat", cat=(0, 0, 14, 14)), 1), (one("shoe", "Red", background="Blue", style="flat"), 2),
                        (one("shoe", "Red", background="Red", style="flat", cat=(0, 0, 14, 14)), 1), (one("shoe", "Red", background="Blue", cat=(0, 0, 14, 14)), 1),
                        (one("cat", background="Blue", style="flat"), 3)]:
        assert alignment(wrong, asked(text)) == pytest.approx(1 - lost / 7)

def test_nobody_sees_colour_in_an_outline():
    assert alignment(one("shoe", "Red", style="outline"), asked("a red shoe")) == pytest.approx(2 / 3)


# Looks

def test_harmony_by_hand():
    from boig.data.palette import rgb_to_lab
    picture = torch.zeros(1, 3, 64, 64)
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.2, 0.4, 0.9]])
    picture[0, :, :, :16], picture[0, :, :, 16:] = colors[0][:, None, None], colors[1][:, None, None]
    a, b = rgb_to_lab(colors)[:, 1].double(), rgb_to_lab(colors)[:, 2].double()
    chroma, hue = torch.hypot(a, b), torch.atan2(b, a)
    share = torch.tensor([0.25, 0.75]).double()
    x, y = ((share * chroma * f(2 * hue)).sum() for f in (torch.cos, torch.sin))
    harmony, warmth, vividness = looks(picture)[0].double()
    assert harmony == pytest.approx(float(torch.hypot(x, y) / (share * chroma).sum()), abs=1e-4)
    assert warmth == pytest.approx(0.25 - 0.75) and vividness == pytest.approx(float((share * chroma).sum()), rel=1e-5)

def test_looks_are_bounded_and_indifferent_to_mirrors():
    images = pixels(samples(50, 1, "looks")[0])
    seen = looks(images)
    assert ((seen[:, 0] > 0) & (seen[:, 0] <= 1)).all() and (seen[:, 1].abs() <= 1).all() and (seen[:, 2] >= 0).all()
    shifted = images.roll(4, -1)  # whole cells of the sampling grid
    assert torch.allclose(looks(shifted), seen, atol=1e-5)
    assert looks(torch.zeros(1, 3, 64, 64))[0].tolist() == pytest.approx([1, 0, 0], abs=0.02)


# Choosers

def test_utility_is_its_parts():
    scene, ask = one("shoe", "Red"), asked("a red shoe on a blue background")
    p = parts([scene], [ask])[0]
    for name, (mean, sd) in USUAL.items(): assert sd > 0
    assert p[0] == pytest.approx(3 / 4) and p[PARTS.index("richness")] == pytest.approx((1 - USUAL["richness"][0]) / USUAL["richness"][1])
    for group, (_, looks_at, sign) in GROUPS.items():
        c = Chooser(group, 3.0, 0.5, 0.25, 2.0)
        by_hand = 3 * p[0] + 0.5 * p[1] + 0.25 * p[2] + sign * 2 * p[PARTS.index(looks_at)]
        assert utility(scene, ask, c) == pytest.approx(by_hand) == utility(scene, "a red shoe on a blue background", c)

def test_opposite_groups_disagree():
    scene = one("shoe", "Red", background="Orange")
    for a, b in (("warm", "cool"), ("vivid", "muted"), ("simple", "rich")):
        u, v = (utility(scene, "a shoe", Chooser(g, 0, 0, 0, 1.0)) for g in (a, b))
        assert u == pytest.approx(-v) and abs(u) > 0.1
    assert utility(scene, "", Chooser("warm", 0, 0, 0, 1.0)) > 0  # an orange picture is a warm one

def test_groups_are_everybody(): assert sum(share for share, *_ in GROUPS.values()) == pytest.approx(1)

def test_better_layout_is_better():
    big, tiny, crowded = one("cat", box=(15, 15, 49, 49)), one("cat", box=(0, 0, 8, 8)), one("cat", box=(15, 15, 49, 49), dog=(0, 0, 12, 12), shoe=(50, 50, 62, 62), hat=(50, 0, 62, 12))
    c = Chooser("warm", 0, 1.0, 0, 0)
    assert utility(big, "a cat", c) > utility(tiny, "a cat", c) and utility(big, "a cat", c) > utility(crowded, "a cat", c)

def test_preference_in_closed_form():
    rng = np.random.default_rng(0)
    first, second, crowd = rng.normal(size=(20, 6)), rng.normal(size=(20, 6)), people(7, 3, 4.0, 1.0, 1.0, 1.0)
    p = preference(first, second, crowd)
    assert p.shape == (20, 7) and np.allclose(p + preference(second, first, crowd), 1) and np.allclose(preference(first, first, crowd), 0.5)
    for i, c in enumerate(crowd): assert np.allclose(np.log(p[:, i] / (1 - p[:, i])), (first - second) @ c.weights)

def test_a_crowd_has_its_means_and_its_seed():
    crowd = people(4000, 1, 6.0, 1.0, 0.5, 0.7)
    assert np.mean([[c.alignment, c.layout, c.harmony, c.taste] for c in crowd], axis=0) == pytest.approx([6.0, 1.0, 0.5, 0.7], rel=0.03)
    assert {g: np.mean([c.group == g for c in crowd]) for g in GROUPS} == pytest.approx({g: s for g, (s, *_) in GROUPS.items()}, abs=0.03)
    assert people(5, 1, **NEUTRAL) == people(5, 1, **NEUTRAL) and people(50, 1, **NEUTRAL) != people(50, 2, **NEUTRAL)


# Choices

def test_choices_are_the_same_at_every_call_and_never_held_out():
    crowd = people(20, 1, 6.0, 1.0, 0.5, 0.7)
    for source in ("world", "market"):
        a, b, c = (choices(40, crowd, seed, "test", source=source) for seed in (1, 1, 2))
        assert a.texts == b.texts and a.scenes == b.scenes and torch.equal(a.images, b.images) and (a.chosen == b.chosen).all() and (a.who == b.who).all()
        assert a.texts != c.texts and not any(map(held_out, a.scenes))

def test_questions_for_judging_ask_for_held_out_scenes(monkeypatch):
    drawn = []
    monkeypatch.setattr(ch, "vary", lambda scene, edits, rng: drawn.append(scene) or vary(scene, edits, rng))
    for source in ("world", "market"):
        for _ in range(5): question(np.random.default_rng(len(drawn)), source, unseen=True)
    assert len(drawn) >= 20 and all(map(held_out, drawn))

def test_asking_elsewhere_is_an_error():
    with pytest.raises(BoigError, match="world"): question(np.random.default_rng(0), "moon")

def test_chance_of_a_choice_is_what_preference_says():
    crowd = people(30, 5, 5.0, 0.5, 0.5, 0.5)
    c = choices(1500, crowd, 3, "calibrated")
    p = preference(c.parts[:, 0], c.parts[:, 1], crowd)[np.arange(1500), c.who]
    z = ((c.chosen == 0) - p).sum() / math.sqrt((p * (1 - p)).sum())
    assert abs(z) < 4
    best = (preference(c.parts[:, 0], c.parts[:, 1], crowd).mean(1) < 0.5) == c.chosen
    assert best.mean() == pytest.approx(ceiling(c, crowd), abs=4 * 0.5 / math.sqrt(1500))
    assert np.mean(c.chosen) == pytest.approx(0.5, abs=0.06)  # the candidates come in no order

def test_the_ceiling_of_noise_and_of_certainty():
    noise, sure = people(5, 1, **NEUTRAL), people(5, 1, 1e6, 0.0, 0.0, 0.0)
    c = choices(60, noise, 4, "ceiling")
    assert ceiling(c, noise) == pytest.approx(0.5)
    differ = c.parts[:, 0, 0] != c.parts[:, 1, 0]
    assert ceiling(c, sure) == pytest.approx(differ.mean() + 0.5 * (~differ).mean())

@pytest.mark.parametrize("edits", range(len(EDITS) + 1))
def test_edits_make_scenes(edits):
    rng = np.random.default_rng(edits)
    for scene in samples(30, 2, "edits")[0]:
        new = vary(scene, edits, rng)  # a Scene checks itself
        assert 1 <= len(new.objects) <= 5
        if edits == 0:
            assert (new.background, new.colors, new.style) == (scene.background, scene.colors, scene.style)
            assert next(iter(truth(new))) == next(iter(truth(scene))) and {(o.name, o.color) for o in new.objects} <= {(o.name, o.color) for o in scene.objects}


# Judges

def test_a_judge_that_sees_nothing_is_half_right():
    crowd = people(20, 1, 6.0, 1.0, 0.5, 0.7)
    def same(images, texts): return torch.zeros(len(texts))
    assert presence(same, 20) == 0.5
    found = agreement(same, choices(40, crowd, 1, "ties"), crowd)
    assert found.pop("ceiling") > 0.5 and set(found.values()) == {0.5}

def test_the_loss_knows_no_order():
    torch.manual_seed(0)
    scores, chosen = torch.randn(9, 2), torch.randint(2, (9,))
    assert torch.allclose(choice_loss(scores, chosen), choice_loss(scores.flip(1), 1 - chosen))
    assert torch.allclose(choice_loss(scores, chosen), choice_loss(scores + torch.randn(9, 1), chosen))  # only differences count
    assert choice_loss(torch.zeros(4, 2), chosen[:4]).item() == pytest.approx(math.log(2))
    images, texts = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    assert torch.allclose(clip_loss(images, texts, 10.0), clip_loss(texts, images, 10.0))

def test_nobody_shares_a_draw_or_a_seed():
    names = (*REWARDS, *JUDGES, "pocket-style", "pocket-subject", "pocket-clip", "pocket-eval")
    assert len({recipe(n)["seed"] for n in names}) == len(names)
    draws = {}
    for name in (*REWARDS, *JUDGES):
        r = recipe(name)
        c = choices(12, people(seed=r["seed"], **r["choosers"]), r["seed"], name, 0, source=r["source"])
        draws[name] = {caption(s) for s in c.scenes}, tuple(people(seed=r["seed"], **r["choosers"]))
    for reward in REWARDS:
        for judge in JUDGES:
            assert not draws[reward][0] & draws[judge][0] and draws[reward][1] != draws[judge][1]
            assert (recipe(reward)["vision"], recipe(reward)["text"]) != (recipe(judge)["vision"], recipe(judge)["text"])

def test_the_reward_knows_alignment_only():
    for c in people(seed=recipe("pocket-image-reward")["seed"], **recipe("pocket-image-reward")["choosers"]):
        assert c.alignment > 0 and (c.weights[1:] == 0).all()

@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    model = train_chooser("pocket-hps", folder, steps=3, batch_size=4, vision={**TINY, "patch_size": 8}, text=TINY)
    return folder, model, CLIPTokenizer.from_pretrained(folder)

def test_a_judge_survives_the_disk(judge):
    folder, model, tokenizer = judge
    images, texts = pixels(samples(3, 1, "disk")[0]), ["a cat", "a red shoe on a blue background", "größer als ein Baum 🙂"]
    loaded, words, preprocess = load_clip(str(folder))
    a, b = (ClipScore(m.eval(), words, preprocess, "a judge", "logit")(images, texts) for m in (loaded, model))
    assert a.shape == (3,) and a.dtype == torch.float32 and torch.allclose(a, b, atol=0.1)
    alone = torch.cat([ClipScore(loaded, words, preprocess, "a judge", "logit")(images[i:i + 1], texts[i:i + 1]) for i in range(3)])
    assert torch.allclose(a, alone, atol=1e-3)  # padding and neighbours change nothing

def test_a_judges_batch_depends_on_its_step_alone(judge):
    r, crowd = recipe("pocket-hps") | {"batch_size": 4}, people(5, 1, 5.0, 1.0, 1.0, 1.0)
    a, b, c = (judge_batch(judge[2], crowd, r, "pocket-hps", i) for i in (0, 0, 1))
    assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["texts"]["input_ids"], b["texts"]["input_ids"])
    assert not torch.equal(a["pixel_values"], c["pixel_values"])
    assert len(a["pixel_values"]) == 8 and len(a["texts"]["input_ids"]) == 12 and len(a["chosen"]) == 4


# Embeddings

def test_supervised_contrast_is_a_double_loop():
    torch.manual_seed(0)
    z, labels, tau = F.normalize(torch.randn(9, 4), dim=1), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 0]), 0.3
    terms = []
    for i in range(9):
        others = [a for a in range(9) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives: continue
        total = math.log(sum(math.exp(float(z[i] @ z[a]) / tau) for a in others))
        terms.append(-sum(float(z[i] @ z[p]) / tau - total for p in positives) / len(positives))
    assert len(terms) == 8  # one is alone with its label
    assert supervised_contrast(z, labels, tau).item() == pytest.approx(np.mean(terms), rel=1e-5)

def test_batches_of_looks_and_subjects():
    scenes, labels = look_batch(40, 1, "a")
    assert labels.shape == (3, 40) and not any(map(held_out, scenes)) and [STYLES[k] for k in labels[0]] == [s.style for s in scenes]
    assert (look_batch(40, 1, "a")[0], look_batch(40, 2, "a")[0] == scenes) == (scenes, False)
    scenes, labels = subject_batch(20, 1, "a")
    assert labels.shape == (2, 40) and (labels[:, ::2] == labels[:, 1::2]).all() and len(set(labels[0].tolist())) == 20
    for s, k, o in zip(scenes, *labels.tolist()):
        assert (s.objects[-1].name, s.objects[-1].color) == subjects()[k] and not held_out(s) and list(load_sprites())[o] == s.objects[-1].name
    some, labels = subject_batch(10, 1, "a", unseen=True)
    assert [(s.objects[-1].name, s.objects[-1].color) for s in some] == [subjects()[k] for k in labels[0]]  # the same numbers for both
    assert all(held_out(s) for s in look_batch(10, 1, "a", unseen=True)[0] + subject_batch(10, 1, "a", unseen=True)[0])
    assert len(set(family().values())) == 9 and len(family()) == 40

def test_a_red_shoe_is_not_a_blue_shoe():
    assert ("shoe", "Red") in subjects() and ("shoe", "Blue") in subjects() and len(set(subjects())) == len(subjects())
    assert len(subjects()) == sum(1 + len(s.colors) for s in load_sprites().values()) and set(subjects(True)) <= set(subjects())

def test_nearest_by_hand():
    z = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.3]]), dim=1)
    assert nearest(z, torch.tensor([0, 0, 1, 1, 1])).item() == pytest.approx(4 / 5)

@pytest.mark.parametrize("name", ["pocket-style", "pocket-subject"])
def test_an_embedding_survives_the_disk(name, tmp_path):
    model = train_embedding(name, tmp_path, steps=2, batch_size=8, vision={**TINY, "patch_size": 8}).eval()
    loaded, images = load_embedding(tmp_path), pixels(samples(4, 1, "disk")[0]).requires_grad_()
    assert type(loaded) is type(model) and not loaded.training
    z = embed(loaded, images)
    assert torch.allclose(z.norm(dim=1), torch.ones(4), atol=1e-5) and torch.allclose(z, embed(model, images), atol=0.01)
    s = similarity(loaded, images, images.detach()[:2])
    assert torch.allclose(s, (z @ z[:2].T).mean(1), atol=1e-5)
    s[3].backward()
    assert images.grad[3].abs().max() > 0 and images.grad[0].abs().max() == 0
    assert embed(loaded, torch.rand(1, 3, 100, 90)).shape == z[:1].shape

def test_there_are_two_embeddings():
    with pytest.raises(BoigError, match="subject"): make_embedding("smell", {**TINY, "patch_size": 8})

@pytest.mark.parametrize("name, most", [*((n, 700_000) for n in (*REWARDS, *JUDGES)), ("pocket-style", 400_000), ("pocket-subject", 400_000)])
def test_recipes_are_small(name, most):
    from boig.pocket.captions import zoo_tokenizer
    from boig.pocket.clip import make_clip
    r = recipe(name)
    model = make_embedding(r["of"], r["vision"], r["dim"]) if "of" in r else make_clip(zoo_tokenizer(), r["vision"], r["text"], r["dim"])
    assert sum(p.numel() for p in model.parameters()) <= most
