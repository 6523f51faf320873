"What each stage cost: python bench/stages.py RESULTS [RESULTS ...] adds the records of finished results to bench/results/stages.json (`boig plan`, time left)."
import json
import sys
from pathlib import Path

from boig.core import write_json
from boig.stages import load_stages

OUT = Path(__file__).parent/"results"/"stages.json"


def size(results: Path, record: dict) -> int: # bytes
    "What a stage leaves on disk: outputs and run folder; files with two names count once."
    run = results/"runs"/record["stage"]/record["key"]
    files = [results/f for f in record["outputs"]] + [p for p in run.rglob("*") if not p.is_symlink()]
    seen = {(s.st_dev, s.st_ino): s.st_size for p in files if p.is_file() for s in [p.stat()]}
    return sum(seen.values())


def measurement(results: Path, record: dict) -> dict:
    "One record as a measurement."
    origin = record["provenance"]
    return dict(seconds=record["seconds"], cpu_seconds=record.get("cpu_seconds"), peak_memory=record.get("peak_memory"), disk=size(results, record), threads=origin["threads"],
                cores=origin["cores"], cpu=origin["cpu"], gpu=origin["gpu"] or "", commit=origin["commit"] or "", time=origin["time"], key=record["key"])


if __name__ == "__main__":
    found = json.loads(OUT.read_text())["stages"] if OUT.exists() else {}
    for results in map(Path, sys.argv[1:]):
        for path in sorted((results/"provenance").glob("*.json")):
            record = json.loads(path.read_text())
            if record["stage"] not in load_stages() or record.get("resumed"): continue  # of an older table; only the last leg was timed
            new, old = measurement(results, record), found.setdefault(record["parameters"]["scale"], {}).setdefault(record["stage"], [])
            old[:] = [m for m in old if (m["cpu"], m["cores"], m["threads"], m["gpu"]) != (new["cpu"], new["cores"], new["threads"], new["gpu"])] + [new]
    write_json(OUT, {"about": "What each stage cost, by scale: bench/stages.py, from the records of finished results. One measurement a machine, the newest.", "stages": found})
    print(f"{sum(len(s) for s in found.values())} stages in {OUT}")
