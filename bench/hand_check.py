"""A sample of pocket-sd's pictures, looked at by three readers, so that the detector's word is not the last one.

    python bench/hand_check.py draw FOLDER                      # 100 pictures for held-out captions, as numbered sheets to look at; the same as the world draws them, and as pocket-vae keeps those
    python bench/hand_check.py label FOLDER 3,17 3,17,20 3,40 --world 3 3 --vae 3,4   # of each reader of each: the numbers where the answer is no

Each reader looks at the sheets alone, knowing neither the others' answers nor the detector's, and answers of each picture: "Is there a TITLE in this picture?" Yes if
somebody who is asked this would say so, small flaws forgiven; no if it is absent, another thing, or a shape that could be anything. Their majority is what counts. Other
readers look at the world's own drawings, to see what could be reached, and at the same drawings after the autoencoder. The second command writes bench/results/pocket_sd_hand_check.parquet, with every reader's answers; bench/zoo.py compares them with each other and with the detector.
The readers of the shipped answers were multimodal language models with fresh eyes, not people. An earlier reader, alone and asked which objects "can NOT be recognised", had
let 83 of the same 100 pictures pass.
"""
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image

from boig.core import atomic_path
from boig.data.world import caption
from boig.diffusion.pipeline import draw, load_pipeline, sampling
from boig.pocket.captions import pixels, quarters, samples
from boig.pocket.sd import picture_latents
from boig.zoo import resolve, sha256_tree

SAMPLE = Path(__file__).parent/"results"/"pocket_sd_hand_check.parquet"


def packed(picture):
    "In steps of 8 of 255: not to be seen, no answer of the detector changes, and half the bytes."
    out = BytesIO()
    Image.fromarray(np.clip((picture.permute(1, 2, 0).numpy() * 255 / 8).round() * 8, 0, 255).astype(np.uint8)).save(out, "WEBP", lossless=True, quality=100, method=6)
    return {"bytes": out.getvalue(), "path": None}


def draw_sample(folder, n=100, a_sheet=10):
    scenes = samples(n, 5, "hand check", unseen=True)[0]
    texts = [caption(s) for s in scenes]
    pipe = load_pipeline("pocket-sd")
    pictures = draw(pipe, texts, seed=5, **sampling("pocket-sd"))
    table = pd.DataFrame({"number": range(n), "caption": texts, "main": [s.objects[-1].name for s in scenes], "image": [packed(p) for p in pictures]})
    folder.mkdir(parents=True, exist_ok=True)
    table.assign(weights=sha256_tree(resolve("pocket-sd"))).to_parquet(folder/"sample.parquet", index=False)
    true = pixels(map(quarters, scenes))
    with torch.no_grad(): seen = pipe.vae.decode(picture_latents(pipe.vae, true) / pipe.vae.config.scaling_factor).sample
    for name, shown in (("sheet", pictures), ("world", true), ("vae", ((seen + 1) / 2).clamp(0, 1))):
        for start in range(0, n, a_sheet):
            fig, axes = plt.subplots(2, 5, figsize=(15, 6.6))
            for ax, i in zip(axes.flat, range(start, start + a_sheet)):
                ax.imshow(shown[i].permute(1, 2, 0), interpolation="nearest"); ax.axis("off"); ax.set_title(f"{i}: {table.main[i]}", fontsize=14)
            fig.tight_layout()
            fig.savefig(folder/f"{name}{start:03d}.png", dpi=75)
            plt.close(fig)


def label(folder, *missing):
    lists, who = {"reader": []}, "reader"
    for word in missing:
        if word.startswith("--"): lists[who := word[2:]] = []
        else: lists[who].append(word)
    if len(lists["reader"]) % 2 == 0: sys.exit("A majority needs an odd number of readers: one list of numbers of each.")
    table = pd.read_parquet(folder/"sample.parquet")
    for who, of in lists.items():
        for k, numbers in enumerate(of, 1): table[f"{who} {k}"] = ~table.number.isin([int(i) for i in numbers.split(",") if i])
    table["shown"] = table.filter(like="reader").mean(axis=1) > 0.5
    with atomic_path(SAMPLE) as tmp: table.to_parquet(tmp, index=False)
    print(f"{table.shown.mean():.0%} of {len(table)} show the asked main object")


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    draw_sample(folder) if command == "draw" else label(folder, *sys.argv[3:])
