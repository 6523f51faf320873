"""How good the pocket zoo is, on held-out scenes: `python bench/zoo.py` writes bench/results/zoo.json.

`python bench/zoo.py sd turbo` measures these parts anew and keeps the other figures. Each part notes the weights that it was measured on.
"""
import json
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPTokenizer

from boig.behaviour.finetune import load_llm
from boig.benches.stock import decode
from boig.core import provenance, write_json, write_text
from boig.data.world import caption, truth
from boig.diffusion.pipeline import draw, load_pipeline, sampling
from boig.metrics.detection import mean_average_precision
from boig.perception.detector import detect, load_detector
from boig.pocket.aesthetic import correlations
from boig.pocket.captions import pixels, samples
from boig.pocket.cards import card
from boig.pocket.choosers import choices, people
from boig.pocket.clip import normalize
from boig.pocket.embeddings import load_embedding, style_quality, subject_quality
from boig.pocket.idefics import question_accuracy
from boig.pocket.judges import agreement, presence
from boig.pocket.llama import verbalization_quality
from boig.pocket.quality import background_right, objects_shown, plain, right_caption
from boig.pocket.signs import RULES, Album, sign_accuracy
from boig.pocket.training import recipe
from boig.pocket.vae import patch_pca, psnr
from boig.rewards.base import load_reward
from boig.zoo import entries, resolve, sha256_tree

RESULTS = Path(__file__).parent/"results"/"zoo.json"


def vae(n=512):
    "Reconstruction of held-out scenes against the same number of principal components."
    model, x = AutoencoderKL.from_pretrained(resolve("pocket-vae")), pixels(samples(n, 1, "bench vae", unseen=True)[0])
    with torch.no_grad(): y = model.decode(model.encode(normalize(x)).latent_dist.mean).sample.add(1).div(2).clamp(0, 1)
    pca = patch_pca(pixels(samples(2000, 2, "bench vae")[0]), x, model.config.latent_channels)
    return {"n": n, "psnr_db": psnr(x, y).mean().item(), "patch_pca_psnr_db": psnr(x, pca.clamp(0, 1)).mean().item()}


def clip():
    "The right caption among 64 with distinct object sets."
    def accuracy(name): return right_caption(CLIPModel.from_pretrained(resolve(name), dtype=torch.float32), CLIPTokenizer.from_pretrained(resolve(name)))
    return {name: accuracy(name) for name in ("pocket-clip", "pocket-eval")}


def detector(n=1000):
    "Mean average precision on held-out renders."
    scenes = samples(n, 3, "bench detector", unseen=True)[0]
    found = detect(load_detector("pocket-detector"), pixels(scenes))
    return {"n": n, "map50": mean_average_precision([truth(s) for s in scenes], found)}


def pictures(name, n):
    "Held-out scenes, their full captions and what a generator draws for them."
    scenes = samples(n, 4, "bench pictures", unseen=True)[0]
    return scenes, draw(load_pipeline(name), [caption(s) for s in scenes], seed=4, **sampling(name))


def shown(name, n=500):
    "Are the asked objects and backgrounds there? Seconds a picture on all cores."
    scenes, images = pictures(name, n)
    main, two = objects_shown([{d.name for d in ds} for ds in detect(load_detector("pocket-detector"), images)], scenes)
    flat = torch.tensor([plain(s) for s in scenes])
    background = background_right(images[flat], [s for s in scenes if plain(s)])
    pipe, texts, seconds = load_pipeline(name), [caption(s) for s in scenes[:16]], []
    for _ in range(4):
        start = time.perf_counter()
        draw(pipe, texts, batch_size=16, **sampling(name))
        seconds.append((time.perf_counter() - start) / 16)
    return {"n": n, **sampling(name), "main_object": main.float().mean().item(), "two_objects": two.float().mean().item(), "n_two": len(two),
            "background": background.float().mean().item(), "n_background": len(background),
            "seconds_a_picture": statistics.median(seconds[1:]), "threads": torch.get_num_threads()}


def hand():
    "The detector against three readers, on pocket-sd's own pictures (bench/hand_check.py)."
    table = pd.read_parquet(RESULTS.parent/"pocket_sd_hand_check.parquet")
    found = [{d.name for d in ds} for ds in detect(load_detector("pocket-detector"), decode(table.image))]
    seen = [m in f for m, f in zip(table.main, found)]
    readers = table.filter(like="reader")
    return {"n": len(table), "shown_by_hand": float(table.shown.mean()), "world_shown_by_each": table.filter(like="world").mean().tolist(), "vae_shown_by_each": table.filter(like="vae").mean().tolist(), "shown_by_each": readers.mean().tolist(), "shown_by_detector": sum(seen) / len(seen),
            "two_readers_agree": statistics.mean(float((readers[a] == readers[b]).mean()) for a, b in combinations(readers, 2)),
            "detector_agrees": float((table.shown == seen).mean()), "detector_agrees_with_each": [float((r == seen).mean()) for _, r in readers.items()], "of_these_weights": bool((table.weights == sha256_tree(resolve("pocket-sd"))).all())}


def judges(n=300):
    "How often a model scores a held-out picture higher for its own caption than for another scene's; agrees with the choices of those it learned from; sees the asked main object."
    scenes = samples(n, 6, "bench judges", unseen=True)[0]
    images, texts = pixels(scenes), [caption(s) for s in scenes]
    def one(name):
        reward, r = load_reward(name, device="cpu"), recipe(name)
        with torch.no_grad(): own = (reward(images, texts) > reward(images, texts[1:] + texts[:1])).float().mean().item()
        crowd = people(seed=r["seed"], **r["choosers"])
        told = agreement(reward, choices(n, crowd, 6, "bench judges", source=r["source"], unseen=True), crowd)
        return {"own caption preferred to another's": own, "choices predicted": told["chosen"], "the best possible judge predicts": told["ceiling"], "crowd's favourite preferred": told["favourite"],
                "better aligned picture preferred": told["better aligned"], "asked main object preferred to another": presence(reward, n)}
    return {"n": n} | {name: one(name) for name in ("pocket-image-reward", "pocket-pickscore", "pocket-hps")}


def embeddings():
    "How often the nearest held-out picture has the same look, or shows the same individual; by chance; the aesthetic head's correlations."
    def both(quality): return {k: {"nearest is right": right, "chance": chance} for k, (right, chance) in quality.items()}
    return {"pocket-style": both(style_quality(load_embedding(resolve("pocket-style")))),
            "pocket-subject": both(subject_quality(load_embedding(resolve("pocket-subject")))),
            "pocket-aesthetic": {f"correlation with {k}": v for k, v in correlations(load_reward("pocket-aesthetic", device="cpu")).items()}}


def idefics(n=100):
    "Simple questions about held-out pictures and pairs, answered exactly; chance is the commonest answer. Signs after 8 to 15 examples of a hidden rule; chance is one half."
    folder = resolve("pocket-idefics")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    table, album = question_accuracy(model, processor, n), Album(model, 1000, 1, "bench zoo", unseen=True)
    return {"n": n} | table.to_dict("index") | {"signs": {rule: float(sign_accuracy(model, processor, rule, album, count=2 * n)[8:].mean()) for rule in RULES}}


def llama(n=200):
    "Free answers about held-out captions, measured as pocket.llama measures them."
    model, tokenizer = load_llm("pocket-llama", "cpu")
    return {"n": n} | {who: row.to_dict() for who, row in verbalization_quality(model, tokenizer, n).iterrows()}


PARTS = {"vae": vae, "clip": clip, "detector": detector, "sd": lambda: shown("pocket-sd"), "turbo": lambda: shown("pocket-turbo"), "hand": hand,
         "judges": judges, "embeddings": embeddings, "llama": llama, "idefics": idefics}
MODELS = {"clip": ("pocket-clip", "pocket-eval"), "sd": ("pocket-sd", "pocket-detector"), "turbo": ("pocket-turbo", "pocket-sd", "pocket-detector"), "hand": ("pocket-sd", "pocket-detector"),
          "judges": ("pocket-image-reward", "pocket-pickscore", "pocket-hps"), "embeddings": ("pocket-style", "pocket-subject", "pocket-aesthetic", "pocket-eval")}  # that a part measures, or by; else its own


def weights(part):
    "Today's weights of the models of a part."
    return {name: sha256_tree(resolve(name))[:12] for name in MODELS.get(part, (f"pocket-{part}",))}


def figures(record, name):
    "What is measured of a model, for its card."
    part = name.removeprefix("pocket-")
    if part not in PARTS: part = next(p for p in ("clip", "embeddings", "judges") if name in MODELS[p])
    found = record.get(part, {})
    if found and found.get("weights") != weights(part): return {"not measured on these weights": ""}
    found = found.get(name, {}) if part in ("embeddings", "judges") else {"right_caption_among_64": found[name]} if name in found else found.get("model", found)
    return {key: value for key, value in found.items() if key not in ("bench_seconds", "weights")}


if __name__ == "__main__":
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in sys.argv[1:] or PARTS:
        start = time.perf_counter()
        record[part] = PARTS[part]() | {"weights": weights(part), "bench_seconds": round(time.perf_counter() - start, 1)}
        print(part, json.dumps(record[part]), flush=True)
    shipped = {f for n in entries() if n.startswith("pocket-") for f in resolve(n).rglob("*") if f.is_file()}  # pocket-vae lies in pocket-sd
    record["megabytes"] = round(sum(f.stat().st_size for f in shipped) / 2**20, 1)
    write_json(RESULTS, record | {"provenance": provenance()})
    for name, e in entries().items():
        if name.startswith("pocket-"): write_text(resolve(name)/"README.md", card(name, figures(record, name)))
