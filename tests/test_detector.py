"The pocket detector: average precision, non-maximum suppression, detection, its training's parts."
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from boig.core import BoigError
from boig.data.world import load_sprites, truth
from boig.metrics.detection import average_precision, box_iou, detection_table, match, mean_average_precision
from boig.perception.detector import Detection, detect, load_detector, make_detector, surest
from boig.pocket.captions import held_out, pixels, samples
from boig.pocket.detector import bumps, cosines, detection_loss, gaussians, soften, targets, train_detector

NAMES = tuple(load_sprites())
Found = namedtuple("Found", "name score box")


@pytest.fixture(scope="module")
def blind():
    "A detector with random weights that sees something everywhere."
    torch.manual_seed(0)
    model = make_detector(NAMES, widths=[16, 24, 32, 32], blocks=[1, 1, 1]).eval()
    with torch.no_grad():
        model.out.weight.normal_(std=0.5)
        model.out.bias[len(NAMES)] = 0
    return model

@pytest.fixture(scope="module")
def pictures(): return pixels(samples(6, 7, "test")[0])

@pytest.fixture(scope="module")
def finished(): return load_detector()


# Average precision

def test_average_precision_by_hand():
    # in order of score: right, wrong, right, wrong; 4 true. Recall 1/4, 1/4, 2/4, 2/4; precision 1, 1/2, 2/3, 1/2, made to fall: 1, 2/3, 2/3, 1/2
    assert np.isclose(average_precision([0.2, 0.9, 0.5, 0.7], [False, True, True, False], 4), 1/4 + 1/4 * 2/3)
    # wrong, right, right: precision 0, 1/2, 2/3, made to fall: 2/3 throughout
    assert np.isclose(average_precision([3, 2, 1], [False, True, True], 2), 2/3)

def test_mean_average_precision_by_hand():
    box, other = (0, 0, 10, 10), (30, 30, 40, 40)
    true = [{"cat": box, "dog": other}, {"cat": box}, {}]
    found = [[Found("cat", 0.6, box)], [Found("cat", 0.9, other), Found("dog", 0.3, box)], [Found("cat", 0.1, box)]]
    table = detection_table(true, found)
    assert table.loc["cat"].tolist() == [2, 3, 1, 0.25] and table.loc["dog"].tolist() == [1, 1, 0, 0]  # cat: wrong, right (1/2), wrong; half of recall
    assert mean_average_precision(true, found) == 0.125

def test_a_true_object_is_claimed_once_by_the_surest():
    box = (0, 0, 10, 10)
    claims = match([{"cat": box}], [[Found("cat", 0.5, box), Found("cat", 0.8, box)]])
    assert claims.score.tolist() == [0.8, 0.5] and claims.right.tolist() == [True, False]
    off = match([{"cat": box}], [[Found("cat", 0.9, (8, 8, 18, 18)), Found("cat", 0.8, box)]])  # a wrong claim takes nothing away
    assert off.right.tolist() == [False, True]

def test_nothing_found_and_nothing_there():
    assert mean_average_precision([{"cat": (0, 0, 1, 1)}], [[]]) == 0
    assert np.isnan(mean_average_precision([{}], [[Found("cat", 0.9, (0, 0, 1, 1))]]))

def test_the_truth_has_map_one():
    scenes = samples(20, 3, "test")[0]
    true = [truth(s) for s in scenes]
    assert mean_average_precision(true, [[Detection(n, 0.9, b) for n, b in t.items()] for t in true]) == 1

def test_iou():
    a = torch.tensor([0., 0, 2, 2])
    assert box_iou(a, torch.tensor([[0., 0, 2, 2], [1, 1, 3, 3], [2, 2, 4, 4], [0, 0, 0, 0]])).tolist() == pytest.approx([1, 1 / 7, 0, 0])
    assert box_iou(torch.zeros(4), torch.zeros(4)) == 0


# Detection

def test_suppression_keeps_the_surest():
    near, far = (0., 0, 10, 10), (20., 20, 30, 30)
    assert surest(torch.tensor([[near, far, near, far], [near, far, far, near]])).tolist() == [[True, True, False, False]] * 2
    assert surest(torch.tensor([[near, (0., 5, 10, 15)]])).all()  # an IOU of 1/3 is no reason

def test_a_name_once_and_no_two_on_one_thing(blind, pictures):
    found = detect(blind, pictures, threshold=0.0)
    assert any(len(f) > 2 for f in found)
    for f in found:
        assert len({d.name for d in f}) == len(f) <= 8 and [d.score for d in f] == sorted((d.score for d in f), reverse=True)
        boxes = torch.tensor([d.box for d in f])
        assert (box_iou(boxes[:, None], boxes[None]) - torch.eye(len(f))).max() <= 0.5
        assert all(0 <= d.box[0] < d.box[2] <= 64 and 0 <= d.box[1] < d.box[3] <= 64 and d.name in NAMES for d in f)

def test_a_picture_is_seen_the_same_alone_and_in_a_batch(blind, pictures):
    def numbers(found): return [[(d.score, *d.box) for d in f] for f in found]
    def names(found): return [[d.name for d in f] for f in found]
    whole = detect(blind, pictures, threshold=0.05)
    for other in ([detect(blind, p[None], threshold=0.05)[0] for p in pictures], detect(blind, pictures, threshold=0.05, batch_size=4)):
        assert names(other) == names(whole)
        for a, b in zip(numbers(other), numbers(whole)): assert np.allclose(a, b, atol=1e-3)

def test_threshold_and_number(blind, pictures):
    every = detect(blind, pictures, threshold=0.0, max_objects=72)
    cut = sorted(d.score for f in every for d in f)[len(every)]
    assert detect(blind, pictures, threshold=cut, max_objects=72) == [[d for d in f if d.score >= cut] for f in every]
    assert detect(blind, pictures, threshold=0.0, max_objects=1) == [f[:1] for f in every]
    assert detect(blind, pictures[:0]) == [] and detect(blind, pictures, threshold=1.1) == [[]] * len(pictures)

def test_boxes_are_in_the_pictures_own_pixels(blind, pictures):
    small = detect(blind, pictures, threshold=0.05)
    wide = detect(blind, F.interpolate(pictures, size=(128, 320), mode="nearest"), threshold=0.05)  # averaged back, these are the same pictures
    assert any(small) and [[d.name for d in f] for f in wide] == [[d.name for d in f] for f in small]
    for f, g in zip(wide, small): assert np.allclose([d.box for d in f], [np.array(d.box) * [5, 2, 5, 2] for d in g], atol=0.01)

@pytest.mark.parametrize("images", [torch.rand(3, 64, 64), torch.rand(1, 4, 64, 64), torch.randint(0, 255, (1, 3, 64, 64)), torch.rand(1, 3, 64, 64) * 2])
def test_what_is_no_picture_is_told(blind, images):
    with pytest.raises(BoigError, match="Pictures must be"): detect(blind, images)

def test_an_unknown_detector_is_told():
    with pytest.raises(BoigError, match="pocket-detektor"): load_detector("pocket-detektor")

def test_saved_and_loaded_it_sees_the_same(blind, pictures, tmp_path):
    blind.save_pretrained(tmp_path)
    loaded = load_detector(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"} and tuple(loaded.config.names) == NAMES
    assert detect(loaded, pictures, threshold=0.05) == detect(blind, pictures, threshold=0.05)


# Training

def test_targets_name_the_middle_of_each_object():
    scenes = samples(50, 1, "test")[0]
    wanted = targets(scenes, NAMES)
    for s, near, name, box in zip(scenes, *wanted.values()):
        for n, (x1, y1, x2, y2) in truth(s).items():
            i, j = min(int((y1 + y2) / 2 / 4), 15), min(int((x1 + x2) / 2 / 4), 15)
            if NAMES[name[i, j]] == n:  # else two objects' middles are in one cell
                assert near[i, j] > 0.6 and box[:, i, j].tolist() == [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        assert {NAMES[n] for n in name[near == 1]} <= set(truth(s)) and near.max() == 1 and near.mean() < 0.5

def test_a_scene_without_objects_wants_nothing():
    scene = samples(1, 1, "test")[0][0]
    wanted = targets([type(scene)(scene.background, scene.colors, scene.style, ()), scene], NAMES)
    assert wanted["near"][0].max() == 0 and wanted["near"][1].max() == 1
    torch.manual_seed(0)
    loss = detection_loss(make_detector(NAMES), {"images": torch.rand(2, 3, 64, 64), **wanted})
    assert all(torch.isfinite(x) for x in loss.values())

def test_bumps_have_their_summit_at_the_nearest_cell():
    b = bumps(torch.tensor([[[31., 13, 40, 10], [2, 2, 8, 8]]]))[0]
    assert (b.flatten(1).argmax(1) == torch.tensor([3 * 16 + 7, 0])).all() and (b.amax((1, 2)) == 1).all()
    assert b[0, 3, 9] > b[0, 5, 7]  # wide boxes make wide bumps

def test_softening_spoils_most_pictures_mildly():
    images = pixels(samples(64, 2, "test")[0])
    soft = soften(images, torch.Generator().manual_seed(0))
    changed = (soft - images).abs().flatten(1).mean(1)
    assert soft.shape == images.shape and soft.min() >= 0 and soft.max() <= 1
    assert 0.6 < (changed > 1e-3).float().mean() < 0.9 and changed.max() < 0.35
    assert torch.equal(soft, soften(images, torch.Generator().manual_seed(0)))

def test_matrices_of_the_softening():
    assert torch.allclose(cosines() @ cosines().T, torch.eye(8), atol=1e-6) and torch.allclose(cosines()[0], torch.full((8,), 8 ** -0.5))
    G = gaussians(torch.tensor([0.1, 1.0]), 16)
    assert torch.allclose(G.sum(-1), torch.ones(2, 16)) and torch.isclose(G[1, 8, 9] / G[1, 8, 8], torch.tensor(-0.5).exp())

def test_a_batch_is_never_held_out():
    assert not any(map(held_out, samples(200, 404, "pocket-detector", 0)[0]))

def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    from boig.pocket import detector as module
    fit, shape = module.fit, dict(steps=6, batch_size=8, widths=[16, 16, 16, 16], blocks=[1, 1, 1])
    whole = train_detector("pocket-detector", tmp_path/"a", **shape)
    monkeypatch.setattr(module, "fit", lambda *a, **k: fit(*a, **k, stop_after=3))
    train_detector("pocket-detector", tmp_path/"b", **shape)
    monkeypatch.setattr(module, "fit", fit)
    again = train_detector("pocket-detector", tmp_path/"b", **shape)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))


# The finished model

def test_the_shipped_detector_is_good_on_held_out_scenes(finished):
    scenes = samples(300, 2, "held out", unseen=True)[0]
    images, true = pixels(scenes), [truth(s) for s in scenes]
    assert finished.num_parameters() <= 1_000_000 and tuple(finished.config.names) == NAMES
    assert mean_average_precision(true, detect(finished, images, threshold=0.02)) > 0.85
    soft = soften(images, torch.Generator().manual_seed(0))
    assert mean_average_precision(true, detect(finished, soft, threshold=0.02)) > 0.75

def test_the_shipped_detector_sees_nothing_where_there_is_nothing(finished):
    empty = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 64, 64)
    assert sum(map(len, detect(finished, empty))) <= 1
