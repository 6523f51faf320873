"The pocket zoo: the loop that trains it, what it is trained on, and what is shipped."
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTokenizer

from boig import zoo
from boig.core import BoigError
from boig.data.world import caption
from boig.pocket import captions, training
from boig.pocket.sd import make_scheduler
from boig.pocket.turbo import step_times, turn

SHIPPED = [n for n, e in zoo.entries().items() if e.file.startswith("weights/") and e.sha256]
JUDGES, REWARDS = {"pocket-eval", "pocket-pickscore", "pocket-hps", "pocket-style", "pocket-subject", "pocket-aesthetic"}, {"pocket-image-reward"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_half_precision_safetensors_with_a_card(name):
    folder = zoo.resolve(name)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert all(f.get_slice(k).get_dtype() in ("F16", "I64", "I32", "BOOL") for k in f.keys()), file
    assert (folder/"log.csv").is_file() or "steps" not in training.recipes()[name]  # one is fitted in closed form
    assert f"# {name}" in (folder/"README.md").read_text()


def test_the_zoo_stays_small():
    shipped = {f for n in SHIPPED for f in zoo.resolve(n).rglob("*") if f.is_file()}  # pocket-vae lies in pocket-sd
    assert sum(f.stat().st_size for f in shipped) <= 40e6


def test_recipes_and_entries_belong_together():
    weights = {n for n, e in zoo.entries().items() if e.file.startswith("weights/")}
    assert weights == set(SHIPPED) and weights <= set(training.recipes())


def test_judges_and_rewards_share_neither_seed_nor_weights():
    seeds = {n: r["seed"] for n, r in training.recipes().items()}
    assert len(set(seeds.values())) == len(seeds)
    hashes = {}
    for name in (JUDGES | REWARDS) & set(SHIPPED):
        for file in zoo.resolve(name).rglob("*.safetensors"):
            with safe_open(file, "pt") as f:
                for k in f.keys():
                    t = f.get_tensor(k)
                    if t.numel() > 1000: hashes.setdefault(t.numpy().tobytes(), set()).add(name)
    assert all(len(names) == 1 for names in hashes.values())


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    (tmp_path/"model").mkdir()
    (tmp_path/"model/config.json").write_text("{}")
    sha = zoo.sha256_tree(tmp_path/"model")
    (tmp_path/"model/README.md").write_text("a card may be reworded")
    assert zoo.sha256_tree(tmp_path/"model") == sha
    monkeypatch.setattr(zoo, "files", lambda package: tmp_path)
    monkeypatch.setattr(zoo, "entries", lambda: {"m": zoo.Entry("m", "packaged", "model", sha, "", "")})
    assert zoo.resolve("m") == tmp_path/"model" and zoo.check() == {"m": "ok"}
    (tmp_path/"model/config.json").write_text("{ }")
    zoo._packaged.cache_clear()
    assert zoo.check() == {"m": "changed"}
    with pytest.raises(BoigError, match="not as shipped"): zoo.resolve("m")


def net(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32 * 16, 20))


def batch(i): return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))


def loss(model, x):
    y = model(x + 0.01 * torch.randn_like(x))
    return {"loss": y.float().square().mean(), "largest": y.abs().max()}


def test_a_stopped_training_ends_in_the_same_weights(tmp_path):
    models = [net(0), net(0)]
    log = training.fit(models[0], batch, loss, 23, tmp_path/"a", log_every=5)
    training.fit(models[1], batch, loss, 23, tmp_path/"b", log_every=5, stop_after=13)
    models[1] = net(1)  # a new process knows nothing
    again = training.fit(models[1], batch, loss, 23, tmp_path/"b", log_every=5)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))
    assert log.drop(columns="cpu_seconds").equals(again.drop(columns="cpu_seconds")) and list(log.step) == [5, 10, 15, 20]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    training.fit(net(0), batch, loss, 4, tmp_path)
    with pytest.raises(BoigError, match="other settings"): training.fit(net(0), batch, loss, 5, tmp_path)


def spoilt(steps):
    "The loss, which is no finite number at `steps`: now itself, now its gradient."
    which = {batch(i).sum().item(): i for i in steps}
    def bad_loss(model, x):
        if (i := which.get(x.sum().item())) is None: return loss(model, x)
        y = model(x).sum()
        return {"loss": y * float("nan") if i % 2 else (y - y.detach()).abs().sqrt() * 0, "largest": torch.tensor(float("nan"))}  # the second is 0, of slope 0 · ∞
    return bad_loss


def test_a_step_that_is_no_number_is_left_out(tmp_path):
    model, start = net(0), [p.detach().clone() for p in net(0).parameters()]
    with pytest.warns(UserWarning, match=r"Step 1 \(batch 0\) is left out"): training.fit(model, batch, spoilt({0, 1}), 12, tmp_path, log_every=4, stop_after=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start))
    with pytest.warns(UserWarning, match=r"Step 6 \(batch 5\) is left out"): log = training.fit(net(1), batch, spoilt({5, 6}), 12, tmp_path, log_every=4)
    good, sums = net(0), []
    params = list(good.parameters())
    ema, opts = [p.detach().clone() for p in params], training.optimizers(good, 1e-3, 0.02)
    for i in set(range(12)) - {0, 1, 5, 6}:
        torch.manual_seed(training.derive_seed(0, "step", i))
        sums.append(training._step(good, loss, batch(i), params, opts, training.learning_rate(i, 12), "cpu")["loss"])
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(0.998, (1 + i) / (10 + i)))
    found = training.load_file(tmp_path/"checkpoint.safetensors")
    assert all(torch.equal(found[f"{i}.weight"], p) and torch.equal(found[f"{i}.running"], q) for i, (p, q) in enumerate(zip(params, ema)))
    assert list(log.loss) == pytest.approx([sum(sums[:2]) / 2, sum(sums[2:4]) / 2, sum(sums[4:]) / 4]) and log.largest.notna().all()


def test_a_training_that_is_no_number_any_more_stops(tmp_path):
    training.fit(net(0), batch, loss, 60, tmp_path, stop_after=10)
    before = (tmp_path/"checkpoint.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(BoigError, match="Twenty steps in a row, up to step 35"):
        training.fit(net(0), batch, spoilt(range(15, 60)), 60, tmp_path)
    assert (tmp_path/"checkpoint.safetensors").read_bytes() == before
    with pytest.warns(UserWarning, match="left out"): training.fit(net(0), batch, spoilt({*range(15, 34), *range(35, 54)}), 60, tmp_path)  # nineteen, twice


class Part:
    "What saves itself: a file, or half of one and then no more."
    def __init__(self, name, half=False): self.name, self.is_half = name, half
    def half(self): return self
    def float(self): return self
    def save_pretrained(self, folder):
        (folder/"nested").mkdir(exist_ok=True)
        (folder/"nested"/self.name).write_text("half" if self.is_half else "new")
        if self.is_half: raise KeyboardInterrupt


def test_a_model_is_saved_whole_or_not_at_all(tmp_path):
    folder, log = tmp_path/"m", pd.DataFrame({"step": [1], "loss": [0.5]})
    (folder/"run").mkdir(parents=True)
    (folder/"run"/"checkpoint.safetensors").write_text("kept")
    (folder/"nested").mkdir()
    (folder/"nested"/"model").write_text("old")
    def found(): return {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    before = found()
    with pytest.raises(KeyboardInterrupt): training.save_model(Part("model"), folder, log, Part("tokenizer", half=True))
    assert found() == before
    training.save_model(Part("model"), folder, log, Part("tokenizer"))
    assert found() == before | {"m/nested/model": "new", "m/nested/tokenizer": "new", "m/log.csv": "step,loss\n1,0.5\n"}


def test_no_trainer_saves_straight_into_its_folder():
    package = Path(training.__file__).parents[1]
    for file in (*(package/"pocket").glob("*.py"), package/"preference"/"baselines.py"):
        assert not re.search(r"save_(pretrained|lora_weights|file)\(.*\bfolder\b", file.read_text()), file.name


def test_who_steps_which_weights():
    kinds = {type(o).__name__: {tuple(p.shape) for g in o.param_groups for p in g["params"]} for o in training.optimizers(net(0), 1e-3, 0.02)}
    assert kinds["Muon"] == {(32, 32, 3, 3), (20, 512)} and (32, 3, 3, 3) in kinds["AdamW"]


def test_muon_steps_as_by_hand():
    "One step without momentum history: the direction of the gradient's polar factor, at the learning rate."
    p = torch.nn.Parameter(torch.zeros(20, 30))
    p.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    training.Muon([p], lr=0.1).step()
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((-p).flatten(), (u @ v).flatten(), 0) > 0.98
    assert 0.07 < p.norm() / (20 ** 0.5) < 0.12


@pytest.mark.parametrize("change", [{"step": 3}, {"steps": "many"}])
def test_unknown_settings_of_a_recipe(tmp_path, change):
    name = "pocket-clip"
    if "step" in change:
        with pytest.raises(BoigError, match="Did you mean 'steps'"): training.train(name, tmp_path, **change)
    with pytest.raises(BoigError, match="recipe"): training.train("pocket-klip", tmp_path)


def test_held_out_scenes_are_a_sixteenth_and_never_drawn():
    scenes, texts = captions.samples(400, 1, "test")
    assert not any(map(captions.held_out, scenes))
    unseen = captions.samples(50, 1, "test", unseen=True)[0]
    assert all(map(captions.held_out, unseen))
    assert captions.samples(400, 1, "test")[1] == texts
    pairs = {(s.objects[-1].name, s.colors[0]) for s in scenes} & {(s.objects[-1].name, s.colors[0]) for s in unseen}
    assert not pairs


def test_every_text_names_the_main_object():
    scenes, texts = captions.samples(300, 2, "names")
    for scene, text in zip(scenes, texts): assert scene.objects[-1].name.lower() in text.lower(), text


def test_the_tokenizer_is_the_same_at_every_call_and_that_of_the_shipped_models():
    "A training that goes on would read other words with another one. Shipped models are older: they number the letters that end words by chance."
    first, again = (captions.zoo_tokenizer() for _ in range(2))
    shipped = CLIPTokenizer.from_pretrained(zoo.resolve("pocket-clip"))
    assert first.get_vocab() == again.get_vocab()
    assert set(first.get_vocab()) == set(shipped.get_vocab())
    for text in ("a red-hot pumpkin", "Zürich, 42 €!"): assert first.tokenize(text) == shipped.tokenize(text)


def test_captions_survive_the_tokenizer():
    tokenizer = captions.zoo_tokenizer()
    scenes, _ = captions.samples(50, 3, "tokens")
    for scene in scenes:
        ids = tokenizer(caption(scene)).input_ids
        plain = re.sub(r"\s*([,\-])\s*", r"\1", tokenizer.decode(ids, skip_special_tokens=True))
        assert len(ids) > captions.MAX_TOKENS or plain == re.sub(r"\s*([,\-])\s*", r"\1", caption(scene).lower())


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_turn_is_a_ddim_step(steps):
    ddim = make_scheduler()
    ddim.set_timesteps(steps)
    x, v = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(steps))
    for t, s in zip(ddim.timesteps, [*ddim.timesteps[1:], torch.tensor(-1)]):
        angle = turn(ddim, t[None], s[None])
        ours, theirs = angle.cos() * x - angle.sin() * v, ddim.step(v, int(t), x).prev_sample
        assert torch.allclose(ours, theirs, atol=2e-3 if s < 0 else 1e-4), (steps, int(t))


def test_student_steps_are_cut_evenly():
    times = step_times(make_scheduler(), 8, steps=4, substeps=5)
    assert times.shape == (6, 8) and (times[1:] < times[:-1]).all() and sorted(set(times[0].tolist())) == [249, 499, 749, 999]
    assert sorted(set(times[-1].tolist())) == [-1, 249, 499, 749]
