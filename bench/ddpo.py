"""How fast DDPO is, side by side with TRL's, and what the fast recipe gains: `python bench/ddpo.py trl fast` writes bench/results/ddpo.json.

trl   TRL 0.23.1's DDPOTrainer and ours on one tiny pipeline, in turns, CPU time of the process. TRL is no dependency of boig: put it into a folder of its own with
      `pip install --no-deps trl==0.23.1 -t FOLDER` and pass --trl FOLDER.
fast  The standard and the fast recipe on pocket-sd: CPU time to the reward that the standard one has after --epochs epochs, and what became of the pictures.
      The fast one may train on shorter paths (--fast-path); both are watched and judged on paths of --path steps. Stopped, it goes on from --folder.
"""
import argparse
import io
import json
import os
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from boig.core import BoigError, atomic_path, derive_seed, provenance, write_json
from boig.diffusion.ddpo import DDPOConfig, Run, path_loss, train_ddpo, update
from boig.diffusion.pipeline import load_pipeline
from boig.diffusion.sampler import Trajectories, make_steps, sample

RESULTS = Path(__file__).parent/"results"/"ddpo.json"
PROMPTS = ["a cat", "a dog on a table", "a red car", "a house by the sea"]


# --- side by side with TRL

def tiny_pipeline(folder):
    "Random weights of Stable Diffusion's classes and noise schedule; latents of 4 × 16 × 16."
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from boig.zoo import resolve
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(resolve("pocket-clip"))
    tower = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=48,
                                         bos_token_id=0, eos_token_id=1))
    vae = AutoencoderKL(block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=4)
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    StableDiffusionPipeline(vae=vae, text_encoder=tower, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(folder)


def brightness(images, prompts, context=None): return images.mean(dim=(1, 2, 3))


def open_trl(folder, pipeline, lora: bool, a):
    "TRL's trainer on the pipeline in a folder; one clear line if TRL is not there."
    if folder: sys.path.insert(0, str(Path(folder).resolve()))
    try: found = distribution("trl").version
    except PackageNotFoundError: found = ""
    if found != "0.23.1": raise BoigError(f"TRL 0.23.1 is needed for this section ({found or 'none'} is here): pip install --no-deps trl==0.23.1 -t FOLDER, then pass --trl FOLDER.")
    from accelerate import PartialState
    PartialState() # its logging needs one
    from trl import DDPOConfig as TheirConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    config = TheirConfig(mixed_precision="no", sample_num_steps=a.steps, sample_batch_size=a.batch, sample_num_batches_per_epoch=a.pictures // a.batch, train_batch_size=a.batch,
                         train_gradient_accumulation_steps=a.pictures // a.batch, train_learning_rate=1e-4, save_freq=10**9, project_kwargs={"project_dir": str(pipeline)})
    turn = iter(range(10**9))
    def prompt(): return PROMPTS[next(turn) % len(PROMPTS)], {}
    return DDPOTrainer(config, lambda images, prompts, _: (brightness(images, prompts), {}), prompt, DefaultDDPOStableDiffusionPipeline(str(pipeline), use_lora=lora))


def open_ours(folder, pipeline, theirs, lora: bool, a) -> Run:
    "Our run with the weights of TRL's."
    config = DDPOConfig(samples=a.pictures, batch_size=a.pictures, micro_batch=a.batch, steps=a.steps, advantages="global", lr=1e-4, lora_rank=4 if lora else 0, tracker="", micro_steps=a.micro_steps)
    run = Run(load_pipeline(str(pipeline), "cpu"), PROMPTS, brightness, folder, config)
    with torch.no_grad():
        for mine, other in zip(run.params, trained(theirs), strict=True): mine.copy_(other)
    return run


def trained(trainer): return [p for p in trainer.sd_pipeline.unet.parameters() if p.requires_grad]


def as_trajectories(run, sample, steps) -> Trajectories:
    "A batch of TRL's samples as ours, their order of time undone."
    order = sample["timesteps"].argsort(dim=1, descending=True)
    rows = torch.arange(len(order))[:, None]
    assert torch.equal(sample["timesteps"][rows, order][0], steps.t)
    latents, last = sample["latents"][rows, order], sample["next_latents"][rows, order][:, -1:]
    return Trajectories([""] * len(order), torch.cat([latents, last], 1), sample["log_probs"][rows, order], sample["prompt_embeds"], sample["negative_prompt_embeds"][:1],
                        torch.empty(0), steps)


def record_samples(trainer, seed=0):
    "What TRL draws for one update, with advantages, in batches as its training takes them."
    torch.manual_seed(seed)
    with torch.no_grad(): drawn, _ = trainer._generate_samples(iterations=trainer.config.sample_num_batches_per_epoch, batch_size=trainer.config.sample_batch_size)
    for k, s in enumerate(drawn):
        s["advantages"] = torch.randn(len(s["timesteps"]), generator=torch.Generator().manual_seed(k))
        orders = torch.stack([torch.randperm(s["timesteps"].shape[1]) for _ in s["timesteps"]])
        for name in ("timesteps", "latents", "next_latents", "log_probs"): s[name] = s[name][torch.arange(len(orders))[:, None], orders]
    return drawn


def cpu_time(call):
    "Seconds of CPU that a call takes."
    started = time.process_time()
    call()
    return time.process_time() - started


def in_turns(calls: dict, repeats: int) -> dict: # name -> its times, after one to warm up
    "Calls in turns, so that a slow minute of the machine meets all of them."
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = cpu_time(call)
            if turn: times[name].append(seconds)
    return times


def compare(times: dict, ours: str, theirs: str) -> dict:
    "The median of the ratios of neighbours, and of the times."
    ratios = np.array(times[ours]) / np.array(times[theirs])
    return {"ours_s": float(np.median(times[ours])), "trl_s": float(np.median(times[theirs])), "ratio": float(np.median(ratios)), "ratios": [round(float(r), 3) for r in sorted(ratios)]}


def same_loss(trainer, run, drawn, paths) -> dict:
    "Both losses of the same steps, after both models were moved in the same way."
    torch.manual_seed(1)
    with torch.no_grad():
        for mine, other in zip(run.params, trained(trainer), strict=True):
            other.add_(torch.randn_like(other) * 1e-4 * other.abs().mean())
            mine.copy_(other)
    s, p, worst, off, gradients = drawn[0], paths[0], 0.0, 0.0, []
    for j in range(s["timesteps"].shape[1]):
        theirs, *_ = trainer.calculate_loss(s["latents"][:, j], s["timesteps"][:, j], s["next_latents"][:, j], s["log_probs"][:, j], s["advantages"],
                                            torch.cat([s["negative_prompt_embeds"], s["prompt_embeds"]]))
        i = (p.steps.t[None] == s["timesteps"][:, j, None]).long().argmax(1)
        ours, watch = path_loss(run.pipe.unet, p, i, s["advantages"], run.config)
        worst, off = max(worst, abs(float((ours.mean() - theirs).detach()))), max(off, float(watch[1].mean()))
        gradients.append([torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss, params in ((theirs, trained(trainer)), (ours.mean(), run.params))])
    theirs, ours = (sum(g) for g in zip(*gradients))
    return {"largest_difference_of_a_loss": worst, "mean_ratio_off_by_at_most": off, "relative_difference_of_the_gradient": float((ours - theirs).norm() / theirs.norm())}


def bench_trl(a) -> dict:
    "Losses, one identical update, and an epoch, with LoRA and of the whole denoiser."
    found = {"settings": {"pictures": a.pictures, "batch": a.batch, "steps": a.steps, "guidance": 5.0, "micro_steps": a.micro_steps, "threads": torch.get_num_threads(), "repeats": a.repeats}}
    for lora in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            pipeline = Path(folder)/"tiny"
            tiny_pipeline(pipeline)
            trainer = open_trl(a.trl, pipeline, lora, a)
            run = open_ours(Path(folder)/"run", pipeline, trainer, lora, a)
            trainer.sd_pipeline.set_progress_bar_config(disable=True)
            trainer.accelerator.gradient_accumulation_steps = a.steps * a.pictures // a.batch # accelerate keeps one number for all; ours has just set it to 1
            drawn = record_samples(trainer)
            steps = make_steps(run.pipe.scheduler, a.steps)
            numbers, A = torch.arange(a.pictures).split(a.batch), torch.cat([s["advantages"] for s in drawn])
            batches = [(n, as_trajectories(run, s, steps)) for n, s in zip(numbers, drawn)]
            before = [p.detach().clone() for p in run.params]
            theirs, ours = lambda: trainer._train_batched_samples(0, 0, 0, drawn), lambda: update(run, list(batches), A, 0, 0)
            theirs(), ours() # the same update from the same weights
            moved, apart = (torch.cat([(x - y).flatten() for x, y in zip(run.params, other)]).abs().mean().item() for other in (before, trained(trainer)))
            row = {"weights_apart_after_one_update_relative_to_the_update": apart / moved, **same_loss(trainer, run, drawn, [p for _, p in batches])}
            print(json.dumps(row), flush=True)
            row["identical update"] = compare(in_turns({"ours": ours, "trl": theirs}, a.repeats), "ours", "trl")
            row["epoch of one update"] = compare(in_turns(whole_epochs(trainer, run), a.repeats), "ours", "trl")
            found["LoRA" if lora else "whole denoiser"] = row
            print("LoRA" if lora else "whole denoiser", json.dumps(row), flush=True)
    return found


def whole_epochs(trainer, run) -> dict:
    "An epoch of each: drawing, reward, advantages, one update; ours keeps the graph of sampling."
    from dataclasses import replace
    from boig.diffusion.ddpo import _epoch
    run.config, turn = replace(run.config, keep_graph=True), iter(range(10**9))
    texts = [PROMPTS[k % len(PROMPTS)] for k in range(run.config.samples)]
    return {"ours": lambda: _epoch(run, texts, brightness, None, next(turn)), "trl": lambda: trainer.step(0, 0)}


# --- the fast recipe

class Compressible:
    "Minus the kilobytes of a JPEG file of quality 95, as in DDPO's paper: cheap, not differentiable, the same for all prompts."
    name, differentiable = "jpeg", False
    def __call__(self, images, prompts, context=None):
        return -torch.tensor([len(self.pack(x)) for x in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]) / 1000
    def pack(self, pixels):
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=95)
        return file.getvalue()


class Watch:
    "After each epoch: the CPU time of the training so far, and the mean reward of pictures of other prompts from the same seeds."
    def __init__(self, folder, reward, prompts, c, target=None):
        self.folder, self.reward, self.prompts, self.c, self.target, self.since = Path(folder), reward, prompts, c, target, time.process_time()

    def __call__(self, pipe, epoch):
        spent = time.process_time() - self.since
        value = float(self.reward(pictures(pipe, self.prompts, self.c), self.prompts).mean())
        if self.target is not None and value >= self.target and not (self.folder/"reached.safetensors").exists():
            with atomic_path(self.folder/"reached.safetensors") as tmp: save_file({n: p.detach().contiguous() for n, p in pipe.unet.named_parameters() if p.requires_grad}, tmp)
        self.since = time.process_time()
        return {"value": value, "cpu": spent}


def pictures(pipe, prompts, c: DDPOConfig):
    "One picture for each prompt, drawn as the model is meant to be used: without chance after the first noise."
    return sample(pipe, prompts, [derive_seed(0, "validation", k) for k in range(len(prompts))], c.steps, c.guidance, 0.0, batch_size=64).images


def oracle_log_kpis(drawn) -> list[float]:
    "What the simulated market would make of the pictures: log of the likes it expects, by turns as if each brand had published them on the same day."
    from boig.data.world import Context, accounts, expected
    from boig.perception.verbalizer import load_verbalizer
    brands = [handle for handle, a in accounts().items() if a["kind"] == "brand"]
    return [float(np.log(expected(v, Context(brands[k % len(brands)], date(2020, 6, 1))))) for k, v in enumerate(load_verbalizer("pocket")(drawn))]


FD = "pocket-eval-FD"

def look(pipe, prompts, real, c: DDPOConfig) -> dict: # name -> a number a picture; FD: of all, then with each tenth left out
    "Distance to real pictures of the same prompts, the judge's opinion, the oracle's."
    from boig.behaviour.boigsd import fid_folds
    from boig.metrics.fid import load_features
    from boig.rewards.base import load_reward
    drawn, features, judge = pictures(pipe, prompts, c), load_features("pocket-eval", device="cpu"), load_reward("pocket-eval", device="cpu")
    def in_parts(call, *parts): return torch.cat([call(*part) for part in zip(*parts)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # n is stated
        apart = fid_folds(in_parts(features, drawn.split(64)), in_parts(features, real.split(64)), features.name).tolist()
    scores = in_parts(judge, drawn.split(64), [prompts[k:k + 64] for k in range(0, len(prompts), 64)])
    return {FD: apart, "pocket-eval score": scores.tolist(), "oracle log KPI": oracle_log_kpis(drawn), "jpeg": Compressible()(drawn, prompts).tolist()}


def quality(seen: dict) -> dict: return {k: v[0] if k == FD else float(np.mean(v)) for k, v in seen.items()} | {"n": len(seen["jpeg"])}


def differences(pairs: list[tuple[dict, dict]]) -> dict: # name -> mean and ends of its 95 % interval
    "What the first of each pair has more than the second, picture by picture, mean over the pairs; the intervals are over pictures, not over trainings."
    from boig.behaviour.boigsd import jackknife
    from boig.metrics.verbalization_metrics import bootstrap_means
    if not pairs: return {}
    more = {k: np.mean([np.subtract(a[k], b[k]) for a, b in pairs], 0) for k in pairs[0][0]}
    return {k: [round(float(x), 4) for x in (jackknife(v) if k == FD else bootstrap_means(v[:, None], 2000, 0)[:3, 0])] for k, v in more.items()}


def bench_fast(a) -> dict:
    "Both recipes from each seed; how much CPU time until the standard one's last value, and the pictures then."
    from boig.pocket.captions import pixels, quarters, samples
    prompts, (scenes, others) = samples(16, 0, "bench ddpo")[1], samples(a.validation, 1, "bench ddpo validation", unseen=True)
    real = pixels(map(quarters, scenes))
    common = dict(samples=a.samples, batch_size=a.samples // 2, micro_batch=32, steps=a.path, guidance=4.0, lora_rank=a.rank, lr=a.lr, tracker="")
    watched, reward, rows = others[:a.watched], Compressible(), []
    for seed in range(a.seeds):
        kept = Path(a.folder)/f"found-{seed}.json"
        if kept.exists():
            rows.append(json.loads(kept.read_text()))
            continue
        recipes = {"standard": DDPOConfig(epochs=a.epochs, seed=seed, **common), "fast": DDPOConfig.fast(epochs=a.fast_epochs, seed=seed, **common | {"steps": a.fast_path or a.path, "window": a.window, "reach": a.reach, "lr": a.fast_lr or a.lr})}
        asked = recipes["standard"]
        target, row = None, {"seed": seed}
        for name, config in recipes.items():
            folder = Path(a.folder)/f"{name}-{seed}"
            pipe = load_pipeline("pocket-sd", "cpu")
            log = train_ddpo(pipe, prompts, reward, folder, config, watch=Watch(folder, reward, watched, asked, target))
            cpu, value = log.cpu.cumsum(), log.value
            if target is None: target, row["standard_cpu_s"] = value.iloc[-1], float(cpu.iloc[-1])
            row[f"{name}_values"] = [round(v, 4) for v in value]
            row[f"{name}_cpu"] = [round(v, 1) for v in cpu]
            if name == "fast": reached = (value >= target).to_numpy().nonzero()[0]
            if name == "fast" and len(reached): row |= {"fast_cpu_s": float(cpu.iloc[reached[0]]), "share": float(cpu.iloc[reached[0]] / row["standard_cpu_s"]), "epochs": int(reached[0]) + 1}
            if name == "standard" or len(reached):
                if name == "fast": pipe.unet.load_state_dict(load_file(folder/"reached.safetensors"), strict=False)
                row.setdefault("looks", {})[name] = look(pipe, others, real, asked)
        write_json(kept, row)
        rows.append(row)
    base = look(load_pipeline("pocket-sd", "cpu"), others, real, DDPOConfig(**common))
    looks = [r.pop("looks") | {"base": base} for r in rows]
    for row, seen in zip(rows, looks): row |= {f"quality_{name}": quality(s) for name, s in seen.items()}
    shares = [r["share"] for r in rows if "share" in r]
    against = {f"{a} − {b}": differences([(s[a], s[b]) for s in looks if a in s]) for a, b in (("fast", "standard"), ("standard", "base"), ("fast", "base"))}
    return {"settings": {k: v for k, v in vars(a).items() if k not in ("sections", "folder", "trl", "out")}, "reward": reward.name, "model": "pocket-sd", "runs": rows, **against,
            "reached": f"{len(shares)} of {len(rows)}", "mean_share_of_the_time": float(np.mean(shares)) if len(shares) == len(rows) else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sections", nargs="+", choices=["trl", "fast"])
    add("--out", default=str(RESULTS), help="the record; other sections in it stay")
    add("--trl", default="", help="folder that TRL 0.23.1 was installed into")
    add("--pictures", type=int, default=8, help="trl: of an update"); add("--batch", type=int, default=4, help="trl: at once"); add("--steps", type=int, default=10, help="trl: of a path")
    add("--micro-steps", type=int, default=1, help="trl: steps of a path in one pass of ours; TRL takes one"); add("--repeats", type=int, default=7, help="trl: measurements of each")
    add("--folder", default="", help="fast: of the runs; needed to go on after a stop"); add("--seeds", type=int, default=3); add("--epochs", type=int, default=20, help="of the standard recipe")
    add("--fast-epochs", type=int, default=40, help="at most, of the fast one"); add("--samples", type=int, default=64, help="pictures of an epoch"); add("--path", type=int, default=20, help="steps of a path")
    add("--fast-lr", type=float, default=0, help="learning rate of the fast recipe; 0: --lr")
    add("--fast-path", type=int, default=0, help="of the fast recipe's training; 0: --path")
    add("--window", type=int, default=2); add("--reach", type=float, default=1.0); add("--lr", type=float, default=3e-4); add("--rank", type=int, default=8)
    add("--validation", type=int, default=512, help="pictures for the distance"); add("--watched", type=int, default=64, help="of them, asked after each epoch")
    a = parser.parse_args()
    a.folder = a.folder or tempfile.mkdtemp(prefix="boig-ddpo-")
    record = json.loads(Path(a.out).read_text()) if Path(a.out).exists() else {}
    for section in a.sections:
        load = os.getloadavg()[0]
        found = {"trl": bench_trl, "fast": bench_fast}[section](a)
        record[section] = found | {"load_of_the_machine": [load, os.getloadavg()[0]], "provenance": provenance()}
        write_json(Path(a.out), record)


if __name__ == "__main__":
    try: main()
    except BoigError as problem: sys.exit(str(problem))
