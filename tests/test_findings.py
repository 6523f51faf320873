"The numbers in the prose of README and findings are those of the tables that tests/data/findings.toml names for them."
import json
import math
import re
import tomllib
from functools import cache
from statistics import fmean, stdev

import pandas as pd
import pytest
from scipy.stats import t as student

from boig.claims import ends_of, number, select
from boig.core import project_root

ROOT = project_root()
NOTED = tomllib.loads((ROOT/"tests"/"data"/"findings.toml").read_text(encoding="utf-8"))
KEYS = {"scale", "table", "rows", "column", "mean", "seeds", "json", "at", "each", "exp", "times"}
NUMBER = r"(?<![\w.@])[-+]?\d+(?:\.\d+)?(?!\.?\w)"
INTERVAL = rf"({NUMBER})(?: %|(?: [a-z]+){{1,3}})?(?:, | \()(?:by Student's interval )?(?:from )?({NUMBER}) to ({NUMBER})" # a value and its ends
RESULT = rf"{INTERVAL}|{NUMBER} to {NUMBER}|{NUMBER} %|(?<![\w.@])[-+]?\d+\.\d+(?!\.?\w)|(?<!\w)[-+]\d+" # what looks like one
SILENT = r"```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)|<!-- claims -->.*<!-- /claims -->" # code, links, what is computed


def one_line(text): return " ".join(text.split())


def documents() -> dict[str, str]:
    cells = json.loads((ROOT/"nbs"/"findings.ipynb").read_text(encoding="utf-8"))["cells"]
    return {"README.md": one_line((ROOT/"README.md").read_text(encoding="utf-8")),
            "nbs/findings.ipynb": one_line("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"))}


@cache
def table_rows(scale: str, table: str) -> list[dict]: return pd.read_csv(ROOT/"results"/"reference"/scale/f"{table}.csv").to_dict("records")


def sources(entry: dict) -> list[dict]:
    "Each source in full."
    out = []
    for s in entry["from"]:
        if unknown := set(s) - KEYS: raise KeyError(f"{unknown} in findings.toml, at '{entry['text']}'; a source has {KEYS}")
        before = {"scale": "reference", "rows": {}} if {"table", "json"} & {*s} else out[-1]
        out.append(before | s | {"rows": before["rows"] | s.get("rows", {})})
    return out


def looked_up(source: dict) -> tuple[str, list[tuple]]: # where, and (value, low, high) for each row that fits
    if "json" in source:
        found = json.loads((ROOT/source["json"]).read_text(encoding="utf-8"))
        for key in source["at"]: within, found = found, found[key]
        ends = [within.get(e, math.nan) if isinstance(within, dict) else math.nan for e in ("low", "high")]
        return f"{source['json']}, {' > '.join(map(str, source['at']))}", [(x, *ends) for x in (found if isinstance(found, list) else [found])]
    tables, column = [source["table"]] if isinstance(source["table"], str) else source["table"], source.get("column")
    scales = [source["scale"], *(f"{source['scale']}/{p.name}" for p in sorted((ROOT/"results"/"reference"/source["scale"]).glob("seed-*")))] if source.get("seeds") else [source["scale"]]
    by = [[r for t in tables for _, group in select(table_rows(s, t), source["rows"]) for r in group] for s in scales]
    rows = [r for of_scale in by for r in of_scale]
    where = f"{source['scale']}/{', '.join(f'{t}.csv' for t in tables)}, {', '.join(map(str, source['rows'].values()))}{f': {column}' if column else ''}{f', {len(scales)} seeds' if source.get('seeds') else ''}"
    if pick := {"least": min, "most": max}.get(source.get("seeds")): return where, [(pick(len(rs) if column is None else fmean(r[column] for r in rs) for rs in by), math.nan, math.nan)]
    if column is None: return where, [(len(rows), math.nan, math.nan)]
    if source.get("seeds") and not source.get("mean"): return where, [((x := number(rows, column)).value, *x.ends())]
    values = [fmean(r[column] for r in of_scale) for of_scale in by if of_scale] if source.get("seeds") else [r[column] for r in rows]
    if not source.get("mean") or len(values) < 2: return where, [(r[column], *(r.get(e, math.nan) for e in ends_of(r, column))) for r in rows]
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{where}, mean of {len(values)}", [(fmean(values), fmean(values) - half, fmean(values) + half)]


def mistakes(text: str, entry: dict) -> list[str]:
    "Where the numbers of a text are not those of its sources."
    written = [(m[1], m[2], m[3]) if m[1] else (m[0],) for m in re.finditer(rf"{INTERVAL}|{NUMBER}", text)]
    if len(written) != len(given := sources(entry)): return [f"'{text}': {len(written)} values are written ({written}), but findings.toml has {len(given)} sources for them."]
    out = []
    for words, source in zip(written, given):
        try: where, found = looked_up(source)
        except (OSError, LookupError) as gone: out.append(f"'{text}': {gone!r} is missing, asked by {source}."); continue
        if not found or len(found) > 1 and not source.get("each"): out.append(f"'{text}': {len(found)} rows fit {where}, it must be one."); continue
        for row in found:
            value, *ends = (source.get("times", 1) * (math.expm1(x) if source.get("exp") else x) for x in row)
            for word, x in zip(words, (value, *sorted(ends))):
                if not abs(float(word) - x) <= 0.5001 * 10.0 ** -len(word.partition(".")[2]): out.append(f"'{text}': {word} is written, {x:.5g} stands in {where}.")
    return out


def test_numbers_are_those_of_the_tables():
    read = documents().values()
    out = [f"'{e['text']}' must stand once in README.md or nbs/findings.ipynb." for e in NOTED["said"] if max(d.count(one_line(e["text"])) for d in read) != 1]
    out += [line for e in NOTED["said"] for line in mistakes(one_line(e["text"]), e)]
    if out: pytest.fail(f"{len(out)} to mend in the prose, and then in `text` of tests/data/findings.toml:\n" + "\n".join(out), pytrace=False)


def test_every_result_in_the_prose_has_a_source():
    known, out = [one_line(t) for t in (*(e["text"] for e in NOTED["said"]), *NOTED["elsewhere"])], []
    for name, text in documents().items():
        covered = [m.span() for piece in known for m in re.finditer(re.escape(piece), text)]
        spoken = re.sub(SILENT, lambda m: " " * len(m[0]), text)
        out += [f"{name}: …{text[max(m.start() - 60, 0):m.end() + 20]}…" for m in re.finditer(RESULT, spoken) if not any(a <= m.start() and m.end() <= b for a, b in covered)]
    if out: pytest.fail(f"{len(out)} numbers of which tests/data/findings.toml does not say whence they come:\n" + "\n".join(out), pytrace=False)


def test_what_is_noted_is_said():
    read = documents().values()
    assert not [t for t in NOTED["elsewhere"] if not any(one_line(t) in d for d in read)]


def test_a_wrong_digit_is_noticed():
    for e in NOTED["said"]:
        text = one_line(e["text"])
        for m in re.finditer(NUMBER, text):
            places = len(m[0].partition(".")[2])
            wrong = f"{text[:m.start()]}{float(m[0]) + 2 * 10.0 ** -places:{'+' if m[0][0] == '+' else ''}.{places}f}{text[m.end():]}"
            assert mistakes(wrong, e), wrong
