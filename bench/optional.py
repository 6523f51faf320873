"""The tests that `make test` skips, with what they need: python bench/optional.py FOLDER makes an environment with every extra in FOLDER (watermark's package without its CUDA-sized
dependencies), runs the tests of the parts that need one, and writes bench/results/optional.json: what passed, what was still skipped and why, with which versions."""
import re
import subprocess
import sys
from pathlib import Path

from boig.core import project_root, provenance, write_json

ROOT, OUT = project_root(), Path(__file__).parent/"results"/"optional.json"
TESTS = ["bench_stage", "cards", "cluster", "data", "docs", "shards", "tuning", "watermark"]  # each holds tests that are skipped where a package is missing
PACKAGES = ["ray", "snakemake-executor-plugin-slurm", "snakemake-executor-plugin-kubernetes", "snakemake-storage-plugin-fs", "tensorboard", "mlcroissant", "myst-nb", "datasets", "invisible-watermark"]


def main(folder: Path):
    run = lambda *command, **kw: subprocess.run([folder/"bin"/"python", "-m", *command], cwd=ROOT, text=True, **kw)
    if not (folder/"bin"/"pytest").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for wanted in (["torch==2.13.0"], ["-e", ".[dev,cluster,track,cards,ray,docs]"], ["opencv-python-headless", "PyWavelets"], ["invisible-watermark>=0.2", "--no-deps"]):
            run("pip", "install", "-q", "-c", "constraints.txt", *wanted, check=True)
    said = run("pytest", "-q", "-rs", *[f"tests/test_{t}.py" for t in TESTS], capture_output=True).stdout
    versions = dict(re.findall(r"^(\S+)==(\S+)$", run("pip", "freeze", capture_output=True).stdout, re.M))
    write_json(OUT, {"about": "bench/optional.py: tests of parts whose packages are extras, with the extras.", "tests": TESTS, "closing_line": said.strip().splitlines()[-1],
                     "still_skipped": re.findall(r"^SKIPPED \[\d+\] (.*)$", said, re.M), "packages": {p: versions.get(p) for p in PACKAGES}, "provenance": provenance()})
    print(said[-1500:])


if __name__ == "__main__": main(Path(sys.argv[1]).absolute())
