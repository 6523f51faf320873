"Presets, overrides, and experiment notebooks whose defaults are the pocket scale's."
import ast
import json
from dataclasses import asdict, fields

import pytest
from papermill import inspect_notebook

from boig.core import BoigError, project_root
from boig.stages import load_stages, notebook_parameters
from boig.scales import AT_LEAST, CHOICES, SECTIONS, load_scale, scale_names

NBS = project_root()/"nbs"


@pytest.mark.parametrize("name", ["smoke", "pocket", "reference", "paper"])
def test_every_scale_loads_with_every_model(name):
    assert name in scale_names()
    scale = load_scale(name, llm="smollm2")
    assert scale.boig_llm.llm == "smollm2" and scale.boig_llm.lora_rank > 0 and scale.emojibench == load_scale(name).emojibench


@pytest.mark.parametrize("name", ["smoke", "pocket", "reference", "paper"])
def test_every_value_of_a_scale_is_commented(name):
    text = (project_root()/"boig"/"scales"/f"{name}.toml").read_text(encoding="utf-8")
    assert [l for l in text.splitlines() if "=" in l.split("#")[0] and "#" not in l] == []


def test_every_number_has_a_bound():
    numbers = {f.name for section in SECTIONS.values() for f in fields(section) if f.type in (int, float)}
    assert numbers - set(AT_LEAST) - set(CHOICES) == set()
    assert load_scale("pocket", overrides={"preference_guidance.clip": 0, "seed": 2**32 - 1}).preference_models.clip == load_scale("pocket").preference_models.clip # a word, where that is a number


def defaults(path):
    "The values in a notebook's parameters cell."
    cell = next(c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", []))
    return {n.target.id: ast.literal_eval(n.value) for n in ast.parse("".join(cell["source"])).body}


@pytest.mark.parametrize("stage", load_stages().values(), ids=lambda s: s.name)
def test_notebook_defaults_are_the_pocket_scale(stage):
    values, pocket = defaults(NBS/stage.notebook), load_scale("pocket")
    told = stage.parameters(pocket)
    assert notebook_parameters(NBS/stage.notebook) == set(told) | {"results", "run_dir"}
    section = asdict(getattr(pocket, stage.section))
    assert {k: values[k] for k in section} == section and values["seed"] == pocket.seed and values["scale"] == "pocket"


@pytest.mark.parametrize("notebook", sorted({s.notebook for s in load_stages().values()}))
def test_papermill_knows_every_parameter_with_its_meaning(notebook, caplog):
    found = inspect_notebook(NBS/notebook)
    assert set(found) == notebook_parameters(NBS/notebook) and not caplog.records and all(p["help"] for p in found.values())


@pytest.mark.parametrize("wrong, says", [
    (dict(name="poket"), "Did you mean 'pocket'"), (dict(llm="smolm2"), "Did you mean 'smollm2'"),
    (dict(overrides={"boig_llm.stepps": 3}), "Did you mean 'boig_llm.steps'"), (dict(overrides={"boig_llm.steps": "many"}), "must be int"),
    (dict(overrides={"boig_llm.steps": 2.5}), "must be int"), (dict(overrides={"boig_llm.steps": 0}), "at least 1"),
    (dict(overrides={"emojibench.test_fraction": "nan"}), "at least 0"), (dict(overrides={"emojibench.test_fraction": 1.0}), "at most 0.9"),
    (dict(overrides={"table1.bootstrap": -1}), "at least 1"), (dict(overrides={"boig_llm.noise_kind": "unifrom"}), "Did you mean 'uniform'"),
    (dict(overrides={"boig_llm.llm": "smollm2"}), "Use --llm smollm2"), (dict(overrides={"boig_llm.bits": "3"}), "Unknown boig_llm.bits '3'.*Known: 0, 4, 8"),
    (dict(overrides={"instructbooth.rl_lr": "nan"}), "at least 0"), (dict(overrides={"instructbooth.rl_lr": -1}), "at least 0"), (dict(overrides={"preference_guidance.weight": "inf"}), "finite number"),
    (dict(overrides={"seed": -1}), "seed must be at least 0"), (dict(overrides={"seed": 2**32}), "seed must be at most 4294967295")])
def test_mistakes_get_one_clear_line(wrong, says):
    with pytest.raises(BoigError, match=says) as e: load_scale(**wrong)
    assert "\n" not in str(e.value)
