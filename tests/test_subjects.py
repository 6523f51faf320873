"DreamBench's layout read and written, the action set as the paper has it, and the pocket world's subjects."
import hashlib
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from boig.benches.cards import fill, read_card
from boig.benches.subjects import (FAILURES, LAYOUTS, POSES, Shot, _inside, action_table, actions, card_facts, fill_prompt, in_action, parse_prompts, pocket_prompts, pocket_subject, pocket_subjects, portrait, prompts_text,
                                   read_dreambench, read_subject, rl_prompts, subject_sprite, take, variants, write_pocket_subjects)
from boig.core import BoigError, project_root
from boig.data.world import load_sprites, overlap
from boig.metrics.subject_fidelity import where

EIGHT = ("cat", "dog", "teddy bear", "monster toy", "wooden pot", "cup", "motorbike", "bike") # InstructBooth, appendix A


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    write_pocket_subjects(folder := tmp_path_factory.mktemp("bench"), names=["cat", "cup", "mascot"], n=4)
    return folder

def test_one_reader_reads_what_was_written(folder):
    bench = read_dreambench(folder)
    assert {n: (s.noun, s.live, len(s.pictures)) for n, s in bench.subjects.items()} == {"cat": ("cat", True, 4), "cup": ("cup", False, 4), "mascot": ("monster toy", False, 4)}
    assert bench.prompts == pocket_prompts() and {k: len(set(v)) for k, v in bench.prompts.items()} == {"object": 25, "live": 25}
    assert bench.prompts_of(bench.subjects["cat"]) == bench.prompts["live"] != bench.prompts_of(bench.subjects["cup"])
    picture = bench.subjects["cup"].load()[2]
    assert picture.shape == (3, 64, 64) and np.array_equal((picture * 255).permute(1, 2, 0).numpy().round(), take(subject_sprite("cup"), portrait("cup", 2)))

def test_photographs_of_any_size(folder, tmp_path):
    for k, (mode, size) in enumerate((("RGB", (60, 90)), ("L", (30, 20)), ("RGBA", (10, 10)))): (p := tmp_path/"mug").mkdir(exist_ok=True), Image.new(mode, size).save(p/f"0{k}.png")
    (tmp_path/"mug"/"notes.txt").write_text("not a picture")
    (tmp_path/"mug"/"._00.png").write_bytes(b"\0\5\x16\7")  # what macOS puts beside 00.png
    subject = read_subject(tmp_path/"mug", "mug", "chipped")
    assert [tuple(x.shape) for x in subject.load()] == [(3, 90, 60), (3, 20, 30), (3, 10, 10)] and subject.description == "chipped"

def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(BoigError, match="prompts_and_classes.txt"): read_dreambench(tmp_path)
    with pytest.raises(BoigError, match="Did you mean 'mascot'"): read_dreambench(folder, names=["mascott"])
    (tmp_path/"prompts_and_classes.txt").write_text(prompts_text({"cup": "cup"}, pocket_prompts()))
    with pytest.raises(BoigError, match="no folder for cup"): read_dreambench(tmp_path)
    (tmp_path/"cup").mkdir()
    for k in range(2): Image.new("RGB", (4, 4)).save(tmp_path/"cup"/f"{k}.jpg")
    with pytest.raises(BoigError, match="holds 2 pictures"): read_dreambench(tmp_path)
    (tmp_path/"cup"/"2.JPG").write_bytes(b"no picture")
    with pytest.raises(BoigError, match="2.JPG.*no format"): read_dreambench(tmp_path).subjects["cup"].load()
    with pytest.raises(BoigError, match="no folder"): read_subject(tmp_path/"nobody", "cup")

@pytest.mark.parametrize("change, message", [(("subject_name,class", "name;class"), "no table"), (("Object Prompts", "Prompts for things"), "'Object Prompts'"), (("{1}", "cup"), "has no place"), (("a,cup", "../a,cup"), "is not 'subject,class'")])
def test_files_that_are_something_else(change, message):
    text = prompts_text({"a": "cup"}, {"object": ("a {0} {1}",), "live": ("a {0} {1} at the vet's", 'a {0} {1} who says "hi"')})
    assert parse_prompts(text) == ({"a": "cup"}, {"object": ("a {0} {1}",), "live": ("a {0} {1} at the vet's", 'a {0} {1} who says "hi"')})
    assert parse_prompts(text.replace("\n", "\r\n").replace("\r\n", "\n"))[0] == {"a": "cup"}
    with pytest.raises(BoigError, match=message): parse_prompts(text.replace(*change))

def test_another_encoding_is_said(tmp_path):
    (tmp_path/"prompts_and_classes.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(BoigError, match="save it as UTF-8"): read_dreambench(tmp_path)

def test_nothing_in_the_file_is_executed():
    text = prompts_text({"a": "cup"}, {"object": ("a {1}",), "live": ("a {1}",)})
    assert "__import__" not in str(parse_prompts(text.replace("prompt_list = [", "prompt_list = [\n__import__('os').abort().format(1),", 1)))

def test_prompts():
    assert fill_prompt("A {0} {1} in {1}s", "cup", "sks") == "A sks cup in cups"
    assert fill_prompt("A {0} {1} on a rug", "owl") == "An owl on a rug" and fill_prompt("a red {0} {1}", "owl") == "a red owl"
    assert fill_prompt("a {0} {1}", "plushie", "sks", "triangular") == "a sks triangular plushie"

@pytest.mark.parametrize("template, noun, said", [
    *[("a {0} {1}", n, f"a {n}") for n in ("unicorn", "ukulele", "uniform", "European doll", "used book", "one-eyed toy", "cup")],
    *[("a {0} {1}", n, f"an {n}") for n in ("hourglass", "heirloom", "umbrella", "unidentified object", "Easter egg", "onesie")],
    ("a {0} {1} beside a used book", "hat", "a hat beside a used book"), ("A {0} {1}, vitamin A is here", "owl", "An owl, vitamin A is here"), ("a photo of a {1}", "owl", "a photo of an owl")])
def test_the_article_is_as_one_says_it_and_nothing_else_is_touched(template, noun, said): assert fill_prompt(template, noun) == said

def test_action_set_is_the_papers():
    assert sum(len(actions(n)) for n in EIGHT) == 40 and len(action_table()) == 20
    for a, b in (("cat", "dog"), ("teddy bear", "monster toy"), ("wooden pot", "cup"), ("pot", "cup"), ("motorbike", "bike")): assert actions(a) == actions(b)
    assert "A [*] teddy bear doing taekwondo" == fill_prompt(next(a for a in actions("teddy bear") if "taekwondo" in a.phrase).template(), "teddy bear", "[*]").replace("a ", "A ", 1)
    told = {a.phrase: a.rl for n in EIGHT for a in actions(n) if a.told}
    assert told == {"cooking a gourmet meal": True, "playing a guitar": False, "wearing headphones": False, "doing taekwondo": False, "with pens in it": True,
                    "driving through a vibrant city at night": True, "cornering on the cliffside road": False}  # Figs. 3, 6, 8, 11 to 13
    for n in EIGHT:
        assert [a.rl for a in actions(n)].count(True) == 2 and all(a.companion in load_sprites() and a.layout in LAYOUTS for a in actions(n))
        assert all(not a.told for a in actions(n) if a.origin == "ours")
    assert {pocket_subject(n).noun for n in pocket_subjects()} == {*EIGHT, "pot"} - {"wooden pot"}

def test_rl_prompts_are_unseen():
    assert rl_prompts(True) == ("A {0} {1} in a nurse outfit", "A {0} {1} on top of blue sofa") and "church" in rl_prompts(False)[0]
    for live, kind in ((True, "live"), (False, "object")): assert not set(rl_prompts(live, True)) & set(pocket_prompts()[kind])

@pytest.mark.parametrize("name", list(pocket_subjects()))
def test_subjects_are_particular(name):
    s, sprite = pocket_subject(name), subject_sprite(name)
    plain = subject_sprite(name, marked=False)
    assert s.mark == "mascot" or s.color not in ("", *load_sprites()[s.noun].colors)
    assert plain.shape == sprite.shape and (plain != sprite).any(-1).mean() > 0.01 and (s.mark == "mascot" or np.array_equal(plain[..., 3], sprite[..., 3]))
    assert s.live == (s.noun in ("cat", "dog"))
    for shot in (portrait(name, 0), portrait(name, 7, seed=3)): assert take(sprite, shot, 96).shape == (96, 96, 3)
    for k, a in enumerate(actions(s.noun)):
        shot = in_action(name, a, k)
        assert overlap(shot.box, shot.others[0].box) == 0 and where(shot.box, shot.others[0].box) == a.layout and shot == in_action(name, a, k)

def test_mirrored_stays_in_the_box():
    sprite, shot = subject_sprite("teddy_bear"), portrait("teddy_bear", 0)
    shot = replace(shot, background="plain", colors=("White",), mirrored=False)
    for s in (shot, replace(shot, mirrored=True)):
        drawn = (take(sprite, s) < 250).any(-1)
        x1, y1, x2, y2 = s.box
        outside = drawn.copy(); outside[y1:y2, x1:x2] = False
        assert not outside.any() and drawn[y1:y2, x1:x2].mean() > 0.3
    (x1, y1, x2, y2), turned = shot.box, take(sprite, replace(shot, mirrored=True)).astype(int)
    assert abs(take(sprite, shot)[y1:y2, x1:x2][:, ::-1].astype(int) - turned[y1:y2, x1:x2]).max() <= 2

def cover(sprite, shot, size): # pixels that a red thing covers of a white ground, and where it begins and ends
    red = 1 - take(sprite, shot, size)[..., 1] / 255
    ys, xs = (red > 0.02).nonzero()
    return red.sum(), xs.min(), ys.min(), xs.max() + 1, ys.max() + 1

@pytest.mark.parametrize("tilt", [-25, 10, 90, 180])
def test_tilted_keeps_its_scale_and_its_middle(tilt):
    "A bar of 48 × 16 in the middle: turned, it covers as much, about the same point; its sides are those of a turned rectangle."
    bar, shot = np.full((16, 48, 4), (255, 0, 0, 255), np.uint8), Shot((20, 28, 44, 36), colors=("White",))
    n, *_ = cover(bar, shot, 256)
    turned, x1, y1, x2, y2 = cover(bar, replace(shot, tilt=float(tilt)), 256)
    assert n == pytest.approx(96 * 32) and turned == pytest.approx(n, rel=0.03)
    assert abs((x1 + x2) / 2 - 128) <= 2 and abs((y1 + y2) / 2 - 128) <= 2
    c, s = abs(math.cos(math.radians(tilt))), abs(math.sin(math.radians(tilt)))
    assert abs(x2 - x1 - (96 * c + 32 * s)) <= 4 and abs(y2 - y1 - (96 * s + 32 * c)) <= 4

def test_tilted_stays_in_the_picture():
    bar = np.full((16, 48, 4), (255, 0, 0, 255), np.uint8)
    for box in ((0, 0, 48, 16), (16, 48, 64, 64), (0, 21, 64, 43)):
        shot = Shot(box, colors=("White",))
        n, *_ = cover(bar, shot, 256)
        turned, x1, y1, x2, y2 = cover(bar, replace(shot, tilt=25.0), 256)
        whole = (x2 - x1) / 256 < 0.99  # the last one is made smaller to fit
        assert turned == pytest.approx(n, rel=0.05) if whole else turned < n

def test_another_thing_keeps_its_proportions():
    for name in ("cat", "motorbike", "teddy_bear"):
        for k in range(3):
            assert (shot := portrait(name, k)).box == pytest.approx(_inside(subject_sprite(name), shot.box), abs=1)  # its own sprite fills its box
            for other in load_sprites().values():
                (h, w), (x1, y1, x2, y2), (a, b, c, d) = other.image.shape[:2], _inside(other.image, shot.box), shot.box
                assert a <= x1 < x2 <= c and b <= y1 < y2 <= d and abs((x2 - x1) - (y2 - y1) * w / h) <= max(1, w / h)

def test_variants_change_one_thing():
    v = variants("cat", 2)
    assert tuple(v) == ("copy", *POSES, *FAILURES) and len({hashlib.sha256(x.tobytes()).hexdigest() for x in v.values()}) == len(v)
    copy, lost = v["copy"], v["mark lost"]
    assert 0 < (copy != lost).any(-1).mean() < 0.05  # a small spot
    assert np.array_equal(copy, take(subject_sprite("cat"), portrait("cat", 2)))

@pytest.mark.parametrize("name", ("monster_toy", "motorbike", "pot", "teddy_bear"))
def test_what_has_the_subjects_shape_is_drawn_in_its_place(name):
    "A lost mark is all that changes: not also the box, by a pixel."
    for k in range(4): assert np.array_equal(variants(name, k)["mark lost"], take(subject_sprite(name, False), portrait(name, k)))

def test_written_bytes_depend_on_the_seed_alone(folder, tmp_path):
    def digest(f): return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file())).hexdigest()
    write_pocket_subjects(tmp_path/"a", names=["cat", "cup", "mascot"], n=4)
    assert digest(tmp_path/"a") == digest(folder)
    write_pocket_subjects(tmp_path/"b", names=["cat", "cup", "mascot"], n=4, seed=1)
    assert digest(tmp_path/"b") != digest(folder)
    with pytest.raises(BoigError, match="needs 3 or more"): write_pocket_subjects(tmp_path/"c", n=2)
    with pytest.raises(BoigError, match="Did you mean 'cat'"): write_pocket_subjects(tmp_path/"c", names=["catt"])

def test_card_agrees_with_the_data(folder):
    path = project_root()/"data_cards"/"pocket-subjects.md"
    text = path.read_text(encoding="utf-8")
    assert fill(text, card_facts()) == text, "run python bench/cards.py"
    columns, = read_card(str(path)).columns
    assert [c for c, *_ in columns.rows] == list(pd.read_csv(folder/columns.file, nrows=1).columns)
