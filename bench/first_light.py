"""What First light promises about speed and memory, measured: `python bench/first_light.py` writes bench/results/first_light.json.

Each figure is the median of several runs in one process, after one run that is not counted.
"""
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from boig.behaviour.finetune import examples_of, fixed_texts, make_llama, train_tokenizer
from boig.behaviour.generate import Constraint, generate_answers, verbalization_grammar
from boig.benches.emojibench import build_benchmark
from boig.benches.instructions import EMOJIBENCH
from boig.core import provenance, write_json
from boig.data.emoji import decode_images, load_emojibench
from boig.data.palette import COLOR_NAMES, TONE_NAMES
from boig.data.verbalization import Verbalization, parse
from boig.metrics.verbalization_metrics import score_verbalizations
from boig.perception.colors import verbalize_colors


def median_seconds(f, runs=5):
    f()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_verbalizations(n, seed):
    rng = np.random.default_rng(seed)
    words = ["cat", "dog", "sofa", "couch", "teddy bear", "watch", "shoe", "burger", "woman", "man", "cup", "tree", "safety vest", "lamp", "car"]
    def one():
        c, o = rng.choice(40, rng.integers(1, 6), replace=False), rng.choice(words, rng.integers(0, 6), replace=False)
        corner = rng.uniform(0, 40, (len(o), 2))
        return Verbalization({COLOR_NAMES[k]: 1 / len(c) for k in c}, dict(zip(TONE_NAMES, rng.dirichlet([1, 1, 1]))),
                             {str(w): (*q, *(q + rng.uniform(1, 24, 2))) for w, q in zip(o, corner)})
    return [one() for _ in range(n)]


def main():
    out = {}
    a, b = random_verbalizations(10_000, 0), random_verbalizations(10_000, 1)
    out["nine metrics, 10,000 pairs, s"] = median_seconds(lambda: score_verbalizations(a, b, (64, 64)))

    rgba = torch.from_numpy(decode_images(load_emojibench().image)).permute(0, 3, 1, 2)
    images, masks = rgba[:, :3] / 255, rgba[:, 3] > 127
    out["colours and tones, 64-px pictures a second"] = len(images) / median_seconds(lambda: verbalize_colors(images, masks))

    bench = build_benchmark()
    texts = list(bench.verbalization)
    out["parse, texts a second"] = len(texts) / median_seconds(lambda: [parse(t) for t in texts])

    groups = examples_of(bench, EMOJIBENCH, True, seed=0)
    tok = train_tokenizer([t for g in groups for e in g for t in (e.prompt, e.answer)], fixed_texts(EMOJIBENCH), 1000)
    model, prompts = make_llama(tok, 192, 2), [g[0].prompt for g in groups[:64]]
    # an answer of exactly 40 tokens in both cases: the end token is never the untrained model's choice
    constraint = Constraint(verbalization_grammar((64, 64), 5), tok)
    free = median_seconds(lambda: generate_answers(model, tok, prompts, max_new_tokens=40), 3)
    bound = median_seconds(lambda: generate_answers(model, tok, prompts, constraint, max_new_tokens=40), 3)
    out |= {"free generation, tokens a second": 64 * 40 / free, "constrained generation, tokens a second": 64 * 40 / bound, "constrained / free, time": bound / free}
    out["peak memory of this process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    record = {"what": "bench/first_light.py", "threads": torch.get_num_threads(), "figures": {k: round(v, 3) for k, v in out.items()}} | provenance()
    path = Path(__file__).parent/"results"/"first_light.json"
    write_json(path, record)
    print(json.dumps(record["figures"], indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
