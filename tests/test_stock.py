"The Stock benchmark from what the simulated seller delivers."
import numpy as np
import pandas as pd
import pytest

from boig.benches.market import write_market
from boig.benches.stock import build_stock, read_stock
from boig.core import BoigError
from boig.data.verbalization import parse, problems
from boig.perception.verbalizer import load_verbalizer


@pytest.fixture(scope="module")
def market(tmp_path_factory): return write_market(tmp_path_factory.mktemp("m")/"market", tweets=0, stock=240)/"stock"


@pytest.fixture(scope="module")
def bench(market): return build_stock(market, load_verbalizer(), test_fraction=0.25, valid_fraction=0.1)


def test_every_row_can_be_asked_about(bench):
    assert len(bench) == 240 and bench.id.is_unique
    assert all(parse(v).clean and not problems(parse(v).value, (64, 64)) for v in bench.verbalization)
    assert (bench["image resolution"] == "(64, 64)").all()


def test_buckets_follow_forwards(bench):
    by = bench.groupby("bucket").forwards
    assert by.max()["low"] <= by.min()["medium"] and by.max()["medium"] <= by.min()["high"]
    assert bench.bucket.value_counts().min() > 60


def test_splits_are_disjoint_and_repeatable(bench, market):
    assert (bench.split == "test").sum() == 60 and (bench.split == "valid").sum() == 18
    again = build_stock(market, load_verbalizer(), test_fraction=0.25, valid_fraction=0.1)
    assert again.drop(columns="image").equals(bench.drop(columns="image"))
    other = build_stock(market, load_verbalizer(), test_fraction=0.25, valid_fraction=0.1, seed=1)
    assert set(other.id[other.split == "test"]) != set(bench.id[bench.split == "test"])


def test_perception_sees_most_of_the_truth(bench, market):
    "No truth goes in; the truth beside the seller's folder says how much came out."
    truth = pd.read_json(market.parent/"truth"/"stock.jsonl", lines=True, dtype={"asset_id": str}, convert_dates=False).set_index("asset_id")
    def main(i): return truth.scene[i]["objects"][-1]["name"]
    seen = np.mean([main(str(r.id)) in parse(r.verbalization).value.objects for r in bench.itertuples()])
    assert seen > 0.85


def test_a_picture_is_missing(tmp_path, market):
    table = pd.read_csv(market/"assets.csv")
    table.to_csv(tmp_path/"assets.csv", index=False)
    with pytest.raises(BoigError, match="240 pictures .* are missing"): read_stock(tmp_path)
    table.drop(columns="forwards").to_csv(tmp_path/"assets.csv", index=False)
    with pytest.raises(BoigError, match="lacks the columns forwards"): read_stock(tmp_path)
    with pytest.raises(BoigError, match="no assets.csv"): read_stock(tmp_path/"nowhere")
