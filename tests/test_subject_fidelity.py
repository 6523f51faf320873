"Scores, the detector's answers and tables, against sums done here."
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from boig.core import BoigError
from boig.metrics.subject_fidelity import action_shown, change_costs, change_scores, fidelity_differences, fidelity_table, prefers_failures, score_pictures, where
from boig.perception import pixels
from boig.perception.detector import Detection


class Redness:
    "How alike the mean red of a picture and of the references is; counts words too."
    differentiable = False
    def __init__(self, name, words=0.0): self.name, self.words = name, words
    def __call__(self, images, prompts, context=None):
        refs = torch.stack([r[0].mean() for r in context["references"]])
        return (1 - (images[:, 0].mean((1, 2))[:, None] - refs).abs()).mean(1) + self.words * torch.tensor([len(p.split()) for p in prompts])

def red(v, size=4): return torch.full((3, size, size), float(v))

def test_every_picture_has_its_own_prompt_and_all_references():
    images = [red(0.2), red(0.9, 6), red(0.4)]  # two sizes: scored apart, in their order
    scores = score_pictures(images, ["a", "a b", "a b c"], [red(0.0), red(1.0, 9)], [Redness("r"), Redness("w", 1.0)])
    assert scores["r"].tolist() == pytest.approx([0.5, 0.5, 0.5], abs=1e-6)  # |v - 0| + |v - 1| = 1
    assert (scores["w"] - scores["r"]).tolist() == pytest.approx([1, 2, 3], abs=1e-6)
    with pytest.raises(BoigError, match="3 pictures need 3 prompts"): score_pictures(images, ["a"], [red(0)], [])

def test_files_are_unpacked_a_part_at_a_time_and_once_for_all_judges(monkeypatch, tmp_path):
    values, opened, most, read = [k / 20 for k in range(20)], [], [], pixels.to_tensor
    for k, v in enumerate(values): Image.new("RGB", (8, 8), (round(255 * v), 0, 0)).save(tmp_path/f"{k}.png")
    files, refs = [tmp_path/f"{k}.png" for k in range(20)], [tmp_path/"0.png"]
    monkeypatch.setattr(pixels, "_MOST_NUMBERS", 5 * 3 * 64)
    monkeypatch.setattr(pixels, "to_tensor", lambda p: opened.append(p) or read(p))
    class Watching(Redness):
        def __call__(self, images, prompts, context=None):
            most.append(len(opened))
            return super().__call__(images, prompts, context)
    scores = score_pictures(files, ["a " * k for k in range(20)], refs, [Watching("r"), Watching("w", 1.0)])
    assert scores["r"].tolist() == pytest.approx([1 - v for v in values], abs=0.01) and (scores["w"] - scores["r"]).round(3).tolist() == list(range(20))
    assert opened == files and most[0] <= 6

@pytest.mark.parametrize("dx, dy, answer", [(20, 5, "beside"), (-20, 19, "beside"), (0, -30, "above"), (10, -11, "above"), (3, 12, "below"), (0, 0, "beside")])
def test_where(dx, dy, answer):
    assert where((20, 20, 40, 40), (25 + dx, 25 + dy, 35 + dx, 35 + dy)) == answer

def test_action_takes_the_surest_and_needs_both():
    cat, balls = Detection("cat", 0.9, (0, 30, 20, 50)), [Detection("ball", 0.5, (0, 0, 20, 10)), Detection("ball", 0.8, (40, 30, 60, 50))]
    assert action_shown([balls[0], cat, balls[1]], "cat", "ball", "beside") == {"kind": 1, "companion": 1, "action": 1, "layout": 1}
    assert action_shown([cat, balls[0]], "cat", "ball", "beside")["layout"] == 0
    alone = action_shown([cat], "cat", "ball", "beside")
    assert alone["action"] == alone["companion"] == 0 and np.isnan(alone["layout"])
    assert np.isnan(action_shown([cat, *balls], "cat", "ball")["layout"]) and action_shown([], "cat", "ball")["kind"] == 0


@pytest.fixture
def scores():
    "12 cells with a difficulty each; method B is 0.1 above A in `x` and equal, but for noise, in `y`."
    rng, rows = np.random.default_rng(0), []
    for subject in "abc":
        for prompt in "wxyz":
            hard = rng.normal()
            for method, more in (("A", 0), ("B", 0.1)):
                for _ in range(4): rows.append((method, subject, prompt, hard + more + rng.normal() * 0.01, hard + rng.normal(), True))
    return pd.DataFrame(rows, columns=["method", "subject", "prompt", "x", "y", "shown"])

def test_table_has_means_and_intervals_of_cells(scores):
    t = fidelity_table(scores, ["x", "y", "shown"]).set_index("Method")
    assert t.loc["A", "x"] == pytest.approx(scores[scores.method == "A"].x.mean()) and t.loc["A", "n"] == 48 and t.loc["A", "cells"] == 12
    cells = scores[scores.method == "A"].groupby(["subject", "prompt"]).x.mean()
    expected = 2 * stats.t.ppf(0.975, 11) * cells.std(ddof=1) / np.sqrt(12)  # Student's interval over cells
    assert t.loc["A", "x high"] - t.loc["A", "x low"] == pytest.approx(expected, rel=0.15)
    assert t.loc["A", "shown"] == 1
    few = fidelity_table(scores[scores.prompt == "w"], ["x"])
    assert few["x low"].isna().all() and few["cells"].tolist() == [3, 3]
    with pytest.raises(BoigError, match="no column z"): fidelity_table(scores, ["z"])
    with pytest.raises(BoigError, match="no column place"): fidelity_table(scores, ["x"], by=("place",))

def test_differences_are_paired(scores):
    d = fidelity_differences(scores, "B", "A", ["x", "y"]).set_index("Metric")
    assert d.loc["x", "gain"] == pytest.approx(0.1, abs=0.01) and d.loc["x", "verdict"] == "better"  # though the cells' spread is ten times that
    assert d.loc["x", "high"] - d.loc["x", "low"] < 0.03 and d.loc["y", "verdict"] == "undecided"
    assert fidelity_differences(scores, "A", "B", ["x"]).verdict.item() == "worse"
    assert fidelity_differences(scores[scores.prompt == "w"], "A", "B", ["x"]).verdict.item() == "not measurable"
    apart = scores[(scores.method == "A") ^ (scores.subject == "a")]
    with pytest.raises(BoigError, match="in common"): fidelity_differences(apart, "A", "B", ["x"])

def test_costs_of_changes():
    pictures = {"copy": torch.stack([red(0.5), red(0.4)]), "pose": torch.stack([red(0.3), red(0.4)]), "failure": torch.stack([red(0.4), red(0.1)])}
    s = change_scores(Redness("r"), pictures, torch.stack([red(0.5)]))
    costs = change_costs(s)
    assert costs.cost.tolist() == pytest.approx([0, 0.1, 0.2], abs=1e-6)
    assert prefers_failures(s, ["pose"], ["failure"]) == 0.5  # the first time yes, the second time no
