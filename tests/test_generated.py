"Pictures that a model drew say so wherever they are written: model, seed and prompt hash in the file, and with these the picture can be drawn again."
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_sampler import tiny

import boig
from boig.behaviour import boigsd
from boig.benches.questionnaire import read_pictures, save_pictures
from boig.benches.tastes import TasteRules, make_tastes
from boig.core import png_record, project_root
from boig.data.verbalization import Verbalization
from boig.diffusion.pipeline import as_png, draw, records_of, save_figure
from boig.personalise.base import class_pictures
from boig.personalise.compare import picture_rows

HOW = dict(num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe(): return tiny()


def check(pipe, files, prompts, model):
    "Every file says who drew it and from what, and is drawn again from what it says; its pixels are those of a plain PNG."
    for file, prompt in zip(files, prompts, strict=True):
        record = png_record(io.BytesIO(file))
        assert record["generated"] is True and record["model"] == model and record["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
        again = pipe(prompt, generator=torch.Generator().manual_seed(record["seed"]), output_type="pt", **HOW).images[0]
        Image.fromarray((again * 255).round().byte().permute(1, 2, 0).numpy()).save(plain := io.BytesIO(), "PNG")
        ours, theirs = (np.asarray(Image.open(io.BytesIO(f))).astype(int) for f in (file, plain.getvalue()))
        assert abs(ours - theirs).max() <= 1  # another batch, another last digit
    assert len({json.dumps(png_record(io.BytesIO(f))) for f in files}) == len(files)


def test_of_a_subject(pipe):
    asked = pd.DataFrame({"template": ["a {0} {1}", "a {0} {1} on red"], "seen": False})
    rows = picture_rows(pipe, "q cup", "cup", asked, 2, 3, "tiny, DreamBooth", **HOW)
    check(pipe, [i["bytes"] for i in rows.image], list(rows.asked), "tiny, DreamBooth")
    assert rows.image.tolist() == picture_rows(pipe, "q cup", "cup", asked, 2, 3, "tiny, DreamBooth", **HOW).image.tolist()


def test_of_a_class(pipe, tmp_path):
    pictures = class_pictures(pipe, "a cup", tmp_path, 10, **HOW)
    files = [p.read_bytes() for p in sorted(tmp_path.glob("*.png"))]
    check(pipe, files, ["a cup"] * 10, type(pipe).__name__)
    assert all(torch.equal((255 * x).round().byte(), torch.from_numpy(np.array(Image.open(io.BytesIO(f)))).permute(2, 0, 1)) for x, f in zip(pictures, files))


def test_of_tastes(pipe, tmp_path):
    def drawn(captions, seed): return draw(pipe, captions, seed, **HOW)
    make_tastes(tmp_path, TasteRules(users=1, prompts=1, rounds=2), drawn, lambda images: [Verbalization({}, {}, {})] * len(images), "tiny")
    rows = pd.read_parquet(tmp_path/"choices.parquet")
    files = dict(zip([*rows.image_0_uid, *rows.image_1_uid], [*rows.jpg_0, *rows.jpg_1]))
    check(pipe, list(files.values()), [rows.caption[0]] * len(files), "tiny")
    make_tastes(tmp_path/"scenes", TasteRules(users=1, prompts=1, rounds=2))  # drawn by the world's brush: no model made them
    assert not records_of(pd.read_parquet(tmp_path/"scenes"/"choices.parquet").jpg_0)


def test_of_boigsd(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(boigsd, "assess", lambda images, asked, *_: asked.assign(reward=range(len(asked))))
    asked = pd.DataFrame({"prompt": ["a cup", "a shoe"]})
    rows = boigsd._one_set(boigsd.Watch(None, {"gallery": (asked, 2)}, {}, tmp_path/"run", HOW), pipe, "gallery")
    files = rows.image.dropna()
    check(pipe, list(files), list(rows.prompt[files.index]), type(pipe).__name__)
    assert len(files) == 2 and png_record(io.BytesIO(files.iloc[0]))["trained_in"] == "run"


def test_a_figure_carries_the_records_of_its_pictures(tmp_path):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    files = [as_png(torch.rand(3, 4, 4), "tiny", f"größe {i}", 1, i) for i in range(2)]
    Image.new("RGB", (4, 4)).save(plain := io.BytesIO(), "PNG")
    assert len(records_of([*files, plain.getvalue()])) == 2
    for name in ("a", "b"): save_figure(tmp_path/f"{name}.png", fig, 50, records_of(files))
    save_figure(tmp_path/"plot.png", fig, 50)
    assert png_record(tmp_path/"a.png")["pictures"] == [png_record(io.BytesIO(f)) for f in files] and png_record(tmp_path/"plot.png") == {}
    assert (tmp_path/"a.png").read_bytes() == (tmp_path/"b.png").read_bytes()
    assert np.array_equal(*(np.asarray(Image.open(tmp_path/f"{n}.png")) for n in ("a", "plot")))


def test_raters_see_no_records(tmp_path):
    "A questionnaire is blind: who drew a picture is in its key, not in the file."
    file = as_png(torch.rand(3, 8, 8), "tiny", "a cup", 1, 0)
    save_pictures(tmp_path, [file], pd.DataFrame({"subject": ["cup"], "prompt": ["a cup"]}))
    assert records_of([file]) and png_record(tmp_path/"00000.png") == {} and len(read_pictures(tmp_path)) == 1


def test_who_draws_writes_with_a_record():
    "Code that draws has no way of its own to write a picture or a figure."
    package = [p for p in Path(boig.__file__).parent.rglob("*.py") if "pipeline import" in (t := p.read_text()) and "draw" in t]
    assert {p.stem for p in package} >= {"boigsd", "base", "compare"}
    for p in package: assert "fromarray" not in p.read_text() or ".save(" not in p.read_text().replace("torch.save(", ""), p
    books = {p.stem: "".join("".join(c["source"]) for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code") for p in (project_root()/"nbs"/"90_experiments").glob("*.ipynb")}
    drawing = {n: code for n, code in books.items() if any(w in code for w in ("import draw", " draw,", "optimise_noise", "picture_grid", "data.pictures"))}
    assert set(drawing) >= {"pocket_world", "boig_table2", "preference_data", "preference_guidance", "preference_tables", "instructbooth_tables", "instructbooth_ablations"}
    assert [n for n, code in drawing.items() if ".savefig(" in code] == []
