"Fine-tuning, constrained generation and the controls of Table 1."
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from boig.behaviour.evaluate import ask, constant_answer, differences, pick_test_rows, score_answers, shuffled_kpis, spread, table1
from boig.behaviour.batches import PadGroups, encode_example, weighted_loss
from boig.behaviour.finetune import (add_lora, examples_of, finetune, fixed_texts, last_checkpoint, load_llm, make_llama, save_llm, train_tokenizer)
from boig.behaviour.generate import Constraint, SizedConstraints, answer_room, generate_answers, verbalization_grammar
from boig.benches.emojibench import build_benchmark
from boig.benches.instructions import EMOJIBENCH, Example, listing1
from boig.core import BoigError
from boig.data.verbalization import Verbalization, parse, problems
from boig.metrics.verbalization_metrics import METRICS


@pytest.fixture(scope="module")
def bench(): return build_benchmark(120)


@pytest.fixture(scope="module")
def groups(bench): return examples_of(bench, EMOJIBENCH, True, seed=0)


@pytest.fixture(scope="module")
def tok(groups): return train_tokenizer([t for g in groups for e in g for t in (e.prompt, e.answer)], fixed_texts(EMOJIBENCH), 700)


def small(tok, seed=0): return make_llama(tok, 32, 1, seed=seed)


def test_tokenizer_loses_nothing(tok):
    for text in ["plain", "naïve 🐙\n\ttabs", '{"a": [1, 2.5]}', "x" * 500, *fixed_texts(EMOJIBENCH)]:
        assert tok.decode(tok(text, add_special_tokens=False).input_ids) == text


def test_fixed_texts_are_one_token(tok):
    assert all(len(tok(f, add_special_tokens=False).input_ids) == 1 for f in fixed_texts(EMOJIBENCH))


def test_loss_is_on_the_answer_only(tok):
    "The model's loss equals a cross-entropy computed by hand over the answer's tokens."
    model = small(tok).eval()
    e = Example(1, 'captions: "a cat"', '{"objects": {"cat": [1, 2, 3, 4]}}')
    batch = PadGroups(tok.pad_token_id)([[encode_example(e, tok)], [encode_example(Example(1, "longer " * 9, "{}"), tok)]])
    prompt = 1 + len(tok(e.prompt, add_special_tokens=False).input_ids)
    ids = torch.tensor([encode_example(e, tok)["input_ids"]])
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
        by_hand = -torch.stack([logp[t - 1, ids[0, t]] for t in range(prompt, ids.shape[1])])
        other = [encode_example(Example(1, "longer " * 9, "{}"), tok)]
        ids2 = torch.tensor([other[0]["input_ids"]])
        start2 = sum(l == -100 for l in other[0]["labels"])
        logp2 = model(ids2).logits[0].log_softmax(-1)
        by_hand2 = -torch.stack([logp2[t - 1, ids2[0, t]] for t in range(start2, ids2.shape[1])])
        loss = weighted_loss(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"], batch["weights"]) / batch["items"].sum()
    torch.testing.assert_close(loss, torch.cat([by_hand, by_hand2]).mean(), rtol=1e-5, atol=1e-6)


def test_too_long_is_an_error(tok):
    with pytest.raises(BoigError, match="more than max_length = 10"): encode_example(Example(1, "1 " * 40, "{}"), tok, 10)


class Watch(TrainerCallback):
    "Counts steps and keeps the verbalisation targets of each."
    def __init__(self): self.steps = 0
    def on_step_end(self, args, state, control, **kw): self.steps = state.global_step


def test_twins_take_the_same_steps_on_the_same_targets(bench, tok, tmp_path, monkeypatch):
    seen = {}
    for b in (True, False):
        g, order = examples_of(bench, EMOJIBENCH, b, seed=0), []
        real = PadGroups.__call__
        def spy(self, rows, real=real, order=order):
            batch = real(self, rows)
            labels = [[t for t in r[0]["labels"] if t >= 0] for r in rows]
            order.append([tok.decode(l).replace("</s>", "").rstrip("}").split(', "exact')[0].rstrip("}") for l in labels])
            return batch
        monkeypatch.setattr(PadGroups, "__call__", spy)
        watch = Watch()
        finetune(small(tok), tok, g[:80], g[80:90], tmp_path/str(b), steps=7, batch_size=8, eval_every=7, device="cpu", callbacks=(watch,))
        monkeypatch.setattr(PadGroups, "__call__", real)
        assert watch.steps == 7
        seen[b] = order
    assert seen[True] == seen[False]


def test_interrupted_training_ends_in_the_same_weights(groups, tok, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 5: raise KeyboardInterrupt
    def run(folder, *callbacks):
        m = small(tok)
        finetune(m, tok, groups[:60], groups[60:70], folder, steps=8, batch_size=8, eval_every=2, device="cpu", callbacks=callbacks)
        return m.state_dict()
    whole = run(tmp_path/"a")
    with pytest.raises(KeyboardInterrupt): run(tmp_path/"b", Stop())
    half = tmp_path/"b"/"checkpoint-6"
    half.mkdir()  # as if the machine had died while writing it
    (half/"model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path/"b").name == "checkpoint-4" and not half.exists()
    resumed = run(tmp_path/"b")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_best_checkpoint_is_kept(groups, tok, tmp_path):
    m = small(tok)
    log = finetune(m, tok, groups[:8], groups[60:80], tmp_path, steps=120, batch_size=8, learning_rate=2e-2, eval_every=10, device="cpu")
    losses = [l["eval_loss"] for l in log if "eval_loss" in l]
    m.eval()
    b = PadGroups(tok.pad_token_id)([[encode_example(g[0], tok)] for g in groups[60:80]])  # by hand: all tokens at once
    with torch.no_grad(): loss = (weighted_loss(m(b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"], b["weights"]) / b["items"].sum()).item()
    assert abs(loss - min(losses)) < 1e-3 and losses[-1] > min(losses)  # it did overfit, and the best was put back


def test_lora_trains_few_and_saves_an_adapter(groups, tok, tmp_path):
    small(tok).save_pretrained(tmp_path/"base")
    tok.save_pretrained(tmp_path/"base")
    m = add_lora(load_llm(str(tmp_path/"base"), "cpu")[0], 2, str(tmp_path/"base"))
    before = copy.deepcopy(m.state_dict())
    finetune(m, tok, groups[:16], groups[16:20], tmp_path/"run", steps=2, batch_size=4, eval_every=2, device="cpu")
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all("lora" in k for k in changed)
    save_llm(m, tok, tmp_path/"adapter")
    again, _ = load_llm(str(tmp_path/"adapter"), "cpu")
    x = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.eval()(x).logits, m.eval()(x).logits)


def test_a_vocabulary_padded_beyond_the_tokenizer(groups, tok):
    "Many checkpoints have more embeddings than tokens."
    model = small(tok)
    model.resize_token_embeddings(len(tok) + 61)
    bigger = Constraint(verbalization_grammar((64, 64), 1), tok, model.config.vocab_size)
    assert all(parse(t).clean for t in generate_answers(model, tok, [g[0].prompt for g in groups[:4]], bigger))


def test_a_llama_checkpoint_in_the_hubs_layout(groups, tok, tmp_path):
    "What `meta-llama/Llama-2-13b-hf` goes through, with a tiny random model of the same class."
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=4)).save_pretrained(tmp_path/"llama")
    tok.save_pretrained(tmp_path/"llama")
    model, tokenizer = load_llm(str(tmp_path/"llama"), device="cpu")
    finetune(model, tokenizer, groups[:8], groups[8:12], tmp_path/"run", steps=1, batch_size=4, eval_every=1, device="cpu")
    assert parse(ask(model, tokenizer, build_benchmark(30).head(1), EMOJIBENCH, True, most_objects=1)[0]).clean


@pytest.fixture(scope="module")
def constraint(tok): return Constraint(verbalization_grammar((64, 64), 3), tok)


def test_grammar_takes_all_of_emojibench(tok, constraint):
    assert all(constraint.accepts(v, tok) for v in build_benchmark().verbalization)


@pytest.mark.parametrize("old, new", [
    ("0.82", "0.8"), ("0.82", "0.83"), ('"Black"', '"Red"'), ('"Black"', '"Blurple"'), ('"Black": {"coverage": 0.18}', '"Black": {"coverage": 0.09}, "White": {"coverage": 0.09}'),
    ('"cool": 0', '"cool": 0.01'), ('"warm"', '"hot"'), ("[10, 10, 54, 53]", "[54, 10, 10, 53]"), ("[10, 10, 54, 53]", "[10, 53, 54, 53]"),
    ("[10, 10, 54, 53]", "[10, 10, 65, 53]"), ("[10, 10, 54, 53]", "[10, 10, 54]"), ("red heart", ""), ("red heart", " red heart"), ("}}", "}")])
def test_grammar_refuses_what_breaks_the_schema(tok, constraint, old, new):
    right = '{"color and tones": {"colors": {"Red": {"coverage": 0.82}, "Black": {"coverage": 0.18}}, "tones": {"warm": 0.83, "neutral": 0.17, "cool": 0}}, "objects": {"red heart": [10, 10, 54, 53]}}'
    assert constraint.accepts(right, tok) and old in right
    assert not constraint.accepts(right.replace(old, new), tok)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_untrained_models_write_valid_answers(groups, tok, constraint, temperature):
    torch.manual_seed(0)
    texts = generate_answers(small(tok, seed=5), tok, [g[0].prompt for g in groups[:24]], constraint, batch_size=7, temperature=temperature)
    if temperature: assert len(set(texts)) == len(texts)  # it does sample
    for t in texts: assert parse(t).value is not None and problems(parse(t).value, (64, 64)) == []


def test_batches_do_not_change_answers(groups, tok, constraint):
    model, prompts = small(tok, seed=2), [g[0].prompt for g in groups[:9]]
    assert generate_answers(model, tok, prompts, constraint, batch_size=9) == generate_answers(model, tok, prompts, constraint, batch_size=2)


@pytest.mark.parametrize("lora", [False, True])
def test_a_models_own_settings_change_no_answer(groups, tok, constraint, lora):
    "As Qwen2.5-Instruct brings them, and worse."
    model, prompts = small(tok, seed=2), [g[0].prompt for g in groups[:3]]
    if lora: model = add_lora(model, 2, "x")
    own = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.1, top_k=2, min_p=0.5, repetition_penalty=5.0, no_repeat_ngram_size=2, num_beams=2, suppress_tokens=[5, 6, 7], min_new_tokens=30)
    def answers():
        torch.manual_seed(0)
        return [generate_answers(model, tok, prompts, c, max_new_tokens=n, temperature=t) for c, n in ((None, 20), (constraint, 400)) for t in (0.0, 1.5)]
    plain = answers()
    (model.get_base_model() if lora else model).generation_config = own
    assert answers() == plain and model.generation_config is own
    ids = torch.tensor([tok(prompts[0]).input_ids])
    greedy = list(ids[0])  # token by token
    with torch.no_grad():
        while len(greedy) < ids.shape[1] + 20 and greedy[-1] != tok.eos_token_id: greedy.append(model(torch.tensor([greedy])).logits[0, -1].argmax())
    assert generate_answers(model, tok, prompts[:1], max_new_tokens=20) == [tok.decode(greedy[ids.shape[1]:], skip_special_tokens=True)]


def sentencepiece(texts, legacy):
    "As Llama-2's tokenizer, of either kind: a text begins with a blank, which decoding takes away."
    bytes_, bpe = [f"<0x{i:02X}>" for i in range(256)], Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy: bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else: bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=450, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_begins_an_answer_with_a_blank(groups, bench, legacy):
    tok = sentencepiece(bench.verbalization, legacy)
    said = encode_example(groups[0][0], tok)
    first = next(t for t in said["labels"] if t >= 0)
    assert tok.convert_ids_to_tokens(first).startswith("▁")
    constraint = Constraint(verbalization_grammar((64, 64), 3), tok)
    assert constraint.matcher().try_consume_tokens([first]) == 1  # decoding may begin as training did
    assert all(constraint.accepts(v, tok) for v in bench.verbalization) and not constraint.accepts("  " + bench.verbalization[0], tok)
    assert not constraint.accepts(bench.verbalization[0].replace('"warm"', '"hot"'), tok)
    texts = generate_answers(make_llama(tok, 32, 1), tok, [g[0].prompt for g in groups[:3]], constraint)
    assert all(parse(t).value is not None and problems(parse(t).value, (64, 64)) == [] for t in texts)


def test_byte_level_tokens_get_no_blank(bench, tok, constraint):
    assert constraint.matcher().try_consume_tokens(tok(" ", add_special_tokens=False).input_ids) == 0 and not constraint.accepts(" " + bench.verbalization[0], tok)


@pytest.mark.parametrize("size", [(5, 12), (10, 10), (64, 64), (13, 120), (1200, 675), (5760, 3840), (99999, 10000)], ids=str)
def test_boxes_lie_within_pictures_of_any_size(tok, size):
    "Corners that differ in their first, their last or no digit, or in how many they have: allowed if and only if they make a box inside the picture."
    constraint, rng = Constraint(verbalization_grammar(size, 1), tok), np.random.default_rng(0)
    right = '{"color and tones": {"colors": {"Red": {"coverage": 1.0}}, "tones": {"warm": 1.0, "neutral": 0, "cool": 0}}, "objects": {"cat": [BOX]}}'
    def corners(side):
        some = [0, 1, 9, 10, 11, 19, 20, 21, side // 3, side // 3 + 1, side // 2, side - 10, side - 1, side, side + 1, *rng.integers(0, side, 6)]
        return [int(v) for v in some if 0 <= v <= side + 1]
    found = []
    for k in range(400):
        (x1, x2), (y1, y2) = (rng.choice(corners(side), 2) for side in size)
        if k % 2: (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
        found.append(0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1])
        assert constraint.accepts(right.replace("BOX", f"{x1}, {y1}, {x2}, {y2}"), tok) == found[-1], (x1, y1, x2, y2)
    assert 40 < sum(found) < 360
    for wrong in ("00, 1, 3, 4", "1, 01, 3, 4", "1, 1, -3, 4", "1, 1, 3.0, 4", "1, 1, 3, ", "1, 1, 3"): assert not constraint.accepts(right.replace("BOX", wrong), tok)

@pytest.mark.parametrize("size", [(1, 2), (10, 20), (64, 64), (101, 99), (1200, 675)], ids=str)
def test_no_corner_leads_nowhere(tok, size):
    "After 1, 19, 50 no second corner begins with a 1, for none of 10 to 19 lies below 19: who types only what is allowed always comes to an end."
    constraint = Constraint(verbalization_grammar(size, 1), tok)
    begun = tok('{"color and tones": {"colors": {"Red": {"coverage": 1.0}}, "tones": {"warm": 1.0, "neutral": 0, "cool": 0}}, "objects": {"cat": [', add_special_tokens=False).input_ids
    for seed in range(150):
        rng, m, typed, mask = np.random.default_rng(seed), constraint.matcher(), list(begun), allocate_token_bitmask(1, len(tok))
        assert m.try_consume_tokens(typed) == len(typed)
        while not m.is_stopped():
            fill_next_token_bitmask(m, mask, 0)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8)[0], bitorder="little")[:len(tok)])
            assert len(allowed), tok.decode(typed)
            typed.append(int(rng.choice(allowed))); m.consume_token(typed[-1])
        assert problems(parse(tok.decode(typed, skip_special_tokens=True)).value, size) == []

@pytest.mark.parametrize("size", [(0, 5), (5, 100_000)])
def test_no_picture_is_so_large(size):
    with pytest.raises(BoigError, match="1 to 99,999 pixels a side"): verbalization_grammar(size)

def test_each_answer_fits_its_own_picture(bench, groups, tok):
    "Pictures of several sizes in one batch: as each would be answered alone."
    rows, sizes = bench.head(6), [(64, 64), (1200, 675), (3, 2)] * 2
    rows = rows.assign(**{"image resolution": [str(s) for s in sizes]})
    model = small(tok, seed=5)
    answers = ask(model, tok, rows, EMOJIBENCH, True, most_objects=2)
    for a, s in zip(answers, sizes): assert parse(a).value is not None and problems(parse(a).value, s) == []
    alone = [generate_answers(model, tok, [listing1(EMOJIBENCH, r)], Constraint(verbalization_grammar(s, 2), tok))[0] for (_, r), s in zip(rows.iterrows(), sizes)]
    assert answers == alone

def test_many_sizes_are_compiled_once_while_they_are_needed(tok, monkeypatch):
    made = []
    monkeypatch.setattr("boig.behaviour.generate.verbalization_grammar", lambda size, most: made.append(size) or verbalization_grammar(size, most))
    sized = SizedConstraints([(60, 50), (70, 50), (60, 50)], 1, tok)
    assert sized[0] is sized[2] and sized[1].tokenizer is sized[0].tokenizer and made == [(60, 50), (70, 50)]


class Writes:
    "A model that writes one text, as far as it may."
    device, generation_config = "cpu", None
    def __init__(self, ids): self.ids = ids
    def eval(self): return self
    def generate(self, input_ids, max_new_tokens, **_): return torch.cat([input_ids, torch.tensor([self.ids[:max_new_tokens]] * len(input_ids))], 1)


def test_there_is_room_for_the_longest_true_answer(tok):
    "Four objects with real pictures' boxes, as Listing 1 has them, are more than 200 tokens."
    truth = Verbalization({"Gray": 0.6, "Black": 0.4}, {"warm": 0, "neutral": 1.0, "cool": 0}, {n: (1892.94, 11.18, 4260.09, 3824.34) for n in ("woman in jeans", "safety vest", "white shirt", "helmet of a worker")}).to_json()
    writes, room = Writes(tok(truth, add_special_tokens=False).input_ids + [tok.eos_token_id]), answer_room(tok, ["{}", truth])
    assert len(writes.ids) > 200 and room >= len(writes.ids)
    assert [parse(generate_answers(writes, tok, ["?"], max_new_tokens=n)[0]).clean for n in (200, room)] == [False, True]


def test_picking_rows_spreads_over_buckets_and_ranks(bench):
    rows = pick_test_rows(bench, 10)
    assert len(rows) == 10 and rows.bucket.value_counts().max() == 4 and rows.hexcode.is_unique
    every = pick_test_rows(bench)
    assert rows.uses.min() == every.uses.min() and rows.uses.max() == every.uses.max()
    assert len(pick_test_rows(bench, 10_000)) == len(every)
    for n in range(1, len(bench) + 3): assert len(spread(bench, n)) == min(n, len(bench)) and spread(bench, n).hexcode.is_unique
    assert spread(bench, 0) is bench and [*spread(bench, 2).index] == [bench.index[0], bench.index[-1]]


def test_constant_answer_is_the_best_prefix_of_common_colours():
    pictures = [parse(v).value for v in build_benchmark(120).verbalization]
    c = constant_answer(pictures)
    assert problems(c, (64, 64)) == []
    def iou(names): return np.mean([len(set(names) & set(v.colors)) / len(set(names) | set(v.colors)) for v in pictures])
    assert iou(c.colors) >= max(iou(v.colors) for v in [constant_answer([p]) for p in pictures[:5]])


def test_shuffling_moves_every_value():
    rows = pd.DataFrame({"uses": range(57)})
    mixed = shuffled_kpis(rows, ["uses"], 3)
    assert sorted(mixed.uses) == list(range(57)) and (mixed.uses != rows.uses).all()


def test_table1_means_and_counts(bench):
    rows = pick_test_rows(bench)
    scores = score_answers(rows, [v if i % 2 else "no idea" for i, v in enumerate(rows.verbalization)])
    table = table1({"half": ("No", scores)}, resamples=50)
    every = table[table.KPI == "All"].iloc[0]
    assert every.n == len(rows) and every.unreadable == (len(rows) + 1) // 2 and every["Objects IOU"] == 1 and every["Objects IOU n"] == len(rows) // 2
    assert set(table.KPI) == {"High", "Medium", "Low", "All"}
    by_hand = np.nanmean(scores["Colours Cosine Similarity"])
    assert abs(every["Colours Cosine Similarity"] - by_hand) < 1e-12


def test_differences_have_the_right_sign(bench):
    rows = pick_test_rows(bench)
    good, bad = score_answers(rows, list(rows.verbalization)), score_answers(rows, list(rows.verbalization)[1:] + list(rows.verbalization)[:1])
    d = differences(good, bad, 200).set_index(["KPI", "Metric"]).loc["All"]
    assert d.loc["Colours IOU", "verdict"] == "better" and d.loc["Colours Coverage RMSE", "gain"] > 0
    assert d.loc["Objects Normalised Area RMSE", "verdict"] in ("not measurable", "better")
    assert differences(bad, good, 200).set_index(["KPI", "Metric"]).loc[("All", "Colours IOU"), "verdict"] == "worse"


def test_rows_of_a_subgroup_are_drawn_together():
    "Scores that are constant within six subgroups say less than those of as many single rows: the intervals are wider by about √10."
    rng, few = np.random.default_rng(0), np.repeat(np.arange(6), 10)
    scores = pd.DataFrame(np.repeat(rng.random((6, 1)), 10, 0) * np.ones(9), columns=list(METRICS)).assign(bucket="high", group=few, readable=True, clean=True)
    none = scores.assign(**{m: 0.0 for m in METRICS})
    for interval_of, end in ((lambda s: table1({"model": ("No", s)}, 500), "Objects IOU "), (lambda s: differences(s, none, 500), "")):
        together, alone = (t[f"{end}high"][0] - t[f"{end}low"][0] for t in (interval_of(scores.assign(group=g)) for g in (few, np.arange(60))))
        assert together > 2 * alone
