"Stages on a cluster: what each asks for, what Snakemake makes of it, and what the plug-ins submit."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_reproduce import World

from boig import reproduce as module
from boig.core import BoigError
from boig.reproduce import needs, needs_text, profile_folder, run_plan
from boig.scales import load_scale, scale_names
from boig.stages import NEEDS, Step, load_stages, make_plan

PROFILES = Path(module.__file__).parent/"profiles"
ASKS = """needs.paper = {gpus = 1, cores = 4, memory = 48, hours = 24}
needs.smoke = {gpus = 2, cores = 3, memory = 0.5, hours = 0.5}
"""

def step(scale, name):
    stage = load_stages(scale=scale)[name]
    return Step(stage, stage.parameters(load_scale(scale)), {}, "", [], Path("boig"))


def test_every_stage_of_the_paper_that_runs_a_model_asks_for_a_gpu():
    "The others compute tables from what is there, or draw with the pocket's models."
    without = {n for n in load_stages(scale="paper") if "gpu" not in needs(step("paper", n))["resources"]}
    assert without == {"emojibench", "pocket_world", "boig_table1", "boigbench_table1", "stock_table1"}

def test_needs_are_of_each_process():
    "BoigLLM trains in as many processes as the scale says, one a GPU, on one machine."
    asked, processes = needs(step("paper", "market_llm")), load_scale("paper").boig_llm.processes
    stated = load_stages()["market_llm"].needs["paper"]
    assert processes > 1 and asked == dict(threads=processes * stated["cores"], resources=dict(
        gpu=processes * stated["gpus"], nodes=1, mem_mb=1000 * processes * stated["memory"], runtime=60 * stated["hours"]))
    assert needs_text(asked) == f"{processes} GPU, {8 * processes} CPU, {64 * processes} GB, 48.0 h"

def test_needs_follow_measurements_elsewhere(monkeypatch):
    monkeypatch.setattr(module, "measured", lambda scale, stage: dict(seconds=600, peak_memory=3_000_000_000, threads=4))
    assert needs(step("pocket", "boig_table1")) == dict(threads=4, resources=dict(mem_mb=6000, runtime=40))
    assert needs(step("paper", "boig_sd"))["resources"]["gpu"] == 1  # stated: what is said counts
    monkeypatch.setattr(module, "measured", lambda scale, stage: dict(seconds=600, peak_memory=None, threads=1))
    assert needs(step("pocket", "boig_table1")) == dict(threads=1, resources=dict(runtime=40))
    monkeypatch.setattr(module, "measured", lambda scale, stage: None)
    assert needs(step("pocket", "boig_table1")) == dict(threads=2, resources={})

def test_stages_state_needs_in_known_words(tmp_path):
    for stage in load_stages().values():
        assert set(stage.needs) <= set(scale_names()) and all(set(a) <= set(NEEDS) for a in stage.needs.values())
    (tmp_path/"stages.toml").write_text('[a]\nnotebook = "a.ipynb"\ntitle = "a"\nneeds.paper = {gpu = 1}\n')
    with pytest.raises(BoigError, match=r"Unknown need of stage \[a\] 'gpu'. Did you mean 'gpus'"): load_stages(tmp_path/"stages.toml")

@pytest.mark.parametrize("wrong, message", [("slurn", "Unknown profile 'slurn'. Did you mean 'slurm'"), ("/nowhere", "no config.yaml")])
def test_wrong_profiles(wrong, message):
    with pytest.raises(BoigError, match=message): profile_folder(wrong)

def test_a_missing_plug_in_is_named(world, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for name in ("slurm", "kubernetes"):
        with pytest.raises(BoigError, match=f"pip install snakemake-executor-plugin-{name}$"): world.run(profile=name)
    assert not world.results.exists()

def test_profiles_are_shipped_and_say_what_a_cluster_needs():
    assert '"profiles/*/*.yaml"' in (Path(__file__).parents[1]/"setup.py").read_text()
    for name in ("slurm", "kubernetes"):
        config = yaml.safe_load((PROFILES/name/"config.yaml").read_text())
        assert config["executor"] == name and config["jobs"] > 1 and config["default-resources"]["mem_mb"] > 0
    assert config["default-resources"]["gpu_manufacturer"] == "nvidia" and config["default-resources"]["scale"] == 0  # a limit: no GPU without


@pytest.fixture
def world(tmp_path):
    "Two stages, the first of which asks for something."
    world = World(tmp_path)
    table = (tmp_path/"stages.toml").read_text().replace("[second]", ASKS + "[second]")
    (tmp_path/"stages.toml").write_text(table)
    return world

def rendered(world, *command):
    "What Snakemake would submit: rule -> its threads and resources."
    out = subprocess.run([sys.executable, "-m", "snakemake", *map(str, command), "--directory", str(world.results), "--dry-run", "--nolock", "--nocolor"],
                         capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    rules = {}
    for line in (out.stdout + out.stderr).splitlines():
        if line.startswith("rule "): rule = rules.setdefault(line[5:].rstrip(":"), {"threads": 1})
        if line.strip().startswith("threads: "): rule["threads"] = int(line.split(": ")[1])
        if line.strip().startswith("resources: "): rule |= dict(p.split("=", 1) for p in line.split(": ", 1)[1].split(", "))
    return rules

def plan_of(world, monkeypatch, profile):
    "The plan and the engine's arguments of a run that is not started."
    world.results.mkdir()
    steps = make_plan(load_stages(world.root/"stages.toml"), load_scale("smoke"), world.results, world.root/"nbs", world.root/"toylib")
    said = []
    class Stopped(Exception): pass
    def popen(command, **kw):
        said.extend(command)
        raise Stopped
    with monkeypatch.context() as patch:
        patch.setattr(module.subprocess, "Popen", popen)
        with pytest.raises(Stopped): run_plan(steps, world.results, world.root/"nbs", None, profile)
    return json.loads((world.results/"plan.json").read_text()), list(map(str, said))

@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_snakemake_passes_on_what_a_stage_asks_for(world, monkeypatch, name):
    "The shipped profile's own defaults and the stage's needs, in Snakemake's words; without the plug-in and its own settings."
    config = yaml.safe_load((PROFILES/name/"config.yaml").read_text())
    own = world.root/"own"
    own.mkdir()
    (own/"config.yaml").write_text(yaml.safe_dump({k: config[k] for k in ("jobs", "default-resources")}))
    plan, said = plan_of(world, monkeypatch, own)
    engine = said[said.index("snakemake") + 1:said.index("--directory")]
    assert engine[engine.index("--profile") + 1] == str(own) and "--cores" not in engine
    rules = rendered(world, *engine, "--cores", 8)
    assert {k: rules["first"][k] for k in ("threads", "gpu", "nodes", "mem_mb", "runtime")} == dict(threads=3, gpu="2", nodes="1", mem_mb="500", runtime="30")
    assert all(rules["first"][k] == str(v) for k, v in config["default-resources"].items() if k not in ("mem_mb", "runtime"))
    assert rules["other"]["mem_mb"] == str(config["default-resources"]["mem_mb"]) and "gpu" not in rules["other"] and rules["second"]["threads"] == 2

def test_here_stages_that_ask_for_gpus_take_turns(world):
    "Each would take the first GPU, and two 13B models are too much for it."
    table = (world.root/"stages.toml").read_text()
    (world.root/"stages.toml").write_text(table.replace("[other]", f"[other]\n{ASKS}"))
    world.run(only=["first", "other"], jobs=2)
    assert [json.loads(e)["event"] for e in (world.results/".events.jsonl").read_text().splitlines()] == ["start", "end"] * 2

def test_what_stopped_snakemake_is_told(world, monkeypatch):
    "A home that cannot be written, say, as of a pod; or a cluster's refusal of a job."
    (file := world.root/"file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file/"cache"))
    with pytest.raises(BoigError, match=rf"Snakemake stopped with exit code 1 \(NotADirectoryError: .*{file.name}.*\)\. Its log: "): world.run(only=["first"])


SLURM = {"sbatch": """for a in "$@"; do case "$a" in --wrap=*) job="${a#--wrap=}"; break;; *) printf '%s ' "$a" >> "$FAKE/asked";; esac; done
echo >> "$FAKE/asked"; id=$(wc -l < "$FAKE/asked")
(SLURM_JOB_ID=$id bash -c "$job" && echo "$id|COMPLETED" || echo "$id|FAILED") > "$FAKE/job$id" 2> "$FAKE/said$id" < /dev/null & echo $id""",
    "srun": "while [[ $1 == -* ]]; do shift; done; exec $*", "sacct": 'cat "$FAKE"/job* 2> /dev/null || true', "sinfo": "echo 'normal*'", "scontrol": "", "scancel": "", "squeue": ""}

def test_the_slurm_plug_in_takes_the_profile(world, monkeypatch):
    "The real plug-in, where it is installed, against a stand-in for Slurm that runs each job at once."
    pytest.importorskip("snakemake_executor_plugin_slurm")
    (fake := world.root/"bin").mkdir()
    for name, body in SLURM.items():
        (fake/name).write_text(f"#!/bin/bash\n{body}\n")
        (fake/name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    (own := world.root/"own").mkdir()
    (own/"config.yaml").write_text((PROFILES/"slurm"/"config.yaml").read_text() + "slurm-init-seconds-before-status-checks: 1\n")
    world.run(profile=str(own), only=["second"])
    assert (world.results/"b.txt").read_text() == "84!"
    first, second = (fake/"asked").read_text().splitlines()
    assert all(f" {word} " in first for word in ("--gpus=2", "--nodes=1", "--cpus-per-task=3", "--mem 500", "-t 30"))
    assert "--gpus" not in second and all(f" {word} " in second for word in ("--cpus-per-task=2", "--mem 8000", "-t 240"))
