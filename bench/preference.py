"""What keeping a user's history saves, what sorting out a million choices needs, and what noise optimisation costs: `python bench/preference.py` writes bench/results/preference.json.

Speed: 4 candidates after 8 reference pairs, with a model of pocket-idefics's shape. Its weights are random: they do not matter for time. Memory: the tables of a made-up release
of a million choices without pictures, in a process of its own. Noise optimisation (ReNO): seconds a step and peak memory with 10 and with 30 steps, each in a process of its own;
and with the generator's steps recomputed.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from boig.core import provenance, write_json

RESULTS = Path(__file__).parent/"results"/"preference.json"
PAIRS, CANDIDATES = 8, 4


def fastest(calls, repeats):
    "Milliseconds of the fastest run of each call, in turns, after one to warm up; and what each returned."
    times, found = [[] for _ in calls], [None] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            found[i] = call()
            if turn: times[i].append(1000 * (time.perf_counter() - start))
    return [min(t) for t in times], found


def speed(repeats):
    "Whole sequences against a history read once."
    from boig.pocket.captions import pixels, samples
    from boig.pocket.idefics import make_idefics, make_processor
    from boig.pocket.training import recipe
    from boig.preference.loss import like_probability
    from boig.preference.model import PreferenceConfig, PreferenceModel, Rated, judge_whole
    from boig.preference.reward import PreferenceReward
    shape = recipe("pocket-idefics")
    processor = make_processor(shape["latents"])
    torch.manual_seed(0)
    idefics = make_idefics(processor, shape["vision"], shape["text"], shape["depth"])
    for p in idefics.parameters(): p.data.mul_(4 if p.ndim == 2 else 1)  # so that a wrong score would show
    model = PreferenceModel(idefics, processor, PreferenceConfig(tokens=10)).eval().requires_grad_(False)
    scenes, texts = samples(2 * PAIRS + CANDIDATES, 7, "bench preference")
    images = pixels(scenes)
    history = [Rated(x, texts[i // 2], i % 2 == 1) for i, x in enumerate(images[:2 * PAIRS])]
    faces, prompts = images[2 * PAIRS:], texts[2 * PAIRS:]
    warm = PreferenceReward(model, history)

    def whole(x): return like_probability(judge_whole(model, [history] * len(x), list(x), prompts).logits, model.words.like, model.words.dislike)

    def gradient(f):
        x = faces.clone().requires_grad_()
        f(x).sum().backward()
        return x.grad

    with torch.no_grad():
        (full, cold, kept), (a, _, b) = fastest([lambda: whole(faces), lambda: PreferenceReward(model, history)(faces, prompts), lambda: warm(faces, prompts)], repeats)
    (full_gradient, kept_gradient), (c, d) = fastest([lambda: gradient(whole), lambda: gradient(lambda x: warm(x, prompts))], max(1, repeats // 2))
    return {"pairs": PAIRS, "candidates": CANDIDATES, "repeats": repeats, "history_tokens": len(model.words.history(history)), "parameters": idefics.num_parameters(),
            "ms_whole": full, "ms_cold": cold, "ms_warm": kept, "cold_times_faster": full / cold, "warm_times_faster": full / kept,
            "ms_whole_with_gradient": full_gradient, "ms_warm_with_gradient": kept_gradient, "warm_with_gradient_times_faster": full_gradient / kept_gradient,
            "largest_difference_of_a_score": (a - b).abs().max().item(), "largest_difference_of_a_gradient": (c - d).abs().max().item(), "largest_gradient": c.abs().max().item()}


def sort_out(release, memory):
    "One build of the tables: seconds and memory."
    from boig.benches.pickapic import build_histories
    start = time.perf_counter()
    with TemporaryDirectory() as out: report = build_histories(release, out, pictures=False, memory=memory, threads=2)
    peak = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]) / 1024
    return {"seconds": round(time.perf_counter() - start, 1), "peak_rss_mb": round(peak), "duckdb_memory": memory, **report}


def peak_mb(): # of this process, since its start or the last reset
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]) / 1024


def climb_noise(steps, checkpointing, pictures=2):
    "Noise optimisation of some pictures by one user's taste: seconds a step, and megabytes beyond those of drawing the same pictures."
    from boig.diffusion.pipeline import draw, load_pipeline, sampling
    from boig.diffusion.reno import RenoConfig, Term, optimise_noise
    from boig.pocket.captions import pixels, samples
    from boig.preference.model import PreferenceConfig, PreferenceModel, Rated, load_idefics
    from boig.preference.reward import PreferenceReward
    scenes, texts = samples(2 * PAIRS + pictures, 7, "bench preference")
    history = [Rated(x, texts[i // 2], i % 2 == 1) for i, x in enumerate(pixels(scenes[:2 * PAIRS]))]
    torch.manual_seed(0)
    taste = PreferenceReward(PreferenceModel(*load_idefics("pocket-idefics", "cpu"), PreferenceConfig(tokens=10)), history)
    pipe, how, prompts = load_pipeline("pocket-turbo", "cpu"), sampling("pocket-turbo"), texts[2 * PAIRS:]
    images = draw(pipe, prompts, **how)
    with torch.no_grad(): taste(images, prompts)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, seconds, clock = peak_mb(), [], [time.process_time()]
    def watch(numbers, step, images): seconds.append(time.process_time() - clock[0]); clock[0] = time.process_time()
    found = optimise_noise(pipe, prompts, Term(taste), RenoConfig(steps=steps, checkpointing=checkpointing), watch=watch, **how)
    return {"steps": steps, "recomputed": checkpointing, "pictures": pictures, "generator_steps": how["num_inference_steps"], "cpu_seconds_a_step": sorted(seconds[1:-1])[len(seconds[1:-1]) // 2],
            "mb_before": round(before), "mb_more": round(peak_mb() - before, 1), "p_before": found.table["first"].mean() / 0.75, "p_best": found.table.best.mean() / 0.75}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory", default="500MB")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--release", type=Path, help="the made-up release: kept there, and taken if it is there")
    parser.add_argument("--only", choices=("speed", "memory", "reno"))
    parser.add_argument("--measure", default="", help="(the process that is measured)")
    args = parser.parse_args()
    if args.measure.startswith("reno"):
        print(json.dumps(climb_noise(int(args.measure.split()[1]), "again" in args.measure)))
        sys.exit()
    if args.measure: print(json.dumps(sort_out(args.measure, args.memory))); sys.exit()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.only in (None, "speed"):
        record["speed"] = speed(args.repeats) | {"threads": torch.get_num_threads()}
        print(json.dumps(record["speed"], indent=1), flush=True)
    if args.only in (None, "reno"):
        runs = [subprocess.run([sys.executable, __file__, "--measure", f"reno {what}"], check=True, stdout=subprocess.PIPE, text=True) for what in ("10", "30", "10 again")]
        record["reno"] = {"runs": [json.loads(r.stdout.splitlines()[-1]) for r in runs], "threads": torch.get_num_threads(), "load_of_the_machine": os.getloadavg()[0], "provenance": provenance()}
        print(json.dumps(record["reno"]["runs"], indent=1), flush=True)
    if args.only in (None, "memory"):
        from boig.benches.pickapic import synthetic
        with TemporaryDirectory() as tmp:
            release = args.release or Path(tmp)/"choices.parquet"
            if not release.exists(): synthetic(release, args.rows, max(1, args.rows // 150), pictures=False)
            child = subprocess.run([sys.executable, __file__, "--measure", str(release), "--memory", args.memory], check=True, stdout=subprocess.PIPE, text=True)
        record["memory"] = json.loads(child.stdout)
        print(json.dumps(record["memory"], indent=1), flush=True)
    if args.only != "reno": record |= {"load_of_the_machine": os.getloadavg()[0], "provenance": provenance()}  # of the first two; reno's stand beside it
    write_json(RESULTS, record)
