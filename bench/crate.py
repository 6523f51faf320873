"""Does a validator accept the RO-Crate of a results folder? python bench/crate.py RESULTS VALIDATOR [ADDRESS=FILE ...] writes bench/results/crate.json.

VALIDATOR is a Python that has roc-validator (pip install roc-validator==0.13.0 in an environment of its own). It asks the network for the contexts that a crate names; where there is none,
their texts are given as files: https://w3id.org/ro/crate/1.1/context=FILE. Two spoilt copies must be refused, or the validator's yes would mean nothing."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROFILES = ("ro-crate-1.1", "process-run-crate-0.5")


def check(crate: str, severity: str, *contexts: str) -> dict: # profile -> what it misses
    "What roc-validator says; runs in its environment."
    from rocrate_validator import services
    from rocrate_validator.utils.http import HttpRequester
    from requests import Response
    texts = dict(c.split("=", 1) for c in contexts)
    def get(self, url, **_):
        if url not in texts: raise ConnectionError(f"{url} was not given")
        answer = Response()
        answer.status_code, answer._content, answer.headers["Content-Type"] = 200, Path(texts[url]).read_bytes(), "application/ld+json"
        return answer
    if texts: HttpRequester.get = get
    found = {}
    for profile in PROFILES:
        result = services.validate({"rocrate_uri": crate, "profile_identifier": profile, "requirement_severity": severity})
        found[profile] = dict(checks=len(result.executed_checks), misses=sorted({f"{i.check.identifier}: {i.message}" for i in result.get_issues()}))
    return found


def spoil(file: Path, name: str):
    "Make a crate wrong in one place."
    crate = json.loads(file.read_text())
    for e in crate["@graph"]:
        if name == "an action without its instrument" and e["@type"] == "CreateAction": e.pop("instrument", None)
        if name == "no licence" and e["@id"] == "./": e.pop("license")
    file.write_text(json.dumps(crate))


def main(results: str, validator: str, *contexts: str):
    from boig.core import provenance, write_json
    from boig.crate import write_crate
    results, made = Path(results).absolute(), {}
    with tempfile.TemporaryDirectory() as place:
        def ask(crate, severity): return json.loads(subprocess.run([validator, __file__, "--check", str(crate), severity, *contexts], stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])
        file = write_crate(results, Path(place)/"crate", author="A reader")
        whole, text = json.loads(file.read_text()), file.read_text()
        made["REQUIRED"], made["RECOMMENDED"] = ask(file.parent, "REQUIRED"), ask(file.parent, "RECOMMENDED")
        for name in ("an action without its instrument", "no licence"):
            file.write_text(text)
            spoil(file, name)
            made[name] = ask(file.parent, "REQUIRED")
    version = subprocess.run([validator, "-c", "from importlib.metadata import version; print(version('roc-validator'))"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    scale = next(iter(json.loads(p.read_text())["parameters"]["scale"] for p in sorted((results/"provenance").glob("*.json"))))
    write_json(Path(__file__).parent/"results"/"crate.json", dict(about="roc-validator on the crate of a results folder: bench/crate.py", validator=version, scale=scale,
               entities=len(whole["@graph"]), files=sum(e["@type"] == "File" for e in whole["@graph"]), said=made, **provenance()))
    for name, said in made.items(): print(name, {p: (f["checks"], f["misses"]) for p, f in said.items()})
    accepted = not any(f["misses"] for f in made["REQUIRED"].values())
    refused = all(any(f["misses"] for f in made[name].values()) for name in ("an action without its instrument", "no licence"))
    sys.exit(0 if accepted and refused else "The crate was not accepted, or a spoilt one was.")


if __name__ == "__main__":
    if sys.argv[1] == "--check": print(json.dumps(check(*sys.argv[2:])))
    else: main(*sys.argv[1:])
