"In-context baselines: the shots, the shared beginning against reading everything, and a server of ours that does what servers do."
import copy
import json
import logging
import math
import random
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig, MistralConfig
from transformers.cache_utils import Cache

from boig.behaviour.evaluate import score_answers, table1
from boig.behaviour.batches import encode_example, encode_prompt
from boig.behaviour.finetune import load_llm
from boig.behaviour.generate import Constraint, generate_answers, verbalization_grammar
from boig.behaviour.incontext import (Budget, NotRun, Price, Server, ServerConfig, SharedStart, answer_by_server, answer_locally, answers_table, check_room, choose_shots,
                                      common_length, conversation, encode, estimate, read_prices, table1_shots)
from boig.benches.emojibench import build_benchmark
from boig.benches.instructions import EMOJIBENCH, Example, listing1
from boig.core import BoigError
from boig.data.verbalization import parse, problems
from boig.metrics.verbalization_metrics import METRICS


@pytest.fixture(scope="module")
def bench(): return build_benchmark(120)


@pytest.fixture(scope="module")
def pocket(): return load_llm("pocket-llama", "cpu")


@pytest.fixture(scope="module")
def talks(bench):
    "Six conversations of three shots."
    return [conversation(EMOJIBENCH, choose_shots(bench, 3), r) for _, r in bench[bench.split == "test"].head(6).iterrows()]


# --- Shots -----------------------------------------------------------------------------------------------------------------------------------------------

def test_shots_are_even_seeded_and_nested(bench):
    for k in (0, 1, 3, 4, 5, 9):
        shots = choose_shots(bench, k)
        counts = shots.bucket.value_counts().reindex(["high", "medium", "low"], fill_value=0)
        assert len(shots) == len(set(shots.id)) == k and (shots.split == "train").all() and counts.max() - counts.min() <= 1
        assert list(shots.id) == list(choose_shots(bench, 9).id[:k])
    assert list(choose_shots(bench, 5).id) == list(choose_shots(bench, 5).id) != list(choose_shots(bench, 5, seed=7).id)
    assert len({tuple(choose_shots(bench, 3, seed=s).bucket) for s in range(20)}) > 1  # the last shot is of no particular bucket


def test_shots_are_never_of_a_test_rows_subgroup():
    table = pd.DataFrame({"id": range(40), "split": ["train"] * 30 + ["test"] * 10, "subgroup": [i % 10 for i in range(30)] + [i % 7 for i in range(10)], "bucket": "high", "verbalization": "{}"})
    assert set(choose_shots(table, 9).subgroup) == {7, 8, 9}
    with pytest.raises(BoigError, match="10 shots were asked for; 9 training rows"): choose_shots(table, 10)
    with pytest.raises(BoigError, match="-1 shots"): choose_shots(table, -1)
    with pytest.raises(BoigError, match="column subgroup"): choose_shots(table.drop(columns="subgroup"))


def test_conversation_and_its_tokens(bench, pocket):
    tok, shots, row = pocket[1], choose_shots(bench, 2), bench[bench.split == "test"].iloc[0]
    talk = conversation(EMOJIBENCH, shots, row)
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2 + ["user"]
    assert [m["content"] for m in talk] == [listing1(EMOJIBENCH, shots.iloc[0]), shots.verbalization[0], listing1(EMOJIBENCH, shots.iloc[1]), shots.verbalization[1], listing1(EMOJIBENCH, row)]
    assert f'number of uses: "{shots.uses[0]}"' in talk[0]["content"] and "uses" not in conversation(EMOJIBENCH.told(False), shots, row)[0]["content"]
    want = [i for q, a in ((talk[0], talk[1]), (talk[2], talk[3])) for i in encode_example(Example(1, q["content"], a["content"]), tok)["input_ids"]]
    assert encode(talk, tok) == want + encode_prompt(talk[-1]["content"], tok)


def test_a_chat_template_is_used(bench):
    "By hand, for a tokenizer of its own."
    _, tok = load_llm("pocket-llama", "cpu")
    tok.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "{}"}, {"role": "user", "content": "And this?"}]
    assert encode(talk, tok) == tok("[user] What?\n[assistant] {}\n[user] And this?\n[assistant] ", add_special_tokens=False).input_ids


def test_no_room_is_an_error(pocket, talks):
    ids = [encode(t, pocket[1]) for t in talks]
    longest = max(map(len, ids))
    check_room(ids, longest + 50, 50); check_room(ids, None, 50); check_room([], 50, 50)
    with pytest.raises(NotRun, match=f"has {longest} tokens and its answer up to 50.*Show fewer shots"): check_room(ids, longest + 49, 50)
    with pytest.raises(BoigError, match="more than the model's 2048"): answer_locally(*pocket, ids, max_new_tokens=2000)


# --- The shared beginning --------------------------------------------------------------------------------------------------------------------------------

def test_common_length_against_trying_all():
    rng = random.Random(0)
    for _ in range(300):
        ids = [[rng.randint(0, 1) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
        want = max(n for n in range(min(map(len, ids))) if len({tuple(i[:n]) for i in ids}) == 1)
        assert common_length(ids) == want
    assert common_length([]) == 0 and common_length([[5, 6, 7]]) == 2 and common_length([[5, 6], [5, 6]]) == 1


def tiny(kind, size, seed=0, **more):
    torch.manual_seed(seed)
    shape = dict(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3)
    if kind is GPT2Config: shape = dict(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(kind(**shape, **more)).eval()


def counted(model):
    "A model with a count of what it reads: rows × tokens of each pass."
    log = []
    hook = model.register_forward_pre_hook(lambda m, a, kw: log.append(kw["input_ids"].numel()), with_kwargs=True)
    return log, hook


@pytest.mark.parametrize("kind, more", [(None, {}), (LlamaConfig, {}), (GPT2Config, {}), (MistralConfig, {"sliding_window": None}), (MistralConfig, {"sliding_window": 16})])
def test_sharing_changes_no_answer(pocket, talks, kind, more):
    "Free answers, in batches of one, some and all; attention of 16 tokens shares nothing, and stays right."
    model, tok = pocket
    if kind: model = tiny(kind, len(tok), **more)
    ids = [encode(t, tok) for t in talks]
    plain = answer_locally(model, tok, ids, batch_size=1, max_new_tokens=12, share=False)
    assert plain.prompt_tokens.tolist() == [len(i) for i in ids] and plain.answer_tokens.between(1, 12).all() and plain.answer.nunique() > 1
    with torch.no_grad():  # the first: token by token, everything read each time
        full = list(ids[0])
        while len(full) < len(ids[0]) + 12 and full[-1] != tok.eos_token_id: full.append(model(torch.tensor([full])).logits[0, -1].argmax().item())
    assert tok.decode(full[len(ids[0]):], skip_special_tokens=True) == plain.answer[0]
    for size in (1, 4, 16): pd.testing.assert_frame_equal(answer_locally(model, tok, ids, batch_size=size, max_new_tokens=12), plain)


def test_a_models_own_settings_change_no_answer(pocket, talks):
    tok, ids = pocket[1], [encode(t, pocket[1]) for t in talks[:2]]
    model = tiny(LlamaConfig, len(tok))
    plain = answer_locally(model, tok, ids, max_new_tokens=12)
    model.generation_config = own = GenerationConfig(do_sample=True, top_p=0.5, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2)
    pd.testing.assert_frame_equal(answer_locally(model, tok, ids, max_new_tokens=12), plain)
    assert model.generation_config is own


def test_only_once_means_once(pocket, talks):
    model, tok = pocket
    ids = [encode(t, tok) for t in talks]
    P, n = common_length(ids), [len(i) for i in ids]
    log, hook = counted(model)
    answer_locally(model, tok, ids, batch_size=1, max_new_tokens=1)
    shared, log[:] = sum(log), []
    answer_locally(model, tok, ids, batch_size=1, max_new_tokens=1, share=False)
    hook.remove()
    assert shared == P + sum(n) - len(n) * P and sum(log) == sum(n) and P > 0.7 * max(n)


def test_logits_behind_a_shared_start(pocket, talks):
    "Two passes behind the beginning, with padding in the middle, against one pass over everything."
    model, tok = copy.deepcopy(pocket[0]).double(), pocket[1]
    ids = sorted((encode(t, tok) for t in talks), key=len)[::5]
    P, width = common_length(ids), max(map(len, ids))
    assert len(ids[0]) < width
    with torch.no_grad():
        start = model(torch.tensor([ids[0][:P]]), use_cache=True).past_key_values
        before = [l.keys.clone() for l in start.layers]
        cache, more = Cache(layers=[SharedStart(l) for l in start.layers]), torch.tensor([[7], [8]])
        mask = torch.tensor([[1] * P + [0] * (width - len(i)) + [1] * (len(i) - P) for i in ids])
        rest = torch.tensor([[0] * (width - len(i)) + i[P:] for i in ids])
        where = mask.cumsum(1) - 1
        one = model(rest, attention_mask=mask, position_ids=where[:, P:], past_key_values=cache).logits[:, -1]
        two = model(more, attention_mask=torch.cat([mask, mask[:, -1:]], 1), position_ids=where[:, -1:] + 1, past_key_values=cache).logits[:, -1]
        for i, x in enumerate(ids):
            whole = model(torch.tensor([x + more[i].tolist()])).logits[0]
            torch.testing.assert_close(one[i], whole[-2], rtol=0, atol=1e-8)
            torch.testing.assert_close(two[i], whole[-1], rtol=0, atol=1e-8)
    assert cache.get_seq_length() == width + 1 and all(torch.equal(a, l.keys) for a, l in zip(before, start.layers))


def test_constrained_answers_obey_and_equal_the_known_way(pocket, bench):
    "Without shots this is `generate_answers`."
    rows = bench[bench.split == "test"].head(3)
    grammar = Constraint(verbalization_grammar((64, 64), 1), pocket[1], pocket[0].config.vocab_size)
    got = answer_locally(*pocket, [encode(conversation(EMOJIBENCH, rows[:0], r), pocket[1]) for _, r in rows.iterrows()], grammar)
    assert list(got.answer) == generate_answers(*pocket, [listing1(EMOJIBENCH, r) for _, r in rows.iterrows()], grammar)
    shown = answer_locally(*pocket, [encode(conversation(EMOJIBENCH, choose_shots(bench, 3), r), pocket[1]) for _, r in rows.iterrows()], grammar)
    assert all(not problems(parse(a).value, (64, 64)) for a in shown.answer)


def test_nothing_to_ask(pocket): assert len(answer_locally(*pocket, [])) == 0


# --- A server --------------------------------------------------------------------------------------------------------------------------------------------

KEY = "sk-very/secret+key-0123456789"
SAID = '{"color and tones": {"colors": {"Red": {"coverage": 1.0}}, "tones": {"warm": 1.0, "neutral": 0, "cool": 0}}, "objects": {"cat": [1, 2, 3, 4]}}'
PRICE = Price(2.0, 10.0)
CONFIG = ServerConfig("some-model", max_tokens=100, timeout=5, tries=4, first_wait=1.0, longest_wait=3.0)


def good(answer=SAID, usage=(900, 60), **more):
    usage = {} if usage is None else {"usage": dict(zip(("prompt_tokens", "completion_tokens"), usage))}
    return 200, {}, json.dumps({"model": "some-model-0613", "choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]} | usage | more)


class Speaks:
    "A server on this machine: plays its script, then answers well. An entry is (status, headers, text) or (…, seconds to wait first)."
    def __init__(self, *script):
        self.script, self.seen = list(script), []
        class Handler(BaseHTTPRequestHandler):
            def log_message(handler, *args): pass
            def do_POST(handler):
                self.seen.append((handler.path, dict(handler.headers), json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))))
                status, headers, text, *wait = self.script.pop(0) if self.script else good()
                time.sleep(sum(wait))
                try:
                    handler.send_response(status)
                    for name, value in headers.items(): handler.send_header(name, value)
                    handler.end_headers(); handler.wfile.write(text.encode())
                except OSError: pass  # the client has gone
        self.web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.web.server_port}/v1"

    def close(self): self.web.shutdown(); self.web.server_close()


@pytest.fixture
def speaks(monkeypatch):
    "Starts servers and points the environment at the last."
    running = []
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    def start(*script):
        running.append(Speaks(*script))
        monkeypatch.setenv("OPENAI_BASE_URL", running[-1].url)
        return running[-1]
    yield start
    for s in running: s.close()


def talk(words="Describe it."): return [{"role": "user", "content": words}]


def connect(folder, config=CONFIG, price=PRICE, budget=1.0, waits=None): return Server(config, folder, price, Budget(budget), sleep=(waits if waits is not None else []).append)


def test_success(speaks, tmp_path):
    web = speaks()
    server = connect(tmp_path)
    status, table = answer_by_server(server, [talk("one"), talk("two"), talk("one")])
    assert status == "done" and table.answer.tolist() == [SAID] * 3 and table.prompt_tokens.tolist() == [900] * 3 and table.answer_tokens.tolist() == [60] * 3
    assert table.cost.tolist() == pytest.approx([(900 * 2 + 60 * 10) / 1e6] * 3) and len(web.seen) == 2  # the same question once
    assert server.budget.spent == pytest.approx(2 * 0.0024)
    path, headers, body = web.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "some-model", "messages": talk("one"), "max_tokens": 100, "temperature": 0.0}


def test_settings_reach_the_request(speaks, tmp_path):
    web = speaks()
    answer_by_server(connect(tmp_path, ServerConfig("o", max_tokens=7, limit_field="max_completion_tokens", temperature=None)), [talk()])
    assert web.seen[0][2] == {"model": "o", "messages": talk(), "max_completion_tokens": 7}


@pytest.mark.parametrize("trouble, least, most", [
    ((429, {"Retry-After": "7"}, "slow down"), 7, 8), ((429, {}, ""), 0.5, 1), ((500, {}, "oops"), 0.5, 1), ((503, {"Retry-After": "soon"}, ""), 0.5, 1),
    ((200, {}, '{"choices": [{"mess'), 0.5, 1), ((200, {}, '{"choices": []}'), 0.5, 1), ((200, {}, "[" * 100_000), 0.5, 1), ((200, {}, '"text"'), 0.5, 1), (good(answer=["no", "text"]), 0.5, 1)])
def test_trouble_then_success(speaks, tmp_path, trouble, least, most):
    web, waits = speaks(trouble), []
    status, table = answer_by_server(connect(tmp_path, waits=waits), [talk()])
    assert status == "done" and table.answer[0] == SAID and len(web.seen) == 2 and len(waits) == 1 and least <= waits[0] <= most


def test_waits_grow_and_are_never_alike(speaks, tmp_path):
    speaks(*[(502, {}, "")] * 40)
    waits = []
    status, table = answer_by_server(connect(tmp_path, waits=waits), [talk()])
    assert status == "not run: it does not answer after 4 tries (status 502); 0 of 1 answers are kept" and len(table) == 0
    assert len(waits) == 3 and all(top / 2 <= w <= top for w, top in zip(waits, (1, 2, 3))) and not list(tmp_path.iterdir())
    again = []
    answer_by_server(connect(tmp_path, waits=again), [talk()])
    assert again != waits


def test_retry_after_as_a_date_and_beyond_patience(speaks, tmp_path):
    soon, waits = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True), []
    speaks((429, {"Retry-After": soon}, ""))
    assert answer_by_server(connect(tmp_path, waits=waits), [talk()])[0] == "done" and 80 < waits[0] < 92
    web = speaks((429, {"Retry-After": "86400"}, ""))
    assert "left alone for 86400 s" in answer_by_server(connect(tmp_path, waits=waits), [talk("more")])[0] and len(web.seen) == len(waits) == 1


def test_time_out(speaks, tmp_path):
    "Its cost is not known, so it counts in full."
    web = speaks((*good(), 0.6))
    server = connect(tmp_path, ServerConfig("some-model", max_tokens=100, timeout=0.2, tries=2))
    status, table = answer_by_server(server, [talk()])
    assert status == "done" and len(web.seen) == 2
    assert server.budget.spent == pytest.approx(table.cost[0] + server.cost(server.request(talk())))


def test_nobody_there_costs_nothing(speaks, tmp_path):
    speaks().close()
    server = connect(tmp_path)
    assert "not run: it does not answer after 4 tries (ConnectError)" in answer_by_server(server, [talk()])[0] and server.budget.spent == 0


@pytest.mark.parametrize("status, text", [(400, "maximum context length is 4097 tokens"), (401, "Incorrect API key provided"), (404, "no such model"), (302, "moved"),
                                          (429, '{"error": {"code": "insufficient_quota"}}')])
def test_refusals_are_final(speaks, tmp_path, status, text):
    web, waits = speaks((status, {"Location": "http://127.0.0.1:9/elsewhere"}, text)), []
    said, table = answer_by_server(connect(tmp_path, waits=waits), [talk(), talk("2")])
    assert said == f"not run: it refuses, {status}: {text}; 0 of 2 answers are kept" and len(table) == 0 and len(web.seen) == 1 and not waits


def test_an_empty_answer_is_an_answer(speaks, tmp_path):
    speaks(good(answer=None))
    status, table = answer_by_server(connect(tmp_path), [talk()])
    assert status == "done" and table.answer.tolist() == [""] and parse("").value is None


def test_uncounted_tokens_cost_the_most(speaks, tmp_path):
    speaks(good(usage=None), good(usage=(-5, True)))
    server = connect(tmp_path)
    table = answer_by_server(server, [talk("äö"), talk("2")])[1]
    assert table.prompt_tokens.isna().all() and table.answer_tokens.isna().all()
    assert table.cost[0] == pytest.approx(((4 + 16) * 2 + 100 * 10) / 1e6) and server.budget.spent == pytest.approx(table.cost.sum())


def test_budget_is_never_passed(speaks, tmp_path):
    "However dear the answers are, as long as the server keeps to what was asked."
    most = connect(tmp_path).cost(connect(tmp_path).request(talk("0")))
    rng = np.random.default_rng(0)
    for case in range(12):
        web = speaks(*[good(usage=(int(rng.integers(0, 18)), int(rng.integers(0, 101)))) if rng.random() < 0.8 else (200, {}, "broken") for _ in range(40)])
        server = connect(tmp_path/str(case), budget=float(rng.uniform(0, 12)) * most)
        status, _ = answer_by_server(server, [talk(str(i % 10)) for i in range(30)])
        assert server.budget.spent <= server.budget.limit
        if status != "done": assert "would be passed" in status and server.budget.spent + most > server.budget.limit
        if server.budget.limit < most: assert not web.seen
    exact = connect(tmp_path/"exact", budget=most)
    speaks()
    assert answer_by_server(exact, [talk("0")])[0] == "done"


def test_budget_is_shared_and_survives_a_restart(speaks, tmp_path):
    web, purse = speaks(*[good(usage=(18, 100))] * 9), Budget(0.004)
    a, b = (Server(ServerConfig(name, max_tokens=100), tmp_path, PRICE, purse) for name in ("a", "b"))
    assert answer_by_server(a, [talk("0"), talk("1")])[0] == "done" and answer_by_server(b, [talk("0"), talk("1")])[0].startswith("not run: the budget of 0.004 would be passed")
    assert len(web.seen) == 3 and purse.spent <= purse.limit
    again = Server(ServerConfig("a", max_tokens=100), tmp_path, PRICE, Budget(0.0025))
    assert "2 of 3 answers are kept" in answer_by_server(again, [talk("new"), talk("0"), talk("1")])[0] and len(web.seen) == 3  # what was paid before counts, wherever it stands


def test_an_answer_counts_once(speaks, tmp_path):
    speaks()
    server = connect(tmp_path)
    for _ in range(3): answer_by_server(server, [talk("0"), talk("0"), talk("1")])
    assert server.budget.spent == pytest.approx(2 * 0.0024)
    other = Server(CONFIG, tmp_path, PRICE, Budget(0.0))
    assert answer_by_server(other, [talk("1"), talk("1")])[0] == "done" and other.budget.spent == pytest.approx(0.0024)


def test_nothing_is_asked_without_key_price_or_budget(monkeypatch, speaks, tmp_path):
    web = speaks()
    assert "no price of 'some-model'" in answer_by_server(connect(tmp_path, price=None), [talk()])[0]
    assert "the budget of 0 would be passed" in answer_by_server(Server(CONFIG, tmp_path, PRICE), [talk()])[0]
    assert "would be passed" in answer_by_server(connect(tmp_path, budget=math.nan), [talk()])[0]
    monkeypatch.setenv("OPENAI_API_KEY", "  ")
    assert answer_by_server(connect(tmp_path), [talk()])[0].startswith("not run: no OPENAI_API_KEY in the environment") and not web.seen
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert answer_by_server(connect(tmp_path, price=Price(0, 0), budget=0.0), [talk()])[0] == "done"  # a free server


def test_replay_needs_neither_key_nor_server(monkeypatch, speaks, tmp_path):
    web = speaks()
    asked = [talk("one"), talk("two")]
    first = answer_by_server(connect(tmp_path), asked)
    web.close()
    monkeypatch.delenv("OPENAI_API_KEY")
    status, table = answer_by_server(Server(CONFIG, tmp_path, PRICE), asked)
    assert status == "done"
    pd.testing.assert_frame_equal(table, first[1])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and all(len(f.stem) == 64 and f.suffix == ".json" for f in files)
    record = json.loads(files[0].read_text())
    assert record["server"] == web.url and record["answered_by"] == "some-model-0613" and record["finish_reason"] == "stop" and record["request"]["model"] == "some-model"
    for other in (ServerConfig("other"), ServerConfig("some-model", max_tokens=100, temperature=1.0)):
        assert answer_by_server(Server(other, tmp_path, PRICE), asked)[0].endswith("0 of 2 answers are kept")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")  # another server is another answer
    assert answer_by_server(Server(CONFIG, tmp_path, PRICE), asked)[0].endswith("0 of 2 answers are kept")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"answer": "x"}', '{"request": {}, "answer": "x"}'])
def test_a_damaged_kept_answer_is_named(speaks, tmp_path, damage):
    speaks()
    answer_by_server(connect(tmp_path), [talk()])
    file = next(tmp_path.iterdir())
    file.write_text(damage)
    with pytest.raises(BoigError, match=f"{file.name}' is no kept answer"): answer_by_server(connect(tmp_path), [talk()])


def test_what_is_kept_survives_an_interrupt(speaks, tmp_path):
    web = speaks(good(), good(), (500, {}, ""))
    def stop(seconds): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): answer_by_server(Server(CONFIG, tmp_path, PRICE, Budget(1.0), sleep=stop), [talk(str(i)) for i in range(4)])
    assert len(list(tmp_path.iterdir())) == 2
    assert answer_by_server(connect(tmp_path), [talk(str(i)) for i in range(4)])[0] == "done" and len(web.seen) == 5


# --- The key ---------------------------------------------------------------------------------------------------------------------------------------------

def spelt(key): return "".join(f"\\u{ord(c):04x}" for c in key)


@pytest.mark.parametrize("evil", [
    (401, {}, f"Incorrect API key provided: {KEY}"), (500, {"Retry-After": KEY}, KEY), (200, {}, f"not JSON {KEY}"), (429, {"X-Echo": KEY}, f'insufficient_quota {KEY}'),
    good(answer=f"your key is {KEY}", model=KEY), (200, {}, good(answer="KEY")[2].replace("KEY", spelt(KEY))), (302, {"Location": f"http://127.0.0.1:9/{KEY}"}, "")])
def test_the_key_is_never_told(speaks, tmp_path, caplog, capfd, evil):
    caplog.set_level(logging.DEBUG)
    speaks(evil)
    server = connect(tmp_path)
    status, table = answer_by_server(server, [talk()])
    shown = [status, table.to_csv(), caplog.text, repr(server), str(vars(server)), *capfd.readouterr(), *(f.read_text() for f in tmp_path.iterdir())]
    assert not any(KEY in text or spelt(KEY) in text for text in shown)
    if evil[0] == 200 and table.answer[0] != SAID: assert table.answer[0].endswith("…")


def chain(error):
    while error: yield error; error = error.__cause__ or error.__context__


@pytest.mark.parametrize("key, kind, words", [("", NotRun, "no OPENAI_API_KEY"), ("sk-två", BoigError, "no key has"), ("sk-a\nb", BoigError, "no key has")])
def test_a_bad_key_is_not_shown(monkeypatch, tmp_path, key, kind, words):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    try: status = answer_by_server(connect(tmp_path), [talk()])[0]
    except BoigError as e: status, errors = str(e), list(chain(e))
    else: errors = []
    assert words in status and (not key or not any(key in repr(vars(e)) + repr(e.args) for e in errors)) and (kind is NotRun) == (not errors)


def test_key_and_address_are_no_parameters(monkeypatch, tmp_path):
    for name in ("api_key", "base_url", "token"):
        with pytest.raises(BoigError, match=f"takes no {name}.*OPENAI_BASE_URL and OPENAI_API_KEY, and from nowhere else") as e: Server(CONFIG, tmp_path, **{name: KEY})
        assert KEY not in str(e.value)
    for url in (f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", "ftp://host", "host:80", f"http://{KEY}@host", "http://host/v1#x"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(BoigError, match="without a user") as e: Server(CONFIG, tmp_path)
        assert KEY not in str(e.value)
    for url in ("http://localhost:8000/v1/", "https://[::1]:8000/v1", "https://a-b.example.org/deep/path"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert Server(CONFIG, tmp_path).url == url.rstrip("/")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert Server(CONFIG, tmp_path).url == "https://api.openai.com/v1"


# --- Prices, estimates, tables ---------------------------------------------------------------------------------------------------------------------------

def test_prices():
    assert Price(2, 10).of(1_000_000, 100_000) == 3 and read_prices("") == {} and read_prices('{"a": [1, 2.5], "b": ["0", 0]}') == {"a": Price(1, 2.5), "b": Price(0, 0)}
    for wrong in ("{", "[]", '{"a": 3}', '{"a": [1]}', '{"a": [1, 2, 3]}', '{"a": ["x", 1]}', '{"a": [1, NaN]}', '{"a": [-1, 0]}'):
        with pytest.raises(BoigError): read_prices(wrong)


def test_estimate_by_hand(speaks, tmp_path):
    speaks()
    solved = [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a" * 60}, {"role": "user", "content": "q" * 240}]
    server = connect(tmp_path)
    want = {"requests": 2, "kept": 0, "tokens": 2 * 220, "tokens at most": 2 * (600 + 48 + 100), "cost": pytest.approx(2 * (200 * 2 + 20 * 10) / 1e6), "cost at most": pytest.approx(2 * (648 * 2 + 100 * 10) / 1e6)}
    assert estimate(server, [solved, solved]) == want
    answer_by_server(server, [solved])
    assert estimate(server, [solved, talk("x" * 30)]) == {"requests": 2, "kept": 1, "tokens": 110, "tokens at most": 146, "cost": pytest.approx((10 * 2 + 100 * 10) / 1e6), "cost at most": pytest.approx((46 * 2 + 1000) / 1e6)}
    assert math.isnan(estimate(connect(tmp_path, price=None), [talk()])["cost"]) and estimate(server, [])["cost at most"] == 0


def test_tables(bench, tmp_path):
    rows = bench[bench.split == "test"].reset_index(drop=True)
    said = pd.DataFrame({"answer": rows.verbalization.where(rows.index % 4 > 0, "I do not know."), "prompt_tokens": 100.0, "answer_tokens": 10.0, "cost": 0.5})
    done = answers_table(rows, EMOJIBENCH, 3, "some-model", "done", said, list(said.answer))
    assert (done.condition == "3-shot").all() and done.told[0] == json.dumps({"uses": int(rows.uses[0])}) and done.free_read[0] == len(rows) - len(rows[::4]) and done.free_n[0] == len(rows)
    lost = answers_table(rows, EMOJIBENCH, 5, "other", "not run: no key", pd.DataFrame())
    both = pd.concat([done, lost])
    both.to_parquet(tmp_path/"a.parquet")
    got = table1_shots(pd.read_parquet(tmp_path/"a.parquet"), bench, 50, 1)
    want = table1({"3-shot some-model": ("In-context learning", score_answers(rows, list(said.answer)))}, 50, 1)
    pd.testing.assert_frame_equal(got.iloc[:-1][want.columns], want, check_dtype=False)
    assert got.loc[got.KPI == "All", "unreadable"].iloc[0] == len(rows[::4]) and got.free_n[0] - got.free_read[0] == len(rows[::4])
    high = (rows.bucket == "high").sum()
    assert got.loc[got.KPI == "High", ["tokens read", "tokens written", "cost"]].iloc[0].tolist() == [100 * high, 10 * high, 0.5 * high]
    last = got.iloc[-1]
    assert (last.Model, last.KPI, last.n, last.status) == ("5-shot other", "All", 0, "not run: no key") and last[list(METRICS)].isna().all() and math.isnan(last.cost)
    with pytest.raises(BoigError, match="do not belong together"): answers_table(rows, EMOJIBENCH, 3, "m", "done", said[1:])
