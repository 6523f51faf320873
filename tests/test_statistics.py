"What is said about a benchmark, against a table small enough to count by hand."
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from boig.benches.statistics import (as_text, by_month, ground_truth, looks_by_bucket, looks_figure, over_time, paper_ground_truth, paper_statistics, sample_grid,
                                     score_figure, scores, statistics)
from boig.core import BoigError
from boig.data.verbalization import Verbalization
from boig.perception import pixels


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def picture(grey, size=(8, 8)):
    Image.new("RGB", size, (grey,) * 3).save(out := io.BytesIO(), format="PNG")
    return {"bytes": out.getvalue(), "path": "p.png"}


def says(colors, *objects):
    tones = {"warm": 1.0, "neutral": 0, "cool": 0} if "Red" in colors else {"warm": 0, "neutral": 0, "cool": 1.0}
    return Verbalization(dict.fromkeys(colors, 1 / len(colors)), tones, {o: (0, 0, 4, 4) for o in objects}).to_json()


@pytest.fixture
def tweets():
    "Two accounts, four tweets, five pictures: tweet 1 has two. The index is not 0, 1, 2, … on purpose."
    rows = [("1", "a", "2019-02-01", 100, "high", "train", says(["Red"], "cat")), ("1", "a", "2019-02-01", 100, "high", "train", says(["Red", "Blue"], "cat", "dog")),
            ("2", "a", "2020-05-01", 4, "low", "test", says(["Blue"])), ("3", "b", "2021-02-01", 10, "high", "train", says(["Red"], "cat")),
            ("4", "b", "2022-05-01", 0, "low", "valid", says(["Blue"], "dog"))]
    table = pd.DataFrame(rows, columns=["tweet_id", "account", "created_at", "likes", "bucket", "split", "verbalization"], index=[7, 3, 5, 1, 9])
    table["created_at"] = pd.to_datetime(table.created_at)
    table["image"] = [picture(50 * i, (8, 8 + 4 * (i % 2))) for i in range(5)]
    return table.assign(captions=[f"caption {i} of it" for i in range(5)], keywords=["a, b", "a", "", None, "a,, b, c"], text=["one two"] * 5, **{"image resolution": ["(8, 8)", "(8, 12)"] * 2 + ["(8, 8)"]})


def test_counts(tweets):
    s = statistics(tweets)
    assert list(s.columns) == ["all", "high", "low"]
    assert s.loc["pictures"].tolist() == [5, 3, 2] and s.loc["tweets"].tolist() == [4, 2, 2] and s.loc["accounts"].tolist() == [2, 2, 2]
    assert s.loc["pictures a tweet"].tolist() == [5 / 4, 3 / 2, 1] and s.loc["pictures for train"].tolist() == [3, 3, 0]
    assert s.loc["first year"].tolist() == [2019, 2019, 2020] and s.loc["last year"].tolist() == [2022, 2021, 2022]
    assert s.loc["objects a picture"].tolist() == pytest.approx([1.0, 4 / 3, 0.5]) and s.loc["colours a picture", "high"] == pytest.approx(4 / 3)
    assert s.loc["keywords, median", "all"] == 1 and s.loc["words of captions, median", "all"] == 4 and s.loc["width, median", "low"] == 8


def test_likes_belong_to_tweets_not_to_pictures(tweets):
    s = statistics(tweets)
    assert s.loc["likes, mean"].tolist() == [28.5, 55, 2] and s.loc["likes, median", "all"] == 7 and s.loc["likes, most"].tolist() == [100, 100, 4]
    pictures = statistics(tweets.drop(columns="tweet_id"))
    assert pictures.loc["likes, mean", "all"] == 42.8 and "tweets" not in pictures.index


def test_other_tables_have_other_lines(tweets):
    stock = tweets.drop(columns=["tweet_id", "account", "text", "likes"]).rename(columns={"created_at": "release date"}).assign(contributor="x", forwards=[5, 4, 3, 2, 1], downloads=0, impressions=9)
    s = statistics(stock)
    assert s.loc["contributors", "all"] == 1 and s.loc["forwards, most", "high"] == 5 and s.loc["impressions, mean", "low"] == 9 and "likes, mean" not in s.index
    bare = statistics(pd.DataFrame({"uses": [1, 2]}))
    assert list(bare.columns) == ["all"] and bare.loc["uses, mean", "all"] == 1.5


def test_text_for_people(tweets):
    t = as_text(statistics(tweets, paper="boigbench"))
    assert t.loc["likes, mean", "all"] == "28.50" and t.loc["first year", "high"] == "2019" and t.loc["tweets", "paper, high"] == "" and t.loc["pictures", "paper, high"] == "35,649"
    assert not t.isna().any().any()


def test_the_papers_numbers_add_up():
    for name, total in (("boigbench", 79728), ("stock", 14649 + 12834 + 20142)):
        p = paper_statistics(name).loc["pictures"]
        assert p["all"] == total == p.drop("all").sum()
        assert (paper_statistics(name).loc["objects a picture"].dropna() == paper_ground_truth(name)["# objects"]).all()
    with pytest.raises(BoigError, match="Did you mean 'stock'"): paper_statistics("stok")


def test_ground_truth_is_mean_and_margin(tweets):
    values = np.array([1.0, 2.0, 10.0, 6.0, 20.0])
    t = ground_truth(tweets, {"judge": values})
    assert list(t.index) == ["high", "low"] and t.n.tolist() == [3, 2]
    assert t.judge.tolist() == [3, 15] and t["# objects"].tolist() == pytest.approx([4 / 3, 0.5])
    assert t["± judge"]["high"] == pytest.approx(1.96 * np.sqrt(((1 - 3)**2 + (2 - 3)**2 + (6 - 3)**2) / 2 / 3))


def test_looks_are_shares_of_pictures(tweets):
    t = looks_by_bucket(tweets, "colors", least=1)
    assert t.loc["Red"].tolist()[:4] == [3, 1, 0, 1] and t.loc["Blue", "difference"] == pytest.approx(1 / 3 - 1) and list(t.index) == ["Red", "Blue"]
    assert t.loc["Blue", "±"] == pytest.approx(1.96 * np.sqrt((1 / 3 * 2 / 3 * 3 / 2) / 3))
    assert list(looks_by_bucket(tweets, "objects", least=3).index) == ["cat"]
    assert looks_by_bucket(tweets, "tones", least=1).loc["warm", "high"] == 1
    fig = looks_figure(t)
    assert [p.get_width() for p in fig.axes[0].patches] == pytest.approx(t.difference.tolist())


def test_a_reward_sees_each_picture_with_its_own_caption(tweets):
    seen = []
    def reward(images, prompts):
        seen.append(images.shape)
        assert torch.equal((images[:, 0, 0, 0] * 255 / 50).round(), torch.tensor([float(p.split()[1]) for p in prompts]))
        return images.mean((1, 2, 3))
    assert scores(tweets, reward, batch_size=2) == pytest.approx([i * 50 / 255 for i in range(5)])
    assert {tuple(s[2:]) for s in seen} == {(8, 8), (12, 8)} and max(s[0] for s in seen) <= 2
    assert scores(tweets.head(0), reward).shape == (0,)


def test_photographs_are_unpacked_a_few_at_a_time(monkeypatch):
    "Not all of a table's before the first is scored."
    unpacked, seen, plain = [], [], pixels.to_tensor
    monkeypatch.setattr(pixels, "to_tensor", lambda p: unpacked.append(1) or plain(p))
    table = pd.DataFrame({"captions": [f"{i}" for i in range(9)], "image": [picture(10 * i, (2400, 1600)) for i in range(9)]})
    def reward(images, prompts):
        seen.append(len(unpacked))
        assert torch.equal((images[:, 0, 0, 0] * 255 / 10).round(), torch.tensor([float(p) for p in prompts]))
        return images[..., ::99, ::99].mean((1, 2, 3))
    assert scores(table, reward, batch_size=2) == pytest.approx([i * 10 / 255 for i in range(9)])
    assert seen == [5, 5, 9, 9, 9]  # four are a part, and one more was read to know that


def test_score_figure_is_named_and_normed(tweets):
    ax, = score_figure(tweets, [1, 2, 10, 6, 20], "pocket-judge").axes
    assert "pocket-judge" in ax.get_title() and "mean 3.000\n3 pictures" in ax.get_legend().get_texts()[0].get_text()
    filled = [p.get_xy() for p in ax.patches[::2]]
    for xy in filled: assert abs(0.5 * np.sum(xy[:-1, 0] * xy[1:, 1] - xy[1:, 0] * xy[:-1, 1])) == pytest.approx(1, abs=1e-6)
    with pytest.raises(BoigError, match="5 rows need 5 scores"): score_figure(tweets, [1], "x")


def test_grid_shows_accounts_with_high_left_and_low_right(tweets):
    fig = sample_grid(tweets, rows=2, each=2)
    titles = [[ax.get_title() for ax in fig.axes[i:i + 4]] for i in (0, 4)]
    assert titles == [["100 likes", "100 likes", "4 likes", ""], ["10 likes", "", "0 likes", ""]]
    assert fig.axes[0].get_images()[0].get_array().shape in ((8, 8, 3), (12, 8, 3))
    odd = tweets.drop(columns=["account"]).assign(text="costs $5 or $6 \U0001f389 now" * 9)
    fig = sample_grid(odd, each=1)
    fig.canvas.draw()
    assert len(fig.axes) == 4 and "\U0001f389" not in fig.axes[0].texts[0].get_text() and "$6" in fig.axes[0].texts[0].get_text()


def test_over_time_counts_every_tweet_once(tweets):
    fig = over_time(tweets, every="YE")
    for k, (account, years) in enumerate({"a": {2019: 1, 2020: 1}, "b": {2021: 1, 2022: 1}}.items()):
        top, bottom = fig.axes[k], fig.axes[k + 2]
        assert top.get_title() == account and top.lines[0].get_ydata().sum() == sum(years.values())
        assert len(bottom.lines[0].get_xdata()) == 2 and (bottom.lines[0].get_ydata() >= 0.5).all()
    with pytest.raises(BoigError, match="Unknown account 'c'"): over_time(tweets, ["c"])


def test_months_explain_what_a_regression_says():
    rng = np.random.default_rng(0)
    when = pd.to_datetime(rng.integers(0, 1500, 400), unit="D", origin="2019-01-01")
    t = pd.DataFrame({"tweet_id": range(400), "account": rng.choice(["a", "b"], 400), "created_at": when, "likes": rng.poisson(30 + 20 * (when.month == 6))})
    months, explained, noise = by_month(t)
    log = np.log1p(t.likes.to_numpy(float))
    y = log - np.array([log[t.account == a].mean() for a in t.account])
    dummies = np.eye(12)[when.month - 1]
    fitted = dummies @ np.linalg.lstsq(dummies, y, rcond=None)[0]
    assert explained == pytest.approx(fitted.var() / y.var()) and explained > 3 * noise and noise == pytest.approx(11 / 399)
    assert months["mean"].idxmax() == 6 and months.n.sum() == 400
    twice = pd.concat([t, t])
    assert by_month(twice)[1] == explained  # pictures of one tweet count once


def test_what_is_missing_is_said(tweets):
    with pytest.raises(BoigError, match="no rows"): statistics(tweets.head(0))
    with pytest.raises(BoigError, match="not best"): statistics(tweets.assign(bucket="best"))
    with pytest.raises(BoigError, match="column account or contributor"): over_time(tweets.drop(columns="account"))
    with pytest.raises(BoigError, match="needs 2 or more buckets .* the table has 1"): looks_by_bucket(tweets[tweets.bucket == "low"])
    with pytest.raises(BoigError, match="the table has 0"): score_figure(tweets.drop(columns="bucket"), [1.0] * 5, "x")
    with pytest.raises(BoigError, match="part of a verbalisation"): looks_by_bucket(tweets, "shapes")
