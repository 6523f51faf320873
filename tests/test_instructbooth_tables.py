"InstructBooth's experiment: who is asked what, trainings that are done once, judges that see the right references, and a verdict that is a rule."
import io
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from test_sampler import tiny

from boig.core import BoigError
from boig.diffusion.ddpo import DDPOConfig
from boig.diffusion.pipeline import as_png
from boig.diffusion.sampler import to_ddim
from boig.metrics.subject_fidelity import fidelity_differences
from boig.perception.pixels import to_tensor
from boig.personalise import compare
from boig.personalise.compare import METHODS, PROTOCOLS, Lesson, cells_to_decide, claim_verdict, compare_subject, given_rows, judge_rows, load_protocol, picture_grid, picture_rows, teach
from boig.personalise.base import Subject
from boig.personalise.dreambooth import DreamBoothConfig
from boig.personalise.textual_inversion import TextualInversionConfig

FEW = dict(steps=2, every=1, tracker="")


def brightness(images, prompts, context=None): return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    "Settings for a tiny pipeline."
    folder = tmp_path_factory.mktemp("lesson")
    tiny().save_pretrained(folder/"base")
    rl = DDPOConfig(epochs=1, samples=4, batch_size=2, steps=2, guidance=2.0, lr=1e-2, lora_rank=2, advantages="global", tracker="")
    configs = {"dreambooth": DreamBoothConfig(**FEW, lr=1e-3, prior_pictures=2, prior_steps=2), "textual_inversion": TextualInversionConfig(**FEW, batch_size=2), "instructbooth": rl}
    return Lesson(folder/"learned", configs, str(folder/"base"), "q", brightness, dict(num_inference_steps=2, guidance_scale=2.0), each=2)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory): return load_protocol("actions", "", "cup", tmp_path_factory.mktemp("subjects"), phrases=2)


# --- what is asked

@pytest.mark.parametrize("phrases, seen, unseen", [(0, 2, 3), (1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (5, 2, 3)])
def test_seen_and_unseen_phrases(protocol, phrases, seen, unseen):
    asked = replace(protocol, phrases=phrases).asked(protocol.data.subjects["cup"])
    assert (asked.seen.sum(), (~asked.seen).sum()) == (seen, unseen) and asked.template.is_unique


def test_rl_never_trains_on_an_unseen_prompt(tmp_path):
    for name in PROTOCOLS:
        p = load_protocol(name, "", "cat,mascot,cup,bike", tmp_path)  # one of each group
        assert list(p.data.subjects) == ["cat", "mascot", "cup", "bike"]
        for s in p.data.subjects.values():
            asked, rl = p.asked(s), p.rl(s)
            assert len(rl) == 2 and set(asked.template[asked.seen]) == set(asked.template) & set(rl)
            assert len(asked) == (25 if name == "dreambench" else 5)
    for wrong in (dict(name="dreambooth"), dict(name="actions", trained="dreambooth")):
        with pytest.raises(BoigError, match="Did you mean 'dreambench'"): load_protocol(**wrong, folder="", subjects="", pocket_folder=tmp_path)
    shared = load_protocol("dreambench", "", "cup", tmp_path, trained="actions")
    cup = shared.data.subjects["cup"]
    assert shared.rl(cup) == load_protocol("actions", "", "cup", tmp_path).rl(cup) and not set(shared.rl(cup)) & set(shared.asked(cup).template)
    with pytest.raises(BoigError, match="and a tent', which counts as unseen"): load_protocol("actions", "", "motorbike", tmp_path, trained="dreambench")


def test_a_noun_outside_the_action_set_is_said_before_training(tmp_path):
    (tmp_path/"prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\nx,candle\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n'a {0} {1}'.format(a, b)\n]\nLive Subject Prompts\n\nprompt_list = [\n'a {0} {1}'.format(a, b)\n]\n")
    (tmp_path/"x").mkdir()
    for k in range(3): Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path/"x"/f"{k}.png")
    with pytest.raises(BoigError, match="noun of the action set"): load_protocol("actions", str(tmp_path), "", tmp_path)
    p = load_protocol("dreambench", str(tmp_path), "", tmp_path)
    assert not p.pocket and p.rl(p.data.subjects["x"])[1] == "A {0} {1} on top of blue sofa" and list(p.asked(p.data.subjects["x"]).template) == ["a {0} {1}"]


# --- learning and drawing

@pytest.fixture(scope="module")
def table(lesson, protocol): return compare_subject(lesson, protocol, "cup", ("dreambooth", "textual_inversion", "instructbooth"))


def test_all_methods_draw_the_same_prompts(table, lesson, protocol):
    drawn = table[table.method != "reference"]
    keys = {m: g[["prompt", "number", "seen"]].values.tolist() for m, g in drawn.groupby("method")}
    assert len(keys) == 4 and all(k == keys["base"] for k in keys.values()) and len(keys["base"]) == 4
    assert drawn[drawn.method == "base"].asked.tolist() == drawn[drawn.method == "base"].prompt.tolist()
    assert drawn.groupby("method").asked.first().str.contains("q cup").to_dict() == {"base": False, "dreambooth": True, "instructbooth": True, "textual_inversion": False}
    assert not drawn.prompt.str.contains(r"\bq\b|<").any() and len(table[table.method == "reference"]) == 5
    shots = [np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in drawn[drawn.method == "dreambooth"].image]
    assert len({s.tobytes() for s in shots}) == 4


def test_base_and_methods_start_from_the_same_noise(lesson, protocol):
    pipe, asked = compare.load_pipeline(lesson.base), protocol.asked(protocol.data.subjects["cup"])
    one, two = (picture_rows(pipe, "cup", "cup", asked, 2, 3, **lesson.sampling) for _ in range(2))
    assert one.image.tolist() == two.image.tolist() and one.image.tolist() != picture_rows(pipe, "cup", "cup", asked, 2, 4, **lesson.sampling).image.tolist()


def test_pictures_are_drawn_with_the_sampler_of_rl(lesson, protocol, tmp_path):
    tiny(PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)).save_pretrained(tmp_path/"base")
    own = replace(lesson, folder=tmp_path/"learned", base=str(tmp_path/"base"), sampling=dict(num_inference_steps=5, guidance_scale=2.0))
    with pytest.warns(UserWarning, match="sampling with DDIM"): rows = compare_subject(own, protocol, "cup", ("dreambooth",))
    s = protocol.data.subjects["cup"]
    for method, (pipe, words) in {"base": (compare.load_pipeline(own.base), "cup"), "dreambooth": compare.load_personalised(own.at(s)/"dreambooth", own.base)}.items():
        asked = (pipe, words, "cup", protocol.asked(s), 2, compare.derive_seed(own.seed, "cup"))
        theirs, pipe.scheduler = picture_rows(*asked, **own.sampling), to_ddim(pipe.scheduler)
        ours, kept = picture_rows(*asked, **own.sampling), rows[rows.method == method]
        def pixels(table): return torch.stack([to_tensor(i["bytes"]) for i in table.image])
        assert torch.equal(pixels(kept), pixels(ours)) and not torch.equal(pixels(kept), pixels(theirs))


def test_pictures_are_drawn_so_many_at_once(lesson, protocol, tmp_path, monkeypatch):
    sizes, real = [], StableDiffusionPipeline.__call__
    def counted(pipe, prompts, **how):
        sizes.append(len(prompts))
        return real(pipe, prompts, **how)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    all_, three = (compare_subject(replace(lesson, folder=tmp_path/str(n), draw_batch=n), protocol, "cup", ()) for n in (32, 3))
    assert sizes == [4, 3, 1]
    a, b = (torch.stack([to_tensor(i["bytes"]) for i in t[t.method == "base"].image]) for t in (all_, three))
    assert torch.allclose(a, b, atol=2 / 255)  # a last bit may round the other way
    with pytest.raises(BoigError, match="another pictures at once"): compare_subject(replace(lesson, folder=tmp_path/"3"), protocol, "cup", ())


def test_what_is_learned_is_not_learned_again(table, lesson, protocol, monkeypatch):
    monkeypatch.setattr(compare, "teach", lambda *a, **k: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(compare_subject(lesson, protocol, "cup", ("dreambooth", "textual_inversion", "instructbooth")), table)
    assert not list(lesson.folder.rglob("checkpoint.pt"))


@pytest.mark.parametrize("changed, said", [
    (lambda l: {"each": 1}, "another pictures of a prompt"), (lambda l: {"seed": 7}, "another seed of the pictures"), (lambda l: {"sampling": {"num_inference_steps": 3, "guidance_scale": 2.0}}, "another sampling"),
    (lambda l: {"identifier": "z"}, r"dreambooth.parquet .* another subject \(q cup\)"), (lambda l: {"reward": lambda images, prompts, context: -brightness(images, prompts)}, "instructbooth.parquet .* another reward"),
    *[(lambda l, m=m, c=c: {"configs": l.configs | {m: replace(l.configs[m], **c)}}, f"{m}.parquet .* another {next(iter(c))}")
      for m, c in (("dreambooth", {"steps": 3}), ("dreambooth", {"prior_pictures": 3}), ("textual_inversion", {"lr": 1.0}), ("instructbooth", {"epochs": 2}), ("instructbooth", {"seed": 5}))]])
def test_pictures_of_other_settings_are_refused(changed, said, table, lesson, protocol):
    with pytest.raises(BoigError, match=said): compare_subject(replace(lesson, **changed(lesson)), protocol, "cup", ("dreambooth", "textual_inversion", "instructbooth"))


def test_pictures_of_other_phrases_are_refused(table, lesson, protocol):
    with pytest.raises(BoigError, match="another templates asked"): compare_subject(lesson, replace(protocol, phrases=1), "cup", ("dreambooth",))


def test_a_training_of_other_settings_is_refused(table, lesson, protocol):
    "Also without its table; what changes no result may differ, and a folder without a plan is an older version's."
    s = protocol.data.subjects["cup"]
    place, subject = lesson.at(s), Subject(list(s.pictures), s.noun, "q")
    config, rl = lesson.configs["dreambooth"], lesson.configs["instructbooth"]
    first = ("dreambooth", subject, place/"dreambooth", config, lesson.base)
    assert teach(*first)[1] == teach(*first[:3], replace(config, gradient_checkpointing=True), lesson.base)[1] == "q cup"
    with pytest.raises(BoigError, match="dreambooth holds a run with another lr"): teach(*first[:3], replace(config, lr=1.0), lesson.base)
    with pytest.raises(BoigError, match="another pictures"): teach("dreambooth", replace(subject, pictures=subject.pictures[:3]), *first[2:])
    with pytest.raises(BoigError, match="another base"): teach(*first[:4], "pocket-sd")
    more = dict(start=place/"dreambooth", templates=protocol.rl(s), reward=brightness)
    teach("instructbooth", subject, place/"instructbooth-actions", rl, lesson.base, **more)
    for wrong, said in ((dict(both=False), "another prompts"), (dict(plainly=False), "another plainly"), (dict(templates=["a {0} {1} on red"]), "another prompts")):
        with pytest.raises(BoigError, match=said): teach("instructbooth", subject, place/"instructbooth-actions", rl, lesson.base, **more | wrong)
    (shutil.copytree(place/"dreambooth", place/"older")/"plan.json").unlink()
    assert teach(*first[:2], place/"older", replace(config, lr=1.0), lesson.base)[1] == "q cup"


def test_a_killed_run_goes_on_to_the_same_pictures(table, lesson, protocol, tmp_path, monkeypatch):
    other, real, calls = replace(lesson, folder=tmp_path), compare.draw, []
    def killed(*a, **k):
        calls.append(0)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(compare, "draw", killed)
    with pytest.raises(KeyboardInterrupt): compare_subject(other, protocol, "cup", ("dreambooth", "textual_inversion", "instructbooth"))
    again = compare_subject(other, protocol, "cup", ("dreambooth", "textual_inversion", "instructbooth"))
    assert len(calls) == 5  # base and DreamBooth were kept
    pd.testing.assert_frame_equal(again, table)


def test_unknown_method(lesson):
    with pytest.raises(BoigError, match="Did you mean 'neti'"): teach("netti", None, "x", None, lesson.base)


# --- judging

def plain(value, n=3): return [{"bytes": as_png(torch.full((3, 4, 4), v), "plain", "", 0, 0), "path": None} for v in np.full(n, value)]


class Nearness:
    "1 - distance of mean brightness to that of the references."
    name = "near"
    def __call__(self, images, prompts, context): return 1 - (brightness(images, 0) - brightness(torch.stack(list(context["references"])), 0).mean()).abs()


def test_each_subject_is_compared_with_its_own_references():
    rows = pd.concat([pd.DataFrame({"subject": s, "method": m, "image": plain(v), "prompt": "a cup", "companion": "", "noun": "cup", "protocol": "actions"})
                      for s, m, v in (("dark", "reference", 0.2), ("dark", "a", 0.2), ("light", "reference", 0.8), ("light", "a", 0.4))], ignore_index=True)
    scores = judge_rows(rows, [Nearness()], detector=object())  # no companion is asked for, so no detector is asked
    assert scores.groupby("subject").near.mean().round(2).to_dict() == {"dark": 1.0, "light": 0.6} and "image" not in scores and "action" not in scores and len(scores) == 6
    with pytest.raises(BoigError, match="no reference pictures of light"): judge_rows(rows[~((rows.subject == "light") & (rows.method == "reference"))], [Nearness()])


def test_grid_has_a_row_for_each_method(table):
    import matplotlib.pyplot as plt
    fig = picture_grid(table, {m: n for m, n in METHODS.items() if m in set(table.method)}, 2)
    assert len(fig.axes) == 5 * 4 and [ax.get_ylabel() for ax in fig.axes[8::4]] == ["DreamBooth", "Textual\nInversion", "InstructBooth"]
    titles = ["".join(t.get_text() for t in ax.texts) for ax in fig.axes[4:8]]
    assert "(seen in RL)" in titles[0] and not titles[1] and titles[2] and "(seen in RL)" not in titles[2]
    assert np.array_equal(fig.axes[8].images[0].get_array(), np.asarray(Image.open(io.BytesIO(table[table.method == "dreambooth"].image.iloc[0]["bytes"]))))
    plt.close(fig)


def test_given_rows_hold_the_files(tmp_path):
    Image.new("RGB", (5, 4), "red").save(tmp_path/"a.png")
    row, = given_rows([tmp_path/"a.png"], "apple").to_dict("records")
    assert row["prompt"] == "an apple" and to_tensor(row["image"]["bytes"]).shape == (3, 4, 5)


def test_large_photographs_are_scaled_down(tmp_path):
    Image.new("RGB", (4000, 3000), "red").save(tmp_path/"a.jpg")
    assert Image.open(io.BytesIO(given_rows([tmp_path/"a.jpg"], "cup").image[0]["bytes"])).size == (1024, 768)


@pytest.mark.parametrize("how", ["written", "kept"])
def test_pictures_lie_in_small_groups_that_pandas_can_read(how, tmp_path):
    "One group with more than 2 GB of pictures cannot be read back."
    rows, file = pd.DataFrame({"image": plain(0.5, 600)}), tmp_path/"t.parquet"
    if how == "kept": compare.kept(file, lambda: rows, {})
    else: compare.write_pictures(file, rows)
    assert pq.ParquetFile(file).metadata.num_row_groups == 3 and pd.read_parquet(file).image.tolist() == rows.image.tolist()
    compare.write_pictures(file, pd.DataFrame())  # a run without a subject of its own


def test_photographs_stand_upright_and_keep_their_secrets(tmp_path):
    exif = Image.Exif()
    exif[274], exif[270], exif[34853] = 6, "Rose Lane 5", {1: "N", 2: (52.0, 31.0, 12.0)}  # turned a quarter; a place
    Image.new("RGB", (6, 4), "red").save(tmp_path/"a.jpg", exif=exif, icc_profile=b"a profile")
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path/"b.jpg")
    rows = given_rows([tmp_path/"a.jpg", tmp_path/"b.jpg"], "cup")
    for row, size in zip(rows.image, ((4, 6), (6, 4))):
        picture = Image.open(io.BytesIO(row["bytes"]))
        assert picture.format == "PNG" and picture.mode == "RGB" and picture.size == size and not picture.info and not picture.getexif() and b"Rose" not in row["bytes"]
        assert np.abs(np.asarray(picture).mean((0, 1)) - (255, 0, 0)).max() < 8
    import matplotlib.pyplot as plt
    files = [{"bytes": (tmp_path/f).read_bytes()} for f in ("a.jpg", "b.jpg")]
    fig = picture_grid(pd.DataFrame({"method": ["reference", "base"], "image": files, "number": 0, "prompt": "a cup", "seen": False}), {"base": "base"})
    shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    assert [a.shape for a in shown] == [(6, 4, 3), (4, 6, 3)] and all(np.abs(a.mean((0, 1)) - (255, 0, 0)).max() < 8 for a in shown)
    plt.close(fig)


def test_the_base_is_asked_as_a_person_would(lesson):
    pipe, asked = compare.load_pipeline(lesson.base), pd.DataFrame({"template": ["a {0} {1} and a ball"], "seen": False})
    for words, said in (("apple", "an apple and a ball"), ("q apple", "a q apple and a ball")):
        row, = picture_rows(pipe, words, "apple", asked, 1, 3, **lesson.sampling).to_dict("records")
        assert (row["asked"], row["prompt"]) == (said, "an apple and a ball")


# --- the verdict

def gaps(**verdicts): return pd.DataFrame([{"Metric": m, "verdict": v} for m, v in verdicts.items()])


@pytest.mark.parametrize("a, b, subject, said", [
    ("better", "better", "undecided", "holds"), ("better", "better", "better", "holds"), ("better", "undecided", "undecided", "undecided"), ("undecided", "undecided", "better", "undecided"),
    ("better", "better", "worse", "fails"), ("better", "worse", "undecided", "fails"), ("better", "not measurable", "undecided", "undecided"), ("better", "better", "not measurable", "undecided")])
def test_the_claim_is_a_rule(a, b, subject, said): assert claim_verdict(gaps(a=a, b=b, s=subject, reward="worse"), ["a", "b"], "s") == said


def test_the_claim_asks_only_for_what_was_measured():
    with pytest.raises(BoigError, match="Unknown metric 'b'"): claim_verdict(gaps(a="better", s="undecided"), ["a", "b"], "s")


def test_cells_that_decide():
    "With so many cells of the same spread, the interval's end is at zero."
    rng, n = np.random.default_rng(0), 40
    values = rng.normal(0.1, 1, n)
    scores = pd.concat([pd.DataFrame({"method": m, "subject": "x", "prompt": range(n), "s": v}) for m, v in (("a", values), ("b", 0 * values))])
    r = fidelity_differences(scores, "a", "b", ["s"]).iloc[0]
    assert cells_to_decide(r.gain, r.low, r.high, r.n) == pytest.approx((1.96 * values.std() / values.mean())**2, rel=0.15)
    assert np.isnan(cells_to_decide(0.1, np.nan, np.nan, 3)) and np.isnan(cells_to_decide(0.0, -1, 1, 3))
