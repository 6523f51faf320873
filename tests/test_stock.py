"The Stock benchmark from what the simulated seller delivers, and from tables that real ones may."
import shutil

import numpy as np
import pandas as pd
import pytest

from boig.benches.market import write_market
from boig.benches.stock import build_stock, choose_assets, clean, clean_keywords, read_stock
from boig.core import BoigError
from boig.data.verbalization import parse, problems
from boig.perception.verbalizer import load_verbalizer


@pytest.fixture(scope="module")
def market(tmp_path_factory): return write_market(tmp_path_factory.mktemp("m")/"market", tweets=0, stock=240)/"stock"


@pytest.fixture(scope="module")
def bench(market, tmp_path_factory):
    table, left_out = build_stock(market, tmp_path_factory.mktemp("seen"), load_verbalizer(), test=0.25, valid=0.1)
    assert not left_out
    return table


def test_every_row_can_be_asked_about(bench):
    assert len(bench) == 240 and bench.id.is_unique
    assert all(parse(v).clean and not problems(parse(v).value, (64, 64)) for v in bench.verbalization)
    assert (bench["image resolution"] == "(64, 64)").all() and bench["release date"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()


def test_buckets_follow_forwards(bench):
    by = bench.groupby("bucket").forwards
    assert by.max()["low"] <= by.min()["medium"] and by.max()["medium"] <= by.min()["high"]
    assert bench.bucket.value_counts().min() > 60


def test_each_bucket_is_split_alike(bench, market):
    n = bench.bucket.value_counts()
    test, valid = (bench[bench.split == s].bucket.value_counts() for s in ("test", "valid"))
    assert all(test[b] == round(0.25 * n[b]) and valid[b] == round(0.1 * (n[b] - test[b])) for b in n.index)
    table, _ = read_stock(market)
    def split(**options): return choose_assets(table, **options).set_index("id").split
    assert split(test=0.25, valid=0.1).to_dict() == bench.set_index("id").split.to_dict()
    assert choose_assets(table.sample(frac=1, random_state=0), 0.25, 0.1).set_index("id").split.to_dict() == bench.set_index("id").split.to_dict()  # whatever the order
    assert (split(test=20) == "test").sum() == 60 and set(split(test=20, seed=1).eq("test").loc[lambda t: t].index) != set(split(test=20).eq("test").loc[lambda t: t].index)
    with pytest.raises(BoigError, match="1,000 for the test leave none to train on"): choose_assets(table)


def test_one_file_is_in_one_split(tmp_path, market):
    "Under three names, in three splits, until its bytes are looked at."
    shutil.copytree(market, tmp_path/"s")
    table = read_stock(tmp_path/"s")[0].head(60)
    table = choose_assets(table, test=0.25, valid=0.2).set_index("id")
    (tmp_path/"s"/"assets.csv").write_text("".join((market/"assets.csv").read_text().splitlines(keepends=True)[:61]))
    a, b, c = (tmp_path/"s"/table.file[table.split == split].iloc[0] for split in ("train", "valid", "test"))
    for p in (b, c): p.write_bytes(a.read_bytes())
    found, _ = build_stock(tmp_path/"s", tmp_path/"seen", load_verbalizer(), test=0.25, valid=0.2)
    same = found[found.id.isin([p.stem for p in (a, b, c)])]
    assert len(same) == 3 and same.split.nunique() == same.subgroup.nunique() == 1
    others = found[~found.id.isin(same.id)].set_index("id")
    assert (others.split == table.split[others.index]).all() and (others.subgroup == others.index).all()


def test_perception_sees_most_of_the_truth(bench, market):
    "No truth goes in; the truth beside the seller's folder says how much came out."
    truth = pd.read_json(market.parent/"truth"/"stock.jsonl", lines=True, dtype={"asset_id": str}, convert_dates=False).set_index("asset_id")
    def main(i): return truth.scene[i]["objects"][-1]["name"]
    seen = np.mean([main(str(r.id)) in parse(r.verbalization).value.objects for r in bench.itertuples()])
    assert seen > 0.85


@pytest.mark.parametrize("dirty, tidy", [
    ("Caf&eacute; &amp; cake", "Caf\u00e9 & cake"), ("<p>Two<br/>lines</p>", "Two lines"), (" a\u00a0 b\t\nc\x00", "a b c"), ("e\u0301", "\u00e9"), ("3 < 4 and 5 > 2", "3 < 4 and 5 > 2"),
    ("None", "None"), ("NA", "NA"), ("", ""), (None, ""), (float("nan"), ""), (7, "7"), ("zero\u200bwidth \ufefffirst", "zerowidth first"), ("\ud83d", "")])
def test_captions_are_tidied(dirty, tidy): assert clean(dirty) == tidy == clean(tidy)


@pytest.mark.parametrize("dirty, tidy", [
    ("Cake; cake,CAKE | sweet", "cake, sweet"), ("a,,b, ,c.", "a, b, c"), ("&quot;copy space&quot;\nnobody", "copy space, nobody"), ("mixed-race, african-american", "mixed-race, african-american"), (None, ""), (",", "")])
def test_keywords_are_tidied(dirty, tidy): assert clean_keywords(dirty) == tidy == clean_keywords(tidy)


def test_broken_rows_are_left_out_and_counted(tmp_path, market):
    table = pd.read_csv(market/"assets.csv", dtype=str)
    table.loc[0, "downloads"], table.loc[1, "forwards"], table.loc[2, "release_date"], table.loc[3, "impressions"] = "many", "", "soon", "-1"
    table.loc[4, ["caption", "keywords"]] = "None", "NA, null"
    table = pd.concat([table, table.iloc[[9]]])
    table.to_csv(tmp_path/"assets.csv", index=False)
    found, left_out = read_stock(tmp_path)
    assert len(found) == 236 and left_out == {"a KPI is no number of 0 or more": 3, "no release date": 1, "listed again": 1}
    assert found.captions[0] == "None" and found.keywords[0] == "na, null" and found.forwards.dtype == "int64"


HEAD = "asset_id,file,caption,keywords,release_date,downloads,forwards,impressions\n"

def listed(folder, *lines):
    (folder/"assets.csv").write_text(HEAD + "\n".join(lines) + "\n")
    return read_stock(folder)


def test_the_day_is_the_one_written(tmp_path):
    "Time zones may differ from row to row; each asset keeps its seller's day."
    days = ["2020-01-02T00:30:00+02:00", "2020-01-02T23:30:00-0500", "2020-01-02T00:00:00Z", "2020-01-02 10:00+01", "2020-01-02", "20200102", "2020-01-02T10:00:00.125"]
    found, left_out = listed(tmp_path, *(f"{i},a.png,c,k,{d},1,1,1" for i, d in enumerate(days)))
    assert list(found["release date"]) == ["2020-01-02"] * len(days) and not left_out
    found[["captions"]].assign(asset_id=found.id, file="a.png", caption="c", keywords="k", downloads=1, forwards=1, impressions=1, release_date=pd.to_datetime(days[:1] * len(days))).to_parquet(tmp_path/"assets.parquet")
    (tmp_path/"assets.csv").unlink()
    assert list(read_stock(tmp_path)[0]["release date"]) == ["2020-01-02"] * len(days)


def test_numbers_beyond_all_counting_are_left_out(tmp_path):
    found, left_out = listed(tmp_path, *(f"{i},a.png,c,k,2020-01-01,{n},1,1" for i, n in enumerate(["1e30", "9" * 20, str(2**53 + 2), str(2**53), "3.0", "7"])))
    assert list(found.downloads) == [2**53, 3, 7] and left_out == {"a KPI is above 2^53": 3}


def test_thousands_may_be_grouped(tmp_path):
    "As spreadsheets write them; what is grouped otherwise is no number."
    found, left_out = listed(tmp_path, *(f'{i},a.png,c,k,2020-01-01,"{n}",1,1' for i, n in enumerate(["1,200", " 1,234,567 ", "950", "1,20", "1200,000", "0,123", "1,,200"])))
    assert list(found.downloads) == [1200, 1234567, 950] and left_out == {"a KPI is no number of 0 or more": 4}


def test_a_table_without_a_good_row_says_why(tmp_path):
    with pytest.raises(BoigError, match=r"No row of the table in .* can be used: a KPI is no number of 0 or more \(1\), no release date \(2\)\..* days as 2021-01-31"): listed(tmp_path, "1,a.png,c,k,01/31/2021,1,1,1", "2,b.png,c,k,,x,1,1")


@pytest.mark.parametrize("between", [";", "\t", "|"])
def test_another_delimiter_is_named(tmp_path, between):
    (tmp_path/"assets.csv").write_text(HEAD.replace(",", between) + between.join(["1", "a.png", "one, two, three", "k", "2020-01-01", "1", "2", "3"]))
    with pytest.raises(BoigError) as error: read_stock(tmp_path)
    assert f"{between!r} between its columns. Save it with commas." in str(error.value)


@pytest.mark.parametrize("encoding, filler", [("cp1252", 0), ("utf-16", 0), ("cp1252", 20_000)])
def test_another_encoding_is_named(tmp_path, encoding, filler):
    (tmp_path/"assets.csv").write_bytes((HEAD + "0,a.png,c,k,2020-01-01,1,1,1\n" * filler + "1,a.png,caf\u00e9,k,2020-01-01,1,2,3\n").encode(encoding))
    with pytest.raises(BoigError, match="is not in UTF-8 .*cp1252.* Save it as CSV in UTF-8"): read_stock(tmp_path)


def test_spaces_in_the_header_and_windows_paths_are_mended(tmp_path):
    (tmp_path/"assets.csv").write_text("\ufeff" + HEAD.replace(",", " , ") + "1,media\\a.png,c,k,2020-01-01,1,2,3\n", encoding="utf-8")
    found, left_out = read_stock(tmp_path)
    assert list(found.file) == ["media/a.png"] and list(found.id) == ["1"] and not left_out


def test_a_comma_at_each_line_s_end_moves_nothing(tmp_path):
    rows = ["1,a.png,c,k,2020-01-01,1,2,3", "2,b.png,c,k,2020-01-02,1,2,3"]
    plain = listed(tmp_path, *rows)
    with pytest.warns(pd.errors.ParserWarning): commas = listed(tmp_path, *(r + "," for r in rows))  # pandas says that a column is dropped
    assert commas[0].equals(plain[0]) and list(plain[0].id) == ["1", "2"] and commas[1] == plain[1] == {}


def test_a_good_row_is_not_lost_to_a_bad_one(tmp_path):
    found, left_out = listed(tmp_path, "1,bad.png,c,k,2020-01-01,,1,1", "1,good.png,c,k,2020-01-01,1,1,1", "1,late.png,c,k,2020-01-01,1,1,1", "1,bad.png,c,k,soon,1,1,1")
    assert list(found.file) == ["good.png"] and left_out == {"a KPI is no number of 0 or more": 1, "no release date": 1, "listed again": 1}


def test_parquet_is_a_table_too(tmp_path, market):
    table = pd.read_csv(market/"assets.csv")
    table.assign(release_date=pd.to_datetime(table.release_date), secret="x").to_parquet(tmp_path/"assets.parquet")
    assert read_stock(tmp_path)[0].equals(read_stock(market)[0])  # what nobody explains is not taken along


def test_pictures_that_are_missing(tmp_path, market, bench):
    table = pd.read_csv(market/"assets.csv").head(40)
    table.to_csv(tmp_path/"assets.csv", index=False)
    with pytest.raises(BoigError, match="None of 40 pictures can be used"): build_stock(tmp_path, tmp_path/"seen", load_verbalizer(), test=0.2)
    (tmp_path/"media").mkdir()
    for f in table.file[2:]: (tmp_path/f).write_bytes((market/f).read_bytes())
    (tmp_path/table.file[2]).write_bytes((market/table.file[2]).read_bytes()[:200])
    some, left_out = build_stock(tmp_path, tmp_path/"seen", load_verbalizer(), test=0.2)
    assert left_out == {"left out: no file": 2, "left out: the picture is damaged": 1} and list(some.id) == list(table.asset_id.astype(str)[3:])
    assert list(some.verbalization) == list(bench.set_index("id").verbalization[some.id])
    table.drop(columns="forwards").to_csv(tmp_path/"assets.csv", index=False)
    with pytest.raises(BoigError, match="lacks the columns forwards"): read_stock(tmp_path)
    with pytest.raises(BoigError, match="has no rows"): listed(tmp_path)
    with pytest.raises(BoigError, match="no assets.csv"): read_stock(tmp_path/"nowhere")
