"BoigSD's experiment: requests and wishes by hand, rewards against the parts they are made of, divergence and intervals against closed forms."
import copy
import datetime
import math
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import t as student
from test_boig_reward import looker, tiny as tiny_llm
from test_sampler import tiny
from transformers import LlamaConfig

from boig.behaviour.boigsd import (FOLDS, SHOWN, Fitted, PromptReward, Watch, all_looks, assess, diversity, divergence, fid_cells, fid_folds, gains, in_form, in_parts,
                                   jackknife, keep_weights, load_tuned, look, oracle, pick, requests, table2, verdict, wishes)
from boig.behaviour.finetune import load_llm
from boig.behaviour.reward import BoigReward
from boig.benches.instructions import SPECS
from boig.core import BoigError
from boig.data.verbalization import Verbalization
from boig.data.world import Context, expected
from boig.diffusion.ddpo import DDPOConfig, train_ddpo
from boig.diffusion.sampler import make_steps, to_ddim
from boig.diffusion.sft import SFTConfig, train_sft

N = 24


def stock(n=N):
    "A benchmark of n assets: three buckets, three splits, every caption twice."
    k = np.arange(n)
    return pd.DataFrame({"id": [f"s{i}" for i in k], "captions": [f"thing {i // 2}" for i in k], "keywords": "a, b", "image resolution": "(64, 64)", "release date": "2021-03-04",
                         "contributor": "atelier_nine", "downloads": k, "forwards": 10 * k, "impressions": 100 * k, "bucket": np.array(["low", "medium", "high"])[k % 3],
                         "split": np.array(["train", "train", "valid", "test"])[k // 3 % 4], "image": [{"bytes": b"", "path": ""}] * n})


def tweets(n=N):
    "A benchmark of two accounts, one with a hundred times the other's likes; the small one has no high training picture."
    k = np.arange(n)
    small = k % 2 == 0
    return pd.DataFrame({"id": [f"t{i}" for i in k], "captions": [f"tweet {i}" for i in k], "keywords": "c", "image resolution": "(64, 64)", "text": "Hello", "account": np.where(small, "velmora", "nobody_knows"),
                         "created_at": pd.Timestamp("2022-12-24 10:00"), "likes": np.where(small, k, 100 * k), "bucket": np.where(k % 4 < 2, "low", "high"),
                         "split": np.where(k % 3 == 0, "test", "train"), "image": [{"bytes": b"", "path": ""}] * n})


@pytest.fixture(scope="module")
def rewards():
    tok = load_llm("pocket-llama", "cpu")[1]
    return {b: BoigReward(tiny_llm(LlamaConfig, tok), tok, SPECS[b], looker, name=f"tiny {b}") for b in ("pocket_stock", "pocket_boigbench")}


@pytest.fixture
def both(): return pd.concat([requests(stock(), "pocket_stock"), requests(tweets(), "pocket_boigbench")], ignore_index=True)


def pictures(n): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(n))


# --- requests

def test_wishes_by_hand():
    high = [k for k in range(N) if k % 3 == 2 and k // 3 % 4 < 2]
    assert wishes(stock(), "pocket_stock")[0] == {"downloads": round(np.median(high)), "forwards": round(np.median(high) * 10), "impressions": round(np.median(high) * 100)}
    t = tweets()
    own = wishes(t, "pocket_boigbench")
    for account in ("velmora", "nobody_knows"):
        part = t[(t.account == account) & (t.bucket == "high") & (t.split == "train")]
        assert own[t.index[t.account == account][0]] == {"likes": round(part.likes.median()), "likes bucket": "high"}
    t.loc[t.account == "velmora", "bucket"] = "low" # no success of its own to wish for: everybody's
    every = t[(t.bucket == "high") & (t.split == "train")].likes.median()
    assert wishes(t, "pocket_boigbench")[0]["likes"] == round(every)


def test_requests_tell_the_reward_what_listing_1_lists(both):
    r = both[both.bench == "pocket_boigbench"].iloc[0]
    assert set(r.context) == {"company", "tweet text", "keywords", "date", "behaviour"} and r.context["date"] == "2022-12-24" and r.context["company"] == "velmora"
    assert r.date == datetime.date(2022, 12, 24) and r.prompt == "tweet 0"
    with pytest.raises(BoigError, match="pocket_stock"): requests(stock(), "pocket_stok")


def test_pick_is_distinct_balanced_and_leaves_out(both):
    train = pick(both, "train", 1, 5)
    assert train.prompt.is_unique and (train.split == "train").all() and (train.groupby(["bench", "bucket"]).size() == 1).all() and len(train) == 5
    assert pick(both, "train", 1, 5).id.tolist() == train.id.tolist() != pick(both, "train", 1, 6).id.tolist()
    rest = pick(both, "train", 99, 5, without=train.prompt)
    assert not set(rest.prompt) & set(train.prompt)
    assert set(pick(both, "test", 9, buckets=["high"]).bucket) == {"high"}
    with pytest.raises(BoigError, match="No request is left"): pick(both, "train", 2, without=both.prompt)


# --- rewards

def test_oracle_is_the_worlds_or_nobodys(both):
    seen = Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, {"shoe": (10, 10, 50, 50)})
    t, s = (both[both.bench == b].iloc[0] for b in ("pocket_boigbench", "pocket_stock"))
    assert oracle(seen, t, (64, 64)) == pytest.approx(math.log(expected(seen, Context("velmora", datetime.date(2022, 12, 24)), "likes")))
    assert oracle(seen, s, (64, 64)) == pytest.approx(math.log(expected(seen, Context("atelier_nine", datetime.date(2021, 3, 4)), "forwards")))
    assert math.isnan(oracle(seen, both[both.account == "nobody_knows"].iloc[0], (64, 64)))


def test_assess_asks_each_benchmarks_own_model(both, rewards):
    rows = both.iloc[[0, 30, 2, 31]]
    x = pictures(4)
    got = assess(x, rows, rewards, {"mean": lambda images, prompts: images.mean((1, 2, 3))})
    for i, (_, r) in enumerate(rows.iterrows()):
        alone = rewards[r.bench].explain(x[i:i + 1], [r.prompt], [r.context]).iloc[0]
        assert got.reward[i] == pytest.approx(alone.reward, rel=1e-4) and got.tokens[i] == alone.tokens and got.objects[i] == alone.objects
    assert got["mean"].tolist() == pytest.approx(x.mean((1, 2, 3)).tolist()) and got.id.tolist() == rows.id.tolist() and "text" not in got
    with pytest.raises(BoigError, match="4 pictures"): assess(x, rows[:3], rewards)
    with pytest.raises(BoigError, match="no reward for 'pocket_boigbench'"): assess(x, rows, {"pocket_stock": rewards["pocket_stock"]})


def test_in_season_is_what_shows_something_of_the_requests_month_and_warm_the_share_of_warm_tones(both, rewards, monkeypatch):
    seen = [Verbalization({"Red": 1.0}, {"warm": warm, "neutral": 1 - warm, "cool": 0}, {thing: (10, 10, 50, 50)}) for thing, warm in (("Christmas tree", 0.5), ("shoe", 0.25))]
    for r in rewards.values(): monkeypatch.setattr(r, "verbalizer", lambda images: seen[:len(images)])
    at = both[both.bench == "pocket_boigbench"].iloc[[0, 1]], both[both.bench == "pocket_stock"].iloc[:1] # of 24 December; of 4 March
    found = assess(pictures(3), pd.concat(at), rewards)
    assert found.in_season.tolist() == [1, 0, 0] and found.warm.tolist() == [0.5, 0.25, 0.5]


def test_reward_by_prompt(both, rewards):
    rows, x = pick(both, "train", 1), pictures(3)
    reward = PromptReward(rewards, rows)
    prompts = [rows.prompt.iloc[-1], rows.prompt.iloc[0], rows.prompt.iloc[-1]]
    want = assess(x, rows.set_index("prompt", drop=False).loc[prompts], rewards).reward
    assert reward(x, prompts).tolist() == pytest.approx(want.tolist(), rel=1e-4) and reward(x, prompts).dtype == torch.float32
    assert reward.name == "tiny pocket_stock, tiny pocket_boigbench"
    with pytest.raises(BoigError, match="No request has the prompt 'x'"): reward(x[:1], ["x"])
    with pytest.raises(BoigError, match="could not tell them apart"): PromptReward(rewards, both)


def test_other_forms_leave_the_reward_as_it_was(both, rewards):
    r, row, x = rewards["pocket_stock"], both.iloc[[0]], pictures(1)
    ask = (x, list(row.prompt), list(row.context))
    told = r.explain(*ask).iloc[0]
    assert in_form(r, "mean_logprob")(*ask).item() == pytest.approx(told.mean_logprob, rel=1e-4)
    assert in_form(r, "sum_logprob", (-1.0, 0.0))(*ask).item() == -1.0
    assert r(*ask).item() == pytest.approx(told.reward, rel=1e-5)


# --- looking

class Shifted(torch.nn.Module):
    "A denoiser that says δ more than another."
    def __init__(self, unet, δ): super().__init__(); self.unet, self.δ, self.config, self.dtype, self.device = unet, δ, unet.config, unet.dtype, unet.device
    def forward(self, *args, **kwargs): return (self.unet(*args, **kwargs)[0] + self.δ,)


def test_divergence_of_a_shifted_denoiser_is_the_closed_form():
    pipe, δ = tiny(), 0.1
    pipe.scheduler = to_ddim(pipe.scheduler)
    base, steps, moved = pipe.unet, make_steps(pipe.scheduler, 4), []
    base.to = lambda device, to=base.to: moved.append(device) or to(device)
    assert divergence(pipe, base, ["a cat"], [1], 4, 1.0) == 0
    pipe.unet = Shifted(base, δ)
    s = steps.next_signal, steps.noise, steps.signal, steps.direction
    slope = {"epsilon": s[3] - s[0] * s[1] / s[2], "v_prediction": s[3] * s[2] - s[0] * s[1], "sample": s[0] - s[3] * s[2] / s[1]}[steps.prediction]
    size = base.config.in_channels * base.config.sample_size**2
    chance = steps.sigma > 0
    want = (((slope * δ / steps.sigma)**2 / 2)[chance]).sum().item() * size
    assert divergence(pipe, base, ["a cat", "a dog"], [1, 2], 4, 1.0) == pytest.approx(want, rel=1e-3)
    assert moved == [pipe.device] * 2 # a training on another GPU moves the pipeline, not the copy that was made before


def test_judges_are_handed_no_more_than_64_large_pictures():
    asked = []
    def judge(x, prompts): asked.append(len(x)); return x[:, 0, 0, 0] + torch.tensor([float(p) for p in prompts])
    large = torch.arange(200.0).view(-1, 1, 1, 1).expand(-1, 3, 512, 512)
    assert in_parts(judge, large, [str(i) for i in range(200)]).tolist() == [2 * i for i in range(200)]
    assert asked == [64, 64, 64, 8]
    assert len(in_parts(judge, large[:, :, :64, :64], ["0"] * 200)) == 200 and asked[4:] == [200]


def test_diversity_by_hand():
    f = torch.tensor([[1.0, 0], [0, 2.0], [3.0, 0], [1.0, 1.0]])
    assert diversity(f, ["a", "a", "b", "b"]) == pytest.approx((1 + (1 - 0.5**0.5)) / 2)
    assert math.isnan(diversity(f, list("abcd")))


def watch_of(pipe, rows, rewards, folder, **more):
    sets = {"valid": (rows[:2], 2), "gallery": (rows[:1], 3)}
    return Watch(copy.deepcopy(pipe.unet), sets, rewards, folder, dict(num_inference_steps=2, guidance_scale=1.0), features=lambda x: x.flatten(1), paths=1, **more)


def test_a_look_is_taken_once_and_tells_the_best(both, rewards, tmp_path, monkeypatch):
    pipe = tiny()
    pipe.scheduler = to_ddim(pipe.scheduler)
    watch = watch_of(pipe, pick(both, "train", 1), rewards, tmp_path, every=2, last=5)
    assert [bool(watch(pipe, e)) for e in range(5)] == [False, True, False, True, True]
    monkeypatch.setattr("boig.behaviour.boigsd.draw", None) # a second look draws nothing
    table = all_looks(tmp_path)
    assert look(watch, pipe, 2)["valid_reward"] == pytest.approx(table.query("done == 2 and set == 'valid'").reward.mean())
    gallery = table.query("done == 4 and set == 'gallery'")
    assert len(gallery) == 3 and gallery.image.notna().sum() == 1 and gallery.reward[gallery.image.notna()].item() == gallery.reward.max()
    assert (table.kl == 0).all() and table[table.set == "valid"].image.isna().all()
    with torch.no_grad(): next(pipe.unet.parameters()).mul_(-1)
    with pytest.raises(TypeError): look(watch, pipe, 2)  # of another model, nothing was seen yet
    with pytest.raises(BoigError, match="Nobody looked"): all_looks(tmp_path/"elsewhere")


def test_training_with_looks_goes_on_to_the_same_weights_and_looks(both, rewards, tmp_path):
    rows = pick(both, "train", 1)
    small = DDPOConfig(epochs=2, samples=4, batch_size=2, micro_batch=2, steps=2, guidance=1.0, lr=1e-2, lora_rank=2, advantages="global", tracker="")
    class Stop(Exception): pass
    def run(folder, stop=False):
        pipe = tiny()
        pipe.scheduler = to_ddim(pipe.scheduler)
        watch = watch_of(pipe, rows, rewards, folder)
        def seen(p, epoch):
            row = watch(p, epoch)
            if stop and epoch == 1: raise Stop # looked, but not yet saved
            return row
        return train_ddpo(pipe, list(rows.prompt), PromptReward(rewards, rows), folder, small, watch=seen, progress=False)
    whole = run(tmp_path/"a")
    with pytest.raises(Stop): run(tmp_path/"b", stop=True)
    again = run(tmp_path/"b")
    assert again.valid_reward.tolist() == whole.valid_reward.tolist() and again.kl.tolist() == whole.kl.tolist() and whole.kl.iloc[-1] > 0
    files = [keep_weights(tmp_path/x, tmp_path/f"{x}.safetensors") for x in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- weights

def test_weights_travel_as_one_file(tmp_path):
    pipe = tiny()
    pipe.save_pretrained(tmp_path/"base")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    for rank, folder in ((0, tmp_path/"full"), (2, tmp_path/"lora")):
        tuned = load_tuned(str(tmp_path/"base"), device="cpu")
        train_sft(tuned, torch.rand(2, 3, size, size), ["a", "b"], folder, SFTConfig(epochs=1, batch_size=2, micro_batch=2, lr=1e-1, lora_rank=rank, tracker=""), progress=False)
        again = load_tuned(str(tmp_path/"base"), keep_weights(folder, tmp_path/f"{rank}.safetensors"), "cpu")
        args = torch.randn(1, tuned.unet.config.in_channels, tuned.unet.config.sample_size, tuned.unet.config.sample_size), torch.tensor([5]), torch.randn(1, 3, tuned.unet.config.cross_attention_dim)
        with torch.no_grad():
            a, b, base = (p.unet(*args)[0] for p in (tuned, again, pipe))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a, base, atol=1e-4)
    save_file({"nothing": torch.zeros(1)}, tmp_path/"x.safetensors")
    with pytest.raises(BoigError, match="does not belong"): load_tuned(str(tmp_path/"base"), tmp_path/"x.safetensors", "cpu")
    with pytest.raises(BoigError, match="no trained weights"): load_tuned(str(tmp_path/"base"), tmp_path/"y.safetensors", "cpu")
    with pytest.raises(BoigError, match="holds no finished training"): keep_weights(tmp_path, tmp_path/"z.safetensors")


# --- Table 2

def scores(shift=0.0, n=40):
    rng = np.random.default_rng(1)
    return pd.DataFrame({"bench": "pocket_stock", "id": range(n), "prompt": [f"caption {i}" for i in range(n)], "bucket": np.array(["high", "low"])[np.arange(n) % 2], **{c: rng.normal(size=n) for c in SHOWN.values()}}).assign(reward=lambda d: d.reward + shift)


def test_table_2_by_hand():
    a = scores()
    table = table2({"A": a, "B": scores(1.0)}, 200).set_index(["Images", "KPI"])
    assert list(table.loc["A"].index) == ["High", "Low", "All"] and (table.loc["A"].n == [20, 20, 40]).all()
    assert table.loc[("A", "Low"), "Aesthetic Score"] == pytest.approx(a.aesthetic[a.bucket == "low"].mean())
    assert table.loc[("B", "All"), "Reward"] == pytest.approx(a.reward.mean() + 1)
    half = table.loc[("A", "All"), "Reward high"] - table.loc[("A", "All"), "Reward low"]
    assert half / 2 == pytest.approx(1.96 * a.reward.std() / 40**0.5, rel=0.25)


def test_gains_are_paired():
    g = gains(scores(0.01), scores(), 100).set_index(["KPI", "Metric"])
    assert g.loc[("All", "Reward"), "gain"] == pytest.approx(0.01) and g.loc[("All", "Reward"), "verdict"] == "higher" # the pairs see what the spread of 1 would hide
    assert g.loc[("All", "Objects"), "verdict"] == "not measurable" # no picture differs
    assert [verdict(*x) for x in ((1, 2), (-2, -1), (-1, 1), (math.nan, math.nan), (0, 0))] == ["higher", "lower", "undecided", "not measurable", "not measurable"]
    with pytest.raises(BoigError, match="different requests"): gains(scores(), scores()[::-1])


def test_copies_of_a_caption_are_no_new_evidence():
    one, more = scores(), pd.concat([scores()] * 4, ignore_index=True)
    def width(table): return (table["Reward high"] - table["Reward low"])[table.KPI == "All"].item()
    assert width(table2({"A": more}, 2000)) == pytest.approx(width(table2({"A": one}, 2000)), rel=0.1)
    a, b = (gains(x.assign(reward=x.objects), x, 2000).set_index(["KPI", "Metric"]).loc[("All", "Reward")] for x in (one, more))
    assert b.high - b.low == pytest.approx(a.high - a.low, rel=0.1) and b.n == 4 * a.n
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y, captions = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)), np.arange(60)
    alone, four = fid_folds(x, y, "f"), fid_folds(x.repeat(4, 1), y.repeat(4, 1), "f", np.tile(captions, 4))
    assert four == pytest.approx(alone, rel=0.1) and fid_folds(x, y, "f", captions) == pytest.approx(alone)


def test_jackknife_of_a_mean_is_the_textbook_interval():
    x = np.random.default_rng(0).normal(size=FOLDS)
    folds = np.array([x.mean(), *[np.delete(x, j).mean() for j in range(FOLDS)]])
    value, low, high = jackknife(folds)
    assert value == x.mean() and (high - low) / 2 == pytest.approx(student.ppf(0.975, FOLDS - 1) * x.std(ddof=1) / FOLDS**0.5)


def test_jackknife_covers_95_percent():
    x = np.random.default_rng(0).normal(size=(5000, FOLDS))
    ends = [jackknife(np.array([row.mean(), *(row.sum() - row) / (FOLDS - 1)]))[1:] for row in x]
    assert 0.94 < np.mean([low <= 0 <= high for low, high in ends]) < 0.96


def test_fid_folds():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, 4, generator=g)
    assert np.abs(fid_folds(a, a.clone(), "f")).max() < 1e-6
    far = fid_folds(a, a + 2, "f")
    assert far[0] == pytest.approx(4 * 4, rel=1e-3) and len(far) == 1 + FOLDS # a shift moves the mean only, whatever is left out
    with pytest.raises(BoigError, match="take as many"): fid_folds(a, a[1:], "f")


def test_a_bucket_has_a_distance_of_its_own_if_it_is_large_enough():
    rows = pd.DataFrame({"bench": ["one"] * 60 + ["two"] * 30, "bucket": (["high"] * 40 + ["low"] * 20) + ["high"] * 30, "prompt": [f"caption {i}" for i in range(90)]})
    true = torch.randn(90, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = true + torch.tensor([3.0] * 40 + [1.0] * 50, dtype=torch.float64)[:, None]
    found = fid_cells(drawn, true, rows, "f", least=30)
    assert set(found) == {("one", "High"), ("one", "All"), ("two", "High"), ("two", "All")}
    assert found["one", "High"][0] == pytest.approx(2 * 3**2) and (found["one", "All"] == fid_folds(drawn[:60], true[:60], "f", rows.prompt[:60])).all()
    assert set(fid_cells(drawn, true, rows, "f")) == {("one", "All"), ("two", "All")}


def test_pictures_are_cut_at_the_middle_and_read_when_asked_for():
    def png(array):
        out = BytesIO()
        Image.fromarray(array).save(out, "PNG")
        return {"bytes": out.getvalue()}
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    fitted = Fitted([png(wide), {"bytes": b"broken"}, png(wide[:, 4:12])], 8)
    assert len(fitted) == 3 and fitted[0].min() == 1 and torch.equal(fitted[0], fitted[2]) # only the white middle is left
    assert len(fitted[2:5]) == 1 and [x.shape for x in fitted[::2]] == [(3, 8, 8)] * 2
    with pytest.raises(BoigError): fitted[1]
