"settings.ini, constraints.txt, environment.yml and setup.py say the same."
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    return ini["DEFAULT"]

def requirements():
    return [Requirement(r) for k, v in settings().items() if k == "requirements" or k.endswith("_requirements") for r in v.split()]

def pins():
    lines = [l.strip() for l in (ROOT/"constraints.txt").read_text().splitlines()]
    return [Requirement(l) for l in lines if l and not l.startswith("#")]

def environment(): return yaml.safe_load((ROOT/"environment.yml").read_text())


def test_pins_are_exact_and_single():
    names = [canonicalize_name(p.name) for p in pins()]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"==[^*,]+", str(p.specifier)) for p in pins())

@pytest.mark.parametrize("wanted", requirements(), ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(wanted):
    found = [p for p in pins() if canonicalize_name(p.name) == canonicalize_name(wanted.name)]
    assert len(found) == 1, f"{wanted.name} has {len(found)} pins in constraints.txt"
    assert wanted.specifier.contains(str(found[0].specifier).removeprefix("=="), prereleases=True)

def test_diffusers_is_new_enough_for_its_dtype():
    "Before 0.40 a pipeline's `dtype=` reached transformers' models only, without a word: `load_pipeline` would mix precisions."
    wanted, = (r for r in requirements() if r.name == "diffusers")
    assert not wanted.specifier.contains("0.39.0") and wanted.specifier.contains("0.40.0")

def test_environment_follows_settings():
    env = environment()
    conda = [d for d in env["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    python = next(d.split("=", 1)[1] for d in conda if d.startswith("python="))
    assert env["name"] == settings()["lib_name"] and "pip" in conda
    assert SpecifierSet(f">={settings()['min_python']}").contains(python)
    assert "-c constraints.txt" in pip and "-e .[dev]" in pip
    for line in pip:
        if not line.startswith("-"): assert Requirement(line) in pins()

def test_makefile_installs_the_pinned_torch_and_checks_python():
    text = (ROOT/"Makefile").read_text()
    assert re.search(r"torch==(\S+)", text)[0] in {str(p) for p in pins()}
    assert f"({settings()['min_python'].replace('.', ', ')})" in text

def test_citation_follows_settings_and_names_readmes_papers():
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == settings()["version"] and cited["repository-code"] == f"https://github.com/{settings()['user']}/{settings()['repo']}"
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert len(cited["references"]) == 3 and all(f"[{r['title'].split(':')[0]}]({r['url']})" in readme for r in cited["references"])

def test_setup_reads_settings_only(monkeypatch):
    import runpy, setuptools
    got = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kw: got.update(kw))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT/"setup.py"))
    ini = settings()
    assert (got["name"], got["version"], got["python_requires"]) == (ini["lib_name"], ini["version"], f">={ini['min_python']}")
    assert got["install_requires"] == ini["requirements"].split() and got["extras_require"]["dev"] == ini["dev_requirements"].split()
    text = (ROOT/"setup.py").read_text()
    assert not [r.name for r in requirements() if re.search(rf"['\"]{re.escape(r.name)}\b", text)]

def test_package_data_is_declared():
    import boig
    for file in ("stages.toml", "Snakefile", "scales/pocket.toml"): assert (Path(boig.__file__).parent/file).is_file()
    patterns = " ".join(re.findall(r'"boig": \[(.*?)\]', (ROOT/"setup.py").read_text()))
    assert all(f'"{p}"' in patterns for p in ("*.toml", "Snakefile", "scales/*.toml"))
