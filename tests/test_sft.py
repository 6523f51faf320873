"Supervised fine-tuning: the loss by its formulas, cached moments against the encoder, a training that resumes to the same weights."
import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from test_sampler import tiny

from boig.core import BoigError
from boig.diffusion import sft
from boig.diffusion.sft import SFTConfig, dice, encode, denoising_loss, noisy, train_sft
from boig.diffusion.tuning import find_tracker

SMALL = SFTConfig(epochs=2, batch_size=3, micro_batch=3, lr=1e-3, tracker="", empty=0.3)
TEXTS = ["a cat", "a dog", "a cat", "a hat", "a cup"]


def pictures(n=5): return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def weights(pipe): return torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])


def train(folder, config=SMALL, pipe=None, **options):
    pipe = pipe or tiny()
    return pipe, train_sft(pipe, pictures(), TEXTS, folder, config, progress=False, **options)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("make", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_loss_by_the_formula(kind, make):
    scheduler, t = make(prediction_type=kind), torch.tensor([0, 400, 999])
    x0, ε, said = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    ᾱ = torch.cumprod(1 - torch.linspace(scheduler.config.beta_start, scheduler.config.beta_end, 1000, dtype=torch.float64), 0)[t]
    seen, want = [], []
    for k, a in enumerate(ᾱ.tolist()):
        seen.append(math.sqrt(a) * x0[k] + math.sqrt(1 - a) * ε[k])
        y = {"epsilon": ε[k], "sample": x0[k], "v_prediction": math.sqrt(a) * ε[k] - math.sqrt(1 - a) * x0[k]}[kind]
        want.append(((said[k] - y)**2).mean())
    def unet(x, times, encoder_hidden_states, return_dict):
        torch.testing.assert_close(x, torch.stack(seen), rtol=1e-4, atol=1e-4)
        assert times is t
        return (said,)
    unet.dtype = torch.float64
    torch.testing.assert_close(denoising_loss(unet, scheduler, x0, ε, t, x0), torch.stack(want), rtol=1e-4, atol=1e-4)
    if make is DDIMScheduler: torch.testing.assert_close(noisy(scheduler, x0.float(), ε.float(), t)[0], scheduler.add_noise(x0.float(), ε.float(), t))


def test_cached_moments_are_the_encoders():
    pipe = tiny()
    shown = encode(pipe, pictures(), TEXTS, batch_size=2)
    with torch.no_grad(): z = pipe.vae.encode(2 * pictures() - 1).latent_dist
    torch.testing.assert_close(shown.mean, z.mean * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(shown.std, z.std * pipe.vae.config.scaling_factor)
    assert shown.text.tolist() == [0, 1, 0, 2, 3] and len(shown.states) == 5
    torch.testing.assert_close(shown.states[3:], pipe.encode_prompt(["a cup", ""], "cpu", 1, False)[0])
    draws = torch.stack([dice(shown, torch.tensor([2]), SMALL, 1000, e)[0][0] for e in range(400)])
    assert ((draws.mean(0) - shown.mean[2]) / shown.std[2]).abs().mean() < 0.1
    torch.testing.assert_close(draws.std(0).mean(), shown.std[2].mean(), rtol=0.05, atol=0)


def test_dice_depend_on_the_picture_only():
    shown = encode(tiny(), pictures(), TEXTS)
    whole, part = (dice(shown, torch.tensor(n), SMALL, 1000, 3) for n in ([4, 0, 2], [2]))
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, part))
    times = torch.stack([dice(shown, torch.tensor([1]), SMALL, 10, e)[2][0] for e in range(300)])
    assert torch.bincount(times, minlength=10).min() > 10 and times.max() == 9
    empties = sum(torch.equal(dice(shown, torch.tensor([1]), SMALL, 10, e)[3][0], shown.states[-1]) for e in range(200))
    assert 35 < empties < 85 # of 200, at 0.3


def test_files_and_tensors_are_the_same(tmp_path):
    whole, files = (pictures() * 255).round() / 255, []
    for k, x in enumerate(whole):
        files.append(tmp_path/f"{k}.png")
        Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()).save(files[-1])
    a, b = (encode(tiny(), x, TEXTS) for x in (whole, files))
    torch.testing.assert_close(a.mean, b.mean)
    assert sft._digest(whole) == sft._digest(files)
    with pytest.raises(BoigError, match="16×16; these are"): encode(tiny(), torch.rand(1, 3, 24, 16), ["a"])


def test_a_set_of_pictures_is_known_by_its_pictures(tmp_path, monkeypatch):
    _, log = train(tmp_path, pipe=tiny())
    with pytest.raises(BoigError, match="another set of training pictures"): train_sft(tiny(), pictures().flip(0), TEXTS, tmp_path, SMALL, progress=False)  # latents of the same mean square
    def elsewhere(*args):  # another machine's arithmetic
        shown = encode(*args)
        return dataclasses.replace(shown, mean=shown.mean * 1.001)
    monkeypatch.setattr(sft, "encode", elsewhere)
    assert train(tmp_path)[1].equals(log)


def test_pictures_that_are_no_squares():
    pipe, wide = tiny(sample_size=(8, 12)), torch.rand(2, 3, 16, 24)
    assert encode(pipe, wide, TEXTS[:2]).mean.shape == (2, 4, 8, 12)
    with pytest.raises(BoigError, match="16×24; these are"): encode(pipe, wide.mT, TEXTS[:2])


@pytest.mark.parametrize("n, processes", [(5, 2), (5, 4), (1, 2)])
def test_processes_share_an_epoch_and_may_have_nothing_to_do(monkeypatch, n, processes):
    def epoch(process, processes):
        pipe, gradients = tiny(), []
        def step(run, of=""):
            gradients.append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in run.params]))
            pipe.unet.zero_grad()
            return 0.0
        monkeypatch.setattr(sft, "step", step)
        accelerator = SimpleNamespace(process_index=process, num_processes=processes, reduce=torch.clone)
        run = SimpleNamespace(device=torch.device("cpu"), config=dataclasses.replace(SMALL, batch_size=4), accelerator=accelerator, pipe=pipe, params=list(pipe.unet.parameters()), autocast=nullcontext,
                              scaler=torch.amp.GradScaler("cpu", enabled=False))
        return sft._epoch(run, encode(pipe, pictures()[:n], TEXTS[:n]), pipe.scheduler, 0)["loss"], torch.stack(gradients)
    (loss, whole), parts = epoch(0, 1), [epoch(p, processes) for p in range(processes)]
    assert sum(x for x, _ in parts) == pytest.approx(loss) and not parts[-1][1][-1].any() and len(whole) == -(-n // 4)
    torch.testing.assert_close(sum(g for _, g in parts), whole)


def test_it_learns_its_pictures(tmp_path):
    _, log = train(tmp_path, dataclasses.replace(SMALL, epochs=20, lr=3e-3, empty=0.0))
    assert log.loss.iloc[-6:].mean() < 0.9 * log.loss.iloc[:4].mean()


@pytest.mark.parametrize("lora", [0, 2])
def test_stopped_in_an_epoch_and_gone_on(tmp_path, lora):
    config = dataclasses.replace(SMALL, ema=0.5, lora_rank=lora)
    straight, log = train(tmp_path/"a", config)
    pipe, calls = tiny(), []
    def stop(*_):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt # two updates an epoch: in the second epoch
    hook = pipe.unet.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/"b", config, pipe)
    hook.remove()
    resumed, log2 = train(tmp_path/"b", config)
    assert torch.equal(weights(straight), weights(resumed)) and log.drop(columns="seconds").equals(log2.drop(columns="seconds"))
    assert len(log) == 2 and sorted(p.name for p in (tmp_path/"b").iterdir()) == sorted(["checkpoint.pt", "log.csv", "adapter" if lora else "pipeline"])
    if lora: (loaded := tiny()).load_lora_weights(tmp_path/"b"/"adapter")
    else: loaded = StableDiffusionPipeline.from_pretrained(tmp_path/"b"/"pipeline")
    x = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 4, 16)
    with torch.no_grad(): torch.testing.assert_close(loaded.unet(*x).sample, resumed.unet(*x).sample, rtol=0, atol=1e-5)
    with pytest.raises(BoigError, match="another set of training pictures"): train_sft(tiny(), pictures() / 2, TEXTS, tmp_path/"b", config, progress=False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_and_small_batches(tmp_path, precision):
    _, log = train(tmp_path/"a", dataclasses.replace(SMALL, epochs=1))
    pipe, log2 = train(tmp_path/"b", dataclasses.replace(SMALL, epochs=1, precision=precision, micro_batch=1, gradient_checkpointing=True))
    assert log2.loss.iloc[0] == pytest.approx(log.loss.iloc[0], rel=0.05) and pipe.unet.dtype == torch.float32 and weights(pipe).isfinite().all()


def test_a_small_autoencoder_without_deviation():
    pipe = tiny()
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)
    shown = encode(pipe, pictures(), TEXTS)
    assert shown.std.abs().max() == 0 and shown.mean.shape == (5, 4, 8, 8)


def test_one_clear_line(tmp_path):
    for call, line in ((lambda: train_sft(tiny(), [], [], tmp_path), "nothing to learn from"), (lambda: train_sft(tiny(), pictures(), TEXTS[:2], tmp_path), "texts, not 2"),
                       (lambda: train_sft(object(), pictures(), TEXTS, tmp_path), "StableDiffusionPipeline, not object"),
                       (lambda: train_sft(tiny(FlowMatchEulerDiscreteScheduler()), pictures(), TEXTS, tmp_path), "FlowMatchEuler"),
                       (lambda: train(tmp_path, dataclasses.replace(SMALL, epochs=0)), "at least 1"), (lambda: train(tmp_path, dataclasses.replace(SMALL, precision="int8")), "precision is one of"),
                       (lambda: train(tmp_path, dataclasses.replace(SMALL, empty=1.0)), r"empty must lie"), (lambda: train(tmp_path, dataclasses.replace(SMALL, ema=1.0)), "ema")):
        with pytest.raises(BoigError, match=line): call()
    assert not list(tmp_path.iterdir())


def test_trackers(monkeypatch):
    from boig.diffusion import tuning
    monkeypatch.setattr(tuning, "get_available_trackers", lambda: ["tensorboard"])
    assert find_tracker("auto") == "tensorboard" and find_tracker("") == ""
    with pytest.raises(BoigError, match="Install its package"): find_tracker("wandb")
    monkeypatch.setattr(tuning, "get_available_trackers", lambda: [])
    with pytest.warns(UserWarning, match="log.csv only"): assert find_tracker("auto") == ""


@pytest.mark.parametrize("wrong", [lambda x: 2 * x - 1, lambda x: x * 255, lambda x: (x * 255).byte()])
def test_pictures_of_another_range_are_refused(tmp_path, wrong):
    with pytest.raises(BoigError, match=r"floats in \[0, 1\]"): train_sft(tiny(), wrong(pictures()), TEXTS, tmp_path, SMALL, progress=False)
