"RO-Crate 1.1 and Process Run Crate 0.5, as their specifications ask, on a results folder that is written here by hand."
import hashlib
import json
import re
from datetime import datetime
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from boig import cli
from boig.core import BoigError
from boig.crate import CC_BY_SA, describe, write_crate
from boig.runs import only_run
from boig.stages import data_parts

TABLE = '[make]\nnotebook = "90_experiments/make.ipynb"\ntitle = "makes"\noutputs = ["data/a b.parquet"]\n' \
        '[use]\nnotebook = "90_experiments/use.ipynb"\ntitle = "uses"\ninputs = ["data/a b.parquet"]\noutputs = ["tables/t.csv", "figures/f.png"]\n'


def sha(data): return hashlib.sha256(data).hexdigest()


def write(results, name, data):
    (results/name).parent.mkdir(parents=True, exist_ok=True)
    (results/name).write_bytes(data)
    return {name: sha(data)}


def record(results, stage, began, inputs, outputs, parts={}, **more):
    "What `boig reproduce` leaves of a stage."
    book = f"notebooks/{stage}.ipynb"
    r = dict(stage=stage, key=f"{stage}key", inputs=inputs, outputs=outputs, notebook=book, notebook_sha256=write(results, book, stage.encode())[book], seconds=90.4, cpu_seconds=80.1, peak_memory=1000, parts={"parameter seed": 7} | parts,
             parameters=dict(results=str(results), run_dir="/secret/place", scale="smoke", seed=7, pages="", bits=None) | more,
             provenance=dict(time=began, commit="c" * 40, changed_since_commit=False, python="3.11.7", system="Linux x86_64", cpu="AMD", cores=2, threads=1, gpu=None, packages={"torch": "2.13.0+cpu", "boig": "0.1.0"}))
    for folder in ("provenance", ".done"): write(results, f"{folder}/{stage}.json", json.dumps(r).encode())
    return r


@pytest.fixture
def folder(tmp_path):
    results, table = tmp_path/"smoke", tmp_path/"stages.toml"
    table.write_text(TABLE)
    data = write(results, "data/a b.parquet", b"rows")
    record(results, "make", "2026-01-02T23:59:00+00:00", {}, data)
    record(results, "use", "2026-01-03T10:00:00+00:00", data, write(results, "tables/t.csv", b"x\n1\n") | write(results, "figures/f.png", b"png"))
    write(results, "index.html", b"<p>page")
    write(results, "tables/my_own.csv", b"not the compendium's")
    return results, table


def entities(crate): return {e["@id"]: e for e in crate["@graph"]}


def many(value): return [v["@id"] for v in (value if isinstance(value, list) else [value])]


def test_what_the_specification_requires(folder):
    crate = describe(folder[0], table=folder[1])
    assert crate["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    found, ids = entities(crate), [e["@id"] for e in crate["@graph"]]
    assert len(ids) == len(set(ids)) and all(e["@type"] for e in crate["@graph"])
    head, root = found["ro-crate-metadata.json"], found["./"]
    assert head["@type"] == "CreativeWork" and head["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"} and head["about"] == {"@id": "./"}
    assert root["@type"] == "Dataset" and root["name"] and root["description"] and root["datePublished"] == "2026-01-03"
    assert found[root["license"]["@id"]]["@type"] == "CreativeWork" and root["license"]["@id"] == CC_BY_SA
    assert found[root["conformsTo"]["@id"]]["@type"] == "CreativeWork" and re.match("https://w3id.org/ro/wfrun/process/", root["conformsTo"]["@id"])
    assert sorted(many(root["hasPart"])) == sorted(i for i, e in found.items() if e["@type"] == "File")
    # flattened and compacted: no entity within another, no list of one, every reference is described here
    for e in crate["@graph"]:
        for key, values in e.items():
            assert not (isinstance(values, list) and len(values) < 2), (e["@id"], key)
            for v in values if isinstance(values, list) else [values]:
                assert not isinstance(v, dict) or set(v) == {"@id"} and (v["@id"] in found or v["@id"] == "https://w3id.org/ro/crate/1.1"), (e["@id"], key, v)


def test_every_listed_file_is_there_with_its_hash(folder, tmp_path):
    made = write_crate(folder[0], tmp_path/"out", table=folder[1])
    files = [e for e in json.loads(made.read_text())["@graph"] if e["@type"] == "File"]
    assert {unquote(e["@id"]) for e in files} == {p.relative_to(tmp_path/"out").as_posix() for p in (tmp_path/"out").rglob("*") if p.is_file()} - {"ro-crate-metadata.json"}
    assert {"data/a%20b.parquet", "tables/t.csv", "figures/f.png", "notebooks/use.ipynb", "provenance/use.json", "index.html"} <= {e["@id"] for e in files}
    for e in files:
        data = (tmp_path/"out"/unquote(e["@id"])).read_bytes()
        assert e["sha256"] == sha(data) and e["contentSize"] == str(len(data)) and e["encodingFormat"] and e["description"]
    assert "tables/my_own.csv" not in made.read_text()
    assert write_crate(folder[0], table=folder[1]).read_bytes() == made.read_bytes() == write_crate(folder[0], table=folder[1]).read_bytes()


def test_runs(folder):
    found = entities(describe(folder[0], author="Ada", table=folder[1]))
    runs = [e for e in found.values() if e["@type"] == "CreateAction"]
    assert [r["@id"] for r in runs] == many(found["./"]["mentions"]) and len(runs) == 2
    use = next(r for r in runs if r["name"] == "use: uses")
    assert (datetime.fromisoformat(use["endTime"]) - datetime.fromisoformat(use["startTime"])).total_seconds() == 90 and use["startTime"] == "2026-01-03T10:00:00+00:00"
    assert many(use["result"]) == ["tables/t.csv", "figures/f.png", "notebooks/use.ipynb"] and "data/a%20b.parquet" in many(use["object"])
    values = {found[i]["name"]: found[i]["value"] for i in many(use["object"]) if i.startswith("#")}
    assert values == {"scale": "smoke", "seed": 7, "pages": "", "bits": "none"}
    code = found[use["instrument"]["@id"]]
    assert code["@type"] == "SoftwareSourceCode" and code["name"] == "90_experiments/use.ipynb" and code["version"] == "c" * 40 and code["url"].endswith(f"/{'c' * 40}/nbs/90_experiments/use.ipynb")
    assert {found[i]["name"]: found[i]["softwareVersion"] for i in many(code["softwareRequirements"])} == {"torch": "2.13.0+cpu", "boig": "0.1.0"}
    assert found[use["agent"]["@id"]]["name"] == "Ada" and use["actionStatus"] == "http://schema.org/CompletedActionStatus"
    assert "secret" not in json.dumps(found)


def test_only_whole_results_are_described(folder, tmp_path):
    results, table = folder
    def refused(match, **kw):
        with pytest.raises(BoigError, match=match): write_crate(results, **{"out": tmp_path/"out", "table": table} | kw)
        assert not (tmp_path/"out"/"ro-crate-metadata.json").exists()
    with only_run(results): refused("A run .* is at")
    refused("is there already", out=tmp_path)
    refused("by its address", license="MIT")
    write(results, "tables/t.csv", b"x\n2\n")
    refused("use: changed, tables/t.csv")
    write(results, "tables/t.csv", b"x\n1\n")
    (results/".done"/"use.json").rename(results/".done"/"other.json")
    refused("use: not finished")
    (results/".done"/"other.json").rename(results/".done"/"use.json")
    (results/"provenance"/"make.json").rename(results/"make.json")
    refused("no stage here made data/a b.parquet")
    (results/"make.json").rename(results/"provenance"/"make.json")
    (results/"provenance"/"make.json").write_text("{")
    refused("make: its record cannot be read")
    assert write_crate(results, table=write_table(tmp_path)).exists(), "a record of a stage that is not in the table is left out"
    with pytest.raises(BoigError, match="No results"): write_crate(tmp_path/"nowhere", table=table)


def test_a_record_cannot_have_files_copied_out(folder, tmp_path):
    results, table = folder
    record(results, "make", "2026-01-02T23:59:00+00:00", {}, write(results, "data/a b.parquet", b"rows") | write(results, "../evil.txt", b"evil"))
    with pytest.raises(BoigError, match="names '../evil.txt', which is not below"): write_crate(results, tmp_path/"crates"/"out", table=table)
    assert not (tmp_path/"crates").exists()


def write_table(tmp_path):
    (tmp_path/"one.toml").write_text(TABLE.split("[use]")[0].replace("make", "other"))
    data = write(tmp_path/"smoke", "data/other.parquet", b"1")
    record(tmp_path/"smoke", "other", "2026-01-04T10:00:00+00:00", {}, data)
    return tmp_path/"one.toml"


def test_own_data_need_a_named_licence(folder):
    results, table = folder
    for name in ("pages", "media", "answers", "actions_folder", "dreambench_folder", "one that comes later"):
        own = data_parts(table, {name: str(results), "precision": "fp32"})  # as a stage's record holds them
        record(results, "make", "2026-01-02T23:59:00+00:00", {}, {"data/a b.parquet": sha(b"rows")}, own, **{name: str(results)})
        with pytest.raises(BoigError, match=f"make {name}=.*--license"): describe(results, table=table)
    assert describe(results, license="https://example.org/terms", table=table)["@graph"][1]["license"] == {"@id": "https://example.org/terms"}


def test_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("boig.crate.load_stages", lambda *_, real=__import__("boig.stages").stages.load_stages: real(folder[1]))
    done = CliRunner().invoke(cli.app, ["crate", str(folder[0]), "--out", str(tmp_path/"out"), "--author", "Ada"])
    assert done.exit_code == 0 and (tmp_path/"out"/"ro-crate-metadata.json").is_file(), done.output
    again = CliRunner().invoke(cli.app, ["crate", str(folder[0]), "--out", str(tmp_path/"out")])
    assert again.exit_code == 2 and "is there already" in again.stderr
