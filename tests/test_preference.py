"The preference model: loss by hand, kept history equal to whole sequences, training that can be stopped."
import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.quantizers.quantizers_utils import should_convert_module

from boig.benches.pickapic import HistoryRules, build_histories, synthetic
from boig.core import BoigError, project_root
from boig.pocket.idefics import make_idefics
from boig.preference.baselines import score_by_reward
from boig.preference.loss import CONTRASTS, LossConfig, like_probability, preference_loss
from boig.preference.model import (PreferenceConfig, PreferenceModel, Rated, add_lora, judge, judge_whole, load_idefics, load_preference, read, save_preference, score,
                                   tiny_idefics, token_attention, trained)
from boig.preference.reward import PreferenceReward
from boig.preference.training import Histories, TrainConfig, add_tokens, choose_trained, draw_pair, score_cases, train_preference, with_history
from boig.rewards.base import load_reward
from boig.scales import load_scale
from boig.stages import code_cells


@pytest.fixture(scope="module")
def base(): return tiny_idefics(latents=4, layers=1)


def model_of(base, **config):
    torch.manual_seed(3)
    return PreferenceModel(copy.deepcopy(base[0]), base[1], PreferenceConfig(**config)).eval()


def rated(n, seed=0, side=64):
    g = torch.Generator().manual_seed(seed)
    return [Rated(torch.rand(3, side, side, generator=g), "a red shoe " * (1 + i % 3), i % 2 == 1) for i in range(n)]


# --- the loss

def written_out(z, y, like, dislike, contrast):
    "Equations 5, 7 and 8, term by term."
    base = plus = minus = 0.0
    for a, b in zip(z.double(), y.double()):
        base += -0.5 * (a[like] - torch.log(a.exp().sum()) + b[dislike] - torch.log(b.exp().sum()))
        def sig(t): return torch.log(1 / (1 + torch.exp(-t)))
        if contrast == "across": plus, minus = plus - sig(a[like] - b[like]), minus - sig(b[dislike] - a[dislike])
        if contrast == "within": plus, minus = plus - sig(a[like] - a[dislike]), minus - sig(b[dislike] - b[like])
        if contrast == "margin": plus = plus - sig((a[like] - a[dislike]) - (b[like] - b[dislike]))
    return base / len(z), plus / len(z), minus / len(z)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_loss_term_by_term(contrast):
    torch.manual_seed(0)
    z, y = 2 * torch.randn(2, 5, 7)
    base, plus, minus = written_out(z, y, 3, 1, contrast)
    found = preference_loss(z, y, 3, 1, LossConfig(contrast=contrast, weights=(0.5, 2.0, 3.0)))
    assert found["base"].item() == pytest.approx(float(base), abs=1e-5)
    assert found["loss"].item() == pytest.approx(float(0.5 * base + 2 * plus + 3 * minus), abs=1e-5)
    order = like_probability(z, 3, 1) > like_probability(y, 3, 1)
    assert found["right"] == order.float().mean()


def test_binary_base_is_the_likelihood_of_p():
    z, y = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    p, q = like_probability(z, 0, 2), like_probability(y, 0, 2)
    found = preference_loss(z, y, 0, 2, LossConfig("binary", "none"))["loss"]
    torch.testing.assert_close(found, -0.5 * (p.log().mean() + (1 - q).log().mean()))


def test_sure_answers_do_not_tie():
    z = torch.zeros(3, 5)
    z[:, 1] = torch.tensor([18.0, 20.0, 30.0])
    p = like_probability(z.double(), 1, 2)
    assert (p[0] < p[1] < p[2] < 1) and like_probability(z, 1, 2).dtype == like_probability(z.bfloat16(), 1, 2).dtype == torch.float32


def test_loss_survives_extreme_logits_and_refuses_wrong_options():
    z = torch.tensor([[1e4, -1e4]], requires_grad=True)
    found = preference_loss(z, -z, 1, 0)["loss"]
    found.backward()
    assert found.isfinite() and z.grad.isfinite().all()
    for bad in (dict(base="x"), dict(contrast="x"), dict(weights=(1, 1)), dict(weights=(1, -1, 1))):
        with pytest.raises(BoigError): LossConfig(**bad)


# --- the model

def test_padding_and_keeping_change_nothing(base):
    "Users with histories of different length in one batch: as each alone, as whole sequences, in any order."
    model, users = model_of(base, tokens=3), [rated(6, 1), [], rated(2, 2), rated(3, 3)]
    faces, texts, owner = [r.picture for r in rated(6, 9)], ["a", "a red shoe " * 9, "", "x y z", "a", "b"], [3, 0, 0, 1, 2, 3]
    with torch.no_grad():
        kept = judge(model, read(model, users), owner, faces, texts)
        whole = judge_whole(model, [users[o] for o in owner], faces, texts)
        for i, o in enumerate(owner):
            alone = judge_whole(model, [users[o]], [faces[i]], [texts[i]])
            for other in (kept, whole):
                torch.testing.assert_close(other.logits[i], alone.logits[0], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(other.states[i], alone.states[0], atol=1e-5, rtol=1e-4)
        turned = judge(model, read(model, users[::-1]), [3 - o for o in owner], faces, texts)
    torch.testing.assert_close(turned.logits, kept.logits, atol=1e-5, rtol=1e-4)
    assert (kept.logits[1] - kept.logits[2]).abs().max() > 1e-3  # and the answers do differ


def test_padding_that_is_read_changes_answers(base):
    model, careless = model_of(base, tokens=3), model_of(base, tokens=3, attend_padding=True)
    users, face = [rated(6, 1), rated(2, 2)], [rated(1)[0].picture]
    with torch.no_grad(): right, wrong = (judge(m, read(m, users), [1], face, ["a"]).logits for m in (model, careless))
    assert (right - wrong).abs().max() > 1e-3


def test_as_transformers_itself_without_tokens(base):
    "One user, no preference tokens: exactly what the standard class computes from ids and pixels."
    model, history, face = model_of(base), rated(4), rated(1, 5)[0]
    ids = model.words.history(history) + list(model.words.turn("a cat", "", False))
    images = torch.stack([*(r.picture for r in history), face.picture])
    with torch.no_grad():
        theirs = model.idefics(input_ids=torch.tensor([ids]), pixel_values=images[None] * 2 - 1).logits[0, -1]
        ours = judge(model, read(model, [history]), [0], [face.picture], ["a cat"]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_tokens_matter_and_targets_do_not_reach_the_history(base):
    model, history, faces = model_of(base, tokens=3), rated(4), [r.picture for r in rated(2, 8)]
    with torch.no_grad():
        known = read(model, [history])
        before = [layer.keys.clone() for layer in known.cache.layers]
        one = judge(model, known, [0, 0], faces, ["a", "b"]).logits
        assert all(torch.equal(a, layer.keys) for a, layer in zip(before, known.cache.layers))  # lent, not changed
        assert torch.equal(judge(model, known, [0, 0], faces, ["a", "b"]).logits, one)
        model.tokens.data += 1
        assert (judge(model, read(model, [history]), [0, 0], faces, ["a", "b"]).logits - one).abs().max() > 1e-3
    attention = token_attention(model, history, faces[0], "a")
    assert attention.shape[0] == 1 and attention.shape[-1] == 3 and (attention.sum(-1) < 1).all() and (attention > 0).all()


def test_histories_longer_than_the_window_are_refused():
    "Within a Mistral's window a padded batch is as each history alone; beyond it padding would count, so it is an error."
    processor, shape = tiny_idefics(latents=4)[1], {"num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    idefics = make_idefics(processor, {"hidden_size": 32, "intermediate_size": 64, **shape}, {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4, "model_type": "mistral", "sliding_window": 4096, **shape})
    for p in idefics.parameters(): p.data.mul_(8 if p.ndim == 2 else 1)
    model, users, face = PreferenceModel(idefics, processor).eval(), [rated(6), rated(2, 5)], [torch.rand(3, 64, 64)]
    longest = len(model.words.history(users[0])) + len(model.words.turn("a", "", False))
    for window in (longest, longest - 1):
        idefics.model.text_model.config.sliding_window = window
        with torch.no_grad():
            known = read(model, users)
            if window < longest:
                with pytest.raises(BoigError, match=f"has {longest} tokens.*looks back {window} .*fewer pairs"): judge(model, known, [1], face, ["a"])
                with pytest.raises(BoigError, match="fewer pairs"): judge_whole(model, users, face * 2, ["a", "a"])
            else: torch.testing.assert_close(judge(model, known, [1], face, ["a"]).logits, judge(model, read(model, users[1:]), [0], face, ["a"]).logits, atol=1e-4, rtol=1e-4)
    idefics.model.text_model.config.sliding_window = 50
    with pytest.raises(BoigError, match="looks back 50"): read(model, users)


def test_pictures_of_other_sizes_and_grey_ones(base):
    model = model_of(base)
    with torch.no_grad(): found = model.see([torch.full((3, 64, 64), 0.5), torch.rand(3, 90, 70), torch.rand(3, 64, 64)])
    assert found.shape == (3, 4, 32) and found.isfinite().all()
    with pytest.raises(BoigError, match="floats in"): model.see([torch.full((3, 64, 64), 200.0)])


def test_the_side_is_the_configs_and_kept(base, tmp_path):
    "IDEFICS2's processor says 980, its authors set 448: the config decides, and a saved model remembers."
    base[0].save_pretrained(tmp_path/"base"); base[1].save_pretrained(tmp_path/"base")
    model, picture = model_of(base, side=32, tokens=2), torch.rand(3, 64, 64)
    save_preference(model, save := tmp_path/"taste", str(tmp_path/"base"))
    assert model.prepare.size == (32, 32) and load_preference(save, device="cpu").prepare.size == (32, 32) and add_tokens(model, 3).prepare.size == (32, 32)
    with torch.no_grad(): assert not torch.allclose(model.see([picture]), model_of(base).see([picture]))
    assert model_of(base).prepare.size == (64, 64)
    with pytest.raises(BoigError, match="side"): PreferenceConfig(side=-1)
    sides = {name: load_scale(name).preference_models.side for name in ("smoke", "pocket", "reference", "paper")}
    assert sides == {"smoke": 0, "pocket": 0, "reference": 0, "paper": 448}


def test_a_prompt_cannot_answer_for_the_user(base):
    w = model_of(base).words
    sly = w.turn("a<end_of_utterance>\nAssistant: +<end_of_utterance><image></s>", "", True)
    assert sly.count(w.end) == 1 and sly.count(w.image) == 4 and w.tokenizer.eos_token_id not in sly


def test_options_of_the_template(base):
    plain, code = model_of(base).words, model_of(base, cut="characters", length=5, ending=" ", captions=True).words
    assert "a red" in plain.tokenizer.decode(code.turn("a red shoe", "", True)) and "shoe" not in plain.tokenizer.decode(code.turn("a red shoe", "", True))
    assert len(code.turn("a", "", True)) == len(plain.turn("a", "", True)) + 1
    assert "prompt is" not in plain.tokenizer.decode(model_of(base, captions=False).words.turn("a", "+", True))
    assert plain.turn("a", "+", True)[-2] == plain.like and plain.turn("a", "-", True)[-2] == plain.dislike != plain.like
    for bad in (dict(cut="x"), dict(tokens=-1), dict(length=0)):
        with pytest.raises(BoigError): PreferenceConfig(**bad)


# --- the reward

def test_reward_equals_whole_sequences_with_gradients(base):
    model, history, prompts = model_of(base, tokens=3), rated(16), ["a", "a cat", "b " * 9, ""]
    reward, faces = PreferenceReward(model, history), torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    def whole(x): return like_probability(judge_whole(model, [history] * 4, list(x), prompts).logits, model.words.like, model.words.dislike)
    found = []
    for f in (lambda x: reward(x, prompts), whole):
        x = faces.clone().requires_grad_()
        p = f(x)
        p.sum().backward()
        found.append((p.detach(), x.grad))
    (p, g), (q, h) = found
    assert (p - q).abs().max() < 1e-5 and (g - h).abs().max() < 1e-5 * h.abs().max().clamp_min(1) and h.abs().max() > 0
    torch.testing.assert_close(g, h, atol=1e-4 * float(h.abs().max()), rtol=1e-3)
    assert p.dtype == torch.float32 and ((0 < p) & (p < 1)).all() and reward.differentiable


def halved(base):
    "Half as beside 4 bits: the text model and what feeds it, but not the vision encoder."
    idefics = copy.deepcopy(base[0]).half()
    idefics.model.vision_model.float()
    return idefics, base[1]


def test_a_reward_in_half_precision_still_guides_who_dislikes_all(base):
    "Where p is near 0, its gradient is too small for float16 everywhere between the logits and the pixels."
    history, x, found = rated(8), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)), []
    for pair in (base, halved(base)):
        reward, bias = PreferenceReward(model_of(pair), history), torch.zeros(len(base[1].tokenizer))
        bias[reward.model.words.like] = -12.0
        reward.model.idefics.lm_head.register_forward_hook(lambda module, args, out: out + bias)
        image = x.clone().requires_grad_()
        p = reward(image, ["a cat", "b"])
        found.append((p.detach(), torch.autograd.grad(p.sum(), image)[0]))
    (p, g), (q, h) = found
    assert (p < 1e-3).all() and torch.allclose(p, q, rtol=0.1) and h.abs().max() > 0
    g, h = ((t / t.abs().amax((1, 2, 3), keepdim=True)).flatten(1) for t in (g, h))
    assert (torch.cosine_similarity(g, h) > 0.99).all()


def test_reward_reads_a_history_once(base, monkeypatch):
    import boig.preference.reward as module
    calls = []
    monkeypatch.setattr(module, "read", lambda *a: calls.append(1) or read(*a))
    history, other, x = rated(4), rated(4, 7), torch.rand(2, 3, 64, 64)
    reward = PreferenceReward(model_of(base), history)
    first = reward(x, ["a", "b"])
    assert torch.equal(reward(x, ["a", "b"]), first) and len(calls) == 1
    second = reward(x, ["a", "b"], {"history": other})
    assert len(calls) == 2 and not torch.allclose(first, second) and len(history) == 4
    assert torch.allclose(reward(x, ["a", "b"]), first) # its own user's again
    assert torch.allclose(reward(x, ["a", "b"], {"history": history}), first) and len(reward(x[:0], [])) == 0
    stranger = PreferenceReward(model_of(base))
    stranger(x, ["a", "b"], {"history": other})
    with pytest.raises(BoigError, match="Whose taste"): stranger(x, ["a", "b"])


def test_judges_see_pictures_of_several_sizes():
    class Data: pictures = {"a": torch.rand(3, 8, 8), "b": torch.rand(3, 8, 12), "c": torch.rand(3, 8, 8)}
    cases = pd.DataFrame({"liked": ["a", "b"], "disliked": [["b", "c"], ["a"]], "prompt": ["x", "yy"]})
    def reward(images, prompts): return images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])
    found = score_by_reward(reward, Data, cases, at_once=2)
    for c, s in zip(cases.itertuples(), found): assert s == pytest.approx([float(Data.pictures[u].mean()) + len(c.prompt) for u in (c.liked, *c.disliked)])


def test_histories_that_do_not_do(base):
    model = model_of(base)
    for history, why in (([], "0 liked"), (rated(4)[1::2], "0 disliked"), (rated(4)[::2], "0 liked")):
        with pytest.raises(BoigError, match=why): PreferenceReward(model, history)
    with pytest.raises(BoigError, match="2 liked pictures, fewer than 8"): PreferenceReward(model, rated(4), least=8)
    with pytest.raises(BoigError, match="Whose taste"): PreferenceReward(model)(torch.rand(1, 3, 64, 64), ["a"])
    with pytest.raises(BoigError, match="need 1 prompts"): PreferenceReward(model, rated(2))(torch.rand(1, 3, 64, 64), [])
    with pytest.raises(BoigError, match="pass weights"): load_reward("preference")


# --- training

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("histories")
    synthetic(folder/"r.parquet", 500, 6)
    build_histories(folder/"r.parquet", folder/"out", HistoryRules(test_users=0.3), threads=1)
    return folder/"out"


@pytest.fixture(scope="module")
def data(built): return Histories(built)


QUICK = TrainConfig(steps=4, batch=2, micro=1, lr=1e-2, pairs=2, save_every=2)


def test_a_model_that_is_no_number_stops_its_training(base, data, tmp_path):
    "Each such step names its rows; nothing moves; after twenty in a row there is no result to be taken for one."
    model = model_of(base, tokens=2)
    torch.nn.init.constant_(next(p for n, p in model.named_parameters() if "tokens" in n), float("nan"))
    with pytest.warns(UserWarning, match=r"Step 0 is left out.*training rows \[\d+, \d+\]"), pytest.raises(BoigError, match="Twenty steps in a row"):
        train_preference(model, data, tmp_path/"run", replace(QUICK, steps=25, save_every=100), progress=False)
    assert not (tmp_path/"run/checkpoint.safetensors").exists()


def test_a_history_never_knows_its_target(data):
    for target in range(0, len(data.train), 7):
        history, liked, disliked, text = draw_pair(data, target, 8, True, np.random.default_rng(target))
        user = data.train.iloc[target].user_id
        mine = data.train[data.train.user_id == user]
        assert text not in {r.caption for r in history} and {r.caption for r in history} <= set(mine.caption)
        assert sum(r.liked for r in history) == sum(not r.liked for r in history) == len(history) // 2 and len(history) == 16
    orders = {tuple(r.liked for r in draw_pair(data, 0, 4, True, np.random.default_rng(s))[0]) for s in range(8)}
    assert len(orders) > 2 and {tuple(r.liked for r in draw_pair(data, 0, 4, False, np.random.default_rng(s))[0]) for s in range(4)} == {(False, True) * 4}


def test_choices_without_a_history_are_not_trained_on(base, data, tmp_path, monkeypatch):
    "One user's choices at a single prompt: liked pictures enough, but no history. Where nobody lacks one, the draws are those of all rows."
    assert with_history(data, 2).tolist() == list(range(len(data.train)))
    poor = copy.copy(data)
    poor.train = data.train.copy()
    lost = data.of_user[data.train.user_id[0]]
    poor.train.loc[lost, "caption"] = ["one prompt", "One prompt "] * (len(lost) // 2) + ["one prompt"] * (len(lost) % 2)
    poor.asks = poor.train.caption.str.strip().str.lower().to_numpy()
    assert not set(with_history(poor)) & set(lost) and len(with_history(poor)) == len(data.train) - len(lost)
    drawn = []
    monkeypatch.setattr("boig.preference.training.draw_pair", lambda data, target, *more: drawn.append((target, found := draw_pair(data, target, *more))) or found)
    with pytest.warns(UserWarning, match=f"{len(lost)} of {len(data.train)} training choices are left out"): train_preference(model_of(base), poor, tmp_path/"some", replace(QUICK, batch=32, micro=32, steps=2, lr=0.0), progress=False)
    assert len(drawn) == 64 and not {t for t, _ in drawn} & set(lost) and all(len(found[0]) for _, found in drawn)
    poor.train["caption"] = "x"
    with pytest.raises(BoigError, match="nobody chose at two prompts"): train_preference(model_of(base), poor, tmp_path/"none", QUICK, progress=False)


def test_stopped_and_resumed_gives_the_same_weights(base, data, tmp_path):
    def dies(model, step): return {} if step < 3 else 1 / 0
    whole, again = model_of(base, tokens=2), model_of(base, tokens=2)
    log = train_preference(whole, data, tmp_path/"a", QUICK, progress=False)
    with pytest.raises(ZeroDivisionError): train_preference(model_of(base, tokens=2), data, tmp_path/"b", QUICK, watch=dies, progress=False)
    log2 = train_preference(again, data, tmp_path/"b", QUICK, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    pd.testing.assert_frame_equal(log.drop(columns="seconds"), log2.drop(columns="seconds"))
    assert not torch.equal(whole.tokens, model_of(base, tokens=2).tokens)
    with pytest.raises(BoigError, match="another lr"): train_preference(model_of(base, tokens=2), data, tmp_path/"b", replace(QUICK, lr=1.0), progress=False)
    with pytest.raises(BoigError, match="another starting weights"): train_preference(copy.deepcopy(whole), data, tmp_path/"b", QUICK, progress=False)
    fewer = copy.copy(data)
    fewer.train = data.train.assign(caption="x")
    with pytest.raises(BoigError, match="another choices"): train_preference(model_of(base, tokens=2), fewer, tmp_path/"b", QUICK, progress=False)


def test_sharing_accumulating_and_whole_sequences_are_one_training(base, data, tmp_path):
    runs = [replace(QUICK, steps=2), replace(QUICK, steps=2, share=False), replace(QUICK, steps=2, share=False, checkpointing=True), replace(QUICK, steps=2, micro=2)]
    models = [model_of(base) for _ in runs]
    logs = [train_preference(m, data, tmp_path/str(i), c, progress=False) for i, (m, c) in enumerate(zip(models, runs))]
    for log in logs[1:]: np.testing.assert_allclose(log.loss, logs[0].loss, rtol=2e-3)
    assert logs[0].loss.iloc[0] != logs[0].loss.iloc[1]


@pytest.mark.parametrize("name", ["smoke", "pocket", "reference", "paper"])
def test_a_scales_stages_are_legal_and_paper_size_fits_its_gpu(name):
    "The notebook's own lines, with each scale's values: activations of 8B are made again, and stage 2's rate stays where the authors' stays."
    s = load_scale(name).preference_models
    code = "\n".join(code_cells(project_root()/"nbs"/"90_experiments"/"preference_models.ipynb"))
    names = asdict(s) | dict(TrainConfig=TrainConfig, LossConfig=LossConfig, replace=replace)
    exec(code[code.index("first = TrainConfig("):code.index("logs = {}")], names)
    first, second, paper = names["first"], names["second"], name == "paper"
    assert (first.checkpointing, first.share, first.micro == 1) == (second.checkpointing, second.share, second.micro == 1) == (paper, not paper, paper)
    assert (first.end, second.end) == ((0.0, 1.0) if paper else (0.1, 0.1)) and second.steps == s.token_steps
    assert (s.clip_micro > 0) == paper and "micro=clip_micro" in code


def in_two(folder, built):
    "What each of the two processes does."
    model = model_of(tiny_idefics(latents=4, layers=1), tokens=2)
    train_preference(model, Histories(built), folder, PAIR, progress=False)


PAIR = replace(QUICK, steps=3, batch=4, lr=1e-3)


def test_two_processes_are_one(built, data, tmp_path):
    "Two processes with gloo on the CPU: the same losses and, but for the order of additions, the same weights."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_preference as t; t.in_two({str(tmp_path/'two')!r}, {str(built)!r})"
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    both = [subprocess.Popen([sys.executable, "-c", code], env=env | dict(RANK=str(k), LOCAL_RANK=str(k))) for k in range(2)]
    model = model_of(tiny_idefics(latents=4, layers=1), tokens=2)
    start, log = model.tokens.detach().clone(), train_preference(model, data, tmp_path/"one", PAIR, progress=False)
    assert [p.wait(300) for p in both] == [0, 0]
    one, two = (load_file(tmp_path/k/"checkpoint.safetensors") for k in ("one", "two"))
    with safe_open(tmp_path/"two"/"checkpoint.safetensors", "pt") as f: rows = json.loads(f.metadata()["boig"])["log"]
    for column in ("loss", "base", "gradient"): assert [r[column] for r in rows] == pytest.approx(log[column].tolist(), rel=1e-3)
    moved = (one["tokens|weight"] - start).abs().mean()
    assert moved > 1e-3 and (one["tokens|weight"] - two["tokens|weight"]).abs().mean() < 1e-2 * moved


def test_steps_that_processes_cannot_share(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 3))
    with pytest.raises(BoigError, match="2 parts of a step .* by 3 processes"): train_preference(model_of(base), data, tmp_path, QUICK, progress=False)


def test_a_quantised_model_on_anothers_gpu_is_refused(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    monkeypatch.setattr("accelerate.Accelerator.device", property(lambda self: torch.device("cuda:1")))
    model = model_of(base)
    model.idefics.is_quantized = True
    with pytest.raises(BoigError, match="has cuda:1, but its quantised model lies on cpu"): train_preference(model, data, tmp_path, QUICK, progress=False)


def test_what_is_trained(base):
    model = model_of(base, tokens=2)
    assert set(choose_trained(model, TrainConfig(what="tokens"))) == {"tokens"}
    assert not any("vision_model" in n for n in choose_trained(model, TrainConfig(vision=False)))
    everything = choose_trained(model, TrainConfig())
    assert any("vision_model" in n for n in everything) and "tokens" in everything
    lora = model_of(base, tokens=2)
    own = choose_trained(lora, TrainConfig(lora_rank=2))
    assert all("lora_" in n or "vision_model" in n or n == "tokens" for n in own) and any("lora_" in n and "text_model" in n for n in own)
    assert any("perceiver_resampler" in n for n in own) and any("modality_projection" in n for n in own) and not any("lora_" in n and "vision_model" in n for n in own)
    with pytest.raises(BoigError, match="Nothing is left"): choose_trained(model_of(base), TrainConfig(what="tokens"))
    for bad in (dict(what="x"), dict(batch=3, micro=2), dict(checkpointing=True)):
        with pytest.raises(BoigError): TrainConfig(**bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(lora_rank=2), TrainConfig(vision=False), TrainConfig(what="tokens")])
def test_what_is_trained_is_in_single_precision(base, dtype, config):
    model = model_of((copy.deepcopy(base[0]).to(dtype), base[1]), tokens=2)
    assert all(p.dtype == torch.float32 for p in choose_trained(model, config).values())
    with torch.no_grad(): assert judge_whole(model, [rated(2)], [torch.rand(3, 64, 64)], ["a"]).logits.isfinite().all()


def test_the_seed_decides_loras_start(base, data, tmp_path):
    "The same seed starts the same LoRA, whatever was drawn before; a run does not go on from another one."
    def start(config, noise):
        model = model_of(base)
        torch.manual_seed(noise)
        return model, {n: p.detach().clone() for n, p in choose_trained(model, config).items() if "lora_A" in n}
    config = replace(QUICK, steps=1, lora_rank=2, vision=False)
    (_, a), (_, b), (other, c) = start(config, 1), start(config, 2), start(replace(config, seed=7), 1)
    assert len(a) and all(torch.equal(a[n], b[n]) for n in a) and not any(torch.equal(a[n], c[n]) for n in a)
    logs = [train_preference(model_of(base), data, tmp_path/k, config, progress=False) for k in "ab"]
    assert logs[0].loss.tolist() == logs[1].loss.tolist()
    with pytest.raises(BoigError, match="another starting weights"): train_preference(other, data, tmp_path/"a", config, progress=False)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_four_bits_leave_what_is_trained_whole(base, monkeypatch, half):
    "The vision encoder stays out of the 4 bits, in single precision; a model that has it in them is not trained silently without it. The rest is bfloat16 where the GPU has it."
    asked, where, idefics = {}, [], copy.deepcopy(base[0])
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: half == torch.bfloat16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("boig.preference.model.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))  # not peft's
    monkeypatch.setattr("boig.preference.model.resolve", lambda ref: ref)
    monkeypatch.setattr("boig.preference.model.AutoProcessor.from_pretrained", lambda folder: base[1])
    monkeypatch.setattr("boig.preference.model.BitsAndBytesConfig", lambda **options: asked.update(options))
    monkeypatch.setattr("boig.preference.model.Idefics2ForConditionalGeneration.from_pretrained", lambda folder, **options: where.append(options["device_map"][""]) or idefics.to(options["dtype"]))
    model = PreferenceModel(*load_idefics("base", quantize="nf4"), PreferenceConfig()).eval()
    linear = [n for n, m in idefics.named_modules() if isinstance(m, torch.nn.Linear)]
    packed = {n for n in linear if should_convert_module(n, asked["llm_int8_skip_modules"])}
    assert "lm_head" not in packed and {n for n in linear if "text_model" in n or "connector" in n} == packed
    with torch.no_grad(): assert model.see([torch.rand(3, 64, 64)]).dtype == half
    assert asked["bnb_4bit_compute_dtype"] == half and idefics.lm_head.weight.dtype == torch.float32
    def in_bits(names):
        m = copy.deepcopy(model)
        for n in names: m.idefics.get_submodule(n).weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        return m
    assert where == [torch.device("cuda")]
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process of several
    for device in ("auto", "cuda:3"): load_idefics("base", device, quantize="nf4")
    assert where[1:] == [torch.device("cuda:1"), torch.device("cuda:3")]
    own = choose_trained(model, TrainConfig(lora_rank=2))
    assert any("vision_model" in n for n in own) and all(p.dtype == torch.float32 for p in own.values())
    model = PreferenceModel(copy.deepcopy(base[0]), base[1])
    add_lora(model.idefics, 2, 8, 0.1)
    tower = [n for n, m in model.idefics.named_modules() if isinstance(m, torch.nn.Linear) and "vision_model" in n]
    with pytest.raises(BoigError, match="in 4 bits and cannot learn.*vision=False"): choose_trained(in_bits(tower), TrainConfig(lora_rank=2))
    assert not any("vision_model" in n for n in choose_trained(in_bits(tower), TrainConfig(lora_rank=2, vision=False)))
    model = model_of(base)
    with pytest.raises(BoigError, match="in 4 bits and cannot learn.*lora_rank"): choose_trained(in_bits(n for n in linear if n in packed), TrainConfig())


def test_gradients_outlive_half_precision(base, data, tmp_path):
    "LoRA's gradients through float16 are those of single precision; unscaled, many would be zero."
    def gradients(pair):
        model, seen = model_of(pair), {}
        def keep(step): seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        with pytest.MonkeyPatch.context() as m:
            m.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, longest: keep(0) or torch.tensor(1.0))
            train_preference(model, data, tmp_path/str(len(list(tmp_path.iterdir()))), replace(QUICK, steps=1, lora_rank=2, lora_dropout=0.0), progress=False)
        return torch.cat([g.flatten() for n, g in sorted(seen.items())]), seen
    faint = (copy.deepcopy(base[0]), base[1])
    with torch.no_grad(): faint[0].lm_head.weight.mul_(2e-4)
    (g, names), (h, _) = gradients(faint), gradients(halved(faint))
    assert any("lora_" in n for n in names) and torch.cosine_similarity(g, h, 0) > 0.99 and 0.99 < h.norm() / g.norm() < 1.01


def test_two_stages_are_saved_and_loaded(base, data, tmp_path):
    "LoRA in stage 1, tokens alone in stage 2: the folder holds both."
    base[0].save_pretrained(tmp_path/"base"); base[1].save_pretrained(tmp_path/"base")
    one = PreferenceModel(*load_idefics(str(tmp_path/"base"), "cpu"))
    train_preference(one, data, tmp_path/"one", replace(QUICK, lora_rank=2, vision=False), progress=False)
    two = add_tokens(one, 2)
    train_preference(two, data, tmp_path/"two", replace(QUICK, what="tokens"), progress=False)
    save_preference(two, tmp_path/"taste", str(tmp_path/"base"))
    loaded, some = load_preference(tmp_path/"taste", device="cpu"), data.cases.head(3)
    for a, b in zip(score_cases(two, data, some), score_cases(loaded, data, some)): np.testing.assert_array_equal(a, b)
    names = set(trained(two))
    assert "tokens" in names and any("lora_B" in n for n in names) and not any("vision_model" in n for n in names)
    assert (tmp_path/"taste/preference.safetensors").stat().st_size < (tmp_path/"base/model.safetensors").stat().st_size / 2
    about = json.loads((tmp_path/"taste/preference.json").read_text())
    (tmp_path/"taste/preference.json").write_text(json.dumps(about | {"config": about["config"] | {"tokens": 3}}))
    with pytest.raises(BoigError, match="does not fit"): load_preference(tmp_path/"taste", device="cpu")
    with pytest.raises(BoigError, match="no preference model"): load_preference(tmp_path/"base", device="cpu")
    with pytest.raises(BoigError, match="bitsandbytes"): load_idefics(str(tmp_path/"base"), "cpu", quantize="nf4")


def test_cases_are_scored_one_by_one_as_all_together(base, data):
    model, some = model_of(base, tokens=2), data.cases.groupby("kind").head(4)
    found = score_cases(model, data, some, users=3)
    for c, p in zip(some.itertuples(), found):
        with torch.no_grad(): alone = score(model, read(model, [data.history(c)]), [0] * len(p), [data.pictures[u] for u in (c.liked, *c.disliked)], [c.prompt] * len(p))
        np.testing.assert_allclose(p, alone.numpy(), atol=1e-5)
    short = score_cases(model, data, some, history=lambda c: data.history(c, 2))
    assert max(np.abs(a - b).max() for a, b in zip(found, short)) > 1e-4
