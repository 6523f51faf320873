"""Put a finished run into the project: python bench/ship.py RESULTS [STAGE ...] copies tables, figures, records and verdicts into results/reference/<scale>/, and draws the page of the longer run.

A run with another seed than the scale's goes into a folder beside them (seed-43), its tables alone; the verdicts are those of all seeds together.

The folder is flat, and small: figures are reduced to few colours (their records of what made the pictures stay in them; `shipped` in a stage's record names the reduced
file's hash), executed notebooks of the longer run lose their pictures, records the hashes of single modules, which the commit tells as well; data sets and models stay behind. The page shows figures from beside it, and links to
notebooks that are not shipped in nbs/. Only results of committed
code are shipped. Without stages: all that have run.
"""
import base64
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from boig.claims import judge
from boig.core import BoigError, atomic_path, project_root, sha256_file, write_json, write_text
from boig.report import write_report
from boig.scales import load_scale
from boig.stages import load_stages, marker

COLOURS, LARGE = 256, 6000 # of a figure; characters of a table that a notebook keeps


def reduce(figure: Path, target: Path):
    "A figure in few colours, with all that was written into it."
    with Image.open(figure) as image:
        info = PngInfo()
        for key, text in image.text.items(): info.add_itxt(key, text)
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        quarter = flat.resize((flat.width // 2, flat.height // 2), Image.Resampling.NEAREST) # enough to choose colours from, in a quarter of the time
        few = flat.quantize(palette=quarter.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1), dither=Image.Dither.NONE)
        with atomic_path(target) as tmp: few.save(tmp, "PNG", optimize=True, pnginfo=info, dpi=image.info.get("dpi", (100, 100)))


def slim(notebook: Path, root: str) -> str:
    "An executed notebook without its pictures, its large tables, whose numbers lie in files beside it, and the paths of the machine."
    found = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in found["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        if cell["cell_type"] != "code": continue
        cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
        for output in cell["outputs"]:
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            if "text/html" in data: data.pop("text/html" if len("".join(data["text/html"])) > LARGE else "text/plain", None)
            if "data" in output: output["data"] = data
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace(f"{root}/", "").replace(root, ".")


def ship(results: Path, record: dict, target: Path):
    "A stage's tables, figures, record and, of the longer run, notebook."
    root, shipped = record["parameters"]["results"].rsplit("/results/", 1)[0], {} # of the checkout that ran it
    for file in record["outputs"]:
        if file.startswith("tables/"): shutil.copyfile(results/file, target/Path(file).name)
        if file.startswith("figures/") and (target/Path(file).name).exists(): # a new one is put there by hand first: the project must stay small
            reduce(results/file, target/Path(file).name)
            shipped[file] = sha256_file(target/Path(file).name)
    if target.name == "reference": shipped[record["notebook"]] = sha256_file(write_text(target/record["notebook"], slim(results/record["notebook"], root)))
    text = json.dumps({k: v for k, v in record.items() if k != "parts"} | {"shipped": shipped}).replace(f"{root}/", "").replace(root, ".")
    write_json(target/"provenance"/f"{record['stage']}.json", json.loads(text))


def seeds(target: Path) -> list[Path]:
    "What is shipped of the same scale with other seeds."
    return sorted(target.glob("seed-*"))


def draw(target: Path) -> Path:
    "The page of the flat folder: drawn from a copy that is laid out as a run leaves it."
    stages = load_stages()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(target/"provenance", folder/"provenance")
        for name in (p.stem for p in (target/"provenance").glob("*.json")):
            write_json(marker(folder, name), {})
            write_text(folder/"notebooks"/f"{name}.ipynb", "{}")
        for kind, end in (("tables", "csv"), ("figures", "png")):
            (folder/kind).mkdir()
            for file in target.glob(f"*.{end}"):
                if file.name != "claims.csv": shutil.copyfile(file, folder/kind/file.name)
        page = write_report(folder, *seeds(target)).read_text(encoding="utf-8")
    for other in seeds(target): page = page.replace(str(other), other.name)
    for figure in target.glob("*.png"): page = page.replace(f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}", figure.name)
    page = page.replace('href="tables/', 'href="')
    for name, stage in stages.items():
        if not (target/"notebooks"/f"{name}.ipynb").exists(): page = page.replace(f"notebooks/{name}.ipynb", f"../../../nbs/{stage.notebook}")
    return write_text(target/"index.html", page)


if __name__ == "__main__":
    results, wanted = Path(sys.argv[1]), sys.argv[2:]
    found = {p.stem: json.loads(p.read_text()) for p in sorted((results/"provenance").glob("*.json")) if marker(results, p.stem).exists() and p.stem in (wanted or load_stages())}
    try:
        if lost := sorted(set(wanted) - set(found)): raise BoigError(f"No finished result of {', '.join(lost)} in '{results}'.")
        if dirty := sorted(n for n, r in found.items() if r["provenance"]["changed_since_commit"]): raise BoigError(f"Made by code that no commit holds: {', '.join(dirty)}. Commit, and run them again.")
        asked = next(iter(found.values()))["parameters"]
        target = project_root()/"results"/"reference"/asked["scale"]
        folder = target if asked["seed"] == load_scale(asked["scale"]).seed else target/f"seed-{asked['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        for record in found.values(): ship(results, record, folder)
        print(judge([target, *seeds(target)]).verdict.value_counts().to_dict())
        if target.name == "reference": print(draw(target)) # pocket's is one `make reproduce` away
    except BoigError as problem: sys.exit(str(problem))
