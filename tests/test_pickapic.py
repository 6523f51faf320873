"Choices of a made-up release: what is kept, who is asked what, and that nothing leaks."
import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from boig.benches.pickapic import FIELDS, HistoryRules, Pictures, authors_table, build_histories, choice_row, stream_pictures, synthetic
from boig.core import BoigError

DAY = pd.Timestamp("2023-05-01")


def png(n):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (n % 256, n // 256, 7)).save(out, "PNG")
    return out.getvalue()


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, FIELDS), path)
    return path


def session(user, prompt, n, start, first=True, text=None):
    "A prompt of which picture `a` beats n rivals in turn."
    def picture(k): return f"u{user}p{prompt}-{k}", png(1000 * user + 20 * prompt + k)
    rows = []
    for k in range(1, n + 1):
        pair = (picture(0), picture(k)) if first else (picture(k), picture(0))
        rows.append(choice_row(user, text or f"prompt {prompt} of {user}", *pair, float(first), DAY + pd.Timedelta(minutes=start + k), prompt))
    return rows


def person(user, prompts=14, rivals=3):
    return [r for p in range(prompts) for r in session(user, p, rivals, 100 * p, first=p % 2 == 0)]


ALL = HistoryRules(test_users=1, valid_users=0)


def test_a_user_by_hand(tmp_path):
    "14 prompts with a winner each: 8 are history, the 6 latest are questions."
    report = build_histories(write(tmp_path/"r.parquet", person(1)), tmp_path/"out", ALL, threads=1)
    cases, triples = pd.read_parquet(tmp_path/"out/cases.parquet"), pd.read_parquet(tmp_path/"out/triples.parquet")
    assert report["triples"] == 42 and report["four test unseen"] == 6 and report["pair test unseen"] == 18 and report["broken"] == 0
    assert triples.split.value_counts().to_dict() == {"history": 24, "test": 18} and not triples.seen.any()
    assert set(triples[triples.split == "history"].caption) == {f"prompt {p} of 1" for p in range(8)}
    for c in cases[cases.kind == "four"].itertuples():
        p = int(c.prompt.split()[1])
        assert p >= 8 and c.liked == f"u1p{p}-0" and sorted(c.disliked) == [f"u1p{p}-{k}" for k in (1, 2, 3)]
        assert sorted(c.reference_list) == sorted(f"u1p{q}-0" for q in range(8))
        assert all(good.split("-")[0] == bad.split("-")[0] and f" {good[3:-2]} " in text for good, bad, text in zip(c.reference_list, c.reference_list_bad, c.reference_prompt_list))


def test_what_is_left_out(tmp_path):
    rows = person(1)
    a, b = ("x", png(1)), ("y", png(2))
    rows += [choice_row(1, "t", a, b, 0.5, DAY, 1), choice_row(1, "t", a, b, None, DAY, 1), choice_row(1, "  ", a, b, 1.0, DAY, 1),
             choice_row(1, "t", a, a, 1.0, DAY, 1), rows[0], choice_row(1, "t", a, b, 1.0, DAY, 1) | {"label_1": 1.0},
             *person(2, prompts=10)]  # ten liked pictures are too few
    report = build_histories(write(tmp_path/"r.parquet", rows), tmp_path/"out", ALL, threads=1)
    triples = pd.read_parquet(tmp_path/"out/triples.parquet")
    assert (report["ties"], report["unlabelled"], report["incomplete"], report["repeated"], report["users"], report["users_kept"]) == (2, 1, 2, 1, 2, 1)
    assert len(triples) == 42 and set(triples.user_id) == {"1"}


def test_missing_and_broken_pictures_cost_their_triples_and_may_cost_their_user(tmp_path):
    rows = person(1) + person(2, prompts=11)
    for r in rows:
        if r["user_id"] == 1 and r["caption"] == "prompt 3 of 1": r["jpg_0"] = None
        if r["user_id"] == 2 and r["caption"] == "prompt 4 of 2": r["jpg_0"] = b"\xff\xd8 broken"
    report = build_histories(write(tmp_path/"r.parquet", rows), tmp_path/"out", ALL, threads=1)
    triples = pd.read_parquet(tmp_path/"out/triples.parquet")
    assert report["broken"] == 3 + 1 and report["without_picture"] == 3 + 3  # three rivals of the one, the winner of the other
    assert set(triples.user_id) == {"1"} and "prompt 3 of 1" not in set(triples.caption)
    store = Pictures(tmp_path/"out")
    assert all(store[u].shape == (3, 4, 4) for u in {*triples.liked, *triples.disliked})


def test_a_prompt_of_both_times_is_on_one_side_only(tmp_path):
    "The first prompt comes back at the end in capitals: all of it counts as early, and nothing of it is asked."
    rows = person(1) + session(1, 50, 3, 5000, text="PROMPT 0 of 1 ")
    build_histories(write(tmp_path/"r.parquet", rows), tmp_path/"out", ALL, threads=1)
    cases = pd.read_parquet(tmp_path/"out/cases.parquet")
    assert not cases.liked.str.startswith("u1p50").any() and not cases.prompt.str.lower().str.strip().isin(["prompt 0 of 1"]).any()


def test_pictures_known_from_training_are_not_asked_about(tmp_path):
    "User 2's late picture is one that user 1 was trained on."
    rules = next(r for s in range(200) if [*map(str, roles(r := HistoryRules(seed=s, test_users=0.5, valid_users=0)))] == ["train", "test"])
    rows = person(1) + person(2)
    shared = next(r for r in rows if r["user_id"] == 1)["image_0_uid"]
    for r in rows:
        for i in (0, 1):
            if r[f"image_{i}_uid"] == "u2p13-0": r[f"image_{i}_uid"] = shared
    build_histories(write(tmp_path/"r.parquet", rows), tmp_path/"out", rules, threads=1)
    cases = pd.read_parquet(tmp_path/"out/cases.parquet")
    assert (cases.user_id == "2").any() and not (cases.liked == shared).any()
    assert cases[cases.user_id == "1"].seen.all() and not cases[cases.user_id == "2"].seen.any()


def test_a_defeat_by_a_known_picture_is_a_defeat(tmp_path):
    "The winner of a late prompt also lost to a picture of the history: no question asks about that triple, and none of four calls it the one that never lost."
    winner, early = ("u1p13-0", png(1000 + 20 * 13)), ("u1p0-0", png(1000))
    rows = person(1) + [choice_row(1, "prompt 13 of 1", early, winner, 1.0, DAY + pd.Timedelta(minutes=1350), 13)]
    report = build_histories(write(tmp_path/"r.parquet", rows), tmp_path/"out", ALL, threads=1)
    cases, triples = pd.read_parquet(tmp_path/"out/cases.parquet"), pd.read_parquet(tmp_path/"out/triples.parquet")
    assert not (triples.disliked == "u1p13-0").any() and report["pair test unseen"] == 18  # the triple leaks and is left out
    assert report["four test unseen"] == 5 and "u1p13-0" not in set(cases[cases.kind == "four"].liked)


def roles(rules):
    from boig.benches.pickapic import _roles
    return _roles(["1", "2"], rules).role


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    for n in (0, 1): synthetic(folder/f"train-{n}.parquet", 700, 12, seed=n)
    return folder, build_histories(folder, folder/"out", HistoryRules(test_users=0.3, valid_users=0.2), threads=1)


def test_nothing_leaks(made):
    folder, report = made
    triples, cases = pd.read_parquet(folder/"out/triples.parquet"), pd.read_parquet(folder/"out/cases.parquet")
    train = triples[triples.split == "train"]
    trained = {*train.liked, *train.disliked}
    assert len(cases) > 100 and {*cases.split} == {"test", "valid"} and report["pair test seen"] > 0
    for c in cases.itertuples():
        asked, known = {c.liked, *c.disliked}, {*c.reference_list, *c.reference_list_bad}
        assert not asked & (known | trained) and c.prompt not in c.reference_prompt_list
        assert len(set(c.reference_list)) == 8 and len(c.disliked) == (1 if c.kind == "pair" else 3)
    assert not {*cases[~cases.seen].user_id} & {*train.user_id} and {*cases[cases.seen].user_id} <= {*train.user_id}
    lost = triples.groupby(["user_id", "caption"]).disliked.apply(set)
    four = cases[cases.kind == "four"]
    assert all(c.liked not in lost[c.user_id, c.prompt] and set(c.disliked) <= lost[c.user_id, c.prompt] for c in four.itertuples())


def test_the_same_twice_and_for_a_user_alone(made, tmp_path):
    "The same files give the same tables; and who else is there changes nothing for a user of the test."
    folder, _ = made
    build_histories(folder, tmp_path/"again", HistoryRules(test_users=0.3, valid_users=0.2), threads=2, memory="200MB")
    for name in ("triples", "cases"): pd.testing.assert_frame_equal(pd.read_parquet(folder/f"out/{name}.parquet"), pd.read_parquet(tmp_path/f"again/{name}.parquet"))


def test_pictures_are_as_they_were_and_work_goes_on(made, tmp_path):
    folder, _ = made
    files = sorted(folder.glob("*.parquet"))
    raw = {r[f"image_{i}_uid"]: r[f"jpg_{i}"] for f in files for r in pq.read_table(f).to_pylist() for i in (0, 1)}
    wanted = set(list(raw)[:60]) | set(list(raw)[-60:])
    assert stream_pictures(files, tmp_path, wanted | {"nobody"}) == {"nobody"}
    store = Pictures(tmp_path, keep=1)
    assert len(store) == 120 and all(store.bytes(u) == raw[u] for u in wanted)
    first = (tmp_path/"pictures-00000.parquet").stat().st_mtime_ns
    (tmp_path/"pictures-00001.parquet").unlink()
    assert stream_pictures(files, tmp_path, wanted | {"nobody"}) == {"nobody"} and (tmp_path/"pictures-00000.parquet").stat().st_mtime_ns == first
    assert len(Pictures(tmp_path)) == 120
    more = set(list(raw)[60:70])  # others are wanted now: what lies there is not all
    assert stream_pictures(files, tmp_path, more) == set() and len(Pictures(tmp_path)) == 10
    with pytest.raises(BoigError, match="no picture"): store["nobody"]


def test_the_authors_columns(made):
    cases = pd.read_parquet(made[0]/"out/cases.parquet")
    table, pairs = authors_table(cases), cases[cases.kind == "pair"]
    liked = np.where(table.label0 == 1, table.image0, table.image1)
    assert (liked == pairs.liked).all() and 0.3 < table.label0.mean() < 0.7
    assert {"reference_list", "reference_list_bad", "reference_prompt_list", "image0", "image1", "prompt", "label0", "user_id"} == {*table}


def test_bad_input(tmp_path):
    with pytest.raises(BoigError, match="no Parquet"): build_histories(tmp_path/"none.parquet", tmp_path/"out")
    pq.write_table(pa.table({"a": [1]}), tmp_path/"a.parquet")
    with pytest.raises(BoigError, match="not Pick-a-Pic"): build_histories(tmp_path/"a.parquet", tmp_path/"out")
    bare = pq.read_table(write(tmp_path/"r.parquet", person(1))).drop_columns(["jpg_0", "jpg_1"])
    pq.write_table(bare, tmp_path/"bare.parquet")
    with pytest.raises(BoigError, match="pictures=False"): build_histories(tmp_path/"bare.parquet", tmp_path/"out")
    assert build_histories(tmp_path/"bare.parquet", tmp_path/"out", ALL, pictures=False, threads=1)["users_kept"] == 1
    for bad in ({"pairs": 11}, {"held": 1.0}, {"test_users": 0.9, "valid_users": 0.2}):
        with pytest.raises(BoigError): HistoryRules(**bad)
