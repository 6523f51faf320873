"""README's two commands as a stranger meets them: python bench/fresh.py FOLDER clones the last commit into FOLDER, sets it up, runs the pocket compendium and all tests,
and writes bench/results/fresh.json. The times are read off what the commands leave: the clone's first file, the environment's marker, the run's events, its first table.
A folder that is there already is brought to the last commit and only tested again. Wants two idle cores."""
import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from boig.core import project_root, provenance, write_json

OUT = Path(__file__).parent/"results"/"fresh.json"


def call(folder: Path, *command) -> str: # what it said
    "Run a command in the clone, in an environment without our settings; it is there to be looked at if it fails."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "PYTHON"))}
    with open(folder/"said.log", "w") as log: done = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    said = (folder/"said.log").read_text()
    if done.returncode: sys.exit(f"{' '.join(command)} failed; see {folder}/said.log:\n{said[-2000:]}")
    return said


def made(folder: Path) -> dict:
    "When what was there, in seconds since the clone was begun."
    began, results = (folder/".git"/"description").stat().st_mtime, folder/"results"/"pocket"
    events = [json.loads(l) for l in (results/".events.jsonl").read_text().splitlines()]
    runs = [json.loads(l) for l in (results/"runs.jsonl").read_text().splitlines()]
    installed, end = (folder/".venv"/".installed").stat().st_mtime, events[-1]["time"]
    first = min(p.stat().st_mtime for p in (results/"tables").glob("*.csv"))
    return {"commit_of_the_run": runs[0]["provenance"]["commit"], "began": datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="seconds"),
            "installation_s": round(installed - began, 1), "first_table_after_installation_s": round(first - installed, 1), "first_table_s": round(first - began, 1), "run_s": round(end - installed, 1),
            "stages": len(runs), "cpu_s": round(sum(r["cpu_seconds"] for r in runs), 1), "largest_process_bytes": max(r["peak_memory"] for r in runs)}


def main(folder: Path):
    if folder.exists(): # its results may be of later runs; the first one's times are recorded
        subprocess.run(["git", "-C", str(folder), "pull", "--quiet", "--ff-only", str(project_root()), "HEAD"], check=True)
        found = json.loads(OUT.read_text())
    else:
        subprocess.run(["git", "clone", "--quiet", str(project_root()), str(folder)], check=True)
        call(folder, "make", "reproduce")
        found = made(folder)
    commit, start, load = provenance()["commit"], time.time(), os.getloadavg()
    def record(): write_json(OUT, {**found, "about": "bench/fresh.py: README's two commands in a fresh clone with a fresh environment.", "provenance": provenance()})
    record() # the times of the run stay, whatever the tests say
    said = call(folder, ".ci/run")
    found["ci"] = {"commit": commit, "seconds": round(time.time() - start, 1), "closing_line": re.findall(r"^.*passed.*$", said, re.M)[-1], "load_before": load}
    record()
    print(json.dumps(found, indent=1))


if __name__ == "__main__": main(Path(sys.argv[1]).absolute())
