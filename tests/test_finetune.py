"What fine-tuning weighs and how its rows are shared out: over samples, parts, processes."
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from boig.behaviour import finetune as module
from boig.behaviour.batches import GroupDataset, PackGroups, PadGroups, Rounds, encode_example, fit_rows, leak, verbalization_in, weighted_loss
from boig.behaviour.finetune import add_lora, examples_of, finetune, fixed_texts, launch, load_llm, make_llama, save_llm, train_tokenizer, training_arguments
from boig.behaviour.reward import load_boig
from boig.benches.emojibench import build_benchmark
from boig.benches.instructions import EMOJIBENCH, Example
from boig.core import BoigError
from boig.scales import load_scale


@pytest.fixture(scope="module")
def bench(): return build_benchmark(120)


@pytest.fixture(scope="module")
def told(bench): return examples_of(bench, EMOJIBENCH, True, seed=0)


@pytest.fixture(scope="module")
def plain(bench): return examples_of(bench, EMOJIBENCH, False, seed=0)


@pytest.fixture(scope="module")
def tok(told): return train_tokenizer([t for g in told for e in g for t in (e.prompt, e.answer)], fixed_texts(EMOJIBENCH), 700)


def small(tok, seed=0, **config):
    model = make_llama(tok, 32, 2, seed=seed)
    return LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), **config})) if config else model


# The loss

def test_an_object_called_exact_stays_in_the_verbalisation(tok):
    look = '{"color and tones": {"colors": {"Red": {"coverage": 1.0}}, "tones": {"warm": 1.0, "neutral": 0, "cool": 0}}, "objects": {"a": [1, 1, 2, 2], "exact match": [1, 1, 2, 2]}}'
    for listing, answer in ((1, look), (2, look[:-1] + ', "exact uses": 7}')): assert verbalization_in(Example(listing, "q", answer)) == look
    row = encode_example(Example(2, "q", look[:-1] + ', "exact uses": 7}'), tok, behaviour_weight=0.25)
    def of(w): return tok.decode([t for t, x in zip(row["labels"], row["weights"]) if x == w])
    assert "exact match" in of(1.0) and "exact uses" in of(0.25) and "7" in of(0.25)
    assert (of(1.0) + of(0.25)).removesuffix("</s>") == look[:-1] + ', "exact uses": 7}'


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step_loss(model, groups, tok, beta=1.0, collate=None):
    b = (collate or PadGroups(tok.pad_token_id))([[encode_example(e, tok, behaviour_weight=beta) for e in g] for g in groups])
    inputs = {k: b[k] for k in ("input_ids", "attention_mask", "position_ids") if k in b}
    return weighted_loss(model(**inputs, use_cache=False).logits, b["labels"], b["weights"]) / b["items"].sum()


def test_the_verbalisation_has_the_same_gradient_in_both_twins(tok, told, plain):
    "Asked alike, BoigLLM's gradient is the twin's plus that of its behaviour tokens: nothing of the first is lost."
    model = small(tok)
    both = [(a, b) for (a, more), (b,) in zip(told, plain) if a.listing == 1][:6]
    extra = [more for a, more in told if a.listing == 1][:6]
    twin = gradient(model, step_loss(model, [[b] for _, b in both], tok))
    boig = gradient(model, step_loss(model, [[Example(1, b.prompt, a.answer), x] for (a, b), x in zip(both, extra)], tok))
    b = PadGroups(0)([[encode_example(x, tok) for x in extra]])
    n = sum(encode_example(v, tok)["items"] for _, v in both)
    behaviour = gradient(model, weighted_loss(model(b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"], b["weights"]) / n)
    torch.testing.assert_close(boig, twin + behaviour, rtol=1e-4, atol=1e-6)
    assert behaviour.norm() > 0.1 * twin.norm()


def test_listing_2_weighs_its_verbalisation_as_listing_1(tok, told, plain):
    "Token by token: what comes before the KPIs has weight 1, and the divisor is that of the bare verbalisation."
    pairs = [(a, b) for (a, _), (b,) in zip(told, plain) if a.listing == 2][:20]
    for a, b in pairs:
        x, y = encode_example(a, tok), encode_example(b, tok)
        assert x["items"] == y["items"] == sum(w > 0 for w in y["weights"])
        zero = encode_example(a, tok, behaviour_weight=0.0)
        assert 0 <= x["items"] - sum(w > 0 for w in zero["weights"]) <= 3  # the closing brackets and the end belong to the KPIs then


def test_weight_zero_leaves_behaviour_out(tok, told):
    model, groups = small(tok), [g for g in told if g[0].listing == 1][:5]
    with torch.no_grad(): torch.testing.assert_close(step_loss(model, groups, tok, beta=0.0), step_loss(model, [g[:1] for g in groups], tok))


def test_groups_without_a_verbalisation_are_refused(tok, told):
    with pytest.raises(BoigError, match="hold no verbalisation"): GroupDataset([told[0][1:]], tok)


# Packing

@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_sample_once_and_no_more_than_fits(seed):
    lengths = np.random.default_rng(seed).integers(1, 90, 40).tolist()
    rows = fit_rows(lengths, 100)
    assert sorted(i for r in rows for i in r) == list(range(40))
    assert all(sum(lengths[i] for i in r) <= 100 for r in rows) and len(rows) <= 1.3 * sum(lengths) / 100 + 1
    assert fit_rows([500, 3], 100) == [[0], [1]]  # too long for a row: alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_is_padded(tok, told, attention):
    "Equal loss and gradient, with both kinds of attention."
    model = small(tok)
    model.set_attn_implementation(attention)
    a, b = (step_loss(model, told[:6], tok, collate=c) for c in (PadGroups(tok.pad_token_id), PackGroups(tok.pad_token_id, 400)))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ga, gb = gradient(model, a), gradient(model, b)
    assert (ga - gb).norm() < 1e-5 * ga.norm()


def test_nothing_of_a_neighbour_gets_through(tok, told):
    "Change one sample of a row: the logits of the others stay, to the bit."
    model = small(tok).eval()
    b = PackGroups(tok.pad_token_id, 10_000)([[encode_example(e, tok) for e in g] for g in told[:3]])
    assert len(b["input_ids"]) == 1
    starts = (b["position_ids"][0] == 0).nonzero().flatten().tolist()
    with torch.no_grad():
        before = model(b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits
        changed = b["input_ids"].clone()
        changed[0, starts[1]:starts[2]] = 7
        after = model(changed, position_ids=b["position_ids"], use_cache=False).logits
    assert torch.equal(before[:, :starts[1]], after[:, :starts[1]]) and torch.equal(before[:, starts[2]:], after[:, starts[2]:])
    assert not torch.equal(before[:, starts[1]:starts[2]], after[:, starts[1]:starts[2]])


def test_a_model_that_leaks_is_not_packed(tok, told, tmp_path, monkeypatch):
    assert leak(small(tok)) < 1e-3
    monkeypatch.setattr(module, "leak", lambda model: 1.5)
    with pytest.raises(BoigError, match="lets packed samples see each other"):
        finetune(small(tok), tok, told[:8], told[8:10], tmp_path, steps=1, batch_size=4, eval_every=1, pack=512, device="cpu")


# Steps

def test_rounds_show_each_row_once_before_any_again():
    order = Rounds(range(7), 30, 3).order.tolist()
    assert len(order) == 30 and all(sorted(order[i:i + 7]) == list(range(7)) for i in range(0, 28, 7))
    assert order == Rounds(range(7), 30, 3).order.tolist() != Rounds(range(7), 30, 4).order.tolist()
    assert Rounds(range(7), 14, 3).order.tolist() == order[:14]  # more steps go on where fewer end


def run(tok, groups, folder, **options):
    model = small(tok)
    log = finetune(model, tok, groups[:30], groups[30:36], folder, steps=5, batch_size=8, eval_every=5, device="cpu", learning_rate=1e-3, **options)
    return model.state_dict(), [l["loss"] for l in log if "loss" in l]


@pytest.mark.parametrize("options", [dict(accumulation=4), dict(pack=300), dict(accumulation=2, pack=300), dict(checkpointing=True)], ids=str)
def test_parts_and_packing_change_nothing_but_rounding(tok, told, tmp_path, options):
    whole, losses = run(tok, told, tmp_path/"a")
    other, same = run(tok, told, tmp_path/"b", **options)
    np.testing.assert_allclose(same, losses, rtol=1e-4)
    assert max((whole[k] - other[k]).abs().max() for k in whole) < 2e-5


def test_the_trainers_loss_is_the_formula(tok, told, tmp_path):
    "The first step's logged loss, and its gradient's effect, against the formula by hand."
    _, losses = run(tok, told, tmp_path)
    data = Rounds(told[:30], 5 * 8, module.derive_seed(42, "rows"))
    with torch.no_grad(): by_hand = step_loss(small(tok), [data[i] for i in range(8)], tok)
    assert abs(losses[0] - by_hand.item()) < 1e-4


def test_the_validation_loss_is_one_ratio_of_sums(tok, told, tmp_path):
    "Validation rows of unlike lengths, in batches of 4: the logged loss is the sum over all tokens by the number of all, as the paper's loss is."
    groups = sorted(told, key=lambda g: len(g[0].answer))
    valid, model = [*groups[:3], *groups[-4:]], small(tok)  # batches of 4 and 3
    log = finetune(model, tok, told[:30], valid, tmp_path, steps=1, batch_size=4, eval_every=1, device="cpu", learning_rate=0.0)
    with torch.no_grad(): by_hand = step_loss(small(tok), [g[:1] for g in valid], tok)
    assert next(l["eval_loss"] for l in log if "eval_loss" in l) == pytest.approx(by_hand.item(), abs=1e-5)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(tok, told, tmp_path):
    log = finetune(small(tok), tok, told[:8], told[8:10], tmp_path, steps=20, batch_size=4, eval_every=20, learning_rate=1e-3, warmup_ratio=0.1, device="cpu")
    rates = [l["learning_rate"] for l in log if "learning_rate" in l]
    np.testing.assert_allclose(rates, [1e-3 * (t / 2 if t < 2 else (1 + np.cos(np.pi * (t - 2) / 18)) / 2) for t in range(20)], atol=1e-9)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_gpu_computes_in_bfloat16_and_a_cpu_does_not(tmp_path, monkeypatch, kind):
    given = {}
    monkeypatch.setattr(module, "get_device", lambda device: torch.device(kind))
    monkeypatch.setattr(module, "TrainingArguments", lambda **args: given.update(args) or SimpleNamespace(n_gpu=1))
    training_arguments(tmp_path, 1, 8, 1, 1e-3, 0, 1, 0, "auto")
    assert given["bf16"] == (kind == "cuda")


def test_4_bits_are_qloras(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(module, "BitsAndBytesConfig", lambda **args: args)
    assert module.quantization(4) == dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    assert module.quantization(8) == dict(load_in_8bit=True) and module.quantization(0) is None


def test_an_adapter_counts_twice_its_rank(tok): assert add_lora(small(tok), 3, "x").peft_config["default"].lora_alpha == 6


class Poison(TrainerCallback):
    "Make the second step's gradient NaN, and keep the weights after each."
    def __init__(self): self.weights = []
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1: self.hook = model.model.norm.weight.register_hook(lambda g: g * torch.nan)
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2: self.hook.remove()
        self.weights.append({k: v.clone() for k, v in model.state_dict().items()})


def test_a_step_without_a_finite_gradient_changes_nothing(tok, told, tmp_path):
    poison = Poison()
    with pytest.warns(UserWarning, match="Step 2 is left out"):
        log = finetune(small(tok), tok, told[:8], told[8:10], tmp_path, steps=3, batch_size=4, eval_every=3, learning_rate=1e-3, device="cpu", callbacks=(poison,))
    before, left_out, after = poison.weights
    assert all(torch.equal(before[k], left_out[k]) for k in before) and not all(torch.equal(before[k], after[k]) for k in before)
    assert all(v.isfinite().all() for v in after.values()) and [l["step"] for l in log if "left_out" in l] == [2]


def checkpointed(model): return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs): self.on = checkpointed(model)


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_is_on_while_a_model_trains(tok, told, tmp_path, rank):
    watch, model = Watch(), add_lora(small(tok), rank, "x")
    finetune(model, tok, told[:8], told[8:10], tmp_path, steps=1, batch_size=4, eval_every=1, device="cpu", checkpointing=True, callbacks=(watch,))
    assert watch.on and not checkpointed(model)


def test_papers_13b_is_checkpointed_without_reentrance(tmp_path):
    s = load_scale("paper").boig_llm
    given = training_arguments(tmp_path, s.steps, s.batch_size, s.accumulation, s.learning_rate, s.warmup_ratio, s.eval_every, 0, "cpu", s.checkpointing)
    assert given.gradient_checkpointing and given.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BoigError, match="8 rows cannot be cut into 3 processes × 1 parts"): training_arguments(tmp_path, 1, 8, 1, 1e-3, 0, 1, 0, "cpu")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_parted_weights_are_refused(tok, told, tmp_path, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(BoigError, match=f"started with {kind}, which parts the weights"): training_arguments(tmp_path, 1, 8, 1, 1e-3, 0, 1, 0, "cpu")
    with pytest.raises(BoigError, match=f"started with {kind}"): launch("no such model", told[:4], told[4:6], tmp_path, device="cpu")  # before it is looked for


def test_finished_training_called_again_gives_the_same_model(tok, told, tmp_path):
    first, _ = run(tok, told, tmp_path)
    again, _ = run(tok, told, tmp_path)
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_folder_goes_on_with_its_own_run_only(tok, told, plain, tmp_path):
    own = dict(steps=2, batch_size=4, eval_every=1, learning_rate=1e-3, device="cpu")
    def go(train=told[:8], valid=told[8:10], model=None, folder=tmp_path, **other):
        model = model or small(tok)
        finetune(model, tok, train, valid, folder, **own | other)
        return model.state_dict()
    first = go()
    def same(weights): return all(torch.equal(first[k], weights[k]) for k in first)
    for name, other in {"learning_rate": dict(learning_rate=1e-2), "seed": dict(seed=7), "steps": dict(steps=3), "warmup_ratio": dict(warmup_ratio=0.5), "eval_every": dict(eval_every=2),
                        "batch_size": dict(batch_size=2), "behaviour_weight": dict(behaviour_weight=0.5), "training set": dict(train=plain[:8]), "validation set": dict(valid=told[8:11]),
                        "model": dict(model=make_llama(tok, 32, 1)), "model ": dict(model=add_lora(small(tok), 2, "x"))}.items():
        with pytest.raises(BoigError, match=rf"holds a run with another {name.strip()} \(.*\)\. Train into another folder, or delete this one"): go(**other)
    assert same(go(accumulation=2, pack=300, max_length=4096))  # these change nothing but rounding
    (tmp_path/"plan.json").unlink()
    assert same(go(seed=7))  # an earlier version's folder has no plan
    (tmp_path/"new").mkdir()
    (tmp_path/"new"/"plan.json").write_text('{"steps": 99}')  # killed before the first checkpoint: nothing is held
    assert same(go(folder=tmp_path/"new")) and json.loads((tmp_path/"new"/"plan.json").read_text())["steps"] == 2


def test_a_base_is_known_by_name_wherever_it_lies(tok, told):
    data = GroupDataset(told[:2], tok)
    def plan(place):
        model = small(tok)
        model.config.name_or_path = place
        return module.what_is_learnt(model, data, data)
    assert plan("/here/llama") == plan("there/llama") != plan("/here/other")


class Spoil(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3: model.model.norm.weight.data *= -9


def test_a_moved_run_ends_in_its_best_weights(tok, told, tmp_path):
    def go(folder):
        model = small(tok)
        log = finetune(model, tok, told[:8], told[8:12], folder, steps=3, batch_size=4, eval_every=1, device="cpu", callbacks=(Spoil(),))
        return model.state_dict(), [l["eval_loss"] for l in log if "eval_loss" in l]
    first, losses = go(tmp_path/"run")
    best = 1 + losses.index(min(losses))
    assert best < 3 and (first["model.norm.weight"] > 0).all()
    shutil.move(tmp_path/"run", tmp_path/"moved")
    again, _ = go(tmp_path/"moved")
    assert all(torch.equal(first[k], again[k]) for k in first)
    shutil.rmtree(tmp_path/"moved"/f"checkpoint-{best}")
    with pytest.raises(BoigError, match=f"checkpoint-{best}, the best checkpoint of its run, is lost"): go(tmp_path/"moved")


def test_a_best_checkpoint_that_was_never_there_is_an_error(tok, told, tmp_path):
    model = small(tok)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(BoigError, match="No validation loss was a finite number"):
        finetune(model, tok, told[:8], told[8:10], tmp_path, steps=1, batch_size=4, eval_every=1, device="cpu")


# Processes

def test_two_processes_end_where_one_does(tok, told, tmp_path):
    "Gloo on the CPU, through accelerate; with packing and accumulation on top."
    save_llm(small(tok), tok, tmp_path/"base")
    options = dict(steps=4, batch_size=8, eval_every=2, learning_rate=1e-3, seed=1)
    one, _, log1 = launch(str(tmp_path/"base"), told[:21], told[21:25], tmp_path/"one", 1, device="cpu", **options)
    two, _, log2 = launch(str(tmp_path/"base"), told[:21], told[21:25], tmp_path/"two", 2, device="cpu", **options, accumulation=2, pack=300, checkpointing=True)
    one, two = one.state_dict(), two.state_dict()
    assert max((one[k] - two[k]).abs().max() for k in one) < 2e-5
    assert any(not torch.equal(one[k], v) for k, v in small(tok).state_dict().items())  # it did train
    for a, b in zip(*([l["loss"] for l in log if "loss" in l] for log in (log1, log2)), strict=True): assert abs(a - b) < 1e-3
    assert (tmp_path/"two"/"checkpoint-4"/"complete.json").is_file() and (tmp_path/"two"/"checkpoint-4"/"rng_state_1.pth").is_file()


def test_a_failure_in_another_process_is_told(tok, told, tmp_path):
    with pytest.raises(BoigError, match="Fine-tuning in 2 processes failed: A batch of 3 rows cannot be cut"):
        launch("pocket-llama", told[:4], told[4:6], tmp_path, 2, device="cpu", steps=1, batch_size=3, eval_every=1)
    with pytest.raises(BoigError, match=r"(?s)Traceback.*TypeError: .*launch\.log"):  # no word of ours, but the words that help
        launch("pocket-llama", told[:4], told[4:6], tmp_path, 2, device="cpu", steps=1, batch_size=2, eval_every=1, max_length=None)
    assert "TypeError" in (tmp_path/"launch.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only there can a process ask to be killed with its parent")
def test_a_killed_run_leaves_no_process_training(tok, told, tmp_path):
    save_llm(small(tok), tok, tmp_path/"base")
    parts = [[[vars(e) for e in g] for g in part] for part in (told[:8], told[8:10])]
    (tmp_path/"parts.json").write_text(json.dumps(parts))
    (tmp_path/"go.py").write_text(f"""import json
from boig.behaviour.finetune import launch
from boig.benches.instructions import Example
train, valid = ([[Example(**e) for e in g] for g in p] for p in json.load(open({str(tmp_path/"parts.json")!r})))
launch({str(tmp_path/"base")!r}, train, valid, {str(tmp_path/"run")!r}, 2, device="cpu", steps=3000, batch_size=4, eval_every=5)
""")
    def training(): return [p.pid for p in psutil.process_iter(["cmdline"]) if str(tmp_path/"run") in (p.info["cmdline"] or [])]
    def wait(done):
        end = time.time() + 60
        while not done() and time.time() < end: time.sleep(0.2)
        return done()
    ours = subprocess.Popen([sys.executable, str(tmp_path/"go.py")])
    try:
        assert wait(lambda: (tmp_path/"run"/"checkpoint-5"/"complete.json").exists()) and len(training()) == 3  # the launcher and two workers
        ours.kill()
        ours.wait()
        assert wait(lambda: not training())
    finally:
        ours.kill()
        for pid in training(): os.kill(pid, 9)


def test_what_several_processes_trained_comes_back_as_they_stored_it(tok, told, tmp_path, monkeypatch):
    "Bits and all: without their package, loading an adapter on a base of 4 bits is an error, and no silent float32."
    save_llm(small(tok), tok, tmp_path/"base")
    save_llm(add_lora(small(tok), 2, str(tmp_path/"base")), tok, tmp_path/"run"/"model")
    (tmp_path/"run"/"log.json").write_text("[]")
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BoigError, match="in 4 bits .QLoRA. need the package"): launch(str(tmp_path/"base"), told[:4], told[4:6], tmp_path/"run", 2, lora_rank=2, bits=4, device="cpu")
    assert launch(str(tmp_path/"base"), told[:4], told[4:6], tmp_path/"run", 2, lora_rank=2, device="cpu")[2] == []


# Ablations

@pytest.mark.parametrize("without, left", [((), {1, 2, 3, 4}), ((1,), {2, 3, 4}), ((3,), {1, 2, 4}), ((3, 4), {1, 2}), ((2, 3, 4), {1})])
def test_listings_can_be_left_out(bench, without, left):
    groups = examples_of(bench.head(40), EMOJIBENCH, True, 0, without=without)
    assert {e.listing for g in groups for e in g} == left and len(groups) == 40
    assert [verbalization_in(g[0]) for g in groups] == list(bench.verbalization[:40])  # the targets stay
    with pytest.raises(BoigError, match="cannot both be left out"): examples_of(bench.head(1), EMOJIBENCH, True, 0, without=(1, 2))


# Weights

def test_qlora_without_its_package_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BoigError, match="need the package bitsandbytes") as e: load_llm("pocket-llama", "cpu", bits=4)
    assert "\n" not in str(e.value)
    with pytest.raises(BoigError, match="in 4 or 8 bits"): load_llm("pocket-llama", "cpu", bits=3)


def test_models_answer_in_bfloat16_on_a_gpu_and_train_in_float32(told, tmp_path, monkeypatch):
    assert load_llm("pocket-llama", "cpu")[0].dtype == torch.float32 and load_llm("pocket-llama", "cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
        assert module._answering_dtype("cuda") == dtype and module._answering_dtype("cpu") == torch.float32
    asked = []
    def spy(*args):
        asked.extend(args)
        raise InterruptedError
    monkeypatch.setattr(module, "load_llm", spy)
    with pytest.raises(InterruptedError): launch("pocket-llama", told[:4], told[4:6], tmp_path)
    assert asked[3] == torch.float32


def test_an_adapter_remembers_the_bits_it_was_trained_on(tok, tmp_path, monkeypatch):
    "Later stages ask for no bits; they get the base as it was, or an error, and no silent float32."
    save_llm(small(tok), tok, tmp_path/"base")
    model, _ = load_llm(str(tmp_path/"base"), "cpu")
    save_llm(add_lora(model, 2, str(tmp_path/"base")), tok, tmp_path/"plain")
    model.boig_bits = 4  # as `load_llm` marks it
    save_llm(add_lora(model, 2, str(tmp_path/"base")), tok, tmp_path/"adapter")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for load in (load_llm, load_boig):
        with pytest.raises(BoigError, match="in 4 bits .QLoRA. need the package"): load(str(tmp_path/"adapter"), device="cpu")
    assert load_llm(str(tmp_path/"plain"), "cpu")[0].boig_bits == 0 and not (tmp_path/"plain"/"bits.json").exists()
    load_llm(str(tmp_path/"adapter"), "cpu", bits=0)  # if one insists


def test_gguf_weights_are_not_quantised_again(tmp_path):
    (tmp_path/"m.gguf").touch()
    with pytest.raises(BoigError, match="quantised already: set bits = 0"): load_llm(str(tmp_path/"m.gguf"), "cpu", bits=4)


def test_quantised_weights_need_an_adapter(tok):
    model = small(tok)
    model.is_quantized = True
    with pytest.raises(BoigError, match="set lora_rank"): add_lora(model, 0, "x")


def test_quantised_weights_are_checkpointed_in_a_way_that_several_processes_bear(tok, monkeypatch):
    given, model = {}, small(tok)
    model.is_quantized = True
    monkeypatch.setattr(module, "prepare_model_for_kbit_training", lambda model, **how: given.update(how) or model)
    monkeypatch.setattr(module, "get_peft_model", lambda model, config: SimpleNamespace(peft_config={"default": config}))
    assert add_lora(model, 2, "x").peft_config["default"].lora_alpha == 4
    assert given["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_a_llama_2_checkpoint_in_the_hubs_layout(tok, told, tmp_path):
    "Llama-2's class, its kind of configuration, sharded weights: tiny and random, through the loader of the 13B."
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok) + 5, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, hidden_act="silu",
                                 max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)).half().save_pretrained(tmp_path/"llama", max_shard_size="100KB")
    plain_tok = copy.deepcopy(tok)
    plain_tok.pad_token = None  # Llama-2's tokenizer has none
    plain_tok.save_pretrained(tmp_path/"llama")
    assert len(list((tmp_path/"llama").glob("*.safetensors"))) > 1
    model, tokenizer = load_llm(str(tmp_path/"llama"), "cpu")
    assert model.dtype == torch.float32 and type(model) is LlamaForCausalLM and tokenizer.pad_token_id == tokenizer.eos_token_id
    start = step_loss(model, told[:8], tokenizer).item()
    finetune(model, tokenizer, told[:8], told[8:12], tmp_path/"run", steps=6, batch_size=4, eval_every=6, learning_rate=3e-3, pack=2048, device="cpu")
    assert step_loss(model, told[:8], tokenizer).item() < start - 0.3
