"Noise optimisation: by hand on a linear generator, by finite differences through pocket-turbo, flat memory, broken rewards, other pipelines."
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from transformers import CLIPImageProcessorPil

from boig.core import BoigError
from boig.diffusion.pipeline import draw, load_pipeline, sampling
from boig.diffusion.reno import Painter, RenoConfig, Term, climb, norm_penalty, optimise_noise

PROMPTS = ["a red shoe on a blue background", "a cat on a green background", "a burger on a pink background"]
FEW = sampling("pocket-turbo")


@pytest.fixture(scope="module")
def turbo(): return load_pipeline("pocket-turbo", "cpu")


class Blue:
    "A reward that needs no model: how blue a picture is."
    name, differentiable = "blue", True
    def __call__(self, images, prompts, context=None): return 10 * (images[:, 2] - images[:, 0]).mean((1, 2))


class Linear:
    "x = Aε"
    def __init__(self, A, noise): self.A, self.noise = A, noise
    def __call__(self, noise): return (noise @ self.A.T).view(-1, 3, 1, 2)


class Bend:
    "A reward with a curved landscape."
    name, differentiable = "bend", True
    def __call__(self, images, prompts, context=None): return (images.flatten(1).sin() * torch.arange(6)).sum(1)


# --- the price of a noise

def test_norm_penalty_is_the_chi_density():
    d, r = 50, torch.tensor([5.0, 6.0, 7.0, 9.0], dtype=torch.float64)
    x = torch.nn.functional.normalize(torch.randn(4, 2, 5, 5, dtype=torch.float64).flatten(1)).view(4, 2, 5, 5) * r.view(-1, 1, 1, 1)
    log_chi = (d - 1) * r.log() - r**2 / 2 - (d / 2 - 1) * math.log(2) - math.lgamma(d / 2)
    assert torch.allclose((norm_penalty(x) + log_chi).diff(), torch.zeros(3, dtype=torch.float64), atol=1e-10)
    top = (x[:1] / r[0] * math.sqrt(d - 1)).requires_grad_()
    assert torch.autograd.grad(norm_penalty(top).sum(), top)[0].abs().max() < 1e-12


def test_the_norm_alone_pulls_to_its_top():
    class Nothing:
        name, differentiable = "nothing", True
        def __call__(self, images, prompts, context=None): return 0 * images.sum((1, 2, 3))
    found = climb(Linear(torch.eye(6), torch.randn(2, 6) * torch.tensor([[0.2], [4.0]])), ["", ""], [Term(Nothing())], RenoConfig(steps=200, lr=0.1, clip=1, norm_weight=1))
    assert found.history[found.history.step == 200].norm.tolist() == pytest.approx([math.sqrt(5)] * 2, abs=1e-3)


# --- the climb

def test_the_climb_is_the_authors_loop():
    "Their ingredients, put together independently: torch's SGD with Nesterov momentum, its clip of a gradient's norm, one picture at a time."
    torch.manual_seed(1)
    A, first = torch.randn(6, 6), torch.randn(3, 6)
    found = climb(Linear(A, first), [""] * 3, [Term(Bend(), 0.75)], RenoConfig(steps=12, lr=0.7, clip=0.4, norm_weight=0.05))
    for k in range(3):
        x, rewards, places = first[k:k + 1].clone().requires_grad_(), [], []
        optimizer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
        for _ in range(13):
            optimizer.zero_grad()
            reward = 0.75 * Bend()(Linear(A, first)(x), [""])
            norm = torch.linalg.vector_norm(x)
            rewards.append(reward.item())
            places.append(x.detach().clone())
            (-reward.sum() + 0.05 * (0.5 * norm**2 - 5 * norm.log())).backward()
            torch.nn.utils.clip_grad_norm_(x, 0.4)
            optimizer.step()
        mine = found.history[found.history.picture == k]
        assert mine.reward.tolist() == pytest.approx(rewards, abs=1e-4)
        assert torch.allclose(found.noise[k], places[max(range(13), key=rewards.__getitem__)][0], atol=1e-4)
        assert mine.best.tolist() == [r > max(rewards[:i], default=-math.inf) for i, r in enumerate(rewards)]
    assert found.table.best.tolist() == pytest.approx(found.history.groupby("picture").reward.max().tolist())


def test_gradient_agrees_with_finite_differences():
    pipe = load_pipeline("pocket-turbo", "cpu", dtype=torch.float64)
    paint = Painter(pipe, PROMPTS[:1], [5], **FEW)
    noise, way, h = paint.noise.clone().requires_grad_(), torch.randn(paint.noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-5
    assert noise.dtype == torch.float64
    slope = (torch.autograd.grad(Blue()(paint(noise), PROMPTS[:1]).sum(), noise)[0] * way).sum()
    with torch.no_grad(): rise = (Blue()(paint(noise + h * way), PROMPTS[:1]) - Blue()(paint(noise - h * way), PROMPTS[:1])) / (2 * h)
    assert slope.item() == pytest.approx(rise.item(), rel=1e-4) and abs(slope) > 1e-4


def test_a_batch_climbs_as_its_pictures_alone(turbo):
    log, config, one = {}, RenoConfig(steps=2, norm_weight=0.1), RenoConfig(steps=2, norm_weight=0.1, batch_size=1)
    wide = load_pipeline("pocket-turbo", "cpu", dtype=torch.float64)  # in float32, a kink of the decoder makes 1e-3 of 1e-6
    both, single = (optimise_noise(wide, PROMPTS, Term(Blue(), 1), c, seed=4, **FEW) for c in (config, one))
    assert torch.allclose(both.images, single.images, atol=1e-6) and torch.allclose(both.noise, single.noise, atol=1e-9)
    together = optimise_noise(turbo, PROMPTS, Term(Blue(), 1), config, seed=4, watch=lambda numbers, step, x: log.setdefault(step, x), **FEW)
    alone = optimise_noise(turbo, PROMPTS, Term(Blue(), 1), one, seed=4, **FEW)
    assert torch.allclose(together.noise, alone.noise, atol=1e-3)
    assert list(log) == [0, 1, 2] and torch.equal(log[0], together.before)
    assert together.history.picture.tolist() == [0, 1, 2] * 3 and alone.history.picture.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert (together.table.best > together.table["first"]).all()
    with torch.no_grad(): assert Blue()(together.images, PROMPTS).tolist() == pytest.approx(together.table.best.tolist(), abs=1e-4)
    again = optimise_noise(turbo, PROMPTS, Term(Blue(), 1), config, seed=4, **FEW)
    assert torch.equal(again.images, together.images)
    assert not torch.allclose(optimise_noise(turbo, PROMPTS, Term(Blue(), 1), config, seed=5, **FEW).before, together.before, atol=0.1)


# --- the first picture is the plain one, whatever the pipeline

@pytest.mark.parametrize("scheduler", [None, EulerAncestralDiscreteScheduler])
def test_step_0_is_a_plain_drawing(turbo, scheduler):
    pipe = load_pipeline("pocket-turbo", "cpu") if scheduler else turbo
    if scheduler: pipe.scheduler = scheduler.from_config(pipe.scheduler.config)  # adds noise at each step
    found = optimise_noise(pipe, PROMPTS[:2], Blue(), RenoConfig(steps=1), seed=7, **FEW)
    assert torch.allclose(found.before, draw(pipe, PROMPTS[:2], seed=7, **FEW), atol=1e-4)


@pytest.mark.parametrize("kind", ["SD-Turbo", "FLUX.1-schnell"])
def test_other_pipelines(kind, tmp_path):
    from test_paper_roles import ROLES
    torch.manual_seed(0)
    pipe = load_pipeline(ROLES[kind][0](tmp_path/"tiny"), "cpu")
    how = dict(num_inference_steps=1, guidance_scale=0.0) | (dict(max_sequence_length=16, height=16, width=16) if "FLUX" in kind else {})
    found = optimise_noise(pipe, ["a cat", "a red shoe"], Term(Blue(), 1), RenoConfig(steps=4, lr=20, norm_weight=0), seed=1, **how)
    assert torch.allclose(found.before, draw(pipe, ["a cat", "a red shoe"], seed=1, **how), atol=1e-4)
    assert (found.table.best > found.table["first"]).all() and (found.history.gradient[:2] > 0).all()
    if "SD" in kind: assert isinstance(pipe.scheduler, EulerDiscreteScheduler) and found.noise.std() < 2  # not yet scaled


class Blackens(torch.nn.Module):
    "A safety checker that likes nothing."
    device, dtype = torch.device("cpu"), torch.float32
    def forward(self, images, clip_input): return 0 * images, [True] * len(images)


def test_a_safety_checker_is_set_aside_and_put_back(turbo):
    pipe = StableDiffusionPipeline(**turbo.components | {"safety_checker": Blackens(), "feature_extractor": CLIPImageProcessorPil()})
    pipe.set_progress_bar_config(disable=True)
    before = dict(pipe.config)
    found, bare = (optimise_noise(p, PROMPTS[:2], Term(Blue(), 1), RenoConfig(steps=1), seed=3, **FEW) for p in (pipe, turbo))
    assert torch.equal(found.images, bare.images) and (found.history.gradient[:2] > 0).all()
    assert dict(pipe.config) == before and isinstance(pipe.safety_checker, Blackens) and draw(pipe, PROMPTS[:1], **FEW).max() == 0
    def stop(*_): raise KeyboardInterrupt
    paint = Painter(pipe, PROMPTS[:1], [0], **FEW, callback_on_step_end=stop)
    with pytest.raises(KeyboardInterrupt): paint(paint.noise)
    assert "run_safety_checker" not in vars(pipe)


def test_negative_prompts_one_for_all_or_one_for_each(turbo):
    how, one = dict(num_inference_steps=1, guidance_scale=3.0), RenoConfig(steps=1, batch_size=2)
    for negative in (["a dog"] * 3, ["a dog", "snow", "a red shoe"]):
        plain = draw(turbo, PROMPTS, seed=2, negative_prompt=negative, **how)
        assert torch.allclose(optimise_noise(turbo, PROMPTS, Blue(), one, seed=2, negative_prompt=negative, **how).before, plain, atol=1e-4)
        assert torch.allclose(draw(turbo, PROMPTS, seed=2, batch_size=2, negative_prompt=negative, **how), plain, atol=1e-4)
        if len(set(negative)) == 1: assert torch.allclose(optimise_noise(turbo, PROMPTS, Blue(), one, seed=2, negative_prompt="a dog", **how).before, plain, atol=1e-4)
    assert not torch.allclose(draw(turbo, PROMPTS, seed=2, **how), plain, atol=1e-2)
    with pytest.raises(BoigError, match="3 pictures need a negative_prompt for each"): optimise_noise(turbo, PROMPTS, Blue(), one, negative_prompt=["a dog"], **how)


# --- memory, frozen weights

class Counted:
    "How many tensors are kept for gradients, now and at most."
    def __init__(self): self.now = self.most = self.bytes = 0
    def __enter__(self):
        counter = self
        class Box:
            def __init__(self, x):
                self.x, self.size = x, x.numel() * x.element_size()
                counter.now += 1
                counter.bytes += self.size
                counter.most = max(counter.most, counter.bytes)
            def __del__(self): counter.now, counter.bytes = counter.now - 1, counter.bytes - self.size
        self.hooks = torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.x)
        self.hooks.__enter__()
        return self
    def __exit__(self, *error): self.hooks.__exit__(*error)


def test_memory_is_flat_in_steps_and_less_with_checkpoints(turbo):
    most, images = {}, {}
    for name, config in {"2": RenoConfig(steps=2), "5": RenoConfig(steps=5), "less": RenoConfig(steps=2, checkpointing=True)}.items():
        left = []
        with Counted() as c: images[name] = optimise_noise(turbo, PROMPTS[:1], Blue(), config, seed=2, watch=lambda *_: left.append(c.now), **FEW).images
        most[name] = c.most
        assert set(left) == {0}  # a step's graph is gone before the next one
    assert most["2"] == most["5"] > 2 * most["less"] > 0
    assert torch.allclose(images["2"], images["less"], atol=1e-4)
    assert "forward" not in vars(turbo.unet)


def test_weights_stay_as_they_are(turbo):
    before, net = [p.clone() for p in turbo.unet.parameters()], turbo.unet
    net.requires_grad_(True).train()
    first = next(net.parameters()).requires_grad_(False)
    optimise_noise(turbo, PROMPTS[:1], Blue(), RenoConfig(steps=1), **FEW)
    assert net.training and not first.requires_grad and all(p.requires_grad for p in list(net.parameters())[1:])
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters()))
    net.requires_grad_(False).eval()


# --- what can go wrong

class Red:
    "No answer for the second picture."
    name, differentiable = "red", True
    def __init__(self, at): self.at = at
    def __call__(self, images, prompts, context=None): return 10 * images[:, 0].mean((1, 2)) * torch.tensor([math.nan if p == self.at else 1.0 for p in prompts])


def test_a_broken_reward_costs_its_own_picture_only(turbo):
    config, terms = RenoConfig(steps=2), [Term(Blue(), 1), Term(Red(PROMPTS[1]), 0.5)]
    with pytest.warns(UserWarning, match="1 of 3 pictures stopped"): found = optimise_noise(turbo, PROMPTS, terms, config, seed=4, **FEW)
    whole = optimise_noise(turbo, PROMPTS, [Term(Blue(), 1), Term(Red(""), 0.5)], config, seed=4, **FEW)
    for k in (0, 2): assert torch.allclose(found.images[k], whole.images[k], atol=1e-4)
    assert torch.equal(found.images[1], found.before[1]) and found.images.isfinite().all()
    assert found.table.stopped.tolist() == [False, True, False] and found.table.best.isna().tolist() == [False, True, False]
    assert found.history[found.history.picture == 1].red.isna().all() and found.history.blue.notna().all()


def test_a_broken_picture_is_not_shown_to_rewards():
    class Breaks(Linear):
        def __call__(self, noise): return super().__call__(noise) / torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    class Strict(Bend):
        def __call__(self, images, prompts, context=None):
            assert images.isfinite().all()
            return super().__call__(images, prompts)
    found = climb(Breaks(torch.eye(6), torch.randn(2, 6)), ["", ""], [Term(Strict())], RenoConfig(steps=3, lr=0.1))
    assert found.table.stopped.tolist() == [False, True] and found.history[found.history.picture == 0].reward.notna().all()


def test_a_killed_call_goes_on(turbo, tmp_path):
    config, drawn = RenoConfig(steps=1, batch_size=1), []
    def power_cut(numbers, step, images):
        drawn.append((numbers[0], step))
        if drawn[-1] == (1, 0): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): optimise_noise(turbo, PROMPTS[:2], Blue(), config, seed=6, folder=tmp_path, watch=power_cut, **FEW)
    again = optimise_noise(turbo, PROMPTS[:2], Blue(), config, seed=6, folder=tmp_path, watch=lambda n, step, x: drawn.append((n[0], step)), **FEW)
    assert drawn == [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]
    whole = optimise_noise(turbo, PROMPTS[:2], Blue(), config, seed=6, **FEW)
    assert torch.equal(again.images, whole.images) and torch.equal(again.noise, whole.noise)
    assert again.history.dtypes.equals(whole.history.dtypes) and again.history.round(4).equals(whole.history.round(4))
    with pytest.raises(BoigError, match="another call"): optimise_noise(turbo, PROMPTS[:2], Blue(), config, seed=7, folder=tmp_path, **FEW)


def test_a_folder_knows_the_pipeline_and_what_the_rewards_read(tmp_path):
    pipe, config, x, drawn = load_pipeline("pocket-turbo", "cpu"), RenoConfig(steps=1), torch.rand(2, 3, 8, 8), []
    def call(folder, pipe, context): return optimise_noise(pipe, PROMPTS[:1], Term(Blue(), 1, context), config, folder=tmp_path/folder, watch=lambda *_: drawn.append(1), **FEW)
    def other(folder, pipe, context):
        with pytest.raises(BoigError, match="another pipeline"): call(folder, pipe, context)
    call("a", pipe, {"references": x})
    call("b", pipe, [{"taste": Path("a"), "person": SimpleNamespace()}])
    call("a", load_pipeline("pocket-turbo", "cpu"), {"references": x.clone()})
    call("b", pipe, [{"taste": Path("a"), "person": SimpleNamespace()}])
    assert len(drawn) == 4  # twice two drawings: the same once more is kept
    changed = x.clone()
    changed[1, 2, 3, 4] += 1e-3
    other("a", pipe, {"references": changed})
    other("a", pipe, None)
    other("b", pipe, [{"taste": Path("b"), "person": SimpleNamespace()}])
    usual, pipe.scheduler = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    other("a", pipe, {"references": x})
    pipe.scheduler = usual
    with torch.no_grad(): pipe.unet.conv_out.weight.mul_(1 + 1e-6)
    other("a", pipe, {"references": x})


def test_each_picture_may_have_its_own_context():
    class Toward:
        name, differentiable = "toward", True
        calls = 0
        def __call__(self, images, prompts, context=None):
            self.calls += 1
            assert all(p == context["of"] for p in prompts)
            return -(images - context["y"]).square().flatten(1).sum(1)
    a, b, reward = {"y": 1.0, "of": "a"}, {"y": -1.0, "of": "b"}, Toward()
    found = climb(Linear(torch.eye(6), torch.zeros(3, 6) + 0.01), ["a", "b", "a"], [Term(reward, 1, [a, b, a])], RenoConfig(steps=60, lr=0.1, norm_weight=0, clip=0, momentum=0))
    assert torch.allclose(found.noise, torch.tensor([1.0, -1.0, 1.0])[:, None].expand(3, 6), atol=1e-3) and reward.calls == 2 * 61


def test_bad_input_says_what_to_do(turbo):
    class Blunt(Blue): differentiable = False
    class Cut(Blue):
        def __call__(self, images, prompts, context=None): return super().__call__(images.detach(), prompts)
    for call, says in ((lambda: optimise_noise(turbo, "a cat", Blue()), "no prompts"), (lambda: optimise_noise(turbo, [], Blue()), "no prompts"),
                       (lambda: optimise_noise(turbo, PROMPTS, Blunt()), "not differentiable"), (lambda: optimise_noise(turbo, PROMPTS, [Blue(), Blue()]), "one name"),
                       (lambda: optimise_noise(turbo, PROMPTS[:1], Cut(), **FEW), "No gradient"), (lambda: optimise_noise(turbo, PROMPTS, Term(Blue(), 1, [{}])), "one for each of the 3"), (lambda: RenoConfig(steps=0), "steps"), (lambda: RenoConfig(lr=math.nan), "lr > 0")):
        with pytest.raises(BoigError, match=says): call()


def test_one_persons_taste_is_a_reward(turbo):
    from boig.preference.model import PreferenceConfig, PreferenceModel, Rated, tiny_idefics
    from boig.preference.reward import PreferenceReward
    torch.manual_seed(3)
    model = PreferenceModel(*tiny_idefics(latents=4, layers=1), PreferenceConfig(tokens=2))
    history = [Rated(torch.rand(3, 64, 64), "a red shoe", i % 2 == 0) for i in range(4)]
    taste = PreferenceReward(model, history)
    found = optimise_noise(turbo, PROMPTS[:2], [Term(taste), Term(Blue(), 0.01)], RenoConfig(steps=3), seed=1, **FEW)
    assert (found.history.gradient[:6] > 0).all() and (found.table.best >= found.table["first"]).all()
    with torch.no_grad(): assert taste(found.before, PROMPTS[:2]).tolist() == pytest.approx(found.history.preference[:2].tolist(), abs=1e-5)


# --- pictures for agents (boig.preference.guidance)

def test_agents_and_what_they_get(tmp_path):
    from boig.benches.pickapic import HistoryRules, build_histories
    from boig.benches.tastes import make_agents, write_agents
    from boig.core import write_json
    from boig.preference.guidance import READ, ByUser, agent_utility, load_people
    agents = make_agents(n=3)
    write_json(tmp_path/"agents"/"profiles.json", write_agents(tmp_path/"choices.parquet", agents, pairs=12))
    build_histories(tmp_path/"choices.parquet", tmp_path/"agents", HistoryRules(test_users=1, valid_users=0), threads=1)
    people = load_people(tmp_path/"agents", pairs=8)
    assert [p.agent for p in people] == agents and [r.liked for r in people[0].history] == [False, True] * 8
    assert all(p.kept.shape == (4, 3, 64, 64) and len(p.captions) == 4 for p in people)
    known = {bytes((r.picture * 255).round().byte().numpy()) for r in people[1].history}
    assert not known & {bytes((x * 255).round().byte().numpy()) for x in people[1].kept}
    with pytest.raises(BoigError, match="more than 12"): load_people(tmp_path/"agents", pairs=12)
    seen = {d: torch.eye(len(v)).numpy() for d, v in {"medium": "abc"}.items()}
    from boig.benches.tastes import POCKET_DIMENSIONS
    for n, a in enumerate(agents):
        for i, value in enumerate(POCKET_DIMENSIONS["medium"]): assert agent_utility(seen, agents, ["medium"])[i, n] == (("medium", value) in a.likes) - (("medium", value) in a.dislikes)
    assert "art style" not in READ
    both = ByUser([Blue(), lambda images, prompts, context: -Blue()(images, prompts)], "both")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(both(x, ["", ""], {"user": 1}), -both(x, ["", ""], {"user": 0}))


def test_paired_gains():
    import pandas as pd
    from boig.preference.guidance import OTHERS, OWN, gains4, table4
    base = pd.DataFrame({"user": range(12), "name": "cat", "prompt": [f"p{i}" for i in range(12)], "Judge": [float(i) for i in range(12)], OWN: 0.0, OTHERS: 0.0})
    more = base.assign(Judge=base.Judge + 2, **{OWN: 1.0, OTHERS: 0.25})
    found = gains4(more, base, 200, 1).set_index("Metric")
    assert found.loc["Judge", ["gain", "low", "high"]].tolist() == [2, 2, 2] and found.loc["Own minus others", "gain"] == 0.75 and (found.n == 12).all()
    table = table4({"a": base, "b": more}, 200, 1).set_index("Model")
    assert table.loc["b", "Judge"] - table.loc["a", "Judge"] == 2 and table.loc["a", "Judge low"] < 5.5 < table.loc["a", "Judge high"]
    with pytest.raises(BoigError, match="no pairs"): gains4(more, base.assign(prompt="x"), 10, 1)
