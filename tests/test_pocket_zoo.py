"The pocket zoo: the loop that trains it, what it is trained on, and what is shipped."
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

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


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_says_how_its_model_is_loaded(name):
    card = (zoo.resolve(name)/"README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.+?)```", card, re.DOTALL)[1], {})


def bench():
    "bench/zoo.py as a module."
    spec = importlib.util.spec_from_file_location("bench_zoo", Path(__file__).parents[1]/"bench"/"zoo.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_cards_are_as_measured_and_say_what_is_not():
    b = bench()
    record = json.loads(b.RESULTS.read_text(encoding="utf-8"))
    for name in SHIPPED:
        card = (zoo.resolve(name)/"README.md").read_text(encoding="utf-8")
        assert card == b.card(name, b.figures(record, name)) and "not measured" not in card, f"run python bench/zoo.py: the card of {name}"
    record["vae"]["weights"]["pocket-vae"] = record["judges"]["weights"]["pocket-hps"] = "older"
    for name in SHIPPED:
        old = name in ("pocket-vae", "pocket-image-reward", "pocket-pickscore", "pocket-hps")
        assert (b.figures(record, name) == {"not measured on these weights": ""}) == old, name


def test_cards_say_whose_weights_were_taken():
    texts = {n: (zoo.resolve(n)/"README.md").read_text(encoding="utf-8") for n in SHIPPED}
    started = {n: re.search("(From nothing|With the weights of .+?), by", t)[1].removeprefix("With the weights of ") for n, t in texts.items()}
    assert {n: s for n, s in started.items() if s != "From nothing"} == {
        "pocket-sd": "pocket-clip and pocket-vae", "pocket-turbo": "pocket-sd", "pocket-detector": "pocket-vae", "pocket-aesthetic": "pocket-eval"}
    assert all(("is `log.csv`" in t) == (zoo.resolve(n)/"log.csv").is_file() for n, t in texts.items())


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
    assert log.drop(columns="cpu_seconds").equals(again.drop(columns="cpu_seconds")) and list(log.step) == [5, 10, 15, 20, 23]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    training.fit(net(0), batch, loss, 4, tmp_path, stop_after=2)
    with pytest.raises(BoigError, match="another steps"): training.fit(net(0), batch, loss, 5, tmp_path)
    training.fit(net(0), batch, loss, 4, tmp_path, recipe={"source": "world"})  # an older version did not write it down
    with pytest.raises(BoigError, match=r"another source \(world\)"): training.fit(net(0), batch, loss, 4, tmp_path, recipe={"source": "market"})


def test_a_training_goes_on_with_its_own_recipe(tmp_path):
    small = dict(vision=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, patch_size=8), text=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1))
    def train(name, **changes): training.train(name, tmp_path/name, **{"steps": 2, "batch_size": 4} | small | changes)
    for name, change in {"pocket-clip": {"batch_size": 8}, "pocket-hps": {"choosers": {"number": 7}}}.items():
        train(name)
        train(name)
        with pytest.raises(BoigError, match=f"another {next(iter(change))}"): train(name, **change)


def test_a_run_whose_batches_depend_on_its_length_keeps_it(tmp_path):
    for name, fixed in {"free": False, "fixed": True}.items():
        training.fit(net(0), batch, loss, 10, tmp_path/name, hold=0.8, stop_after=4, fixed_steps=fixed)
    assert len(training.fit(net(0), batch, loss, 12, tmp_path/"free", hold=0.8))
    with pytest.raises(BoigError, match="another steps"): training.fit(net(0), batch, loss, 12, tmp_path/"fixed", hold=0.8, fixed_steps=True)


def test_a_stop_after_the_end_is_an_end(tmp_path):
    training.fit(net(0), batch, loss, 4, tmp_path, stop_after=9)
    assert (tmp_path/"checkpoint.safetensors").is_file()


def test_the_log_holds_the_end_of_a_run(tmp_path):
    each = training.fit(net(0), batch, loss, 7, tmp_path/"each", log_every=1)
    short, long = (training.fit(net(0), batch, loss, 7, tmp_path/str(n), log_every=n) for n in (50, 4))
    assert list(short.step) == [7] and list(long.step) == [4, 7]
    assert short.loss.iloc[-1] == pytest.approx(each.loss.mean()) and long.loss.iloc[-1] == pytest.approx(each.loss[4:].mean())


def test_the_gpu_is_asked_about_its_own_products_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: "the GPU's")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "the CPU's")
    assert [training.bf16_pays(*d) for d in ((), ("cpu",), ("cuda",), ("mps",))] == ["the CPU's", "the CPU's", "the GPU's", False]


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
    with pytest.raises(BoigError, match="There is no recipe for sprites: it is not a model that boig trains"): training.train("sprites", tmp_path)


def test_a_table_of_a_recipe_keeps_what_is_not_changed(tmp_path, monkeypatch):
    from boig.pocket import signs
    monkeypatch.setattr(signs, "train_idefics", lambda name, folder, **changes: got.update(changes))
    whole, got = training.recipes()["pocket-idefics"]["signs"], {}
    training.train("pocket-idefics", tmp_path, signs={"steps": 3}, stages=[])
    assert got == {"signs": whole | {"steps": 3}, "stages": []}
    with pytest.raises(BoigError, match="Did you mean 'album'"): training.train("pocket-idefics", tmp_path, signs={"albun": 3})
    with pytest.raises(BoigError, match="'signs' of pocket-idefics is a table"): training.train("pocket-idefics", tmp_path, signs=3)


def test_shipped_models_were_trained_as_their_recipes_say():
    "The last line of each log is the recipe's last step (older logs end with the last fifty that were whole)."
    for name in SHIPPED:
        r, log = training.recipe(name), pd.read_csv(zoo.resolve(name)/"log.csv")
        if "steps" not in r: continue  # one is fitted in closed form
        ends = log.groupby("stage").step.max().to_dict() if "stage" in log else {"": log.step.max()}
        planned = {"talk": r["steps"], "signs": r["signs"]["steps"]} if "signs" in r else {"": r["steps"] + r.get("again", 0)}
        assert ends.keys() == planned.keys() and all(0 <= planned[k] - ends[k] < 50 for k in ends), name


def test_held_out_scenes_are_a_sixteenth_and_never_drawn():
    scenes, texts = captions.samples(400, 1, "test")
    assert not any(map(captions.held_out, scenes))
    unseen = captions.samples(50, 1, "test", unseen=True)[0]
    assert all(map(captions.held_out, unseen))
    assert captions.samples(400, 1, "test")[1] == texts
    pairs = {(s.objects[-1].name, s.colors[0]) for s in scenes} & {(s.objects[-1].name, s.colors[0]) for s in unseen}
    assert not pairs


def test_a_picture_has_four_quarters():
    scene = next(s for s in captions.samples(400, 1, "test")[0] if len(s.objects) == 4)
    assert len(captions.quarters(scene).objects) == 4
    with pytest.raises(BoigError, match="four quarters, and this scene 5 objects"): captions.quarters(replace(scene, objects=(replace(scene.objects[0], name="cat", color=""), *scene.objects)))


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
