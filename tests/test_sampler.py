"DDIM's steps against formulas written anew and against diffusers' own scheduler; paths that do not depend on their batch."
import math
import warnings

import pytest
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, PNDMScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler as Theirs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from boig.core import BoigError
from boig.diffusion.sampler import join, log_prob, make_steps, sample, step_mean, step_policy, to_ddim
from boig.zoo import resolve


def tiny(scheduler=None, **unet) -> StableDiffusionPipeline:
    "Random weights of Stable Diffusion's classes: latents of 4 x 8 x 8."
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(resolve("pocket-clip"))
    tower = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         max_position_embeddings=48, bos_token_id=0, eos_token_id=1))
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4)
    net = UNet2DConditionModel(**(dict(sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")) | unet))
    scheduler = scheduler or DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    pipe = StableDiffusionPipeline(vae=vae.eval(), text_encoder=tower.eval(), tokenizer=tokenizer, unet=net.eval(), scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_formula(kind, x, out, a, b, eta, clip):
    "Mean and deviation by DDPM's posterior where η = 1, by DDIM's eq. 12 otherwise; written from x0 alone."
    x0 = {"epsilon": lambda: (x - (1 - a)**0.5 * out) / a**0.5, "sample": lambda: out, "v_prediction": lambda: a**0.5 * x - (1 - a)**0.5 * out}[kind]()
    noise = (x - a**0.5 * x0) / (1 - a)**0.5
    beta = 1 - a / b
    if eta == 1 and not clip:  # q(x_{t-1} | x_t, x_0) of DDPM, eq. 7 of Ho et al. 2020
        return b**0.5 * beta / (1 - a) * x0 + (a / b)**0.5 * (1 - b) / (1 - a) * x, (beta * (1 - b) / (1 - a))**0.5
    sigma = eta * (beta * (1 - b) / (1 - a))**0.5
    return b**0.5 * (x0.clamp(-clip, clip) if clip else x0) + (1 - b - sigma**2)**0.5 * noise, sigma


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("clip", [0, 0.5])
def test_every_step_is_the_closed_form_and_diffusers_step(kind, eta, clip):
    g = torch.Generator().manual_seed(1)
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = Theirs(prediction_type=kind, clip_sample=bool(clip), clip_sample_range=clip or 1.0, timestep_spacing=spacing, set_alpha_to_one=spacing == "trailing",
                           steps_offset=int(spacing == "leading"))
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = scheduler.alphas_cumprod.double(), torch.as_tensor(scheduler.final_alpha_cumprod).double()
        steps = make_steps(scheduler, 7, eta, dtype=torch.float64)
        scheduler.set_timesteps(7)
        assert steps.t.tolist() == scheduler.timesteps.tolist()
        for i, t in enumerate(steps.t.tolist()):
            x, out, z = torch.randn(3, 2, 4, 3, 3, generator=g, dtype=torch.float64)
            before = t - 1000 // 7
            a, b = float(scheduler.alphas_cumprod[t]), float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod)
            mean, sigma = step_mean(steps, i, x, out), steps.at("sigma", i)
            want_mean, want_sigma = by_formula(kind, x, out, a, b, eta, clip)
            torch.testing.assert_close(mean, want_mean, rtol=1e-9, atol=1e-9)
            assert float(sigma) == pytest.approx(want_sigma, rel=1e-9, abs=1e-9)
            theirs = scheduler.step(out, t, x, eta=eta, variance_noise=z).prev_sample
            torch.testing.assert_close(mean + sigma * z, theirs, rtol=1e-9, atol=1e-9)
            if want_sigma > 1e-6:
                want = torch.distributions.Normal(want_mean, want_sigma).log_prob(theirs).mean(dim=(1, 2, 3))
                torch.testing.assert_close(log_prob(theirs, mean, sigma), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("to_one", [False, True]) # then the last step has no chance
def test_gradient_of_the_log_probability(kind, eta, clip, to_one):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=clip, clip_sample_range=0.5, timestep_spacing="trailing", set_alpha_to_one=to_one)
    steps, g = make_steps(scheduler, 5, eta, dtype=torch.float64), torch.Generator().manual_seed(1)
    last = int((steps.sigma > 0).nonzero().max())
    assert last == (3 if to_one else 4)
    x, y, out = torch.randn(3, 2, 1, 2, 2, generator=g, dtype=torch.float64)
    for i in (0, last, torch.tensor([0, last])):
        torch.autograd.gradcheck(lambda out: log_prob(y, step_mean(steps, i, x, out), steps.at("sigma", i)), out.requires_grad_(), atol=1e-4)


def test_places_of_their_own():
    steps = make_steps(DDIMScheduler(), 10)
    x, out = torch.randn(2, 3, 4, 2, 2)
    mixed = step_mean(steps, torch.tensor([7, 0, 3]), x, out)
    for row, i in enumerate((7, 0, 3)): assert torch.equal(mixed[row:row + 1], step_mean(steps, i, x[row:row + 1], out[row:row + 1]))


def test_a_last_step_without_chance_has_no_log_probability():
    steps = make_steps(DDIMScheduler(set_alpha_to_one=True), 10)
    x = torch.randn(1, 4, 2, 2)
    mean = step_mean(steps, 9, x, x)
    assert steps.sigma[-1] == 0 and log_prob(mean, mean, steps.at("sigma", 9)).isnan().all() and mean.isfinite().all()


def test_zero_terminal_snr():
    steps = make_steps(DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10)
    assert steps.signal[0] < 1e-3 and step_mean(steps, 0, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2)).isfinite().all()


@pytest.mark.parametrize("guidance,eta", [(1.0, 1.0), (3.0, 1.0), (3.0, 0.0)])
def test_the_same_pictures_as_diffusers(guidance, eta):
    pipe = tiny()
    paths = sample(pipe, ["a cat", "a dog"], [5, 6], steps=4, guidance=guidance, eta=eta)
    with torch.no_grad():
        images = pipe(["a cat", "a dog"], num_inference_steps=4, guidance_scale=guidance, eta=eta, output_type="pt", generator=[torch.Generator().manual_seed(s) for s in (5, 6)]).images
    torch.testing.assert_close(paths.images, images, rtol=0, atol=2e-5)
    assert paths.latents.shape == (2, 5, 4, 8, 8) and paths.log_probs.shape == (2, 4) and paths.images.dtype == torch.float32
    assert paths.images.min() >= 0 and paths.images.max() <= 1 and paths.steps.t.tolist() == [751, 501, 251, 1]


def test_guidance_is_the_weighted_difference():
    pipe = tiny()
    paths = sample(pipe, ["a cat"], [1], steps=3, guidance=4.0)
    x, t = paths.latents[:, 0], paths.steps.t[0]
    with torch.no_grad():
        cond, empty = (pipe.unet(x, t, s).sample for s in (paths.states, paths.empty))
        mean, _ = step_policy(pipe.unet, paths.steps, 0, x, paths.states, paths.empty, 4.0)
    torch.testing.assert_close(mean, step_mean(paths.steps, 0, x, empty + 4 * (cond - empty)), rtol=0, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch():
    pipe, prompts, seeds = tiny(), ["a cat", "a dog", "a hat"], [1, 2, 3]
    whole, parts = sample(pipe, prompts, seeds, steps=3), sample(pipe, prompts, seeds, steps=3, batch_size=2)
    other = join([sample(pipe, [p], [s], steps=3) for p, s in reversed(list(zip(prompts, seeds)))])
    for a, b in ((whole, parts), (whole, other)):
        order = [b.prompts.index(p) for p in prompts]
        torch.testing.assert_close(a.latents, b.latents[order], rtol=0, atol=1e-4)
        torch.testing.assert_close(a.log_probs, b.log_probs[order], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scored_again_to_the_bit(dtype):
    pipe = tiny().to(dtype)
    paths = sample(pipe, ["a cat", "a dog"], [1, 2], steps=4, guidance=2.0)
    assert paths.latents.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(4):
        with torch.enable_grad(): mean, sigma = step_policy(pipe.unet, paths.steps, torch.tensor([i, i]), paths.latents[:, i], paths.states, paths.empty, 2.0)
        assert torch.equal(log_prob(paths.latents[:, i + 1], mean, sigma), paths.log_probs[:, i])


def test_chance_in_some_steps_and_one_start():
    "Against each picture alone, and against the two kinds of step that there are."
    pipe, eta = tiny(), torch.tensor([0.0, 1.0, 0.0, 0.5])
    steps, full, none = (make_steps(pipe.scheduler, 4, e) for e in (eta, 1.0, 0.0))
    assert steps.sigma[1] == full.sigma[1] and torch.equal(steps.direction[[0, 2]], none.direction[[0, 2]]) and steps.sigma[[0, 2]].tolist() == [0, 0]
    family = sample(pipe, ["a cat", "a dog", "a cat"], [1, 2, 3], steps=4, guidance=2.0, eta=eta, starts=[9, 9, 9])
    alone = [sample(pipe, [p], [s], steps=4, guidance=2.0, eta=eta, starts=[9]) for p, s in zip(family.prompts, (1, 2, 3))]
    torch.testing.assert_close(family.latents, torch.cat([a.latents for a in alone]), rtol=0, atol=1e-4)
    assert torch.equal(family.latents[0, :2], family.latents[2, :2]) and not torch.equal(family.latents[0, 2], family.latents[2, 2])
    assert family.log_probs.isnan().tolist() == [[True, False, True, False]] * 3
    for bad in (torch.ones(3), torch.tensor([0, 2.0, 0, 0])):
        with pytest.raises(BoigError, match="one for each of 4 steps"): make_steps(pipe.scheduler, 4, bad)


def test_kept_steps_know_their_gradient():
    pipe = tiny()
    plain, kept = (sample(pipe, ["a cat", "a dog"], [1, 2], steps=3, guidance=2.0, keep=k) for k in (False, True))
    assert torch.equal(plain.latents, kept.latents) and torch.equal(plain.log_probs, kept.log_probs) and not plain.kept and not kept.images.requires_grad
    for i, logp, mean in kept.kept:
        mean2, sigma = step_policy(pipe.unet, kept.steps, i, kept.latents[:, i], kept.states, kept.empty, 2.0)
        mine, theirs = (torch.autograd.grad(v.sum(), pipe.unet.conv_out.weight)[0] for v in (logp, log_prob(kept.latents[:, i + 1], mean2, sigma)))
        torch.testing.assert_close(mine, theirs)
        assert torch.equal(mean, mean2)
    with pytest.raises(BoigError, match="one batch"): sample(pipe, ["a"] * 3, [1, 2, 3], steps=2, batch_size=2, keep=True)


def test_other_schedulers_become_ddim():
    with pytest.warns(UserWarning, match="PNDMScheduler has no log-probabilities"): ddim = to_ddim(PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1))
    assert not ddim.config.clip_sample and ddim.config.steps_offset == 1
    euler = EulerDiscreteScheduler(prediction_type="v_prediction")
    with pytest.warns(UserWarning): ddim = to_ddim(euler)
    torch.testing.assert_close(ddim.alphas_cumprod, euler.alphas_cumprod)
    assert ddim.config.prediction_type == "v_prediction" and not ddim.config.clip_sample
    for other in (LCMScheduler(), PNDMScheduler(), EulerDiscreteScheduler(beta_schedule="scaled_linear")): # whose defaults are not DDIM's
        with pytest.warns(UserWarning): torch.testing.assert_close(to_ddim(other).alphas_cumprod, other.alphas_cumprod)
    with pytest.warns(UserWarning): assert to_ddim(PNDMScheduler(steps_offset=1)).final_alpha_cumprod < 1 # as SD 1.5's: its last step is random
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_ddim(DDIMScheduler()).config.clip_sample
    with pytest.raises(BoigError, match="no noise schedule"): to_ddim(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(BoigError, match="thresholding"): to_ddim(DDIMScheduler(thresholding=True))


def test_one_clear_line():
    pipe = tiny()
    for call, line in ((lambda: sample(pipe, [], []), "no prompts"), (lambda: sample(pipe, "a cat", [1]), "no prompts"), (lambda: sample(pipe, ["a"], [1, 2]), "1 seeds, not 2"),
                       (lambda: sample(object(), ["a"], [1]), "StableDiffusionPipeline, not object"), (lambda: sample(pipe, ["a"], [1], eta=1.5), "eta"),
                       (lambda: sample(pipe, ["a"], [1], steps=0), "1 to 1000 steps"), (lambda: sample(tiny(time_cond_proj_dim=8), ["a"], [1]), "consistency model")):
        with pytest.raises(BoigError, match=line): call()
    assert math.isinf(make_steps(to_ddim(pipe.scheduler), 3).clip)
