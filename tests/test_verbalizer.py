"From pictures to verbalisations: prompts, boxes, overlaps, captions, any kind of picture, the paper's parts and the pocket's."
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from boig.core import BoigError
from boig.data.verbalization import Verbalization, problems
from boig.data.world import random_scene, render, truth
from boig.perception.captioning import load_captioner, named, say, tiny_blip, tiny_llava
from boig.perception.colors import verbalize_colors
from boig.perception.detector import Detection
from boig.perception.grounding import load_grounder, prompts, read_boxes, text_of, tiny_grounder, to_pil
from boig.perception.pixels import parts_of
from boig.perception.ram import tiny_ram
from boig.perception.saliency import tiny_saliency
from boig.perception.shards import what_runs
from boig.perception.verbalizer import Verbalizer, load_verbalizer, settle, thin_out, whole_box

logging.disable_progress_bar()
WORDS = ("cat", "teddy", "bear", "shoe", "watch", "tree", "burger", "hat")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_ram(folder/"ram", WORDS[3:] + ("teddy bear", "cat"))
    tiny_grounder(folder/"dino", WORDS)
    tiny_saliency(folder/"u2netp.pth")
    tiny_llava(folder/"llava")
    tiny_blip(folder/"blip")
    return folder

@pytest.fixture(scope="module")
def grounder(home): return load_grounder(home/"dino", device="cpu", threshold=0.5)

@pytest.fixture(scope="module")
def paper(home):
    made = load_verbalizer("paper", device="cpu", tagger=home/"ram", grounder=str(home/"dino"), saliency=home/"u2netp.pth", captioner=str(home/"llava"))
    made.mask.size, made.captioner.max_tokens = 64, 8
    return made

@pytest.fixture(scope="module")
def pocket(): return load_verbalizer("pocket", device="cpu")

@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(2)
    return [random_scene(rng) for _ in range(16)]

@pytest.fixture(scope="module")
def images(scenes): return torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2) / 255

def iou(a, b):
    inside = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)

def area(b): return (b[2] - b[0]) * (b[3] - b[1])


# Boxes

@pytest.mark.parametrize("size", [(64, 64), (7, 300), (1, 1)])
def test_settled_objects_obey_the_rules(size):
    (w, h), rng = size, np.random.default_rng(0)
    for _ in range(40):
        (x1, x2), (y1, y2) = (np.sort(rng.uniform(-5, n + 5, (2, 8)), 0) for n in size)
        found = [Detection(str(rng.integers(5)), float(s), b) for s, *b in zip(rng.permutation(8) / 8, x1, y1, x2, y2)]
        kept = settle(found, w, h)
        boxes, score = list(kept.values()), {(d.name, whole_box(d.box, w, h)): d.score for d in sorted(found, key=lambda d: d.score)}
        assert not problems(Verbalization({"Red": 1.0}, {"warm": 1.0, "neutral": 0, "cool": 0}, kept), size)
        assert [area(b) for b in boxes] == sorted(map(area, boxes), reverse=True)
        assert all(iou(a, b) <= 0.5 for i, a in enumerate(boxes) for b in boxes[:i])
        for d in found:  # whoever is not there was beaten by somebody surer who is
            box = whole_box(d.box, w, h)
            if kept.get(d.name) != box: assert any(score[n, b] > d.score and (n == d.name or iou(b, box) > 0.5) for n, b in kept.items())

def test_whole_boxes_stay_inside_and_have_an_area():
    assert whole_box((3.4, 2.6, 9.5, 8.49), 64, 64) == (3, 3, 10, 8)
    assert whole_box((-3, -9, 0.2, 0.1), 10, 10) == (0, 0, 1, 1) and whole_box((63.9, 70, 99, 99), 64, 64) == (63, 63, 64, 64)


# Grounding

def test_prompts_hold_every_tag_once_in_its_place(grounder):
    tokenizer, tags = grounder.processor.tokenizer, ["Teddy bear", "cat", "hat ", "cat", "shoe", "watch", "tree"]
    for limit in (5, 6, 9, 256):
        parts = prompts(tags, tokenizer, limit)
        assert [t for p in parts for t, _ in p] == ["teddy bear", "cat", "hat", "shoe", "watch", "tree"]
        for part in parts:
            ids = tokenizer(text_of(part)).input_ids
            assert len(ids) <= limit and [tokenizer.decode(ids[s]) for _, s in part] == [t for t, _ in part]
    assert len(prompts(tags, tokenizer, 256)) == 1 and prompts([], tokenizer) == []

@pytest.mark.parametrize("tag", ["", "a. b", "cat " * 300])
def test_a_tag_that_cannot_be_asked_for(grounder, tag):
    with pytest.raises(BoigError, match="can't be asked for"): prompts([tag], grounder.processor.tokenizer)

@torch.no_grad()
def test_boxes_and_scores_are_those_of_transformers(grounder, images):
    part = prompts(["cat", "teddy bear", "hat"], grounder.processor.tokenizer)[0]
    pixels, tokens = grounder.processor.image_processor(to_pil(images[:3]), return_tensors="pt"), torch.tensor([1, 3, 4, 6])
    said = grounder.outputs(pixels, [0, 1, 2], [text_of(part)] * 3)
    ids = grounder.processor.tokenizer([text_of(part)] * 3).input_ids
    theirs = grounder.processor.post_process_grounded_object_detection(said, ids, threshold=0.0, text_threshold=0.0, target_sizes=[(64, 64)] * 3)
    compared = 0
    for i, t in enumerate(theirs):
        ours = read_boxes(said.logits[i], said.pred_boxes[i], part, 64, 64, 0.0)
        best = said.logits[i].argmax(-1)
        assert len(ours) == len(t["boxes"])
        for d, box, score, token in zip(ours, t["boxes"], t["scores"], best):
            assert torch.allclose(torch.tensor(d.box), box.clamp(0, 64), atol=1e-3)
            if token in tokens:
                assert np.isclose(d.score, score) and d.name == {1: "cat", 3: "teddy bear", 4: "teddy bear", 6: "hat"}[int(token)]
                compared += 1
    assert compared > 5

def test_a_box_is_in_pixels_of_a_picture_that_is_no_square():
    found = read_boxes(torch.tensor([[-9.0, 3.0, -9.0]]), torch.tensor([[0.5, 0.25, 0.5, 0.5]]), [("cat", slice(1, 2))], width=80, height=20, threshold=0.25)
    assert [(d.name, d.box) for d in found] == [("cat", (20, 0, 60, 10))]

def test_boxes_do_not_depend_on_the_batch_and_are_in_the_pictures_pixels(grounder, images):
    tags = [["cat"], ["shoe", "hat", "teddy bear"], [], ["tree"]]
    together = grounder(images[:4], tags)
    assert together[2] == [] and all(d.name in t for t, f in zip(tags, together) for d in f)
    for image, t, found in zip(images, tags, together):
        alone = grounder(image[None], [t])[0]
        assert [d.name for d in alone] == [d.name for d in found]
        assert np.allclose([d.box for d in alone], [d.box for d in found], atol=1e-3)
    large = grounder(images[:1].repeat_interleave(3, 2).repeat_interleave(3, 3), tags[:1])[0]
    assert all(0 <= v <= 192 for d in large for v in d.box) and max(v for d in large for v in d.box) > 64

def test_every_prompt_of_a_long_list_is_asked(grounder, images, monkeypatch):
    asked = []
    outputs = type(grounder).outputs
    monkeypatch.setattr(type(grounder), "outputs", lambda self, pixels, rows, texts: asked.extend(zip(rows, texts)) or outputs(self, pixels, rows, texts))
    monkeypatch.setattr(grounder.model.config, "max_text_len", 8)
    for layer in grounder.model.class_embed: monkeypatch.setattr(layer, "max_text_len", 8)
    grounder(images[:2], [WORDS[3:], ["cat"]])
    assert asked == [(0, "shoe. watch. tree."), (0, "burger. hat."), (1, "cat.")]

@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("model.level_embed"), "1 missing: model.level_embed"), (lambda s: s.update(extra=torch.zeros(1)), "1 left over: extra"),
    (lambda s: s.update({"model.level_embed": torch.zeros(3, 3)}), r"1 of another shape: model.level_embed \(\[3, 3\], not \[4, 64\]\)")])
def test_a_checkpoint_that_does_not_fit(home, tmp_path, change, says):
    for f in (home/"dino").iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    state = load_file(home/"dino"/"model.safetensors")
    change(state)
    save_file(state, tmp_path/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BoigError, match=says): load_grounder(tmp_path, device="cpu")

def test_a_pickle_is_read_as_tensors_or_not_at_all(home, grounder, tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"ran"),)
    for f in (home/"dino").iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    state = load_file(tmp_path/"model.safetensors")
    (tmp_path/"model.safetensors").unlink()
    torch.save(state, tmp_path/"pytorch_model.bin")
    loaded, wanted = load_grounder(tmp_path, device="cpu").model.state_dict(), grounder.model.state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[k], wanted[k]) for k in wanted)
    torch.save(state | {"model.level_embed": Evil()}, tmp_path/"pytorch_model.bin")
    with pytest.raises(BoigError, match="can be read"): load_grounder(tmp_path, device="cpu")
    assert not (tmp_path/"ran").exists()

def test_hair_thin_pictures_are_refused(grounder):
    with pytest.raises(BoigError, match="too long and thin"): grounder(torch.rand(1, 3, 2, 100), [["cat"]])
    with pytest.raises(BoigError, match="need 1 lists of tags"): grounder(torch.rand(1, 3, 9, 9), [["cat"], ["hat"]])


# Captions

def test_say():
    box = (0, 0, 1, 1)
    assert say(Verbalization({"Light_Blue": 0.8, "Red": 0.2}, {}, {"watch": box})) == "a picture of a watch"
    assert say(Verbalization({"Orange": 1.0}, {}, {"headphones": box, "apple": box})) == "a picture of headphones"
    assert say(Verbalization({"Red": 1.0}, {}, {"a" * 3: box, "cat": box, "hat": box})) == "a picture of an aaa"
    assert say(Verbalization({"Red": 1.0}, {})) == "a picture"

def test_named_are_whole_words():
    assert named(["cat", "ice cream", "hat"], "Ice cream on a caterpillar; that's a HAT.") == ["ice cream", "hat"] and named([], "a cat") == named(["c.t"], "cat") == []

@torch.no_grad()
def test_llava_says_the_likeliest_words(home, images):
    llava = load_captioner(str(home/"llava"), device="cpu", max_tokens=5)
    captions = llava(images[:6])
    assert len(set(captions)) > 1  # random weights, but they do look
    for image, caption in zip(images[:3], captions):
        made, words = llava.inputs(image[None]), []
        for _ in range(5):
            words.append(llava.model(**made).logits[0, -1].argmax().item())
            if words[-1] == 2: break  # the end
            made["input_ids"] = torch.cat([made["input_ids"], torch.tensor([words[-1:]])], 1)
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        assert caption == " ".join(llava.processor.tokenizer.decode(words, skip_special_tokens=True).split())

@pytest.mark.parametrize("kind", ["llava", "blip"])
def test_captions_do_not_depend_on_the_batch(home, images, kind):
    captioner = load_captioner(str(home/kind), device="cpu", max_tokens=6, batch_size=3)
    together = captioner(images[:7])
    assert len(together) == 7 and together == [c for x in images[:7] for c in captioner(x[None])] == captioner(images[:7])

def test_the_prompt_is_a_parameter(home, images):
    blip = load_captioner(str(home/"blip"), device="cpu", prompt="a red", max_tokens=3)
    assert all(c.startswith("a red") for c in blip(images[:2])) and "a red" in repr(blip)
    with pytest.raises(BoigError, match="must have <image>"): load_captioner(str(home/"llava"), device="cpu", prompt="Describe it.")

def test_no_captioner(home, tmp_path):
    with pytest.raises(BoigError, match="Unknown captioner 'grounding-dino'"): load_captioner(str(home/"dino"), device="cpu")
    with pytest.raises(BoigError, match="no config.json"): load_captioner(str(tmp_path), device="cpu")


# The verbalizer

def red_left(images):
    "A mask: the left half, or nothing where the picture is black."
    masks = torch.zeros_like(images[:, 0], dtype=torch.bool)
    masks[:, :, :images.shape[3] // 2] = True
    empty = images.flatten(1).amax(1) == 0
    return masks | empty[:, None, None], empty

def test_colours_are_those_of_the_mask_and_empty_masks_are_counted():
    x = torch.zeros(3, 3, 8, 8)
    x[0, 0, :, :4], x[0, 2, :, 4:], x[1, 1] = 1, 1, 1
    v = Verbalizer(lambda images: [[]] * len(images), mask=red_left)
    assert [list(t.colors) for t in v(x)] == [["Red"], list(verbalize_colors(x[1:2])[0][0]), ["Black"]]
    assert v.describe()["counts"] == {"pictures": 3, "without a subject": 1} and v.describe()["mask"] == {"name": "red_left"}
    assert len(v.caption(x)) == 3
    assert v.describe()["counts"]["pictures"] == 3  # captions are not verbalisations

def test_the_alt_text_names_the_largest_object_and_nothing_else():
    x, found = torch.rand(2, 3, 8, 8), [Detection("cat", 0.9, (0, 0, 3, 3)), Detection("hat", 0.6, (3, 3, 8, 8))]
    v = Verbalizer(lambda images: [found, []][:len(images)], mask=red_left)
    assert v.caption(x) == ["a picture of a hat", "a picture"] and not v.counts

def test_pocket_verbalisations_find_what_is_there(pocket, images, scenes):
    texts = pocket(images)
    assert not any(problems(t, (64, 64)) for t in texts)
    assert [(t.colors, t.tones) for t in texts] == verbalize_colors(images)
    right = sum(iou(t.objects[n], b) > 0.5 for t, s in zip(texts, scenes) for n, b in truth(s).items() if n in t.objects)
    assert right > 0.8 * sum(len(truth(s)) for s in scenes)

def test_boxes_are_in_the_pictures_own_pixels(pocket, images):
    small, large = pocket(images[:4]), pocket(F.interpolate(images[:4], scale_factor=5))
    for a, b in zip(small, large):
        assert a.objects.keys() == b.objects.keys() and all(abs(5 * x - y) <= 3 for n in a.objects for x, y in zip(a.objects[n], b.objects[n]))

def test_any_file_in_one_list_in_order(pocket, images, scenes, tmp_path):
    scene = Image.fromarray(render(scenes[0], 128))
    jpeg = io.BytesIO()
    scene.convert("CMYK").save(jpeg, "JPEG", quality=95)
    scene.save(tmp_path/"scene.png")
    clear = scene.convert("RGBA")
    clear.putalpha(0)
    pictures = [scene, str(tmp_path/"scene.png"), tmp_path/"scene.png", scene.convert("P", palette=Image.Palette.ADAPTIVE), jpeg.getvalue(),
                scene.convert("L"), scene.resize((1, 1)), images[3], scene.resize((300, 10)), clear, images[3][:, :40]]
    texts = pocket(pictures)
    assert texts[0] == texts[1] == texts[2] and texts[3].objects.keys() == texts[4].objects.keys() == texts[0].objects.keys()
    assert texts[5].tones["neutral"] == 1 and texts[9].colors == {"White": 1.0} and texts[7] == pocket(images[3:4])[0]
    sizes = [(128, 128)] * 6 + [(1, 1), (64, 64), (300, 10), (128, 128), (64, 40)]
    assert not any(problems(t, s) for t, s in zip(texts, sizes))
    assert pocket(tmp_path/"scene.png") == pocket(scene) == texts[:1] and len(pocket.caption(pictures)) == len(pictures)

def test_a_mixed_list_is_as_each_alone(pocket, images):
    mixed = [images[0], images[1][:, :30], images[2], images[3][:, :30], images[4][:, :, :9]]
    assert pocket(mixed) == [pocket(p[None])[0] for p in mixed]

@pytest.mark.parametrize("bad, says", [
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide 8-bit"), (torch.zeros(3, 8, 8), r"\[B, 3, H, W\]"), (torch.zeros(1, 4, 8, 8), r"\[B, 3, H, W\]"),
    (torch.full((1, 3, 8, 8), 7.0), r"in \[0, 1\]"), ([np.zeros((8, 8, 3))], "not ndarray"), (["nowhere.png"], "no file 'nowhere.png'"),
    ([b"GIF89a"], "no format"), ([None], "not NoneType")])
def test_what_is_no_picture_gets_one_clear_line(pocket, bad, says):
    with pytest.raises(BoigError, match=says) as e: pocket(bad)
    assert "\n" not in str(e.value)

def test_no_pictures(pocket, paper): assert pocket([]) == [] == paper([]) and pocket(torch.zeros(0, 3, 8, 8)) == [] and pocket.caption([]) == [] == paper.caption([])

def test_pictures_are_read_a_part_at_a_time():
    opened = []
    def folder():
        for i in range(10): opened.append(i); yield Image.new("RGB", (4, 4))
    first = next(parts_of(folder(), 3))
    assert len(first) == 3 and len(opened) == 4
    assert [len(p) for p in parts_of([torch.zeros(3, 3000, 3000)] * 3, 64)] == [1, 1, 1] and [len(p) for p in parts_of(torch.zeros(5, 3, 8, 8), 2)] == [2, 2, 1]

def test_huge_pictures_are_counted_on_a_part_of_their_pixels(pocket, images):
    huge = images[:1].repeat_interleave(30, 2).repeat_interleave(30, 3)
    thin, _ = thin_out(huge, None)
    assert thin.shape[2] * thin.shape[3] <= 2**20 and thin_out(images, None)[0] is images
    seen = pocket(huge)[0].colors
    assert seen.keys() == pocket(images[:1])[0].colors.keys() and all(abs(c - pocket(images[:1])[0].colors[n]) <= 0.01 for n, c in seen.items())
    dot = torch.zeros(1, *huge.shape[2:], dtype=torch.bool)
    dot[0, 1, 1] = True  # thinned out it would be gone
    assert thin_out(huge, dot)[1] is dot and thin_out(huge, ~dot)[1].shape == thin.shape[:1] + thin.shape[2:]


# The paper's parts

def test_the_papers_parts_give_verbalisations_too(paper, images):
    photos = [images[0], images[1], images[2][:, :50], torch.rand(3, 1, 1), torch.rand(3, 30, 400)]
    for p, v in zip(photos, paper(photos), strict=True):
        assert not problems(v, (p.shape[2], p.shape[1])) and set(v.objects) <= set(WORDS) | {"teddy bear"}
    assert len(paper.caption(photos)) == 5

def test_what_ran_is_described(paper, pocket):
    told = paper.describe()
    assert told["objects"]["tagger"]["name"] == "random-ram" and told["objects"]["grounder"]["name"] == "random-grounding-dino"
    assert told["mask"]["name"] == "random-u2netp" and told["captioner"]["name"] == "random-llava" and "<image>" in told["captioner"]["prompt"]
    assert pocket.describe()["objects"] == {"name": "pocket-detector", "threshold": 0.5} and pocket.describe()["mask"] is None and pocket.describe()["most"] == 0.5
    assert json.loads(json.dumps(told)) == told

def test_the_published_thresholds(paper):
    assert (paper.objects.grounder.threshold, paper.mask.threshold) == (0.25, 0.5)

def test_the_papers_first_listing_can_come_out(paper):
    "Four objects that overlap: the paper's settings keep all, the pocket's do not."
    boxes = {"jeans": (2076.67, 2542.5, 3023.88, 3827.01), "woman": (1892.94, 11.18, 4260.09, 3824.34),
             "safety vest": (2160.75, 1410.95, 3668.16, 3826.63), "shirt": (2163.59, 1079.3, 4254.59, 3826.1)}
    found = [Detection(n, 0.9 - 0.1 * i, tuple(x / 100 for x in b)) for i, (n, b) in enumerate(boxes.items())]
    def seen(most): return set(Verbalizer(lambda images: [found] * len(images), most=most)(torch.rand(1, 3, 39, 58))[0].objects)
    assert seen(paper.most) == set(boxes) and len(seen(0.5)) < 4 and paper.describe()["most"] == 1

def test_a_plan_made_without_a_gpu_is_good_with_one(home, paper, images):
    "The captioner's dtype is in the key, so it must not follow the device."
    assert next(paper.captioner.model.parameters()).dtype == torch.bfloat16
    other = replace(paper, captioner=load_captioner(str(home/"llava"), device="cpu", dtype=torch.float32))
    assert what_runs(paper)["weights"] != what_runs(other)["weights"]
    assert what_runs(paper, captions=False) == what_runs(other, captions=False) == what_runs(replace(paper, captioner=None), captions=False)

def test_parts_can_be_left_out(home, images):
    plain = load_verbalizer("paper", device="cpu", tagger=home/"ram", grounder=str(home/"dino"), saliency=None, captioner=None)
    v = plain(images[:2])
    assert plain.mask is None and [(t.colors, t.tones) for t in v] == verbalize_colors(images[:2])
    assert plain.caption(images[:2]) == [say(t) for t in v]

def test_no_captioner_is_loaded_where_none_is_asked(home):
    plain = load_verbalizer("paper", device="cpu", captions=False, tagger=home/"ram", grounder=str(home/"dino"), saliency=None, captioner="nowhere")
    assert plain.captioner is None and load_verbalizer("pocket", device="cpu", captions=False).captioner is None

def test_a_picture_without_tags_has_no_objects(paper, images, monkeypatch):
    monkeypatch.setattr(paper.objects.tagger, "thresholds", torch.ones_like(paper.objects.tagger.thresholds))
    assert all(v.objects == {} and v.colors for v in paper(images[:2]))

def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BOIG_CACHE", str(tmp_path))
    with pytest.raises(BoigError, match=f"RAM needs .* in {tmp_path}/ram"): load_verbalizer("paper")
    with pytest.raises(BoigError, match="Did you mean 'pocket'"): load_verbalizer("poket")
    with pytest.raises(BoigError, match="Did you mean 'detector'"): load_verbalizer("pocket", detektor="x")
