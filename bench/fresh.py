"""README's two commands as a stranger meets them: python bench/fresh.py FOLDER clones the last commit into FOLDER, which must not exist, sets it up, runs the pocket
compendium and all tests, and writes bench/results/fresh.json: seconds of installation, of the first table on the page, of the run, of the tests. Wants two idle cores."""
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from boig.core import project_root, provenance, write_json

OUT = Path(__file__).parent/"results"/"fresh.json"


def timed(folder: Path, *command, watch=lambda: None) -> dict: # seconds, cpu_seconds, said
    "Run a command of the clone; `watch` is asked twice a second."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "PYTHON"))}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    with open(folder/"said.log", "w") as log: run = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    while run.poll() is None:
        watch()
        time.sleep(0.5)
    took, after, said = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN), (folder/"said.log").read_text()
    if run.returncode: sys.exit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    return dict(seconds=round(took, 1), cpu_seconds=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1), said=said)


def main(folder: Path):
    subprocess.run(["git", "clone", "--quiet", str(project_root()), str(folder)], check=True)
    begun, first = time.time(), []
    def watch():
        page = folder/"results"/"pocket"/"index.html"
        if not first and page.exists() and 'id="table-' in (text := page.read_text(encoding="utf-8", errors="replace")) and "sha256 <code>" in text: first.append(round(time.time() - begun, 1))
    found = {"install": timed(folder, "make", "setup"), "reproduce": timed(folder, ".venv/bin/boig", "reproduce", watch=watch)}
    seconds = found["install"]["seconds"]
    found["first_table"] = {"after_make_reproduce_began_s": first[0], "after_installation_s": round(first[0] - seconds, 1)}
    found["test"] = timed(folder, "make", "test")
    found["test"]["closing_line"] = re.findall(r"^.*passed.*$", found["test"]["said"], re.M)[-1]
    for part in found.values(): part.pop("said", None)
    found["largest_process_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    write_json(OUT, {"about": "bench/fresh.py: README's two commands in a fresh clone with a fresh environment.", **found, "load_of_the_machine": os.getloadavg(), "provenance": provenance()})
    print(json.dumps(found, indent=1))


if __name__ == "__main__": main(Path(sys.argv[1]).absolute())
