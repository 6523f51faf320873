"Invisible marks: written and read by the library where it is there; without it, a clear word."
import sys
from itertools import product

import pytest
import torch

from boig.core import BoigError
from boig.diffusion.watermark import MESSAGE, chance, read_watermark, watermark


def pictures(size=256):
    "Waves of different lengths: neither flat nor noise."
    x = torch.linspace(0, 12, size)
    return torch.stack([0.5 + 0.4 * torch.sin(x * a)[:, None] * torch.cos(x * b)[None] * torch.tensor([1.0, 0.8, 0.6])[:, None, None] for a, b in ((1, 2), (3, 1))])


def test_chance_counts_coin_tosses():
    tosses = [sum(t) for t in product((0, 1), repeat=8)]
    for m in range(9): assert chance(m, 8) == sum(t >= m for t in tosses) / 256


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    for f in (watermark, read_watermark):
        with pytest.raises(BoigError, match=r"boig\[watermark\]"): f(pictures())


def test_round_trip():
    pytest.importorskip("imwatermark")
    x = pictures()
    marked = watermark(x)
    assert marked.shape == x.shape and 0 < (marked - x).abs().mean() < 0.03
    assert [agree for agree, _ in read_watermark(marked)] == [1, 1]
    assert all(p > 1e-3 for _, p in read_watermark(x)) and all(p > 1e-3 for _, p in read_watermark(marked, MESSAGE[::-1]))


@pytest.mark.parametrize("x, said", [(torch.zeros(1, 3, 64, 64), "64 × 64"), (torch.zeros(1, 4, 256, 256), "B, 3, H, W"), (torch.zeros(3, 256, 256), "B, 3, H, W")])
def test_pictures_it_cannot_take(x, said):
    for f in (watermark, read_watermark):
        with pytest.raises(BoigError, match=said): f(x)
