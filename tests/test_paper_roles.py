"Real scale, proven small: a tiny random checkpoint of each paper-scale class, in the hub's file layout, through the loader and the use of the real one."
import json

import pytest
import torch
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, PNDMScheduler,
                       StableDiffusionPipeline, UNet2DConditionModel)
from test_clip_rewards import config as clip_config
from test_clip_rewards import original as open_clip_tensors
from test_clip_rewards import save_clip
from test_image_reward import MED, PUBLISHED, VIT
from transformers import (AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel,
                          CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection, Idefics2ForConditionalGeneration, T5Config, T5EncoderModel,
                          T5TokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel)

from boig.behaviour.finetune import load_llm, make_llama, save_llm
from boig.behaviour.generate import Constraint, generate_answers, verbalization_grammar
from boig.checkpoints import load_pretrained
from boig.data.verbalization import Verbalization, parse, problems
from boig.diffusion.pipeline import draw, load_pipeline
from boig.doctor import parts
from boig.metrics.fid import Inception, load_features, statistics
from boig.perception.captioning import load_captioner, tiny_blip, tiny_llava
from boig.perception.colors import verbalize_colors
from boig.perception.grounding import load_grounder, tiny_grounder
from boig.perception.ram import load_ram, tiny_ram
from boig.perception.saliency import load_saliency, tiny_saliency
from boig.pocket.captions import pixels, samples
from boig.pocket.idefics import ask, make_idefics, make_processor
from boig.rewards.aesthetic import LAION, Head
from boig.rewards.base import load_reward
from boig.zoo import resolve

ROLES = {} # of a paper-scale model: (make a tiny one in a folder -> what its loader takes, load and use it)

def role(*models, use):
    "The decorated function makes the checkpoint of these models of roles.toml."
    def register(make):
        for m in models: ROLES[m] = (make, use)
        return make
    return register

@pytest.fixture(scope="module")
def pictures(): return pixels(samples(3, 1, "paper roles")[0])

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


# Generators: a prompt in, a picture out

def autoencoder(channels=4, **more):
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, down_block_types=["DownEncoderBlock2D"] * 2,
                         up_block_types=["UpDecoderBlock2D"] * 2, **more)

def reader(tokenizer): return CLIPTextModel(CLIPTextConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=77))

def stable_diffusion(folder, scheduler, **unet):
    tokenizer = CLIPTokenizer.from_pretrained(resolve("pocket-clip"), model_max_length=77)
    net = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
                               down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **unet)
    StableDiffusionPipeline(autoencoder(), reader(tokenizer), tokenizer, net, scheduler, None, CLIPImageProcessorPil(), requires_safety_checker=False).save_pretrained(folder)
    return str(folder)

def draws(**sampling):
    def use(ref, pictures):
        pipe = load_pipeline(ref, "cpu")
        drawn, alone = draw(pipe, ["a cat", "a red shoe"], seed=1, **sampling), draw(pipe, ["a cat"], seed=1, **sampling)
        assert drawn.shape == (2, 3, 16, 16) and drawn.min() >= 0 and drawn.max() <= 1 and drawn.std() > 0
        assert torch.allclose(drawn[:1], alone, atol=1e-3) and not torch.allclose(drawn[0], drawn[1], atol=1e-3)
        return type(pipe).__name__
    return use

@role("Stable Diffusion 1.5", use=draws(num_inference_steps=2, guidance_scale=7.5))
def make_sd15(folder): return stable_diffusion(folder, PNDMScheduler(skip_prk_steps=True, steps_offset=1), attention_head_dim=2)

@role("SD-Turbo", use=draws(num_inference_steps=1, guidance_scale=0.0))
def make_turbo(folder):
    return stable_diffusion(folder, EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1), attention_head_dim=(1, 2), use_linear_projection=True)

@role("FLUX.1-schnell", use=draws(num_inference_steps=1, guidance_scale=0.0, max_sequence_length=16, height=16, width=16))
def make_flux(folder):
    clip = CLIPTokenizer.from_pretrained(resolve("pocket-clip"), model_max_length=77)
    t5 = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in "a cat red shoe".split())], extra_ids=0)
    net = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
                                 pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=False)
    encoder = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"))
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.3)
    FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, reader(clip), clip, encoder, t5, net).save_pretrained(folder)
    return str(folder)


# Language models: a question in, a verbalisation out

def writes_a_verbalization(ref, pictures):
    model, tokenizer = load_llm(ref, "cpu")
    constraint = Constraint(verbalization_grammar((64, 64), 2), tokenizer)
    answer = generate_answers(model, tokenizer, ["captions: a cat. What is in it?"], constraint, max_new_tokens=300)[0]
    assert parse(answer).value and not problems(parse(answer).value, (64, 64)), answer
    return type(model).__name__

@role("Llama 2 13B", use=writes_a_verbalization)
def make_tiny_llama(folder):
    tokenizer = AutoTokenizer.from_pretrained(resolve("pocket-llama"))
    save_llm(make_llama(tokenizer, 32, 1, seed=0), tokenizer, folder)
    return str(folder)

def answers_about_pictures(ref, pictures):
    folder = resolve(ref)
    model, processor = load_pretrained(Idefics2ForConditionalGeneration, folder), AutoProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(ask(model, processor, pictures[:2], "which picture shows a cat?"), str)
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is type(model)
    return type(model).__name__

@role("IDEFICS2 8B", use=answers_about_pictures)
def make_tiny_idefics(folder):
    processor = make_processor(4)
    make_idefics(processor, SMALL, SMALL).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


# Perception: a picture in, what is on it out

def captions(ref, pictures):
    captioner = load_captioner(ref, "cpu", max_tokens=6)
    said = captioner(pictures)
    assert len(said) == 3 and all(isinstance(s, str) for s in said) and captioner(pictures[:1]) == said[:1]
    return type(captioner.model).__name__

role("LLaVA 1.5 7B", use=captions)(lambda folder: str(tiny_llava(folder)))
role("BLIP captioning large", use=captions)(lambda folder: str(tiny_blip(folder)))

def tags(ref, pictures):
    tagger = load_ram(ref, "cpu")
    found = tagger(pictures)
    assert len(found) == 3 and all(set(f) <= set(tagger.tags) and all(0.5 < p <= 1 for p in f.values()) for f in found)
    return type(tagger.model).__name__

role("RAM (Swin-L)", use=tags)(lambda folder: str(tiny_ram(folder)))

def a_verbalization(ref, pictures):
    grounder = load_grounder(ref, "cpu", threshold=0.1)
    found, looks = grounder(pictures, [["cat", "shoe"], ["watch"], []]), verbalize_colors(pictures)
    assert all(0 <= c <= 64 for f in found for d in f for c in d.box) and any(found) and found[2] == []
    for f, look in zip(found, looks): assert parse(Verbalization(*look, {d.name: tuple(map(int, d.box)) for d in f}).to_json()).value
    return type(grounder.model).__name__

role("Grounding DINO base", use=a_verbalization)(lambda folder: str(tiny_grounder(folder)))

def masks(ref, pictures):
    saliency = load_saliency(ref, "cpu", size=64)
    mask, _ = saliency(pictures)
    assert mask.shape == (3, 64, 64) and mask.dtype == torch.bool
    return next(type(m).__name__ for m in vars(saliency).values() if isinstance(m, torch.nn.Module))

role("U²-Net", use=masks)(lambda folder: str(tiny_saliency(f"{folder}.pth")))


# Judges: a picture and a prompt or references in, a score out

def scores(name, references=False, **options):
    def use(ref, pictures):
        reward = load_reward(name, ref, "cpu", **{k: v(ref) if callable(v) else v for k, v in options.items()})
        x = pictures.clone().requires_grad_()
        s = reward(x, ["a cat", "a red shoe", "a dog"], {"references": pictures[1:]} if references else None)
        assert s.shape == (3,) and s.dtype == torch.float32 and s.isfinite().all() and reward.differentiable
        s.sum().backward()
        assert x.grad.abs().amax((1, 2, 3)).min() > 0
        with torch.no_grad(): assert torch.allclose(reward(pictures[:1], ["a cat"], {"references": pictures[1:]}), s[:1], atol=1e-4)
        return type(getattr(reward, "net", None) or reward.model).__name__
    return use

role("CLIP ViT-B/32", use=scores("clip-score"))(lambda folder: save_clip(folder, activation="quick_gelu"))
role("CLIP ViT-H/14 (LAION-2B)", use=scores("clip-score", scale="100cos", activation="gelu"))(save_clip)
role("PickScore v1", use=scores("pickscore"))(save_clip)

def words(): return len(CLIPTokenizer.from_pretrained(resolve("pocket-clip")))

HPS = {"config": lambda ref: clip_config(words=words()), "processor": lambda ref: f"{ref}.words"}
@role("HPS v2", use=scores("hps-v2", **HPS))
@role("HPS v2.1", use=scores("hps-v2.1", **HPS))
def make_hps(folder):
    state = open_clip_tensors() | {"token_embedding.weight": torch.randn(words(), 24)}
    torch.save({"epoch": 1, "state_dict": {k: t.half() for k, t in state.items()}}, f"{folder}.pt")
    save_clip(f"{folder}.pt.words")
    return f"{folder}.pt"

@role("CLIP ViT-L/14", "LAION aesthetic predictor v2", use=scores("aesthetic", tower=lambda ref: ref.removesuffix(".pth")))
def make_aesthetic(folder):
    save_clip(folder, activation="quick_gelu", dim=768)
    torch.save(Head(LAION).state_dict(), f"{folder}.pth")
    return f"{folder}.pth"

@role("ImageReward", use=scores("image-reward", vision=VIT))
def make_image_reward(folder):
    folder.mkdir()
    torch.save(PUBLISHED, folder/"ImageReward.pt")
    (folder/"med_config.json").write_text(json.dumps(MED))
    (folder/"vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "shoe", "dog", *(f"w{i}" for i in range(MED["vocab_size"] - 12))]))
    return str(folder)

VISION = SMALL | {"image_size": 32, "patch_size": 16}

@role("CSD ViT-L", use=scores("csd", references=True, pixels="folder"))
def make_csd(folder):
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)

@role("DINO ViT-S/16", use=scores("dino", references=True, pixels="folder"))
def make_dino(folder):
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)

def fid(ref, pictures):
    look = load_features("clean-fid", weights=ref, device="cpu")
    seen = statistics(look, pictures[:1])
    assert seen.name == "FID (clean-fid)" and seen.mean.shape == (2048,) and seen.mean.isfinite().all()
    return type(look.net).__name__

@role("FID Inception", use=fid)
def make_inception(folder): # it has one size only
    with torch.device("meta"): net = Inception().to_empty(device="cpu")
    for name, tensor in net.state_dict().items(): tensor.fill_(1.0 if name.endswith("running_var") else 0.01 if tensor.ndim else 0)
    torch.save(net.state_dict(), f"{folder}.pth")
    return f"{folder}.pth"


def test_every_model_of_the_paper_has_a_row(): assert set(ROLES) == {p.model for p in parts("paper")}

@pytest.mark.parametrize("model", ROLES)
def test_role(model, tmp_path, pictures):
    make, use = ROLES[model]
    torch.manual_seed(0)
    kind = next(p.kind for p in parts("paper") if p.model == model)
    used = use(make(tmp_path/"tiny"), pictures)
    assert used == kind or kind == "Head" and used == "CLIPModel"
