"""Time and memory of the five personalisation methods at the shapes of Stable Diffusion 1.5, random weights: `python bench/personalise.py` writes bench/results/personalise.json.

Needs a GPU, and tens of GB of disk for DreamBooth's checkpoint and pipeline. `--tiny` runs the same on a CPU in small shapes and writes nothing.
"""
import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from boig.core import provenance, write_json
from boig.diffusion.ddpo import train_ddpo
from boig.personalise.base import Subject, picture_size
from boig.personalise.custom_diffusion import CustomDiffusionConfig, train_custom_diffusion
from boig.personalise.dreambooth import DreamBoothConfig, train_dreambooth
from boig.personalise.instructbooth import INSTRUCT, instruct_prompts
from boig.personalise.neti import NeTIConfig, train_neti
from boig.personalise.textual_inversion import TextualInversionConfig, train_textual_inversion
from boig.zoo import resolve

RESULTS = Path(__file__).parent/"results"/"personalise.json"
METHODS = {"dreambooth": (train_dreambooth, DreamBoothConfig), "custom_diffusion": (train_custom_diffusion, CustomDiffusionConfig),
           "textual_inversion": (train_textual_inversion, TextualInversionConfig), "neti": (train_neti, NeTIConfig)}


def pipeline(tiny: bool, device: str) -> StableDiffusionPipeline:
    "Stable Diffusion 1.5 with random weights; the words are the pocket tokenizer's."
    width, heads, layers, blocks = (32, 2, 1, (32,) * 4) if tiny else (768, 12, 12, (320, 640, 1280, 1280))
    tokenizer = CLIPTokenizer.from_pretrained(resolve("pocket-clip"), model_max_length=77)
    tower = CLIPTextModel(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=77, bos_token_id=0, eos_token_id=1))
    unet = UNet2DConditionModel(sample_size=8 if tiny else 64, cross_attention_dim=width, attention_head_dim=8, block_out_channels=blocks, norm_num_groups=8 if tiny else 32)
    wide = (8,) * 4 if tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(block_out_channels=wide, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, norm_num_groups=wide[0] // 4)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=tower, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def measure(run, device: str) -> tuple:
    "What a run returns, and the most memory that it took, in GB."
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    log = run()
    return log, round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing is written")
    parser.add_argument("--steps", type=int, default=10, help="measured after as many that are not")
    parser.add_argument("--precision", default="bf16")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not a.tiny: raise SystemExit("There is no GPU here. `--tiny` runs small shapes on a CPU.")
    rows, precision = {}, a.precision if device == "cuda" else "no"
    for name, (train, config) in METHODS.items():
        pipe = pipeline(a.tiny, device)
        subject = Subject([torch.rand(3, picture_size(pipe), picture_size(pipe)) for _ in range(4)], "teddy bear", "q")
        prior = dict(prior_pictures=4, prior_steps=2) if hasattr(config, "prior_pictures") else {}
        c = config(steps=2 * a.steps, every=a.steps, precision=precision, **prior)
        with tempfile.TemporaryDirectory() as folder: log, memory = measure(lambda: train(pipe, subject, folder, c, progress=False), device)
        rows[name] = {"batch_size": c.batch_size, "seconds_per_step": round(float(log.seconds.iloc[-1]) / a.steps, 3), "steps": config().steps, "peak_gb": memory}
        print(name, rows[name])
    def bright(images, prompts, context=None): return images.mean(dim=(1, 2, 3))
    rl = replace(INSTRUCT, epochs=2, precision=precision, tracker="", **({"steps": 2} if a.tiny else {}))
    with tempfile.TemporaryDirectory() as folder:
        log, memory = measure(lambda: train_ddpo(pipeline(a.tiny, device), instruct_prompts(subject, ["a {0} {1} and a ball"]), bright, folder, rl, progress=False), device)
    rows["instructbooth, an epoch of RL"] = {"batch_size": rl.batch_size, "seconds_per_epoch": round(float(log.seconds.iloc[-1]), 2), "epochs": INSTRUCT.epochs, "peak_gb": memory}
    print(rows["instructbooth, an epoch of RL"])
    if not a.tiny: write_json(RESULTS, {"shapes": "Stable Diffusion 1.5, 512 x 512, random weights", "precision": precision, "methods": rows, "provenance": provenance()})


if __name__ == "__main__": main()
