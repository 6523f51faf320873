"DDPO: gradients against finite differences, advantages by hand, a training that resumes to the same weights, rewards that fail."
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_sampler import tiny

from boig.core import BoigError, derive_seed
from boig.diffusion.ddpo import (FAST, Advantages, DDPOConfig, Run, base_mean, choose_steps, collect, ddpo_is, ddpo_sf, draw_batch, epoch_prompts, path_loss, reward_plan, score, standardize, step_loss,
                                 train_ddpo, window_eta)
from boig.diffusion.pipeline import load_pipeline
from boig.diffusion.sampler import log_prob, make_steps, sample, step_policy
from boig.pocket.sd import make_scheduler
from boig.rewards.base import load_reward

SMALL = DDPOConfig(epochs=2, samples=4, batch_size=2, micro_batch=2, steps=3, guidance=2.0, lr=1e-3, advantages="global", tracker="")
PROMPTS = ["a cat", "a dog", "a hat"]


def brightness(images, prompts, context=None): return images.mean(dim=(1, 2, 3))


def weights(pipe): return torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])


def train(folder, config=SMALL, pipe=None, reward=brightness, **options):
    pipe = pipe or tiny()
    return pipe, train_ddpo(pipe, PROMPTS, reward, folder, config, progress=False, **options)


# --- losses and advantages

def test_losses_by_hand():
    old, new = torch.zeros(4), torch.tensor([5e-5, 5e-4, 5e-4, -5e-4])
    A = torch.tensor([2.0, 2.0, -2.0, -2.0])
    want = [-2 * math.exp(5e-5), -2 * (1 + 1e-4), 2 * math.exp(5e-4), 2 * (1 - 1e-4)]
    torch.testing.assert_close(ddpo_is(new, old, A), torch.tensor(want))
    assert torch.equal(ddpo_sf(new, A), -A * new)


def test_both_losses_have_the_same_gradient_before_the_first_update():
    lp, A = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    g1, = torch.autograd.grad(ddpo_is(lp, lp.detach(), A).sum(), lp)
    g2, = torch.autograd.grad(ddpo_sf(lp, A).sum(), lp)
    torch.testing.assert_close(g1, g2)


class Linear(torch.nn.Module):
    "A denoiser of two numbers: θ0 x + θ1."
    dtype = torch.float64
    def __init__(self, θ): super().__init__(); self.θ = torch.nn.Parameter(torch.as_tensor(θ, dtype=torch.float64))
    def forward(self, x, t, encoder_hidden_states, return_dict): return (self.θ[0] * x + self.θ[1],)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_policy_gradient_is_the_slope_of_the_expected_reward(kind):
    "Two steps in one dimension; the true slope from the same noise, moved by ±h."
    steps = make_steps(DDIMScheduler(10, 0.1, 0.4, prediction_type=kind, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False), 2, dtype=torch.float64)
    z = torch.randn(3, 200_000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    def play(θ):
        unet, x, total = Linear(θ), z[0], 0
        for i in range(2):
            mean, sigma = step_policy(unet, steps, i, x, x, None, 1)
            x = (mean + sigma * z[i + 1]).detach()
            total = total + log_prob(x, mean, sigma)
        return unet, -(x.flatten() - 0.5)**2, total
    θ, h = torch.tensor([0.5, 0.2], dtype=torch.float64), 1e-4
    unet, r, total = play(θ)
    parts = torch.stack([torch.autograd.grad(ddpo_sf(l, a).mean(), unet.θ, retain_graph=True)[0] for l, a in zip(total.chunk(40), (r - r.mean()).chunk(40))])
    for k, step in enumerate(h * torch.eye(2, dtype=torch.float64)):
        slopes = torch.stack([c.mean() for c in ((play(θ + step)[1] - play(θ - step)[1]) / (2 * h)).chunk(40)])
        error = (-parts[:, k] - slopes).std() / 40**0.5
        assert abs(float(-parts[:, k].mean() - slopes.mean())) < 4 * error
        assert error < 0.25 * slopes.mean().abs() # or the test could not fail


def test_gradient_of_path_loss_by_finite_differences():
    "The whole chain, guidance, ratio and divergence included, in double precision."
    pipe = tiny().to(torch.float64)
    paths = sample(pipe, PROMPTS[:2], [1, 2], steps=2, guidance=2.0)
    config, i, A = dataclasses.replace(SMALL, kl=0.3, clip=10.0), torch.tensor([0, 1]), torch.tensor([1.5, -0.5], dtype=torch.float64)
    weight, base = pipe.unet.conv_out.bias, paths.latents[torch.arange(2), i] * 0.99
    def loss(): return path_loss(pipe.unet, paths, i, A, config, base)[0].sum()
    loss().backward()
    with torch.no_grad():
        for k in (0, 3):
            at = []
            for h in (1e-5, -2e-5): weight[k] += h; at.append(float(loss()))
            weight[k] += 1e-5
            assert (at[0] - at[1]) / 2e-5 == pytest.approx(float(weight.grad[k]), rel=1e-5)


def test_advantages_by_hand():
    integers = Advantages("global")(["a"] * 3, torch.tensor([1, 2, 4]))
    torch.testing.assert_close(integers, torch.tensor([-1.0690450, -0.2672612, 1.3363062]))
    ulp = torch.nextafter(torch.tensor(0.7), torch.tensor(1.0))
    assert Advantages("global")(["a"] * 4, torch.stack([torch.tensor(0.7)] * 3 + [ulp])).abs().max() == 0
    assert Advantages("prompt")(["a"], torch.tensor([3.0])).tolist() == [0]
    assert Advantages("global", clip=1.2)(["a"] * 3, torch.tensor([1, 2, 4])).max() == pytest.approx(1.2)


def test_advantages_do_not_know_the_unit():
    r = torch.randn(8)
    for scale, shift in ((1e-9, 0), (1e4, 5)): torch.testing.assert_close(standardize(r.double() * scale + shift, r.double() * scale + shift), standardize(r, r))


def test_advantages_of_prompts():
    a = Advantages("prompt", size=3, min_count=2)
    first = a(["x", "x", "y", "z"], torch.tensor([1.0, 3.0, 5.0, math.nan]))
    everyone = torch.tensor([1.0, 3.0, 5.0])
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0, float((5 - everyone.mean()) / everyone.std(correction=0)), 0.0]))
    a(["x", "x"], torch.tensor([5.0, 7.0]))
    assert a.seen == {"x": [3.0, 5.0, 7.0], "y": [5.0], "z": []}
    a(["y"] * 5, torch.arange(5.0))
    assert a.seen["y"] == [0, 1, 2, 3, 4]  # at least all of this epoch's


def test_advantages_of_groups():
    r = torch.tensor([1.0, 3.0, 10.0, 14.0, 7.0, 7.0, math.nan, 5.0])
    d = torch.tensor([-1.0, 1.0, -2.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    want = d / d[[0, 1, 2, 3, 4, 5, 7]].square().mean().sqrt()
    torch.testing.assert_close(Advantages("group")(list("aabbccdd"), r), want)
    assert Advantages("group")(["a"] * 3, torch.tensor([5, 5, 5])).tolist() == [0, 0, 0]


# --- rewards

def test_score_keeps_the_good_ones():
    def reward(images, prompts, context):
        if "bad" in prompts: raise ValueError("no")
        return torch.tensor([math.inf if p == "inf" else len(p) for p in prompts])
    r, problem = score(reward, torch.rand(4, 3, 4, 4), ["ok", "bad", "inf", "fine"])
    assert r[0] == 2 and r[3] == 4 and r[1].isnan() and r[2].isnan() and problem == "ValueError: no"
    integers, problem = score(lambda images, prompts, context: [1, 2], torch.rand(2, 3, 4, 4), ["a", "b"])
    assert integers.tolist() == [1, 2] and integers.dtype == torch.float32 and not problem
    for bad in (lambda i, p, c: i.mean(), lambda i, p, c: torch.zeros(len(i), 1), lambda i, p, c: torch.zeros(5)):
        with pytest.raises(BoigError, match="has the shape"): score(bad, torch.rand(2, 3, 4, 4), ["a", "b"])


def test_a_failed_batch_leaves_its_memory_before_its_pictures_are_asked_one_by_one():
    "Or what did not fit in would still be there."
    held = []
    def reward(images, prompts, context):
        if len(images) == 1: return images.mean((1, 2, 3)) + (held[0]() is not None)
        work = images * 2
        held.append(weakref.ref(work))
        raise RuntimeError("out of memory")
    assert score(reward, torch.zeros(3, 3, 4, 4), list("abc"))[0].tolist() == [0, 0, 0]


def test_failing_rewards_are_reported_and_do_not_train(tmp_path):
    def sick(images, prompts, context=None):
        return torch.where(torch.tensor([p == "a cat" for p in prompts]), math.nan, brightness(images, prompts))
    with pytest.warns(UserWarning, match="no reward for"): pipe, log = train(tmp_path/"a", reward=sick)
    assert log.failed.sum() in (2, 3) and log.reward.notna().all() and weights(pipe).isfinite().all() # 8 pictures: each prompt twice or three times
    with pytest.raises(BoigError, match="failed on all 4.*ZeroDivisionError"): train(tmp_path/"b", reward=lambda *a: 1 / 0)
    with pytest.raises(BoigError, match=r"shape \[2\]; this one gave \[\]"): train(tmp_path/"c", reward=lambda images, *a: images.mean())


def test_a_path_of_nan_counts_as_failed(tmp_path):
    run = Run(tiny(), PROMPTS, brightness, tmp_path, SMALL)
    forward = run.pipe.unet.forward
    def broken(x, *args, **kwargs):
        (out,) = forward(x, *args, **kwargs)
        return (torch.cat([out[:1] * math.nan, out[1:]]),)
    run.pipe.unet.forward = broken
    updates, rewards, problem = collect(run, PROMPTS + PROMPTS[:1], brightness, None, 0)
    assert rewards.isnan().tolist() == [True, False, True, False] and "NaN" in problem
    assert all(p.latents.isfinite().all() and p.log_probs.isnan().all(1).tolist() == [True, False] for batches in updates for _, p in batches)


@pytest.mark.parametrize("loss", ["is", "sf"])
def test_a_broken_path_teaches_nothing(loss):
    "Though it has an advantage of 0 as a flat one, which still pays for its divergence."
    new, mean = (torch.ones(2, *shape).mul(1.5).requires_grad_() for shape in ((), (1, 1, 1)))
    found, watch = step_loss(new, torch.tensor([math.nan, 1.5]), mean, torch.ones(1, 1, 1, 1), torch.zeros(2), dataclasses.replace(SMALL, loss=loss, kl=0.3), torch.zeros(2, 1, 1, 1))
    found.sum().backward()
    assert found[0] == 0 and watch[:, 0].eq(0).all() and new.grad[0] == 0 and mean.grad[0] == 0
    assert watch[:, 1].tolist() == [0, 0, 0, 1.125] and mean.grad[1] == pytest.approx(0.45)


# --- training

def test_brightness_climbs(tmp_path):
    "The decoder of random weights hardly looks at its latents; here a picture is three of their channels."
    pipe = tiny(make_scheduler())
    pipe.vae.decode = lambda z, return_dict: (z[:, :3] * pipe.vae.config.scaling_factor / 3,)
    _, log = train(tmp_path, dataclasses.replace(SMALL, epochs=6, samples=32, batch_size=16, micro_batch=16, guidance=1.0, lr=4e-3, timestep_fraction=0.5), pipe)
    assert log.reward.iloc[-1] > log.reward.iloc[0] + 4 * log.reward_std.iloc[0] / 32**0.5


@pytest.mark.parametrize("config", [
    dataclasses.replace(SMALL, advantages="prompt", min_count=2, ema=0.5, timestep_fraction=0.5, inner_epochs=2),
    dataclasses.replace(SMALL, **FAST | dict(group=2, window=1)),
], ids=["standard", "fast"])
def test_stopped_in_an_epoch_and_gone_on(tmp_path, config):
    straight, log = train(tmp_path/"straight", config)
    calls = []
    def killed(images, prompts, context=None):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt # in the second of two batches of the second epoch
        return brightness(images, prompts)
    killed.name = brightness.name = "brightness"
    try:
        with pytest.raises(KeyboardInterrupt): train(tmp_path/"killed", config, reward=killed)
        resumed, log2 = train(tmp_path/"killed", config)
        del killed.name
        assert torch.equal(weights(straight), weights(resumed))
        assert log.drop(columns="seconds").equals(log2.drop(columns="seconds"))
        with pytest.raises(BoigError, match="another lr"): train(tmp_path/"killed", dataclasses.replace(config, lr=1.0))
    finally: del brightness.name
    assert sorted(p.name for p in (tmp_path/"killed").iterdir()) == ["checkpoint.pt", "log.csv", "pipeline"]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path/"killed"/"pipeline")
    assert torch.equal(weights(loaded), weights(resumed))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("lora", [0, 2])
def test_the_ratio_starts_at_one(tmp_path, precision, lora):
    pipe, log = train(tmp_path, dataclasses.replace(SMALL, precision=precision, lora_rank=lora, epochs=1))
    assert (log.ratio_start == 0).all() and (log.ratio_off > 0).all()
    assert weights(pipe).isfinite().all() and pipe.unet.dtype == torch.float32


def test_the_adapter_is_loaded_by_diffusers_and_by_name(tmp_path):
    pipe, log = train(tmp_path, dataclasses.replace(SMALL, lora_rank=2, kl=0.1))
    assert log.kl.iloc[0] >= 0 and log.kl.iloc[1] > 0
    fresh = tiny()
    untouched = sample(fresh, PROMPTS, [1, 2, 3], steps=3).images
    fresh.load_lora_weights(tmp_path/"adapter")
    mine, theirs = (sample(p, PROMPTS, [1, 2, 3], steps=3).images for p in (pipe, fresh))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert (mine - untouched).abs().max() > 1e-4
    tiny().save_pretrained(tmp_path/"base")
    added = load_pipeline(str(tmp_path/"adapter"), "cpu", base=str(tmp_path/"base"))
    torch.testing.assert_close(sample(added, PROMPTS, [1, 2, 3], steps=3).images, theirs, rtol=0, atol=1e-5)
    assert [n for n, _ in added.unet.named_parameters()] == [n for n, _ in tiny().unet.named_parameters()]
    with pytest.raises(BoigError, match="which pipeline they belong to"): load_pipeline(str(tmp_path/"adapter"), "cpu")
    with pytest.raises(BoigError, match="no pipeline"): load_pipeline(str(tmp_path), "cpu")
    with pytest.raises(BoigError, match="load a fresh one"): train(tmp_path/"b", dataclasses.replace(SMALL, lora_rank=2), pipe)


def test_a_compiled_denoiser_saves_what_others_can_load(tmp_path):
    "torch.compile puts a prefix before every name, which no other pipeline has."
    pipe = tiny()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    train(tmp_path, dataclasses.replace(SMALL, lora_rank=2, epochs=1), pipe)
    names = list(load_file(file := tmp_path/"adapter"/"pytorch_lora_weights.safetensors"))
    tiny().save_pretrained(tmp_path/"base")
    loaded, base = load_pipeline(str(tmp_path/"adapter"), "cpu", base=str(tmp_path/"base")), load_pipeline(str(tmp_path/"base"), "cpu")
    mine, theirs, untouched = (sample(p, PROMPTS, [1, 2, 3], steps=3).images for p in (pipe, loaded, base))
    assert len(names) > 10 and not [n for n in names if "_orig_mod" in n]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert (mine - untouched).abs().max() > 1e-4
    save_file({n.replace("down_blocks", "elsewhere"): x for n, x in load_file(file).items()}, file)
    with pytest.raises(BoigError, match="LoRA weights belong to no layer.*elsewhere"): load_pipeline(str(tmp_path/"adapter"), "cpu", base=str(tmp_path/"base"))


@pytest.mark.parametrize("lora", [0, 2])
def test_the_divergence_is_zero_at_the_base_and_by_the_formula(tmp_path, lora):
    run = Run(tiny(), PROMPTS, brightness, tmp_path, dataclasses.replace(SMALL, kl=1.0, lora_rank=lora))
    updates, *_ = collect(run, PROMPTS + PROMPTS[:1], brightness, None, 0)
    paths, i = updates[0][0][1], torch.tensor([0, 1])
    def kl(): return path_loss(run.pipe.unet, paths, i, torch.zeros(2), run.config, base_mean(run, paths, i))[1][3]
    assert kl().abs().max() == 0
    with torch.no_grad():
        for p in run.params: p.add_(0.01)
    rows = torch.arange(2)
    with torch.no_grad(): mean, sigma = step_policy(run.pipe.unet, paths.steps, i, paths.latents[rows, i], paths.states, paths.empty, 2.0)
    base = base_mean(run, paths, i)
    want = torch.stack([torch.distributions.kl_divergence(torch.distributions.Normal(m, s), torch.distributions.Normal(b, s)).mean() for m, b, s in zip(mean, base, sigma)])
    torch.testing.assert_close(kl(), want)
    assert want.min() > 0 and all(p.requires_grad for p in run.params)
    if lora:
        with pytest.raises(RuntimeError): base_mean(run, dataclasses.replace(paths, states=paths.states[:, :, 1:]), i)
        assert not any(getattr(m, "disable_adapters", None) is True for m in run.pipe.unet.modules()) # the adapters are on again


def test_killed_and_gone_on(tmp_path):
    "kill -9 while the second epoch waits for its rewards."
    code = f"""if True:
        import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_ddpo as t
        calls = []
        def slow(images, prompts, context=None):
            calls.append(1)
            if len(calls) == 4: print("now", flush=True); time.sleep(600)
            return t.brightness(images, prompts)
        slow.name = "brightness"
        t.train({str(tmp_path/'a')!r}, reward=slow)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    brightness.name = "brightness"  # the same reward, says who gives it the same name
    try: resumed, log = train(tmp_path/"a")
    finally: del brightness.name
    straight, log2 = train(tmp_path/"b")
    assert torch.equal(weights(resumed), weights(straight)) and log.reward.equals(log2.reward)


def two_processes(code): # started, not waited for
    "Two processes with gloo on the CPU, each with this file as `t`."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_ddpo as t\n{code}"
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    return [subprocess.Popen([sys.executable, "-c", code], env=env | dict(RANK=str(k), LOCAL_RANK=str(k)), stderr=subprocess.PIPE, text=True) for k in range(2)]


def test_two_processes_are_one(tmp_path):
    "Two processes with gloo on the CPU: the same rewards and, but for the order of additions, the same weights."
    both = two_processes(f"t.train({str(tmp_path/'two')!r}, t.PAIR)")
    one, log = train(tmp_path/"one", PAIR)
    assert [(p.communicate(timeout=600), p.returncode)[1] for p in both] == [0, 0]
    two = StableDiffusionPipeline.from_pretrained(tmp_path/"two"/"pipeline")
    log2 = json.loads(json.dumps(torch.load(tmp_path/"two"/"checkpoint.pt", weights_only=True)["log"]))
    for column in ("reward", "reward_std", "loss", "grad_norm"): assert [row[column] for row in log2] == pytest.approx(log[column].tolist(), rel=1e-3, abs=1e-6)
    assert (weights(one) - weights(two)).abs().mean() < 1e-2 * (weights(one) - weights(tiny())).abs().mean()


def test_two_trainings_in_one_launch_and_an_error_in_one_process(tmp_path):
    "With a tracker, whose end must not be that of the processes' group; and an error in one must not leave the other waiting."
    both = two_processes(f"""
import os, test_tuning
from dataclasses import replace
test_tuning.tuning.get_available_trackers = lambda: ["notes"]
one = replace(t.PAIR, epochs=1, tracker="notes")
for k in range(2): t.train(f"{tmp_path}/{{k}}", one)
t.train({str(tmp_path/'wrong')!r}, one, reward=lambda images, *_: images.mean() if os.environ["RANK"] == "1" else images.mean((1, 2, 3)))""")
    said = [p.communicate(timeout=600)[1] for p in both]
    assert "BoigError: Another process of this run stopped" in said[0] and "BoigError: A reward of 1 pictures has the shape [1]" in said[1]
    for k in range(2): assert len(pd.read_csv(tmp_path/str(k)/"log.csv")) == 1 and (tmp_path/str(k)/"notes.txt").read_text().splitlines() == ["DDPOConfig", "lr 0.0001", "0 reward", "finished"]


def test_whatever_fails_in_one_process_ends_both(tmp_path):
    "What watches, the log that cannot be written, the result that cannot be put in its place: one process meets it, both end, and with a word each; then they can train."
    both = two_processes(f"""
import os
from dataclasses import replace
from pathlib import Path
one, first = replace(t.PAIR, epochs=1), os.environ["RANK"] == "0"
def watch(*_): return dict(seen=1.0) if first else dict(seen=1 / 0)
for name, more in (("watched", dict(watch=watch)), ("log.csv", {{}}), ("pipeline", {{}}), ("fine", {{}})):
    folder = Path({str(tmp_path)!r})/name
    if name == "log.csv" and first: (folder/name).mkdir(parents=True)
    if name == "pipeline" and first: folder.mkdir(); (folder/name).touch()
    try: t.train(folder, one, **more)
    except Exception as e: print(name, type(e).__name__, "other" if "Another process" in str(e) else "own", file=sys.stderr)
    else: print(name, "done", file=sys.stderr)""")
    said = [[line for line in p.communicate(timeout=600)[1].splitlines() if line.split()[:1] and line.split()[0] in ("watched", "log.csv", "pipeline", "fine")] for p in both]
    assert said == [["watched BoigError other", "log.csv IsADirectoryError own", "pipeline NotADirectoryError own", "fine done"],
                    ["watched ZeroDivisionError own", "log.csv BoigError other", "pipeline BoigError other", "fine done"]]
    assert (tmp_path/"fine"/"pipeline"/"model_index.json").is_file() and not (tmp_path/"watched"/"pipeline").exists()


def test_processes_that_see_other_folders_do_not_go_on(tmp_path):
    "Only the first writes checkpoints: on disks of their own the others would begin anew, and the sum of both would be nonsense."
    train(tmp_path/"0", dataclasses.replace(PAIR, epochs=1))
    both = two_processes(f"""
import os, dataclasses
try: t.train({str(tmp_path)!r} + "/" + os.environ["RANK"], t.PAIR)
except t.BoigError as e: print("refused:", e, file=sys.stderr)""")
    said = [p.communicate(timeout=600)[1] for p in both]
    assert all("refused: The processes of this run find checkpoints of 0 to 1 epochs: all must see the same folder" in s for s in said)


def test_a_reward_that_fails_on_one_prompt_teaches_nothing_about_it(tmp_path):
    "The fast recipe makes an update of each prompt's pictures: one whose reward always fails is left out, the others teach; an epoch without any reward is an error."
    config = DDPOConfig.fast(epochs=1, samples=8, batch_size=4, group=4, steps=4, window=2, guidance=2.0, lr=1e-3, tracker="", micro_batch=4)
    def some(images, prompts, context=None): return images.mean((1, 2, 3)).where(torch.tensor([p != "a cat" for p in prompts]), torch.nan)
    def none(images, prompts, context=None): return images.mean((1, 2, 3)) * torch.nan
    texts, start = ["a cat", "a dog"], weights(tiny())
    pipe = tiny()
    with pytest.warns(UserWarning, match="no reward for 4 of 8"): log = train_ddpo(pipe, texts, some, tmp_path/"some", config, progress=False)
    assert log.failed[0] == 4 and not torch.equal(weights(pipe), start)
    pipe = tiny()
    with pytest.raises(BoigError, match="failed on all 8 pictures of epoch 0"), warnings.catch_warnings(): train_ddpo(pipe, texts, none, tmp_path/"none", config, progress=False)
    assert torch.equal(weights(pipe), start)  # no step, not even of momentum or weight decay


def test_two_groups_of_one_prompt_are_two(tmp_path, monkeypatch):
    "They start from other noise: each is compared with itself."
    seen = []
    monkeypatch.setattr(Advantages, "__call__", lambda self, texts, rewards, was=Advantages.__call__: seen.append(list(texts)) or was(self, texts, rewards))
    config = dataclasses.replace(SMALL, epochs=1, samples=4, batch_size=4, group=2, advantages="group", shared_start=True, window=1)
    train_ddpo(tiny(), ["a cat"], brightness, tmp_path, config, progress=False)
    (a, b, c, d), = seen
    assert a == b != c == d


def test_a_scheduler_that_ddim_cannot_follow_changes_nothing(tmp_path):
    pipe = tiny()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=True)
    with pytest.raises(BoigError, match="thresholding"): train(tmp_path, dataclasses.replace(SMALL, lora_rank=2), pipe)
    pipe.scheduler = tiny().scheduler
    train(tmp_path, dataclasses.replace(SMALL, lora_rank=2, epochs=1), pipe)  # no adapter was left behind


PAIR = dataclasses.replace(SMALL, lr=1e-4, weight_decay=0.0)


def gradient(pipe, config, folder, keep):
    "The gradient of the first update, and what it logs."
    run, found = Run(pipe, PROMPTS, brightness, folder, dataclasses.replace(config, keep_graph=keep)), {}
    from boig.diffusion import ddpo
    with torch.no_grad():
        for p in run.params if config.kl else (): p.add_(0.01)  # away from the base, or the divergence has no gradient
    step, ddpo.step = ddpo.step, lambda run, of: found.update(grad=torch.cat([p.grad.flatten() for p in run.params])) or 0.0
    try:
        texts = epoch_prompts(PROMPTS, config, 0)
        updates, rewards, _ = collect(run, texts, brightness, None, 0, first=0)
        assert bool(updates[0][0][1].kept) == keep
        found["log"] = ddpo.update(run, updates[0], run.advantages(texts, rewards), 0, 0)
        assert not updates[0][0][1].kept
    finally: ddpo.step = step
    return found


@pytest.mark.parametrize("changes", [dict(), dict(kl=0.5, window=1), dict(precision="bf16", window=2), dict(timestep_fraction=0.5, micro_batch=1), dict(lora_rank=2)], ids=str)
def test_the_graph_of_sampling_gives_the_same_gradient(tmp_path, changes):
    config = dataclasses.replace(SMALL, **changes)
    again, kept = (gradient(tiny(), config, tmp_path/str(keep), keep) for keep in (False, True))
    tolerance = 2e-2 if config.precision != "no" else 1e-5
    assert (kept["grad"] - again["grad"]).norm() < tolerance * again["grad"].norm() and again["grad"].norm() > 0
    assert kept["log"] == pytest.approx(again["log"], rel=1e-4, abs=1e-7) and again["log"]["ratio_off"] == 0
    assert (again["log"]["kl"] > 1e-3) == (config.kl > 0)


def test_fast_recipe(tmp_path):
    config = DDPOConfig.fast(epochs=1, samples=8, batch_size=4, group=4, steps=4, window=2, guidance=2.0, lr=1e-3, tracker="", micro_batch=4)
    assert config.keep_graph and config.fresh and config.advantages == "group"
    run = Run(tiny(), PROMPTS, brightness, tmp_path/"a", config)
    texts = epoch_prompts(PROMPTS, config, 0)
    assert texts[:4] == texts[:1] * 4 and texts[4:] == texts[4:5] * 4 and texts[0] != texts[4]
    paths = draw_batch(run, texts[4:], torch.arange(4, 8), 0, True)
    assert (paths.steps.sigma > 0).tolist() == [False, True, True, False] and [n for n, *_ in paths.kept] == [1, 2] # the second update's window
    assert paths.latents[:, :2].std(0).max() == 0 and paths.latents[:, 2].std(0).min() > 0 # one start, and the first step taken once
    pipe, log = train(tmp_path/"b", config)
    assert log.ratio_off.iloc[0] == 0 and log.clipped.iloc[0] == 0 and log.grad_norm.iloc[0] > 0


def test_windows_slide_over_the_random_steps():
    scheduler = DDIMScheduler(set_alpha_to_one=True) # its last step has no chance
    config = DDPOConfig(steps=6, window=2, eta=0.5)
    assert [(window_eta(scheduler, config, turn) > 0).nonzero().flatten().tolist() for turn in range(5)] == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 1]]
    assert window_eta(scheduler, config, 0).max() == 0.5 and window_eta(scheduler, DDPOConfig(), 0) == 1.0
    half = dataclasses.replace(config, reach=0.6)
    assert {tuple((window_eta(scheduler, half, turn) > 0).nonzero().flatten().tolist()) for turn in range(9)} == {(0, 1), (1, 2)}


def test_rewards_in_a_thread_change_nothing(tmp_path):
    a, log = train(tmp_path/"a")
    threads = set()
    def reward(images, prompts, context=None):
        import threading
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return brightness(images, prompts)
    b, log2 = train(tmp_path/"b", dataclasses.replace(SMALL, overlap=True), reward=reward)
    assert torch.equal(weights(a), weights(b)) and log.drop(columns="seconds").equals(log2.drop(columns="seconds"))
    assert not threads & {__import__("threading").get_ident()}
    with pytest.raises(BoigError, match="has the shape"): train(tmp_path/"c", dataclasses.replace(SMALL, overlap=True), reward=lambda images, *a: images.mean())


def test_the_thread_of_rewards_works_on_the_gpu_of_the_training(monkeypatch):
    "A new thread of torch begins on the first GPU."
    import threading
    from boig.diffusion.ddpo import _thread
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((device, threading.get_ident())))
    with _thread(torch.device("cuda", 1)) as thread: assert seen == [(torch.device("cuda", 1), thread.submit(threading.get_ident).result())]
    with _thread(torch.device("cpu")) as thread: thread.submit(int).result()
    assert len(seen) == 1


def test_checkpointing_plays_blocks_twice(tmp_path):
    "Or the option would do nothing."
    calls = {}
    for on in (False, True):
        run = Run(tiny(), PROMPTS, brightness, tmp_path, dataclasses.replace(SMALL, gradient_checkpointing=on))
        calls[on] = 0
        def count(*_): calls[on] += 1
        run.pipe.unet.down_blocks[1].resnets[0].register_forward_pre_hook(count) # not forward_hook: playing again stops as soon as it has what it needs
        updates, *_ = collect(run, PROMPTS + PROMPTS[:1], brightness, None, 0)
        numbers, paths = updates[0][0]
        calls[on] = 0
        path_loss(run.pipe.unet, paths, torch.tensor([0, 1]), torch.ones(2), run.config)[0].sum().backward()
    assert calls == {False: 1, True: 2}


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_denoisers_that_say_something_else(tmp_path, kind):
    pipe, log = train(tmp_path, dataclasses.replace(SMALL, epochs=1), tiny(DDIMScheduler(prediction_type=kind, clip_sample=False, steps_offset=1, set_alpha_to_one=False)))
    assert log.ratio_start.iloc[0] == 0 and log.grad_norm.iloc[0] > 0 and weights(pipe).isfinite().all()


@pytest.mark.parametrize("changes", [dict(micro_batch=1, gradient_checkpointing=True), dict(micro_steps=2), dict(micro_steps=8, kl=0.1)], ids=str)
def test_smaller_batches_checkpointing_and_several_steps_at_once_change_nothing(tmp_path, changes):
    config = dataclasses.replace(SMALL, epochs=1, samples=4, batch_size=4, micro_batch=4, kl=changes.get("kl", 0.0))
    a, log = train(tmp_path/"a", config)
    b, log2 = train(tmp_path/"b", dataclasses.replace(config, **changes))
    for column in ("reward", "loss", "grad_norm"): assert log[column].iloc[0] == pytest.approx(log2[column].iloc[0], rel=1e-3, abs=1e-6)
    assert (weights(a) - weights(b)).abs().mean() < 1e-5 # AdamW's first step is lr · sign, so rounding shows where a gradient is 0


def test_steps_that_are_trained():
    steps = make_steps(DDIMScheduler(set_alpha_to_one=True), 10)
    chosen = choose_steps(steps, torch.arange(200), dataclasses.replace(SMALL, timestep_fraction=0.34), 0, 0)
    assert chosen.shape == (200, 3) and set(chosen.flatten().tolist()) == set(range(9)) # never the last one, which has no chance
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    with pytest.raises(BoigError, match="None of the 1 steps"): choose_steps(make_steps(DDIMScheduler(), 1), torch.arange(2), SMALL, 0, 0)


def test_the_negative_prompt_is_the_one_of_diffusers(tmp_path):
    config = dataclasses.replace(SMALL, negative="a blue dog", guidance=8.0)
    run, bare = (Run(tiny(), PROMPTS, brightness, tmp_path, c) for c in (config, dataclasses.replace(config, negative="")))
    noise = [torch.Generator().manual_seed(derive_seed(config.seed, "picture", 0, k)) for k in range(2)]
    with torch.no_grad(): want = run.pipe(PROMPTS[:2], negative_prompt=["a blue dog"] * 2, num_inference_steps=3, guidance_scale=8.0, eta=1.0, output_type="pt", generator=noise).images
    mine, other = (draw_batch(r, PROMPTS[:2], torch.arange(2), 0, False).images for r in (run, bare))
    torch.testing.assert_close(mine, want, rtol=0, atol=2e-5)
    assert (mine - other).abs().max() > 1e-3


def test_the_limits_of_advantages_are_the_settings(tmp_path):
    a = Run(tiny(), PROMPTS, brightness, tmp_path, dataclasses.replace(SMALL, advantages="prompt", buffer=7, min_count=3, advantage_clip=1.5)).advantages
    assert (a.kind, a.size, a.min_count, a.clip) == ("prompt", 7, 3, 1.5)


def test_prompts_take_turns():
    config = DDPOConfig(samples=4)
    texts = [p for e in range(3) for p in epoch_prompts(list("abc"), config, e)]
    assert all(sorted(texts[k:k + 3]) == list("abc") for k in range(0, 12, 3))
    assert texts != [p for e in range(3) for p in epoch_prompts(list("abc"), dataclasses.replace(config, seed=1), e)]


def test_extra_columns_and_score_function(tmp_path):
    pipe, log = train(tmp_path, dataclasses.replace(SMALL, loss="sf", batch_size=4), watch=lambda pipe, epoch: {"twice": 2 * epoch})
    assert log.twice.tolist() == [0, 2] and (tmp_path/"log.csv").read_text().count("\n") == 3


def test_one_clear_line(tmp_path):
    for changes, line in ((dict(loss="ppo"), "loss is one of is, sf"), (dict(loss="sf"), "one update"), (dict(samples=5), "multiple of batch_size"), (dict(eta=0.0), "eta, timestep"), (dict(window=9), r"\[0, 3\]"), (dict(group=3), "multiple of group"), (dict(advantages="group"), "group to 2"), (dict(tracker="abacus"), "does not know it"),
                          (dict(precision="int8"), "precision is one of"), (dict(epochs=0), "at least 1"), (dict(timestep_fraction=1.5), "timestep_fraction")):
        with pytest.raises(BoigError, match=line): train(tmp_path, dataclasses.replace(SMALL, **changes))
    for prompts in ([], "a cat"):
        with pytest.raises(BoigError, match="no prompts"): train_ddpo(tiny(), prompts, brightness, tmp_path, SMALL)
    with pytest.raises(BoigError, match="not object"): train_ddpo(object(), PROMPTS, brightness, tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def test_another_reward_is_another_run(tmp_path):
    "A function's code tells it from another, unless it has a name; an object's settings do."
    one = dataclasses.replace(SMALL, epochs=1)
    def reward(images, prompts, context): return images.mean((1, 2, 3))
    _, log = train(tmp_path, one, reward=reward)
    def reward(images, prompts, context): return images.mean((1, 2, 3))  # the same again
    assert train(tmp_path, one, reward=reward)[1].equals(log)
    def reward(images, prompts, context): return -images.mean((1, 2, 3))
    with pytest.raises(BoigError, match="another code or settings of the reward"): train(tmp_path, one, reward=reward)
    def made(sign): return lambda images, prompts, context: sign * images.mean((1, 2, 3))
    train(tmp_path/"closure", one, reward=made(1))
    with pytest.raises(BoigError, match="another code or settings"): train(tmp_path/"closure", one, reward=made(-1))
    class Told:
        name = "told"
        def __init__(self, **settings): self.settings = settings
        def __call__(self, images, prompts, context): return brightness(images, prompts)
    train(tmp_path/"told", one, reward=Told(form="sum"))
    with pytest.raises(BoigError, match="another code or settings"): train(tmp_path/"told", one, reward=Told(form="mean"))


HOME = """
from functools import cache, partial
import torch
SIGN = {sign}
def helper(images): return {sign} * images.mean((1, 2, 3))
def named(images, prompts, context): return helper(images)
def number(images, prompts, context): return SIGN * images.mean((1, 2, 3))
def keyword(images, prompts, context, *, sign={sign}): return sign * images.mean((1, 2, 3))
def below(images, prompts, context): return [helper(i[None])[0] for i in images]
def itself(images, prompts, context): return named(images, prompts, context) if len(images) < 2 else torch.cat([itself(images[:1], prompts, context), itself(images[1:], prompts, context)])
def closed(inner): return lambda *given: inner(*given)
def signed(images, prompts, context, sign): return sign * images.mean((1, 2, 3))
part, around = partial(signed, sign={sign}), closed(named)
no_grad = torch.no_grad()(named)
@cache
def made(): return {sign}
def cached(images, prompts, context): return made() * images.mean((1, 2, 3))
class Holds:
    def __init__(self, sign): self.sign = sign
    def __call__(self, images, prompts, context): return self.sign * images.mean((1, 2, 3))
held, tensor, method = Holds({sign}), Holds(torch.tensor({sign})), Holds({sign}).__call__
class Class(Holds):
    def __call__(self, images, prompts, context): return {sign} * images.mean((1, 2, 3))
of_class = Class(0)
class Net(torch.nn.Module):
    def __init__(self, sign): super().__init__(); self.weight = torch.nn.Parameter(torch.tensor(float(sign)))
    def forward(self, images, prompts, context): return self.weight * images.mean((1, 2, 3))
net, closed_net, in_net = Net({sign}), closed(Net({sign})), Holds(torch.nn.Linear(1, 1).requires_grad_({sign} > 0))
class Called:
    name = "called"
    def __init__(self, **held): vars(self).update(held, _cache=object(), tokenizer=object())
    def __call__(self, images, prompts, context): return images.mean((1, 2, 3))
called, called_list, called_net = Called(scale="{sign}"), Called(likes=[dict(of=torch.tensor({sign}))]), Called(model=Net({sign}), device=torch.device("cpu"))
torch.nn.init.constant_(in_net.sign.weight, {sign}); torch.nn.init.zeros_(in_net.sign.bias)
"""
REWARDS = "named number keyword below itself part around no_grad cached held tensor method of_class net closed_net in_net called called_list called_net".split()


def plans(sign): # of the rewards of HOME
    home = {"__name__": "home"}
    exec(HOME.format(sign=sign), home)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {n: reward_plan(home[n])["code or settings of the reward"] for n in REWARDS}


def test_rewards_are_known_by_all_that_they_are_made_of():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_ddpo, json; print(json.dumps(test_ddpo.plans(1)))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}).stdout
    one, other = plans(1), plans(-1)
    assert one == json.loads(elsewhere) and [n for n in REWARDS if one[n] == other[n]] == []


def test_a_named_reward_without_settings_is_known_by_its_weights_and_attributes():
    "As boig's own are: its name alone would let a run go on with other weights."
    def of(weights, **how): return load_reward("clip-score", weights, device="cpu", **how)
    one = of("pocket-clip")
    first = reward_plan(one)
    one(torch.rand(1, 3, 32, 32), ["a cat"])
    assert first == reward_plan(one) == reward_plan(of("pocket-clip"))
    assert first not in (reward_plan(of("pocket-eval")), reward_plan(of("pocket-clip", scale="100cos")))


def test_a_reward_that_cannot_be_told_from_another_says_so():
    def reward(images, prompts, context): return seen(images)
    seen = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="cannot tell one Generator from another.*`settings`"): reward_plan(reward)
    def named(images, prompts, context): return seen(images)
    named.name = "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_plan(named)


def test_plans_of_rewards_with_name_and_settings_stay():
    "As checkpoints have them."
    class Told: name, settings = "told", {"form": "sum", "weights": [1, 2.5], "of": torch.arange(3.0)}
    assert reward_plan(Told()) == {"reward": "told", "code or settings of the reward": "ab5932b6563c"}


def test_context_is_one_for_all_and_part_of_the_plan(tmp_path):
    one, prompts = dataclasses.replace(SMALL, epochs=1), ["a", "b"]
    def go(context): return train_ddpo(tiny(), prompts, brightness, tmp_path, one, context, progress=False)
    with pytest.raises(BoigError, match="one dict for all pictures.*PromptReward"): go([{}, {}])
    go({"likes": 3, "like": torch.ones(2)})
    go({"like": torch.ones(2), "likes": 3})
    with pytest.raises(BoigError, match="another context"): go({"likes": 4, "like": torch.ones(2)})


@pytest.mark.parametrize("answer", [lambda n: (torch.ones(n), {}), lambda n: {}, lambda n: None, lambda n: [None] * n])
def test_what_is_no_reward_is_said_at_once(answer):
    with pytest.raises(BoigError, match=r"A reward gives \[B\] numbers"): score(lambda images, prompts, context: answer(len(images)), torch.zeros(2, 3, 8, 8), ["a", "b"])


def test_prompts_of_numpy_and_pandas_can_be_gone_on_with(tmp_path):
    config = dataclasses.replace(SMALL, epochs=1, seed=np.int64(3), advantages="prompt")
    for kind in (np.array, pd.Series, lambda p: (x for x in p)):
        train_ddpo(tiny(), kind(["a", "b"]), brightness, tmp_path, config, progress=False)
    assert len(train_ddpo(tiny(), ["a", "b"], brightness, tmp_path, dataclasses.replace(config, epochs=2, seed=3), progress=False)) == 2
    (tmp_path/"checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(BoigError, match="no checkpoint that can be read. Delete it"): train_ddpo(tiny(), ["a", "b"], brightness, tmp_path, config, progress=False)


def test_a_buffer_that_never_fills_is_refused():
    with pytest.raises(BoigError, match=r"set buffer to that or more"): train_ddpo(tiny(), ["a"], brightness, "nowhere", dataclasses.replace(SMALL, advantages="prompt", buffer=8, min_count=16))


def test_a_run_goes_on_with_less_memory(tmp_path):
    train(tmp_path, dataclasses.replace(SMALL, epochs=1))
    _, log = train(tmp_path, dataclasses.replace(SMALL, epochs=2, micro_batch=1, micro_steps=2, gradient_checkpointing=True))
    assert len(log) == 2


@pytest.mark.parametrize("lora", [0, 2])
def test_the_pipeline_comes_back_with_its_own_sampler(tmp_path, lora):
    "DDIM is RL's: it trains and is watched, but is neither saved nor left behind."
    own, seen = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1), []
    with pytest.warns(UserWarning, match="sampling with DDIM"):
        pipe, _ = train(tmp_path, dataclasses.replace(SMALL, epochs=1, lora_rank=lora), tiny(own), watch=lambda p, epoch: seen.append(type(p.scheduler)) or {})
    assert pipe.scheduler is own and seen == [DDIMScheduler]
    if not lora: assert json.loads((tmp_path/"pipeline"/"model_index.json").read_text())["scheduler"][1] == "PNDMScheduler"
