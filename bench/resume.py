"""Kill -9 at random moments, and start again: python bench/resume.py [KILLS] writes bench/results/resume.json.

An undisturbed smoke run gives the tables to expect. Then the same command is killed again and again, each time after a random while, until it has been killed KILLS times
(30); when a run ends before its kill, the next one starts in a new folder. After each kill nothing half-written may stand under a final name; each finished folder must
have byte-equal tables. Takes half an hour on two idle cores."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from boig.core import provenance, write_json

COMMAND = [sys.executable, "-c", "from boig.cli import app; app()", "reproduce", "--scale", "smoke", "--results"]
TAILS = {".png": b"IEND\xaeB`\x82", ".parquet": b"PAR1"}


def tables(folder: Path) -> dict: return {p.name: p.read_bytes() for p in sorted((folder/"tables").glob("*.csv"))}


def whole(path: Path) -> bool:
    "Whether a file is all there, as far as its kind can say."
    data = path.read_bytes()
    if path.suffix in (".json", ".ipynb"):
        try: json.loads(data)
        except ValueError: return False
    if path.suffix == ".safetensors":
        header = int.from_bytes(data[:8], "little")
        return len(data) >= 8 + header and len(data) == 8 + header + max((t["data_offsets"][1] for n, t in json.loads(data[8:8 + header]).items() if n != "__metadata__"), default=0)
    return data.endswith(TAILS.get(path.suffix, b"")) and len(data) > 0


def broken(folder: Path, expected: dict) -> list[str]:
    "Files under a final name that are not whole; tables must be the expected ones."
    places = [folder/f for f in ("data", "models", "tables", "figures", "notebooks", "provenance", ".done")]
    files = [p for place in places if place.is_dir() for p in place.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(place).parts)]
    return [str(p.relative_to(folder)) for p in files if not whole(p)] + [f"tables/{n}" for n, b in tables(folder).items() if b != expected.get(n)]


def killed(folder: Path, after: float) -> tuple[bool, float]: # was it killed; seconds
    "Start the command and kill its first process with -9 after a while; the others follow it."
    start = time.time()
    run = subprocess.Popen([*COMMAND, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try: _, said = run.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        time.sleep(1)
        return True, time.time() - start
    assert run.returncode == 0, said
    return False, time.time() - start


def main(kills: int = 30, seed: int = 0):
    rng, place, log, folders = random.Random(seed), Path(tempfile.mkdtemp()), [], []
    _, straight = killed(place/"straight", None)
    expected = tables(place/"straight")
    longest = max(20.0, straight / 6)
    while sum(l["killed"] for l in log) < kills or not log[-1]["finished"]:
        more = sum(l["killed"] for l in log) < kills
        if not log or log[-1]["finished"]: folders.append(place/f"killed{len(folders)}")
        was, took = killed(folders[-1], rng.uniform(1, longest) if more else None)
        done = len(list((folders[-1]/".done").glob("*.json"))) if folders[-1].exists() else 0
        log.append(dict(folder=len(folders), killed=was, finished=not was, seconds=round(took, 1), stages_done=done, broken=broken(folders[-1], expected) if folders[-1].exists() else []))
        print(log[-1], flush=True)
    equal = {f.name: tables(f) == expected for f in folders}
    litter = [str(p.relative_to(place)) for f in folders for p in f.rglob("*.tmp*") if ".snakemake" not in p.parts]
    write_json(Path(__file__).parent/"results"/"resume.json", dict(
        about="bench/resume.py: a smoke run killed with -9 at random moments, the same command each time.", undisturbed_seconds=round(straight, 1),
        kills=sum(l["killed"] for l in log), runs_to_the_end=len(folders), tables=len(expected), tables_byte_equal=equal, half_written=sum(len(l["broken"]) for l in log),
        temporary_files_left=litter, log=log, provenance=provenance()))
    assert all(equal.values()) and not any(l["broken"] for l in log), "see bench/results/resume.json"
    shutil.rmtree(place)


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
