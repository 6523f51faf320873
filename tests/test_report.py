"The page: readable by everybody, safe with hostile text, whole without a network."
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

import boig
from boig.compare import compare, compare_page, table_names
from boig.core import BoigError
from boig.report import environment, folded, gallery, records, stage_blocks, write_report

NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)>&'
PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010806000000 1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082".replace(" ", ""))
VOID = {"meta", "link", "img", "br", "hr", "input", "rect"}


class Page(HTMLParser):
    "Elements in order: tag, attributes, text, ancestors."
    def __init__(self, text):
        super().__init__()
        self.items, self.stack = [], []
        self.feed(text)
        assert not self.stack, f"not closed: {[i['tag'] for i in self.stack]}"

    def handle_starttag(self, tag, attrs):
        item = dict(tag=tag, text="", above=[i["tag"] for i in self.stack], **{"attrs": dict(attrs)})
        self.items.append(item)
        if tag not in VOID: self.stack.append(item)

    def handle_startendtag(self, tag, attrs): self.items.append(dict(tag=tag, text="", above=[i["tag"] for i in self.stack], attrs=dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID: return
        assert self.stack and self.stack[-1]["tag"] == tag, f"</{tag}> closes <{self.stack[-1]['tag'] if self.stack else 'nothing'}>"
        self.stack.pop()

    def handle_data(self, data):
        for i in self.stack: i["text"] += data

    def all(self, *tags): return [i for i in self.items if i["tag"] in tags]


def record(stage, files, parameters=None):
    return dict(stage=stage, key="abc123", inputs={"data/in.parquet": "f" * 64}, outputs=files, notebook=f"notebooks/{stage}.ipynb", seconds=1.5,
                parameters={"scale": "pocket", "seed": 42, "bootstrap": 2000} | (parameters or {}),
                provenance=dict(time="2026-01-01T00:00:00", commit="0123456789abcdef", changed_since_commit=False, python="3.11", system="Linux", cpu=NASTY, cores=2, threads=1, packages={"torch": "2.13"}))

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A results folder with hostile words in every place that a model, a tweet or a name can fill."
    from boig.core import sha256_file
    from boig.metrics.verbalization_metrics import METRICS
    d = tmp_path_factory.mktemp("results")
    for f in ("tables", "figures", "provenance", "notebooks", ".done"): (d/f).mkdir()
    row = {"Data": "EmojiBench", "Model": NASTY, "Behaviour Optimised": NASTY, "KPI": "All", "n": 9, "llm": NASTY, "answers changed by shuffling": 0.1, "objects named in the question": 0.2, "objects seen in training": 0.3}
    pd.DataFrame([row | {f"{m}{e}": 0.5 for m in METRICS for e in ("", " low", " high")} | {f"{m} n": 9 for m in METRICS}]).to_csv(d/"tables"/"boig_table1.csv", index=False)
    pd.DataFrame([{"Comparison": NASTY, "KPI": "All", "Metric": "Colours IOU", "gain": 0.1, "low": 0.05, "high": 0.2, "n": 9, "verdict": "better", "scale": "pocket", "seed": 42}]).to_csv(d/"tables"/"boig_table1_differences.csv", index=False)
    reward = [("pocket_boigbench", 0.4, 0.1, 0.7), ("pocket_stock", 0.5, 0.2, 0.8)]
    pd.DataFrame([{"Data": b, "KPI": "All", "Metric": m, "gain": g, "low": lo, "high": hi, "n": 64, "verdict": NASTY, "Comparison": "BoigSD − Base (pocket-sd)", "scale": "pocket", "seed": 42} for b, g, lo, hi in reward for m in ("Reward", "Oracle log KPI")]).to_csv(d/"tables"/"boig_table2_differences.csv", index=False)
    pd.DataFrame([{"Data": NASTY, "Images": NASTY, "KPI": "All", "Reward": 1.5, "Reward low": 1.0, "Reward high": 2.0, "n": 1234, "scale": "pocket", "seed": 42}]).to_csv(d/"tables"/"boig_table2.csv", index=False)
    pd.DataFrame({"KPI": ["high", "low"], "n": 10, "pocket-aesthetic": [0.1, 0.2], "± pocket-aesthetic": 0.01, "scale": "pocket", "seed": 42}).to_csv(d/"tables"/"boig_table3.csv", index=False)
    pd.DataFrame({"line": ["pictures", NASTY], "all": [4000, 12.5], "scale": "pocket", "seed": 42, "n": 4000}).to_csv(d/"tables"/"boigbench_statistics.csv", index=False)
    (d/"figures"/"boig_table2.png").write_bytes(PNG)
    for stage, tables in {"boig_table1": ["boig_table1", "boig_table1_differences"], "boig_table2": ["boig_table2", "boig_table2_differences"], "pocket_boigbench": ["boig_table3", "boigbench_statistics"]}.items():
        (d/"provenance"/f"{stage}.json").write_text(json.dumps(record(stage, {f"tables/{t}.csv": sha256_file(d/"tables"/f"{t}.csv") for t in tables}, {"wish": NASTY})))
        (d/"notebooks"/f"{stage}.ipynb").write_text("{}")
    return d

@pytest.fixture(scope="module")
def page(made): return write_report(made).read_text(encoding="utf-8")

@pytest.fixture(scope="module")
def pages(made, page, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other/"tables").mkdir()
    for t in ("boig_table2", "boig_table2_differences"): (other/"tables"/f"{t}.csv").write_bytes((made/"tables"/f"{t}.csv").read_bytes())
    empty = tmp_path_factory.mktemp("empty")
    return {"report": page, "empty": write_report(empty).read_text(encoding="utf-8"), "compare": compare_page(made, other, other/"compare.html")[0].read_text(encoding="utf-8")}

PAGES = pytest.mark.parametrize("which", ["report", "empty", "compare"])

# -- safe and whole ---------------------------------------------------------------------------------------------------------------

@PAGES
def test_hostile_text_stays_text(pages, which):
    parsed = Page(pages[which])
    assert not parsed.all("script", "iframe", "object", "form") and not any(k.startswith("on") for i in parsed.items for k in i["attrs"])
    assert not any(i["attrs"].get("src") == "x" for i in parsed.items)
    if which != "empty": assert NASTY in "".join(i["text"] for i in parsed.all("th"))  # it is there, as text

@PAGES
def test_nothing_comes_from_elsewhere(pages, which):
    parsed = Page(pages[which])
    for i in parsed.items:
        for name in ("src", "srcset", "poster", "data", "action"): assert i["attrs"].get(name, "data:").startswith("data:")
    assert not parsed.all("link") and not re.search(r"@import|url\(", pages[which])
    outside = [i["attrs"]["href"] for i in parsed.all("a") if "//" in i["attrs"].get("href", "")]
    assert all(h.startswith(("https://openmoji.org", "http://hdl.handle.net/")) for h in outside)  # credits, followed only by a click

def test_links_lead_somewhere(made, page):
    parsed = Page(page)
    ids = [i["attrs"]["id"] for i in parsed.items if "id" in i["attrs"]]
    assert len(ids) == len(set(ids))
    for h in (i["attrs"]["href"] for i in parsed.all("a")):
        if h.startswith("#"): assert h[1:] in ids, h
        elif "//" not in h: assert (made/h).is_file(), h

# -- readable by everybody ---------------------------------------------------------------------------------------------------------

@PAGES
def test_language_title_viewport_and_landmarks(pages, which):
    parsed = Page(pages[which])
    assert parsed.all("html")[0]["attrs"]["lang"] == "en" and parsed.all("title")[0]["text"]
    assert any(m["attrs"].get("name") == "viewport" and "user-scalable" not in m["attrs"]["content"] for m in parsed.all("meta"))
    assert [len(parsed.all(t)) for t in ("main", "header", "h1")] == [1, 1, 1]
    for i in parsed.all("nav"): assert i["attrs"]["aria-label"]

@PAGES
def test_headings_go_down_by_one(pages, which):
    levels = [int(i["tag"][1]) for i in Page(pages[which]).all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))

@PAGES
def test_tables_say_what_they_are(pages, which):
    parsed = Page(pages[which])
    assert len(parsed.all("caption")) + sum("aria-labelledby" in t["attrs"] for t in parsed.all("table")) == len(parsed.all("table")) > 0
    for i in parsed.all("th"): assert i["attrs"].get("scope") in ("col", "row", "rowgroup") and i["text"].strip(), i
    for i in parsed.items:
        if "wide" in (i["attrs"].get("class") or "").split(): assert i["attrs"]["role"] == "region" and i["attrs"]["aria-label"] and i["attrs"]["tabindex"] == "0"
    regions = [i["attrs"]["aria-label"] for i in parsed.items if i["attrs"].get("role") == "region"]
    assert len(regions) == len(set(regions))

@PAGES
def test_pictures_have_words_and_links_have_names(pages, which):
    parsed = Page(pages[which])
    for i in parsed.all("img"): assert i["attrs"]["alt"].strip()
    for i in parsed.all("svg"): assert i["attrs"].get("aria-label")
    for i in parsed.all("a", "summary"): assert i["text"].strip()
    for i in parsed.items:
        for name in ("aria-labelledby",):
            if name in i["attrs"]: assert any(x["attrs"].get("id") == i["attrs"][name] for x in parsed.items)

def luminance(hexa):
    c = [int(hexa[k:k + 2], 16) / 255 for k in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in c)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b

def contrast(a, b):
    x, y = sorted((luminance(a), luminance(b)))
    return (y + 0.05) / (x + 0.05)

def test_contrast():
    "WCAG 2 AA: 4.5 to 1 for text, on white and on the tint."
    css = (Path(boig.__file__).parent/"templates"/"page.css").read_text()
    colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css))
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    for text in ("ink", "soft", "good", "bad", "link"):
        for ground in ("paper", "tint"): assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
    used = set(re.findall(r"(?<![-\w])(?:color|background)\s*:\s*([^;}]+)", css))
    assert used <= {f"var(--{c})" for c in colour} | {"inherit"}  # no colour past the palette

# -- what it says -----------------------------------------------------------------------------------------------------------------

def test_claims_come_first_with_their_numbers(made, page):
    parsed = Page(page)
    assert parsed.all("h2")[0]["text"].startswith("What the papers claim")
    row = next(i for i in parsed.all("tr") if i["attrs"].get("id") == "claim-boigsd-reward")
    assert "holds" in row["text"] and "0.400" in row["text"] and "0.100 to 0.700" in row["text"] and "254.9 against 242.5" in row["text"] and "own table supports it: yes" in row["text"]
    judged = pd.read_csv(made/"claims.csv").set_index("id")
    assert judged.verdict["boigsd-reward"] == judged.oracle["boigsd-reward"] == "holds" and judged.verdict["ib-lora"] == "not run"
    for v, n in judged.verdict.value_counts().items(): assert re.search(rf"<b>{n}</b> {v}", page)

def test_every_table_says_where_it_comes_from(made, page):
    from boig.core import sha256_file
    for t in (made/"tables").glob("*.csv"):
        assert page.count(f'id="table-{t.stem}"') == 1 and sha256_file(t)[:12] in page
    assert 'href="notebooks/boig_table2.ipynb"' in page and "0123456789" in page and "bootstrap = 2000" in page and "data/in.parquet" in page and "changed since" not in page

def test_a_changed_table_is_told(made, page):
    file = made/"tables"/"boig_table2.csv"
    before = file.read_bytes()
    try:
        file.write_bytes(before.replace(b"1.5", b"9.5"))
        assert "the file was changed since" in write_report(made).read_text(encoding="utf-8")
    finally: file.write_bytes(before)

def test_the_papers_numbers_stand_beside_ours(page):
    parsed = Page(page)
    assert "254.918" in page and "0.4065" not in page and "0.406" in page  # Table 2 in full, Table 1 to three digits
    assert any("paper" in (i["attrs"].get("class") or "") for i in parsed.all("tbody"))

def test_smoke_says_that_it_means_nothing(made, tmp_path):
    import shutil
    shutil.copytree(made, tmp_path/"s")
    for f in (tmp_path/"s"/"provenance").glob("*.json"): f.write_text(f.read_text().replace('"scale": "pocket"', '"scale": "smoke"'))
    said = write_report(tmp_path/"s").read_text(encoding="utf-8")
    assert "Its numbers mean nothing, and neither do the verdicts" in said and pd.read_csv(tmp_path/"s"/"claims.csv").verdict.eq("holds").any()

def test_two_seeds_are_judged_together(made, tmp_path):
    import shutil
    for seed in (42, 43):
        shutil.copytree(made/"tables", tmp_path/str(seed)/"tables")
        (tmp_path/str(seed)/".boig.lock").touch()  # as a run leaves it
        for t in (tmp_path/str(seed)/"tables").glob("*.csv"): pd.read_csv(t).assign(scale="pocket", seed=seed).to_csv(t, index=False)
    said = write_report(tmp_path/"42", tmp_path/"43").read_text(encoding="utf-8")
    assert ", 2 seeds" in said and f"Judged together with {tmp_path/'43'}" in said and "Judged together" not in write_report(tmp_path/"43").read_text(encoding="utf-8")
    with pytest.raises(BoigError, match="no results folder"): write_report(tmp_path/"42", tmp_path/"44")

@pytest.mark.parametrize("mine, theirs, count", [("m,v\n", "m,v\na,1\n", 1), ("m,v\n", "m,v\n", 0), ("m,said\na,x\n", "m,said\na,x\n", 0), ("m,said\na,x\n", "m,said\na,2\n", 1)])
def test_tables_without_rows_or_numbers_are_compared(tmp_path, mine, theirs, count):
    "Nobody rated, or no server answered: a run of days must not end in a traceback for it."
    for name, text in (("mine", mine), ("theirs", theirs)):
        (tmp_path/name/"tables").mkdir(parents=True)
        (tmp_path/name/"tables/t.csv").write_text(text)
    found, changed, line = compare(tmp_path/"mine", tmp_path/"theirs")
    assert len(found) == count and not found.within.any() and changed.empty and f"0 of {count} numbers in 1 tables agree" in line

def test_a_broken_record_is_told(made, tmp_path):
    import shutil
    for i, text in enumerate(("{", "[]", "")):
        shutil.copytree(made, tmp_path/str(i))
        (tmp_path/str(i)/"provenance"/"boig_table2.json").write_text(text)
        assert write_report(tmp_path/str(i)).read_text(encoding="utf-8").count("its record cannot be read") == 1
    assert {r["name"] for r in records(tmp_path/"0") if r["broken"]} == {"boig_table2"} and not any(r["broken"] for r in records(made))

def test_the_header_names_each_commit(made):
    path = made/"provenance"/"boig_table2.json"
    kept, said = path.read_text(), "commit <code>0123456789</code>, 2026"
    assert said in write_report(made).read_text(encoding="utf-8").replace("\n", " ")
    r = json.loads(kept)
    r["provenance"] |= dict(commit="fedcba9876543210", changed_since_commit=True)
    path.write_text(json.dumps(r))
    try: assert "commits <code>0123456789</code> (2 stages), <code>fedcba9876+</code> (1 stage), 2026" in write_report(made).read_text(encoding="utf-8")
    finally: path.write_text(kept)

@pytest.mark.parametrize("name, content", [("boig_table2", b""), ("my_own", b"\n"), ("my_own", b"\xff\xfe\x00"), ("my_own", b"a,b\n1\n1,2,3\n")])
def test_a_file_without_a_table_is_one_line(made, tmp_path, name, content):
    import shutil
    shutil.copytree(made, tmp_path/"r")
    (tmp_path/"r"/"tables"/f"{name}.csv").write_bytes(content)
    with pytest.raises(BoigError, match=rf"{name}.csv' holds no table. If a stage makes it, `boig reproduce`"): write_report(tmp_path/"r")

def test_the_half_of_a_killed_writer_is_no_table(made, tmp_path):
    import shutil
    shutil.copytree(made, tmp_path/"r")
    before = table_names(tmp_path/"r")
    (tmp_path/"r"/"tables"/".boig_table2.0123456789abcdef.tmp.csv").write_bytes(b"")
    (tmp_path/"r"/"tables"/".another.0123456789abcdef.tmp.csv").write_text("a,b\n1,2\n")
    assert "0123456789abcdef.tmp" not in write_report(tmp_path/"r").read_text(encoding="utf-8") and table_names(tmp_path/"r") == before

def test_tables_of_an_earlier_run_say_so(made, tmp_path):
    "While a run with another seed is under way, the markers of what is still to come are gone."
    import shutil
    shutil.copytree(made, tmp_path/"r")
    (tmp_path/"r"/".done"/"boig_table2.json").write_text("{}")
    said = {i["attrs"]["id"]: "from an earlier run" in i["text"] for i in Page(write_report(tmp_path/"r").read_text(encoding="utf-8")).items if i["attrs"].get("id", "").startswith(("table-", "claim-"))}
    assert said["table-boig_table1"] and said["table-boig_table3"] and not said["table-boig_table2"] and not said["table-boig_table2_differences"]
    assert not said["claim-boigsd-reward"] and any(v for k, v in said.items() if k.startswith("claim-"))

def test_the_gallery_takes_pictures_that_both_twins_saw(tmp_path):
    "As while one of them has been run again with other pictures."
    (tmp_path/"data").mkdir()
    pd.DataFrame([dict(id=i, bucket="high", name=f"n{i}", uses=i, verbalization="{}", captions="", keywords="", image={"bytes": PNG}) for i in range(4)]).to_parquet(tmp_path/"data"/"emojibench.parquet")
    for name, ids in {"boig_llm": (1, 2), "boig_llm_plain": (2, 3)}.items(): pd.DataFrame(dict(id=ids, condition="true KPI", answer="?")).to_parquet(tmp_path/"data"/f"{name}.parquet")
    assert [g["name"] for g in gallery(tmp_path)] == ["n2"]

def test_somebody_elses_page_is_left_alone(tmp_path):
    (tmp_path/"index.html").write_text("My site.")
    with pytest.raises(BoigError, match="no results of a run"): write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"] and (tmp_path/"index.html").read_text() == "My site."

@pytest.mark.parametrize("files", [["claims.csv"], ["claims.csv", "tables/mine.csv"], ["photo.png"]])
def test_nothing_is_written_among_somebody_elses_files(tmp_path, files):
    for f in files:
        (tmp_path/f).parent.mkdir(exist_ok=True)
        (tmp_path/f).write_text("insurance,claims\n1,2\n")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises(BoigError, match="no results of a run. Name a folder"): write_report(tmp_path)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before

def test_the_shipped_page_is_not_replaced_by_a_poorer_one(tmp_path):
    "The shipped folder is flat: its page is boig's own, but was drawn from elsewhere."
    import shutil
    shutil.copytree(Path(boig.__file__).parents[1]/"results"/"reference"/"reference", tmp_path/"shipped", ignore=shutil.ignore_patterns("*.png"))
    before = {p: p.read_bytes() for p in (tmp_path/"shipped").rglob("*") if p.is_file()}
    with pytest.raises(BoigError, match="boig report --compare"): write_report(tmp_path/"shipped")
    assert {p: p.read_bytes() for p in (tmp_path/"shipped").rglob("*") if p.is_file()} == before

def test_tables_are_folded():
    t = pd.DataFrame({"what": ["a"], "start": 1.0, "gain": 0.5, "low": 0.25, "high": 0.75, "± x": 0.1, "x": 2.5, "n": 3000, "empty": None, "seed": 1, "scale": "pocket"})
    assert folded(t) == {"columns": ["what", "start", "gain", "x", "n"], "rows": [[("a", ""), ("1", ""), ("0.500", "0.250 to 0.750"), ("2.500", "± 0.100"), ("3,000", "")]], "more": 0}

def test_long_tables_are_cut_and_say_so():
    t = folded(pd.DataFrame({"step": range(1300), "loss": 0.5}), most=100)
    assert len(t["rows"]) == 100 and t["more"] == 1200
    page = environment().from_string('{% from "macros.html" import table %}{{ table(t, "log") }}').render(t=t)
    assert "and 1,200 more rows in the file" in page and page.count("<tr>") == 102

def test_stages_without_results_say_so(tmp_path):
    assert all(not b["tables"] and not b["pictures"] for b in stage_blocks(tmp_path))
