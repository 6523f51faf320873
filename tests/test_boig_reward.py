"The reward of §3.2: against probabilities by hand, against the plain way, and when something is wrong."
import copy

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from boig.behaviour.batches import encode_prompt
from boig.behaviour.finetune import load_llm, save_llm
from boig.behaviour.reward import FORMS, BoigReward, load_boig, questions, score_plainly, score_texts, to_score
from boig.benches.instructions import BOIGBENCH, STOCK, instruction
from boig.core import BoigError
from boig.data.verbalization import Verbalization
from boig.rewards.base import load_reward, reward_table

TEXTS = ['{"objects": {"shoe": [1, 2, 30, 40]}}', "{}", '{"objects": {"watch": [5, 6, 50, 60], "cat": [0, 0, 64, 64]}, "more": "words"}', "shoe", '{"objects": {}}']
GIVEN = {"company": "velmora", "tweet text": "New!", "keywords": "sale", "date": "2022-06-01"}
WISH = {"likes": 500, "likes bucket": "high"}


@pytest.fixture(scope="module")
def pocket(): return load_llm("pocket-llama", "cpu")


@pytest.fixture(scope="module")
def question(): return instruction(BOIGBENCH, {**GIVEN, "captions": "a red shoe", "image resolution": "(64, 64)"}, 1, WISH)


def tiny(kind, tok, **more):
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    if kind is GPT2Config: shape = dict(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=512)
    return AutoModelForCausalLM.from_config(kind(**shape, **more)).eval()


def looker(images):
    "A verbalizer for tests: more objects in brighter pictures."
    return [Verbalization({"Gray": 1.0}, {"warm": 0, "neutral": 1.0, "cool": 0}, {f"thing{k}": (k, 0, k + 9, 9) for k in range(round(3 * x.mean().item()))}) for x in images]


def pictures(*levels): return torch.stack([torch.full((3, 64, 64), v) for v in levels])


def reward_of(pocket, **options): return BoigReward(*pocket, BOIGBENCH, looker, WISH, **options)


def by_hand(model, tok, question, text, with_prompt=False):
    "Token after token, each from a pass of its own over all that is before it."
    start, ids = encode_prompt(question, tok), tok(text, add_special_tokens=False).input_ids
    full, first = start + ids, 1 if with_prompt else len(start)
    with torch.no_grad(): return torch.stack([model(torch.tensor([full[:t]])).logits[0, -1].log_softmax(-1)[full[t]] for t in range(first, len(full))])


def test_settings_tell_the_language_model_and_the_verbalizer(pocket):
    "A run must not go on with another one; what the verbalizer has counted is no setting."
    class Looker:
        def __init__(self, threshold): self.threshold, self.counts = threshold, 0
        def __call__(self, images): self.counts += len(images); return looker(images)
        def describe(self): return {"objects": self.threshold, "counts": self.counts}
    model, tok = pocket
    other = copy.deepcopy(model)
    with torch.no_grad(): next(other.parameters()).mul_(-1)
    one, more = (BoigReward(m, tok, BOIGBENCH, Looker(0.5), WISH) for m in (model, other))
    first = one.settings
    one(pictures(0.2), ["a red shoe"], GIVEN)
    assert first == one.settings == BoigReward(model, tok, BOIGBENCH, Looker(0.5), WISH).settings
    assert first not in (more.settings, BoigReward(model, tok, BOIGBENCH, Looker(0.6), WISH).settings)


def test_against_probabilities_by_hand(pocket, question):
    for text, logp in zip(TEXTS[:3], score_texts(*pocket, question, TEXTS)):
        torch.testing.assert_close(logp, by_hand(*pocket, question, text), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind, more", [(LlamaConfig, {}), (GPT2Config, {}), (MistralConfig, {"sliding_window": 16})])
def test_any_causal_model_equals_the_plain_way(pocket, question, kind, more):
    "Padding, grouped heads, learned positions, and attention that looks back 16 tokens only."
    tok = pocket[1]
    model = tiny(kind, tok, **more)
    want = score_plainly(model, tok, question, TEXTS, batch_size=1)
    torch.testing.assert_close(want[0], by_hand(model, tok, question, TEXTS[0]), rtol=0, atol=1e-4)
    for size in (1, 2, 16):
        for got in (score_texts(model, tok, question, TEXTS, size), score_plainly(model, tok, question, TEXTS, size), score_plainly(model, tok, question, TEXTS, size, lean=True)):
            for a, b in zip(got, want, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_question_can_be_scored_too(pocket, question):
    question = question[-60:]
    quick, plain = score_texts(*pocket, question, TEXTS, with_prompt=True), score_plainly(*pocket, question, TEXTS, with_prompt=True)
    n = len(encode_prompt(question, pocket[1])) - 1
    for a, b, alone in zip(quick, plain, score_texts(*pocket, question, TEXTS)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        torch.testing.assert_close(a[n:], alone, rtol=0, atol=1e-4)
        assert len(a) == n + len(alone)
    torch.testing.assert_close(quick[3], by_hand(*pocket, question, TEXTS[3], with_prompt=True), rtol=0, atol=1e-4)


def test_forms_by_hand():
    logp = torch.tensor([0.5, 0.25]).log()
    want = {"sum_prob": 0.75, "sum_logprob": -2.0794415, "mean_prob": 0.375, "mean_logprob": -1.0397208}
    assert {f: to_score(logp, f).item() for f in FORMS} == pytest.approx(want)
    assert to_score(logp, scale=4, shift=-1).item() == pytest.approx(2)
    assert [to_score(logp, scale=4, bounds=b).item() for b in ((0, 2.5), (4, 9), (None, 8))] == pytest.approx([2.5, 4, 3])
    with pytest.raises(BoigError, match="sum_prob"): to_score(logp, "sum_probs")


def test_a_text_that_goes_on_scores_higher(pocket):
    "Tokens that two texts share score alike, and each token more adds a positive number."
    tok, short, long = pocket[1], '{"objects": {"cat": [1, 2, 3, ', '{"objects": {"cat": [1, 2, 3, 4], "dog": [5, 6, 7, 8]}}'
    ids, more = (tok(t, add_special_tokens=False).input_ids for t in (short, long))
    common = next(i for i, (x, y) in enumerate(zip(ids + [None], more)) if x != y)
    a, b = score_texts(*pocket, "shoe", [short, long])
    torch.testing.assert_close(a[:common], b[:common], rtol=0, atol=1e-4)
    assert common > 5 and to_score(b) > to_score(b[:common]) and to_score(b, "sum_logprob") < to_score(b[:common], "sum_logprob")


def test_call_and_table_agree(pocket):
    images = pictures(0.0, 1.0, 0.4, 0.7)
    for options in ({}, {"form": "mean_logprob"}, {"scale": -2.0, "shift": 1.0, "bounds": (-20, 0)}, {"scored": "all"}):
        reward = reward_of(pocket, **options)
        table, scores = reward.explain(images, ["a shoe"] * 4, GIVEN), reward(images, ["a shoe"] * 4, GIVEN)
        assert scores.dtype == torch.float32 and scores.shape == (4,)
        torch.testing.assert_close(scores, torch.tensor(table.reward.to_numpy("float32")))
    table = reward_of(pocket).explain(images, ["a shoe"] * 4, GIVEN)
    assert table.objects.tolist() == [0, 3, 1, 2] and table.tokens.is_monotonic_increasing is False
    assert (table.reward / table.tokens).tolist() == pytest.approx(table.mean_prob.tolist(), abs=1e-6)
    assert table.text[0].endswith('"objects": {}}')


def test_prompts_and_contexts_reach_the_question(pocket):
    "One context for all is one each; pictures of several prompts come back in their order."
    images, prompts = pictures(0.4, 1.0, 0.4, 0.7), ["a shoe", "a cat", "a shoe", "a shoe"]
    reward = reward_of(pocket)
    many = reward(images, prompts, GIVEN)
    torch.testing.assert_close(many, reward(images, prompts, [GIVEN] * 4))
    for i in range(4): torch.testing.assert_close(many[i:i + 1], reward(images[i:i + 1], prompts[i:i + 1], GIVEN), rtol=0, atol=1e-4)
    torch.testing.assert_close(many[0], many[2])
    asked = questions(images, prompts, [GIVEN, GIVEN, GIVEN | {"behaviour": {"likes": 1, "likes bucket": "low"}}, pd.Series(GIVEN)], BOIGBENCH, WISH)
    assert asked[3] == asked[0] != asked[2] and 'likes bucket: "low", number of likes: "1"' in asked[2]
    assert 'captions: "a cat"' in asked[1] and 'image resolution: "(64, 64)"' in asked[1]
    assert reward(images, prompts, [GIVEN, GIVEN, GIVEN | {"company": "parkoda"}, GIVEN])[2] != many[2]


def test_resolution_is_the_pictures_own():
    assert 'image resolution: "(32, 16)"' in questions(torch.zeros(1, 3, 16, 32), ["x"], GIVEN | {"image resolution": "(9, 9)"}, BOIGBENCH, WISH)[0]


def test_stock_and_the_twin(pocket):
    context = {"keywords": "shoe", "release date": "2020-01-01"}
    wish = {"downloads": 4, "forwards": 17, "impressions": 919}
    assert BoigReward(*pocket, STOCK, looker, wish)(pictures(0.5), ["a shoe"], context).isfinite().all()
    assert 'number of impressions: "919"' in questions(pictures(0.5), ["a shoe"], context, STOCK, wish)[0]
    twin = BoigReward(*pocket, STOCK.told(False), looker)
    assert "impressions" not in questions(pictures(0.5), ["a shoe"], context, twin.spec)[0] and twin(pictures(0.5), ["a shoe"], context).isfinite().all()


def test_bad_input(pocket, question):
    reward, images = reward_of(pocket), pictures(0.5, 0.7)
    for call, words in [(lambda: reward((images * 255).byte(), ["x"] * 2, GIVEN), "divide 8-bit"), (lambda: reward(images, ["x"], GIVEN), "2 prompts"),
                        (lambda: reward(images * float("nan"), ["x"] * 2, GIVEN), "floats in"), (lambda: reward(images, ["x"] * 2, [GIVEN]), "not 1"),
                        (lambda: reward(images, ["x"] * 2), "company"), (lambda: BoigReward(*pocket, BOIGBENCH, looker)(images, ["x"] * 2, GIVEN), "behaviour"),
                        (lambda: reward_of(pocket, form="sum"), "sum_prob"), (lambda: reward_of(pocket, scored="text"), "verbalization"),
                        (lambda: score_texts(*pocket, question, ["a", ""]), "Text 1 is empty"), (lambda: load_reward("boig"), "weights="),
                        (lambda: load_boig("pocket-llama", spec="pocket_boig"), "pocket_boigbench")]:
        with pytest.raises(BoigError, match=words): call()


def test_a_question_that_is_too_long(pocket):
    reward = reward_of(pocket)
    with pytest.raises(BoigError, match=r"question has \d{4} tokens .* than the model's 2048"): reward(pictures(0.5), ["shoe " * 3000], GIVEN)


def test_empty_batches(pocket, question):
    reward = reward_of(pocket)
    assert reward(torch.zeros(0, 3, 64, 64), [], GIVEN).shape == (0,) and len(reward.explain(torch.zeros(0, 3, 64, 64), [], GIVEN)) == 0
    assert score_texts(*pocket, question, []) == score_plainly(*pocket, question, []) == []


def test_nan_is_named(pocket):
    "Only the second picture shows what the model cannot say."
    model, tok = copy.deepcopy(pocket[0]), pocket[1]
    images = pictures(0.4, 0.7, 0.4)
    one, two = (set(tok(v.to_json()).input_ids) for v in looker(images[:2]))
    only = torch.tensor(sorted(two - one))

    def spoil(_, args, kwargs, out):
        if "past_key_values" in kwargs: out.logits[torch.isin(kwargs["input_ids"], only).any(1)] = float("nan")
    hook = model.register_forward_hook(spoil, with_kwargs=True)
    reward = reward_of((model, tok))
    with pytest.raises(BoigError, match=r"1 of 3 pictures \(numbers 1\)"): reward(images, ["x"] * 3, GIVEN)
    assert reward.explain(images, ["x"] * 3, GIVEN).reward.isna().tolist() == [False, True, False]
    hook.remove()
    assert reward(images, ["x"] * 3, GIVEN).isfinite().all()


def test_by_name_from_a_saved_folder(pocket, tmp_path):
    save_llm(*pocket, tmp_path/"boigllm")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reward = load_reward("boig", str(tmp_path/"boigllm"), "cpu", behaviour=WISH)
    assert reward.name == "boig (boigllm)" and not reward.differentiable and "boig" in reward_table().index
    texts = [v.to_json() for v in reward.verbalizer(images)]
    asked = questions(images, ["x", "y"], GIVEN, BOIGBENCH, WISH)
    torch.testing.assert_close(reward(images, ["x", "y"], GIVEN), torch.stack([by_hand(*pocket, q, t).exp().sum() for q, t in zip(asked, texts)]), rtol=0, atol=1e-3)
