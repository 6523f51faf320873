"""What reading the question once saves: `python bench/reward.py` writes bench/results/reward.json.

64 pictures of one Listing-1 prompt, for pocket-llama and SmolLM2, and the pocket reward with perception. `python bench/reward.py pocket-llama` measures one model anew.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch

from boig.behaviour.batches import encode_prompt
from boig.behaviour.finetune import load_llm
from boig.behaviour.reward import BoigReward, score_plainly, score_texts
from boig.benches.instructions import BOIGBENCH, instruction
from boig.core import provenance, write_json
from boig.perception.verbalizer import load_verbalizer
from boig.pocket.captions import pixels, samples

RESULTS = Path(__file__).parent/"results"/"reward.json"
REPEATS = {"pocket-llama": 7, "smollm2": 1} # the fastest of them counts
GIVEN = {"company": "velmora", "tweet text": "Everything you need for the season. #Velmora", "keywords": "sale, season", "date": "2022-06-01"}
WISH = {"likes": 500, "likes bucket": "high"}


def fastest(calls, repeats):
    "Seconds of the fastest of some runs of each call, in turns, after one to warm up if there are several; and what each returned."
    seconds, found = [[] for _ in calls], [None] * len(calls)
    for turn in range(repeats + (repeats > 1)):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            found[i] = call()
            if turn or repeats == 1: seconds[i].append(time.perf_counter() - start)
    return [min(s) for s in seconds], found


def shared_question(name, texts, repeats, batch_size=16):
    "Seconds for texts that answer one question: it read once, and read again for each, with all logits and with those needed only."
    model, tokenizer = load_llm(name, "cpu")
    question = instruction(BOIGBENCH, {**GIVEN, "captions": "an advertisement", "image resolution": "(64, 64)"}, 1, WISH)
    (once, again, lean), (quick, plain, _) = fastest([
        lambda: score_texts(model, tokenizer, question, texts, batch_size), lambda: score_plainly(model, tokenizer, question, texts, batch_size),
        lambda: score_plainly(model, tokenizer, question, texts, batch_size, lean=True)], repeats)
    p, n = len(encode_prompt(question, tokenizer)), [len(l) for l in quick]
    allowed = sum(p + i for i in n) / (p + sum(n))
    return {"texts": len(n), "question_tokens": p, "text_tokens": {"fewest": min(n), "mean": sum(n) / len(n), "most": max(n)}, "repeats": repeats,
            "seconds_once": once, "seconds_again": again, "seconds_again_lean": lean,
            "allowed_by_tokens": allowed, "speed_up": again / once, "share_of_allowed": again / once / allowed,
            "speed_up_over_lean": lean / once, "share_of_allowed_over_lean": lean / once / allowed,
            "largest_difference_of_a_log_probability": max((a - b).abs().max().item() for a, b in zip(quick, plain)),
            "largest_difference_of_a_reward": max((a.exp().sum() - b.exp().sum()).abs().item() for a, b in zip(quick, plain))}


def pictures_a_second(images, verbalizer, repeats):
    "The pocket reward from pixels to scores, and perception alone."
    model, tokenizer = load_llm("pocket-llama", "cpu")
    reward = BoigReward(model, tokenizer, BOIGBENCH, verbalizer, WISH, name="boig (pocket-llama)")
    (whole, seen), _ = fastest([lambda: reward(images, ["an advertisement"] * len(images), GIVEN), lambda: verbalizer(images)], repeats)
    return {"reward": reward.name, "pictures": len(images), "pictures_a_second": len(images) / whole, "perception_alone": len(images) / seen}


if __name__ == "__main__":
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    images, verbalizer = pixels(samples(64, 7, "bench reward", unseen=True)[0]), load_verbalizer("pocket", "cpu")
    texts = [v.to_json() for v in verbalizer(images)]
    for name in sys.argv[1:] or REPEATS:
        record[name] = shared_question(name, texts, REPEATS[name]) | {"threads": torch.get_num_threads()}
        print(name, json.dumps(record[name]), flush=True)
    record["with perception"] = pictures_a_second(images, verbalizer, 5) | {"threads": torch.get_num_threads()}
    print("with perception", json.dumps(record["with perception"]), flush=True)
    write_json(RESULTS, record | {"load_of_the_machine": os.getloadavg()[0], "provenance": provenance()})
