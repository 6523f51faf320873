"A rater in a real browser: opens the page, answers by key and by click, stops and goes on, saves; and the tables that come of it."
import csv
import json
import os
import select
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from boig.benches.questionnaire import (KINDS, NOT_RUN, Question, agreement_table, fidelity_questions, human_table, pick_question, pick_table, preference_table, read_answers,
                                        read_pictures, save_pictures, side_question, write_questionnaire)
from boig.core import BoigError, write_json
from boig.metrics.agreement import wilson

EVIL = "a <img src=x onerror=\"window.hacked=1\"> </script><script>window.hacked=2</script> & 'cup' ☕"
RATER = "Zoë <b>\"x\"</b>, ok"
METHODS = ("InstructBooth", "DreamBooth", "NeTI")


def picture(*seed): return Image.fromarray(np.random.default_rng(list(seed)).integers(0, 255, (8, 8, 3), np.uint8))

@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "A folder with a questionnaire of all kinds: 2 cells, 3 methods, one case each of the other two kinds."
    folder = tmp_path_factory.mktemp("asked")
    table = pd.DataFrame({"subject": ["cup", "bear"], "prompt": [EVIL, "a bear"]})
    for m, name in enumerate(METHODS): save_pictures(folder/name, [picture(m, 0), picture(m, 1)], table)
    questions = fidelity_questions({m: folder/m for m in METHODS}, {"cup": [picture(9, 0), picture(9, 1)], "bear": [picture(9, 2)]}, "InstructBooth")
    liked, disliked = [picture(7, k) for k in range(2)], [picture(8, k) for k in range(2)]
    questions += [pick_question(liked, disliked, picture(5, 0), [picture(5, k) for k in (1, 2, 3)], EVIL, user="u1"), side_question(liked, disliked, {"base": picture(6, 0), "ours": picture(6, 1)})]
    write_questionnaire(folder, questions, f"Title {EVIL}")
    return folder

def key_of(folder): return json.loads((folder/"key.json").read_text(encoding="utf-8"))

def rated(folder, rater, say):
    "A rater's file; `say(question of the key) -> yes, no, pass or a name`."
    key = key_of(folder)
    given = [{"question": i, "answer": q["names"].index(a) if (a := say(q)) in q["names"] else a, "seconds": 1} for i, q in key["questions"].items()]
    return write_json(folder/f"saved-{rater}.json", {"questionnaire": key["questionnaire"], "rater": rater, "answers": given})


class Chromium:
    "Chromium by its DevTools protocol over a pipe; no driver needed."
    def __init__(self, path, folder):
        (read, self.out), (self.inn, write) = os.pipe(), os.pipe()
        high = [os.dup(f) for f in (read, write)] if max(read, write) < 20 else [read, write]
        def wire():
            a, b = os.dup(high[0]), os.dup(high[1])
            os.dup2(a, 3), os.dup2(b, 4)
        self.process = subprocess.Popen([path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"],
                                        close_fds=False, preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for f in {read, write, *high}: os.close(f)
        self.number, self.buffer, self.session = 0, b"", None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        limit = time.time() + 60
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.inn], [], [], max(0, limit - time.time()))[0], f"no answer to {method}"
                self.buffer += os.read(self.inn, 1 << 20)
            text, self.buffer = self.buffer.split(b"\0", 1)
            if (d := json.loads(text)).get("id") == self.number:
                assert "error" not in d, d
                return d["result"]

    def js(self, code):
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && !!document.getElementById('rater')")

    def wait(self, code):
        for _ in range(300):
            if self.js(code): return
            time.sleep(0.05)
        raise AssertionError(f"never: {code}")

    def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"): self.send("Input.dispatchKeyEvent", type=kind, key=key, **({"text": text} if text and kind == "keyDown" else {}))

    def click(self, element):
        x, y = self.js(f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] }})()")
        for kind in ("mousePressed", "mouseReleased"): self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def start(self, name):
        self.js(f"document.getElementById('rater').value = {json.dumps(name)}")
        self.click("document.getElementById('start')")
        self.wait("!document.getElementById('rater')")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.inn), os.close(self.out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path: pytest.skip("no Chromium here: the page cannot be tried")
    browser = Chromium(path, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()

def test_a_rater_in_a_browser(asked, browser, tmp_path):
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True)
    page, key = (asked/"page"/"index.html").as_uri(), key_of(asked)["questions"]
    browser.open(page)
    browser.start(RATER)
    n, said, orders = len(key), {}, []

    def answer(step):
        "Answer what is on the screen, by key or by click; remember what was said, by name."
        assert browser.js("page.querySelector('p').textContent") == f"{step + 1} of {n}"
        q, shown = browser.js("order[at].id"), browser.js("order[at].shown")
        options = [*key[q]["names"], "pass"] if KINDS[key[q]["kind"]].choose else ["yes", "no", "pass"]
        said[q] = a = options[step % len(options)]
        place = shown.index(key[q]["names"].index(a)) if a in key[q]["names"] else None
        assert browser.js("document.documentElement.scrollWidth") <= 360, "wider than a phone"
        assert browser.js("[...document.querySelectorAll('.buttons button')].every(b => b.getBoundingClientRect().height >= 44)")
        browser.wait("[...document.images].every(i => i.complete && i.naturalWidth == 8)")
        prompt = browser.js("document.getElementById('prompt')?.textContent")
        assert prompt in (None, EVIL, "a bear")
        if step % 2: browser.press(str(place + 1) if place is not None else a[0], str(place + 1) if place is not None else a[0])
        elif place is not None: browser.click(f"document.querySelectorAll('button.pick')[{place}]")
        else: browser.click(f"[...document.querySelectorAll('.buttons button')].find(b => b.textContent.toLowerCase().startsWith('{a}'))")
        orders.append(q)

    for step in range(5): answer(step)
    browser.press("ArrowLeft")  # a second thought
    assert browser.js("order[at].id") == orders[-1] and browser.js("document.querySelector('[aria-pressed=true]') != null")
    browser.press("p", "p")
    said[orders[-1]] = "pass"
    browser.open(page)  # the page is closed, and opened again tomorrow
    browser.start(RATER)
    for step in range(5, n): answer(step)
    assert browser.js("document.getElementById('done').textContent").startswith(f"{n} of {n}")
    assert browser.js("window.hacked === undefined && document.querySelectorAll('img').length == 0")
    for kind in ("json", "csv"): browser.click(f"document.getElementById('{kind}')")
    for _ in range(200):
        files = [p for p in tmp_path.iterdir() if p.suffix in (".json", ".csv")]
        if len(files) == 2: break
        time.sleep(0.05)
    by_kind = {p.suffix: read_answers(asked, [p]) for p in files}
    for answers in by_kind.values():
        assert dict(zip(answers.question, answers.answer)) == said and set(answers.rater) == {RATER}
        assert (answers.seconds >= 0).all()
    pd.testing.assert_frame_equal(by_kind[".json"], by_kind[".csv"])
    kinds = [key[q]["kind"] for q in orders]
    assert kinds == sorted(kinds, key=list(KINDS).index)  # part after part
    browser.open(page)
    browser.start("somebody else")
    other = browser.js("order.map(q => q.id)")
    assert sorted(other) == sorted(orders) and other != orders

def test_page_is_blind_and_offline(asked):
    text = (asked/"page"/"index.html").read_text(encoding="utf-8")
    assert not any(m in text for m in (*METHODS, '"liked"', '"other 1"', '"base"')) and "http" not in text.replace("http-equiv", "")
    assert "<img src=x" not in text and text.count("</script>") == 2
    shown = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert {len(q["pictures"]) for q in shown["questions"]} == {1, 2, 4} and len(set(map(str, shown["images"]))) == len(shown["images"])
    sides = [q["names"].index("InstructBooth") for q in key_of(asked)["questions"].values() if q["kind"] == "overall"]
    assert set(sides) == {0, 1}

def test_same_seed_same_page_and_no_key_is_lost(asked, tmp_path):
    questions = [Question("text", {"a": picture(1)}, "x"), Question("text", {"b": picture(2)}, "x")]
    pages = [write_questionnaire(tmp_path/name, questions, seed=seed).read_bytes() for name, seed in (("a", 0), ("b", 0), ("a", 0))]
    assert pages[0] == pages[1] == pages[2]
    with pytest.raises(BoigError, match="Choose another folder"): write_questionnaire(tmp_path/"a", questions[:1])
    page = write_questionnaire(tmp_path/"c", questions, embed=False)
    assert len(list((page.parent/"pictures").iterdir())) == 2 and "data:image" not in page.read_text()

def test_pass_counts_as_bad_and_majority_decides(asked):
    votes = {"a": "yes", "b": "yes", "c": "yes", "d": "yes", "e": "no", "f": "pass", "g": "pass"}
    def say(vote):
        return lambda q: {"text": vote, "subject": "pass" if vote == "yes" else "yes", "overall": "InstructBooth", "pick": "liked" if vote == "yes" else "pass", "side": "ours" if vote != "no" else "base"}[q["kind"]]
    files = [rated(asked, r, say(v)) for r, v in votes.items()]
    answers = read_answers(asked, files)
    table = human_table(answers, [*METHODS, "Textual Inversion"]).set_index("Method")
    assert table.loc["NeTI", "Text Human"] == 1 and table.loc["NeTI", "Subject Human"] == 0  # 4 yes of 7; 3 yes of 7
    assert table.loc["NeTI", "Text Human n"] == 2 and table.loc["Textual Inversion", "Text Human"] == NOT_RUN
    fig5 = preference_table(answers, "InstructBooth").set_index("Against")
    assert list(fig5.index) and (fig5["win rate"] == 1).all() and (fig5.n == 2).all()
    assert preference_table(answers, "base", "side").iloc[0][["ours", "other"]].tolist() == [0, 1]
    picked = pick_table(answers).set_index("People")
    assert picked.loc["people, each", "accuracy"] == pytest.approx((4 + 3 / 4) / 7) and picked.loc["people, together", "accuracy"] == 1
    kinds = agreement_table(answers).set_index("Kind")
    assert kinds.loc["overall", "alpha"] == 1 and kinds.loc["text", "raters"] == 7

def alike(kind, yes, no, names):
    "40 cells of ten pictures that raters judge alike, half of the cells one way and half the other."
    return pd.DataFrame([dict(rater=f"r{r}", question=f"q{c}-{k}", kind=kind, answer=yes if c % 2 else no, names=names, subject=str(c // 5), prompt=str(c % 5), number=k)
                         for c in range(40) for k in range(10) for r in range(3)])

def test_intervals_of_people_draw_cells():
    text, overall = alike("text", "yes", "no", ("A",)), alike("overall", "A", "B", ("A", "B"))
    row, = human_table(text, ["A"]).to_dict("records")
    assert row["Text Human"] == 0.5 and row["Text Human n"] == 400 and row["Text Human high"] - row["Text Human low"] > 0.25
    row, = preference_table(overall, "A").to_dict("records")
    assert row["win rate"] == 0.5 and row["high"] - row["low"] > 0.25
    for one in (text[text.number == 0], text.drop(columns="subject")):  # a picture a cell; nobody knows the cells: Wilson's
        row, n = human_table(one, ["A"]).iloc[0], one.question.nunique()
        assert (row["Text Human low"], row["Text Human high"]) == wilson(n // 2, n)
    few = human_table(text[text.subject == "0"].query("prompt < '3'"), ["A"]).iloc[0]
    assert np.isnan(few["Text Human low"])  # three cells are too few
    sure = human_table(text.assign(answer="yes"), ["A"]).iloc[0]
    assert sure["Text Human low"] < 1  # all cells alike: the bootstrap alone would be certain

def test_six_raters_who_split_decide_nothing(asked):
    files = [rated(asked, f"r{k}", lambda q, k=k: {"overall": q["names"][k % len(q["names"])], "side": "pass", "pick": q["names"][k % 2 % len(q["names"])]}.get(q["kind"], "yes" if k % 2 else "no")) for k in range(6)]
    answers = read_answers(asked, files)
    assert human_table(answers, ["NeTI"])["Text Human"].item() == 0
    fig5 = preference_table(answers, "InstructBooth")
    assert (fig5.neither == 1).all() and fig5["win rate"].isna().all()
    assert pick_table(answers).accuracy[1] == 0.25

def test_nobody_rated(asked, tmp_path):
    answers = read_answers(asked, tmp_path)
    assert not len(answers) and (human_table(answers, METHODS)["Subject Human"] == NOT_RUN).all()
    assert not len(preference_table(answers, "InstructBooth")) and (pick_table(answers).accuracy == NOT_RUN).all() and not len(agreement_table(answers))

@pytest.mark.parametrize("text, message", [("{", "holds no answers"), ('{"questionnaire": "x", "rater": "a", "answers": []}', "another questionnaire"), ("[]", "holds no answers")])
def test_foreign_files(asked, tmp_path, text, message):
    (tmp_path/"a.json").write_text(text)
    with pytest.raises(BoigError, match=message): read_answers(asked, tmp_path)

@pytest.mark.parametrize("answers", [["x"], {"q1": "yes"}, [{"question": ["q1"], "answer": "yes"}], [{"question": {}, "answer": "yes"}], [{"answer": "yes"}], [["q1", "yes"]], [None], 7, None, "q1"])
def test_answers_of_another_form(asked, tmp_path, answers):
    write_json(tmp_path/"a.json", {"questionnaire": key_of(asked)["questionnaire"], "rater": "a", "answers": answers})
    with pytest.raises(BoigError, match="a.json' holds no answers"): read_answers(asked, tmp_path)

def test_answers_that_were_not_offered(asked, tmp_path):
    key = key_of(asked)
    one = next(i for i, q in key["questions"].items() if q["kind"] == "text")
    for question, answer, message in ((one, "maybe", "with 'maybe'"), (one, "0", "with '0'"), ("q999", "yes", "was not asked")):
        with (tmp_path/"a.csv").open("w", newline="") as f: csv.writer(f).writerows([["questionnaire", "rater", "question", "answer", "seconds"], [key["questionnaire"], "a", question, answer, "1"]])
        with pytest.raises(BoigError, match=message): read_answers(asked, tmp_path)
    files = [rated(asked, "twice", lambda q: "pass")]
    files.append(files[0].rename(files[0].with_name("again.json")) and rated(asked, "twice", lambda q: "pass"))
    with pytest.raises(BoigError, match="both by twice"): read_answers(asked, [files[0].with_name("again.json"), files[1]])

def test_results_must_belong_together(asked, tmp_path):
    save_pictures(tmp_path/"short", [picture(1)], pd.DataFrame({"subject": ["cup"], "prompt": ["x"]}))
    given = {"cup": [picture(1)], "bear": [picture(1)]}
    with pytest.raises(BoigError, match="not the same pictures"): fidelity_questions({"InstructBooth": asked/"InstructBooth", "B": tmp_path/"short"}, given, "InstructBooth")
    with pytest.raises(BoigError, match="no reference pictures of bear"): fidelity_questions({"InstructBooth": asked/"InstructBooth"}, {"cup": []}, "InstructBooth")
    with pytest.raises(BoigError, match="Did you mean 'NeTI'"): fidelity_questions({"NeTI": asked/"NeTI"}, given, "NeTi")
    (tmp_path/"short"/"00000.png").unlink()
    with pytest.raises(BoigError, match="is not there"): read_pictures(tmp_path/"short")
