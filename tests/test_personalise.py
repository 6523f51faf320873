"Personalisation: losses by hand, what may move and what may not, runs that go on to the same weights, files that diffusers reads."
import dataclasses
import functools
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from test_sampler import tiny

from boig.core import BoigError, project_root
from boig.diffusion.ddpo import DDPOConfig, reward_plan
from boig.diffusion.pipeline import draw
from boig.diffusion.sampler import sample
from boig.diffusion.sft import noisy
from boig.personalise.base import (Subject, add_word, check_words, class_pictures, denoising_loss, encode, load_subject, pick, picture_size, rare_words, read_pictures, speaking,
                                   whole_words, with_prior)
from boig.personalise.custom_diffusion import CustomDiffusionConfig, custom_attention, load_custom_diffusion, train_custom_diffusion
from boig.personalise.dreambooth import DreamBoothConfig, load_dreambooth, train_dreambooth
from boig.personalise.instructbooth import INSTRUCT, Plainly, instruct_prompts, load_instructbooth, load_personalised, train_instructbooth
from boig.personalise.neti import NeTI, NeTIConfig, NeTIMapper, load_neti, make_mapper, text_layers, train_neti
from boig.personalise.textual_inversion import TextualInversionConfig, load_textual_inversion, train_textual_inversion
from boig.scales import load_scale

SMALL = dict(steps=4, every=2, lr=1e-2)
PRIOR = dict(prior_pictures=3, prior_steps=2, prior_guidance=1.0)
torch.manual_seed(5)
SUBJECT = Subject([torch.rand(3, 20, 24) for _ in range(4)], "teddy bear", "q")
METHODS = {"dreambooth": (train_dreambooth, DreamBoothConfig(**SMALL, **PRIOR)), "custom_diffusion": (train_custom_diffusion, CustomDiffusionConfig(batch_size=2, **SMALL, **PRIOR)),
           "textual_inversion": (train_textual_inversion, TextualInversionConfig(batch_size=2, **SMALL)), "neti": (train_neti, NeTIConfig(batch_size=2, **SMALL))}


def learned(folder, name, stop=None):
    "A tiny pipeline after one of the four methods; with `stop`, killed in the middle and started again."
    train, config = METHODS[name]
    if stop:
        with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
            from boig.personalise import base
            steps, real = [], base.step
            def killed(run, of):
                steps.append(0)
                if len(steps) > stop: raise KeyboardInterrupt
                return real(run, of)
            m.setattr(base, "step", killed)
            train(tiny(), SUBJECT, folder, config, progress=False)
    pipe = tiny()
    return pipe, train(pipe, SUBJECT, folder, config, progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A finished run of a method, trained once: pipeline, log, folder."
    @functools.lru_cache
    def run(name): return *learned(folder := tmp_path_factory.mktemp(name), name), folder
    return run


def pictures(pipe, words): return draw(pipe, [f"a {words} and a ball", "a cup"], seed=1, num_inference_steps=3, guidance_scale=3.0)


def tower(pipe): return pipe.text_encoder.get_input_embeddings().weight.detach()


# --- words

def test_words_that_cannot_name_a_subject():
    tokenizer = tiny().tokenizer
    check_words(tokenizer, SUBJECT)
    check_words(tokenizer, Subject([], "Christmas tree", "z", "light blue"))
    for noun, description in (("teddy-bear", ""), ("t-shirt", ""), ("cup", "blue-and-white"), ("3D-cup", "dog's")): check_words(tokenizer, Subject([], noun, "q", description))  # hyphens spell nothing
    for wrong, said in [(Subject([], "cup", "sks"), "2 tokens"), (Subject([], "plushie", "q"), "plu|shi|e"), (Subject([], "teddy-plushie", "q"), "'plushie'"), (Subject([], "cup", "q", "triangular"), "'triangular'"),
                        (Subject([], "cup", "cup"), "already"), (Subject([], " ", "q"), "class noun"), (Subject([], "cup", ""), "0 tokens")]:
        with pytest.raises(BoigError, match=said.replace("|", r"\|")): check_words(tokenizer, wrong)


def test_rare_words_are_one_token_and_the_last_learned():
    tokenizer = tiny().tokenizer
    rare = rare_words(tokenizer, 20)
    assert all(len(tokenizer.tokenize(w)) == 1 and len(w) <= 3 for w in rare)
    ids = [whole_words(tokenizer)[w] for w in rare]
    assert ids == sorted(ids, reverse=True) and len(rare) == 20


def test_prompts():
    assert SUBJECT.prompt("a {0} {1} on a sofa") == "a q teddy bear on a sofa"
    assert Subject([], "toy", "q", "red").prompt() == "a q red toy" and Subject([], "toy", "q", "red").prompt(identifier=False) == "a toy"
    assert instruct_prompts(SUBJECT, ["a {0} {1} x", "a {0} {1} y"]) == ["a q teddy bear x", "a teddy bear x", "a q teddy bear y", "a teddy bear y"]
    assert instruct_prompts(SUBJECT, ["a {0} {1} x"], both=False) == ["a q teddy bear x"]
    with pytest.raises(BoigError, match="at least one template"): instruct_prompts(SUBJECT, "a {0} {1}")


# --- pictures

def test_pictures_from_folders_files_and_tensors(tmp_path):
    for k, mode in enumerate(("RGB", "L", "RGBA")): Image.new(mode, (30, 20), 100).save(tmp_path/f"{k}.png")
    (tmp_path/"notes.txt").write_text("not a picture")
    x = read_pictures(tmp_path, 16)
    assert x.shape == (3, 3, 16, 16) and torch.equal(x, read_pictures([tmp_path/f"{k}.png" for k in range(3)], 16))
    assert torch.allclose(read_pictures([torch.full((3, 40, 8), 0.5)] * 3, 16), torch.tensor(0.5))
    with pytest.raises(BoigError, match="2 pictures; at least 3"): read_pictures([tmp_path/"0.png"] * 2, 16)
    with pytest.raises(BoigError, match="is 1 picture;"): read_pictures([tmp_path/"0.png"], 16)
    with pytest.raises(BoigError, match="no folder"): read_pictures(tmp_path/"none", 16)
    (tmp_path/"1.png").write_bytes((tmp_path/"1.png").read_bytes()[:50])
    with pytest.raises(BoigError, match="1.png"): read_pictures(tmp_path, 16)


def test_hidden_files_are_no_pictures_and_others_are_named(tmp_path):
    for k in range(2): Image.new("RGB", (8, 8)).save(tmp_path/f"{k}.png")
    (tmp_path/"._0.png").write_bytes(b"macOS")
    assert len(read_pictures(tmp_path, 8, 2)) == 2
    for name in ("a.HEIC", "notes.txt"): (tmp_path/name).write_bytes(b"x")
    with pytest.raises(BoigError, match=r"2 pictures; at least 3.* end in \.png, \.jpg.*: a\.HEIC\.$"): read_pictures(tmp_path, 8)
    (tmp_path/"class").mkdir()
    (tmp_path/"class"/".DS_Store").write_bytes(b"x")
    assert len(class_pictures(tiny(), "a cup", tmp_path/"class", 2, num_inference_steps=2)) == 2  # nobody's own pictures


def test_class_pictures_are_drawn_once(tmp_path, monkeypatch):
    pipe = tiny()
    first = class_pictures(pipe, "a cup", tmp_path/"c", 10, num_inference_steps=2)
    assert first.shape == (10, 3, 16, 16) and len(list((tmp_path/"c").glob("*.png"))) == 10
    (tmp_path/"c"/"0009.png").unlink()  # as if stopped before the end
    assert torch.equal(class_pictures(pipe, "a cup", tmp_path/"c", 10, num_inference_steps=2), first)
    from boig.personalise import base
    monkeypatch.setattr(base, "draw", None)
    assert torch.equal(class_pictures(pipe, "a cup", tmp_path/"c", 4, num_inference_steps=2), first[:4])
    with pytest.raises(BoigError, match="a cup"): class_pictures(pipe, "a hat", tmp_path/"c", 4, num_inference_steps=2)
    pipe.unet.conv_in.weight.data += 1
    with pytest.raises(BoigError, match="another model"): class_pictures(pipe, "a cup", tmp_path/"c", 4, num_inference_steps=2)
    (tmp_path/"c"/"class.json").unlink()
    assert len(class_pictures(pipe, "whatever", tmp_path/"c", 99)) == 10  # one's own pictures: all, as they are


# --- the loss

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_sampler_understands(kind):
    "A denoiser that says the target leads DDIM from z_t straight back to z_0."
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    z, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999, 999, 999])
    z_t, target = noisy(scheduler, z, noise, t)
    assert torch.allclose(z_t, scheduler.add_noise(z, noise, t), atol=1e-6)
    scheduler.set_timesteps(1)
    assert torch.allclose(scheduler.step(target, 999, z_t).prev_sample, z, atol=2e-3 if kind == "epsilon" else 1e-5)
    assert torch.equal(noisy(PNDMScheduler(prediction_type="epsilon"), z, noise, t)[1], noise)


def test_unknown_prediction_type():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(BoigError, match="flow"): noisy(scheduler, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([1]))


def test_prior_preservation_by_hand():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0], requires_grad=True)
    found = with_prior(losses, 2, 0.5)
    assert found["loss"].item() == 2 + 0.5 * 15 and float(found["own"]) == 2 and float(found["prior"]) == 15
    found["loss"].backward()
    assert losses.grad.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert with_prior(losses, 4)["loss"].item() == 8.5


def test_loss_is_each_pictures_mean_square():
    pipe = tiny(DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1))
    z, states = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    with torch.no_grad():
        got = denoising_loss(pipe, z, states, torch.Generator().manual_seed(4))
        g = torch.Generator().manual_seed(4)
        t = torch.randint(1000, (3,), generator=g)
        noise = torch.randn(3, 4, 8, 8, generator=g)
        for k in range(3):
            said = pipe.unet(pipe.scheduler.add_noise(z[k:k + 1], noise[k:k + 1], t[k:k + 1]), t[k], states[k:k + 1]).sample
            assert torch.allclose(got[k], ((said - pipe.scheduler.get_velocity(z[k:k + 1], noise[k:k + 1], t[k:k + 1]))**2).mean(), atol=1e-5)


def test_latents_have_the_encoders_mean_and_deviation():
    pipe, x = tiny(), read_pictures(SUBJECT.pictures, 16)
    mean, std = encode(pipe, x)
    d = pipe.vae.encode(2 * x - 1).latent_dist
    assert torch.allclose(mean, d.mean * pipe.vae.config.scaling_factor) and torch.allclose(std, d.std * pipe.vae.config.scaling_factor)
    z = pick((mean[:1], std[:1]), 4000, torch.Generator().manual_seed(0))
    assert torch.allclose(z.mean(0), mean[0], atol=float(5 * std.max() / 4000**0.5)) and torch.allclose(z.std(0), std[0], rtol=0.1)
    assert picture_size(pipe) == 16


# --- a new word

def test_only_the_new_word_is_heard():
    pipe = tiny()
    before = tower(pipe).clone()
    token = add_word(pipe, "<it>", "red cup")
    want = before[pipe.tokenizer("red cup", add_special_tokens=False).input_ids].mean(0)
    assert torch.equal(tower(pipe)[:-1], before) and torch.equal(tower(pipe)[token], want)
    assert pipe.tokenizer("a <it>.", add_special_tokens=False).input_ids[1] == token
    def say(text): return pipe.encode_prompt([text], "cpu", 1, False)[0]
    plain, told = say("a cup"), torch.randn(16)
    with speaking(pipe.text_encoder, token, told):
        assert torch.equal(say("a cup"), plain)
        inside = say("a <it>")
    assert not torch.allclose(inside, say("a <it>"))
    tower(pipe)[token] = told
    assert torch.allclose(inside, say("a <it>"), atol=1e-6)
    with pytest.raises(BoigError, match="already"): add_word(pipe, "<it>", "cup")
    with pytest.raises(BoigError, match="already"): add_word(pipe, "cup", "hat")
    with pytest.raises(BoigError, match="known ones"): add_word(tiny(), "<it>", "")


# --- the four trainings

@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_arrives_at_the_same_weights(name, runs, tmp_path):
    (one, log, folder), (two, log2) = runs(name), learned(tmp_path, name, stop=3)
    for part in ("unet", "text_encoder"):
        a, b = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert log["loss"].tolist() == log2["loss"].tolist() and log["step"].tolist() == [2, 4]
    if name == "neti":  # its network is no part of the pipeline
        a, b = (load_file(x/"mapper.safetensors") for x in (folder, tmp_path))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_settings_or_pictures_are_refused(runs, tmp_path):
    *_, folder = runs("textual_inversion")
    config = METHODS["textual_inversion"][1]
    with pytest.raises(BoigError, match="another lr"): train_textual_inversion(tiny(), SUBJECT, folder, dataclasses.replace(config, lr=1.0), progress=False)
    with pytest.raises(BoigError, match="another pictures"): train_textual_inversion(tiny(), dataclasses.replace(SUBJECT, pictures=SUBJECT.pictures[:3]), folder, config, progress=False)
    with pytest.raises(BoigError, match="no LoRA"): train_textual_inversion(tiny(), SUBJECT, tmp_path, dataclasses.replace(config, lora_rank=4), progress=False)
    with pytest.raises(BoigError, match="no finished training"): load_subject(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_run_without_its_checkpoint_is_taken_as_it_is_and_another_one_refused(name, runs, tmp_path, monkeypatch):
    from boig.personalise import base
    (train, config), (pipe, log, folder), again = METHODS[name], runs(name), tiny()
    shutil.copytree(folder, tmp_path/"run")
    (tmp_path/"run"/"checkpoint.pt").unlink()
    def held(): return {p: p.read_bytes() for p in sorted((tmp_path/"run").rglob("*")) if p.is_file()}
    before = held()
    monkeypatch.setattr(base, "step", lambda *a: pytest.fail("trained"))
    refused("another lr", train, tiny(), SUBJECT, tmp_path/"run", dataclasses.replace(config, lr=1e-1))
    done = train(again, SUBJECT, tmp_path/"run", config, progress=False)
    words = load_subject(folder)["words"]
    assert done["loss"].tolist() == pytest.approx(log["loss"].tolist(), abs=1e-6) and held() == before
    assert torch.allclose(pictures(again, words), pictures(pipe, words), atol=1e-4)
    (tmp_path/"run"/"run.json").unlink()
    refused("does not say of what settings", train, tiny(), SUBJECT, tmp_path/"run", config)


def refused(match, train, *args, **more):
    with pytest.raises(BoigError, match=match): train(*args, progress=False, **more)


@pytest.mark.parametrize("name", ["dreambooth", "custom_diffusion"])
def test_other_words_or_class_pictures_are_another_run(name, runs, tmp_path):
    (train, config), (*_, folder) = METHODS[name], runs(name)
    refused("another subject", train, tiny(), dataclasses.replace(SUBJECT, description="red"), folder, config)
    (tmp_path/"own").mkdir()
    for k in range(3): Image.new("RGB", (16, 16), (60 * k, 0, 90)).save(tmp_path/"own"/f"{k}.png")
    refused("another class pictures", train, tiny(), SUBJECT, folder, config, class_folder=tmp_path/"own")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_wrong_is_said_before_anything_is_drawn_or_changed(name, runs, tmp_path, monkeypatch):
    from boig.personalise import base
    monkeypatch.setattr(base, "draw", lambda *a, **k: pytest.fail("drawn"))
    (train, config), (*_, folder), pipe = METHODS[name], runs(name), tiny()
    for wrong, said in ((dict(lora_rank=4), "no LoRA"), (dict(precision="int8"), "precision is one of"), (dict(steps=0), "steps must be"), (dict(ema=1.0), "ema lie in"), (dict(tracker="abacus"), "does not know it")):
        refused(said, train, pipe, SUBJECT, tmp_path, dataclasses.replace(config, **wrong))
    refused("another lr", train, pipe, SUBJECT, folder, dataclasses.replace(config, lr=1.0), **({"class_folder": tmp_path/"class"} if hasattr(config, "prior_steps") else {}))
    refused("not object", train, object(), SUBJECT, tmp_path, config)
    assert not list(tmp_path.iterdir()) and len(pipe.tokenizer) == len(tiny().tokenizer)


def test_instructbooth_checks_rl_before_dreambooth(tmp_path):
    for wrong, said in ((dict(eta=0.0), "eta, timestep"), (dict(samples=5), "multiple of batch_size"), (dict(precision="int8"), "precision is one of")):
        refused(said, train_instructbooth, tiny(), SUBJECT, ["a {0} {1}"], brightness, tmp_path, METHODS["dreambooth"][1], dataclasses.replace(INSTRUCT, **wrong))
    assert not list(tmp_path.iterdir())


def test_dreambooth_moves_the_denoiser_only_and_diffusers_reads_it(runs):
    pipe, log, folder = runs("dreambooth")
    fresh = tiny()
    for part, moved in (("unet", True), ("text_encoder", False), ("vae", False)):
        a, b = getattr(pipe, part).state_dict(), getattr(fresh, part).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a) != moved
    assert {"loss", "own", "prior", "grad_norm"} <= set(log) and torch.allclose(torch.tensor(log.own + log.prior), torch.tensor(log.loss))
    words = load_subject(folder)["words"]
    assert words == "q teddy bear"
    theirs = StableDiffusionPipeline.from_pretrained(folder/"pipeline")
    theirs.set_progress_bar_config(disable=True)
    for other in (theirs, load_dreambooth(folder, "cpu")): assert torch.allclose(pictures(other, words), pictures(pipe, words), atol=1e-5)


def test_a_pipeline_that_came_in_half_precision_is_saved_as_plain_diffusers_runs_it(tmp_path):
    pipe = tiny().to(torch.float16)
    with pytest.warns(UserWarning, match="has it whole"): train_dreambooth(pipe, SUBJECT, tmp_path, DreamBoothConfig(**SMALL, prior_weight=0), progress=False)
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float16,) * 3
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path/"pipeline")
    theirs.set_progress_bar_config(disable=True)
    assert pictures(theirs, "q teddy bear").isfinite().all()


def test_dreambooth_without_a_prior_draws_no_class_pictures(tmp_path):
    log = train_dreambooth(tiny(), SUBJECT, tmp_path, DreamBoothConfig(**SMALL, prior_weight=0), progress=False)
    assert not (tmp_path/"class").exists() and "prior" not in log


def test_custom_diffusion_moves_keys_values_and_the_word_only(runs):
    pipe, _, folder = runs("custom_diffusion")
    fresh = tiny()
    old, new = fresh.unet.state_dict(), pipe.unet.state_dict()
    assert all(torch.equal(new[k], old[k]) for k in old)
    own = {k for k in new if k not in old}
    assert own == {f"{n}.to_{x}_custom_diffusion.weight" for n in text_layers(fresh.unet) for x in "kv"}
    assert all(not torch.equal(new[k], old[k.replace("processor.", "").replace("_custom_diffusion", "")]) for k in own)
    assert torch.equal(tower(pipe)[:-1], tower(fresh)) and not torch.equal(tower(pipe)[-1], tower(fresh)[whole_words(fresh.tokenizer)[rare_words(fresh.tokenizer, 1)[0]]])
    words = load_subject(folder)["words"]
    assert words == "<new1> teddy bear"
    assert torch.allclose(pictures(load_custom_diffusion(fresh, folder), words), pictures(pipe, words), atol=1e-4)


def test_the_lines_that_the_notebook_gives_open_custom_diffusion_in_plain_diffusers(runs):
    trained, _, folder = runs("custom_diffusion")
    cells = json.loads((project_root()/"nbs"/"80_personalise"/"82_custom_diffusion.ipynb").read_text(encoding="utf-8"))["cells"]
    lines, = ["".join(c["source"]).split("```python\n")[1].split("```")[0] for c in cells if "```python" in "".join(c["source"])]
    pipe, plain = tiny(), tiny()
    exec(lines, {"pipe": pipe, "folder": str(folder)})
    assert lines.count("\n") == 2 and torch.allclose(pictures(pipe, "<new1> teddy bear"), pictures(trained, "<new1> teddy bear"), atol=1e-4)
    exec(lines.splitlines()[1], {"pipe": plain, "folder": str(folder)})
    assert not torch.allclose(pictures(pipe, "<new1> teddy bear"), pictures(plain, "<new1> teddy bear"), atol=1e-4)  # the attention has its share


def test_new_attention_starts_as_the_old():
    pipe = tiny()
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = pipe.unet(x, 3, states).sample
        custom_attention(pipe.unet)
        assert torch.allclose(pipe.unet(x, 3, states).sample, before, atol=1e-5)


def test_textual_inversion_moves_one_row_only_and_diffusers_reads_it(runs):
    pipe, _, folder = runs("textual_inversion")
    fresh = tiny()
    old = {k: v for part in ("unet", "vae") for k, v in getattr(fresh, part).state_dict().items()}
    new = {k: v for part in ("unet", "vae") for k, v in getattr(pipe, part).state_dict().items()}
    assert all(torch.equal(new[k], old[k]) for k in old)
    a, b = pipe.text_encoder.state_dict(), fresh.text_encoder.state_dict()
    assert all(torch.equal(a[k][:len(b[k])], b[k]) for k in b) and len(tower(pipe)) == len(tower(fresh)) + 1
    start = tower(fresh)[fresh.tokenizer("teddy bear", add_special_tokens=False).input_ids].mean(0)
    assert not torch.allclose(tower(pipe)[-1], start)
    theirs = tiny()
    theirs.load_textual_inversion(str(folder))
    for other in (theirs, load_textual_inversion(fresh, folder)): assert torch.allclose(pictures(other, "<subject>"), pictures(pipe, "<subject>"), atol=1e-5)


# --- NeTI

def ids_of(pipe, texts): return pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids


def test_neti_tells_times_apart_in_half_precision():
    mapper, t = make_mapper(tiny(), "hat"), torch.arange(1000)
    code = mapper.code(t, torch.zeros(1000, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16): half = mapper.code(t, torch.zeros(1000, dtype=torch.long))
    assert torch.equal(code, half)


def test_a_method_without_identifier_asks_nothing_of_it():
    tokenizer, subject = tiny().tokenizer, Subject([], "hat", identifier="many tokens")
    with pytest.raises(BoigError, match="tokens to this text encoder"): check_words(tokenizer, subject)
    check_words(tokenizer, subject, identifier=False)
    with pytest.raises(BoigError, match="class noun"): check_words(tokenizer, Subject([], " "), identifier=False)


def test_neti_without_bypass_is_the_text_encoder():
    pipe, prompts = tiny(), ["a <it> and a ball", "a cup", "<it>"]
    token = add_word(pipe, "<it>", "hat")
    with torch.no_grad():
        want = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        mapper = make_mapper(pipe, "hat")
        mapper.forward = lambda t, l, keep: (tower(pipe)[token].expand(len(t), -1), torch.zeros(len(t), 16))
        neti = NeTI(pipe, mapper, token)
        states = neti.states(ids_of(pipe, prompts), torch.tensor([3, 500, 999]))
    assert states.shape == (3, 4, 2, 48, 16)
    assert torch.allclose(states, want[:, None, None].expand_as(states), atol=1e-5)


def test_neti_layers_in_one_batch_are_the_layers_one_by_one():
    pipe = tiny()
    token = add_word(pipe, "<it>", "hat")
    ids, t, neti = ids_of(pipe, ["a <it> and a ball", "red <it>"]), torch.tensor([10, 700]), NeTI(pipe, make_mapper(pipe, "hat"), token)
    with torch.no_grad():
        together = neti.states(ids, t)
        for b in range(2):
            for l in range(4):
                word, bypass = neti.mapper(t[b:b + 1], torch.tensor([l]))
                table = tower(pipe)
                table[token] = word[0]
                neti.reading = True
                seen = {}
                handle = neti.norm.register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
                keys = pipe.text_encoder(ids[b:b + 1])[0]
                handle.remove()
                neti.reading = False
                h, here = seen["h"][0].clone(), int((ids[b] == token).nonzero())
                h[here] += 0.2 * h[here].norm() * bypass[0] / bypass[0].norm()
                assert torch.allclose(together[b, l, 0], keys[0], atol=1e-5) and torch.allclose(together[b, l, 1], neti.norm(h), atol=1e-5)
        assert torch.allclose(neti.states(ids.flip(0), t.flip(0)), together.flip(0), atol=1e-5)


def test_neti_leaves_other_prompts_alone_and_works_in_any_sampler():
    base, pipe = tiny(), tiny()
    token = add_word(pipe, "<it>", "hat")
    NeTI(pipe, make_mapper(pipe, "hat"), token)
    assert torch.allclose(pictures(pipe, "hat"), pictures(base, "hat"), atol=1e-4)
    one, other = (sample(p, ["a cup", "a hat"], [1, 2], 3, 2.0).images for p in (pipe, base))
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(pictures(pipe, "<it>"), pictures(base, "hat"), atol=1e-3)


def test_neti_mapper():
    torch.manual_seed(0)
    m = NeTIMapper(4, 16, 0.3, hidden=8, codes=32)
    t, l = torch.tensor([0, 100, 900]), torch.tensor([0, 3, 1])
    word, bypass = m(t, l)
    assert torch.allclose(word.norm(dim=1), torch.full((3,), 0.3)) and bypass.shape == (3, 16)
    assert torch.allclose(m.code(t, l).norm(dim=1), torch.ones(3))
    assert torch.allclose(m.net[0].weight[5], m.code(torch.tensor([100]), torch.tensor([1]))[0])  # anchors: times first, then layers
    assert all(torch.equal(a, b) for a, b in zip(m(t, l, torch.full((3,), 8)), (word, bypass)))
    kept = m(t, l, torch.tensor([0, 2, 8]))[1]
    assert torch.allclose(kept[0], m.out.bias[16:]) and torch.equal(kept[2], bypass[2]) and not torch.allclose(kept[1], bypass[1])


def test_neti_moves_the_mapper_only_and_comes_back(runs):
    pipe, _, folder = runs("neti")
    fresh = tiny()
    for part in ("unet", "text_encoder", "vae"):
        a, b = getattr(pipe, part).state_dict(), getattr(fresh, part).state_dict()
        assert all(torch.equal(a[k][:len(b[k])] if a[k].ndim else a[k], b[k]) for k in b)
    assert torch.allclose(pictures(load_neti(fresh, folder), "<subject>"), pictures(pipe, "<subject>"), atol=1e-4)
    assert not torch.allclose(pictures(load_neti(tiny(), folder, keep=2), "<subject>"), pictures(pipe, "<subject>"), atol=1e-4)
    with pytest.raises(BoigError, match="another model"): load_neti(tiny(layers_per_block=2), folder)


@pytest.mark.parametrize("first, second", [("custom_diffusion", "custom_diffusion"), ("custom_diffusion", "neti"), ("neti", "custom_diffusion"), ("neti", "textual_inversion"), ("textual_inversion", "textual_inversion")])
def test_a_pipeline_holds_one_subject(first, second, runs, tmp_path):
    "A second one is refused, and changes nothing, whatever its word."
    load = {"custom_diffusion": load_custom_diffusion, "neti": load_neti, "textual_inversion": load_textual_inversion}
    pipe = load[first](tiny(), runs(first)[2])
    words, before = load_subject(runs(first)[2])["words"], len(pipe.tokenizer)
    drawn, other = pictures(pipe, words), tmp_path/"other"
    shutil.copytree(runs(second)[2], other)
    if first != second: (other/"subject.json").write_text(json.dumps(load_subject(other) | {"words": "<other> thing" if second == "custom_diffusion" else "<other>"}))
    with pytest.raises(BoigError, match="already holds .* load a fresh one"): load[second](pipe, other)
    assert len(pipe.tokenizer) == before and torch.equal(pictures(pipe, words), drawn)
    if first != "textual_inversion": refused("already holds", METHODS[second][0], pipe, SUBJECT, tmp_path/"new", METHODS[second][1])


# --- InstructBooth

def brightness(images, prompts, context=None): return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("rank", [2, 0])
def test_instructbooth_comes_back_from_its_folder(rank, tmp_path):
    rl = DDPOConfig(epochs=1, samples=4, batch_size=2, steps=2, guidance=2.0, lr=1e-2, advantages="global", lora_rank=rank, tracker="")
    dream, pipe, asked = METHODS["dreambooth"][1], tiny(), []
    def reward(images, prompts, context=None):
        asked.extend(prompts)
        return brightness(images, prompts)
    log = train_instructbooth(pipe, SUBJECT, ["a {0} {1} and a hat"], reward, tmp_path, dream, rl, progress=False)
    assert len(log) == 1 and set(asked) == {"a teddy bear and a hat"}
    first, both = load_dreambooth(tmp_path/"dreambooth", "cpu"), load_instructbooth(tmp_path, "cpu")
    assert torch.allclose(pictures(both, "q teddy bear"), pictures(pipe, "q teddy bear"), atol=1e-4)
    assert load_personalised(tmp_path, "unused", "cpu")[1] == load_personalised(tmp_path/"dreambooth", "unused", "cpu")[1] == "q teddy bear"
    assert not torch.allclose(pictures(both, "q teddy bear"), pictures(first, "q teddy bear"), atol=1e-4)
    assert (tmp_path/"rl"/"adapter"/"pytorch_lora_weights.safetensors").is_file() == (rank > 0)
    shared = train_instructbooth(tiny(), SUBJECT, ["a {0} {1} and a hat"], reward, tmp_path/"again", dream, rl, start=tmp_path/"dreambooth", class_folder=tmp_path/"dreambooth"/"class", progress=False)
    assert shared.reward.tolist() == log.reward.tolist()
    assert json.loads((tmp_path/"again"/"subject.json").read_text())["start"] == "../dreambooth"
    more = dict(start=tmp_path/"dreambooth", class_folder=tmp_path/"dreambooth"/"class")
    for left in tmp_path.rglob("checkpoint.pt"): left.unlink()  # as `teach` leaves it
    late = train_instructbooth(tiny(), SUBJECT, ["a {0} {1} and a hat"], reward, tmp_path/"late", dream, rl, **more, progress=False)
    assert late.reward.tolist() == pytest.approx(log.reward.tolist(), abs=1e-6)
    refused("another lr", train_instructbooth, tiny(), SUBJECT, ["a {0} {1} and a hat"], reward, tmp_path/"later", dataclasses.replace(dream, lr=1.0), rl, **more)
    refused("checkpoint is gone", train_instructbooth, tiny(), SUBJECT, ["a {0} {1} and a hat"], reward, tmp_path, dream, rl, **more)


@pytest.mark.parametrize("name", ["custom_diffusion", "textual_inversion", "neti"])
def test_any_folder_opens_by_itself(name, runs, tmp_path):
    pipe, _, folder = runs(name)
    tiny().save_pretrained(tmp_path/"base")
    other, words = load_personalised(folder, str(tmp_path/"base"), "cpu")
    assert torch.allclose(pictures(other, words), pictures(pipe, words), atol=1e-4)


def test_a_folder_of_an_unknown_method(tmp_path):
    (tmp_path/"subject.json").write_text('{"method": "neat", "words": "it"}')
    with pytest.raises(BoigError, match="'neti'"): load_personalised(tmp_path, "pocket-sd", "cpu")


def test_reward_reads_prompts_without_the_identifier():
    seen = []
    def reward(images, prompts, context): seen.append((prompts, context)); return torch.zeros(len(prompts))
    plain = Plainly(reward, Subject([], "apple", "q", "red"), ["a {0} {1} and a q", "a {0} {1}"])
    plain(torch.zeros(2, 3, 4, 4), ["a q red apple and a q", "an apple"], {"x": 1})
    assert seen == [(["an apple and a q", "an apple"], {"x": 1})] and plain.name == "function, without 'q'" and not plain.differentiable


def test_another_reward_is_another_run_without_the_identifier_too():
    "Plainly stands between a run and its reward; the plan sees through it."
    one, other = (Plainly(lambda images, prompts, context, k=k: k * brightness(images, prompts), SUBJECT, ["a {0} {1}"]) for k in (1, 2))
    assert one.name == other.name and reward_plan(one) != reward_plan(other)


def test_settings_of_the_paper():
    d, r = DreamBoothConfig(), INSTRUCT
    assert (d.lr, d.batch_size, d.beta2, d.weight_decay, d.prior_pictures, d.prior_weight) == (2e-5, 1, 0.99, 0.01, 200, 1.0)  # appendix B; a batch of 2: one subject, one class picture
    assert (r.samples, r.batch_size, r.steps, r.guidance, r.clip, r.lr, r.weight_decay, r.beta2) == (16, 8, 50, 7.5, 1e-4, 2e-5, 0.01, 0.99) and r.lora_rank > 0


def test_the_papers_scale_uses_the_papers_settings():
    "The experiment takes them from paper.toml, not from the classes."
    c, a = (dataclasses.asdict(getattr(load_scale("paper"), n)) for n in ("instructbooth", "instructbooth_ablations"))
    said = dict(base="stable-diffusion-v1-5/stable-diffusion-v1-5", reward="image-reward", class_pictures=200, dreambooth_lr=2e-5, dreambooth_batch=1, rl_samples=16, rl_batch=8, rl_steps=50, guidance=7.5, rl_lr=2e-5,
                phrases=0, each=10, dreambench_each=4, dreambench_rl="dreambench")  # sec. 4.2, 5.1, 5.3, appendices A, B, G
    ours = dict(sampling_steps=50, fast=False, ema=0, rl_timesteps=1)  # nothing of our own recipe
    assert {k: c[k] for k in said | ours} == said | ours and c["lora_rank"] > 0
    assert c["rl_micro_batch"] < c["rl_batch"] and c["draw_batch"] < 32  # changes no result, but a GPU's memory ends
    assert len(c["actions_subjects"].split(",")) == 8 and (a["rare_each"], a["seeds"]) == (10, 3)
    assert {k: v for k, v in a.items() if k in c} == {k: v for k, v in c.items() if k in a}
    assert load_scale("paper").instructbooth_tables.asked_each == c["each"]
