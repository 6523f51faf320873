"The documentation site: `make docs`. The notebooks as they are, with their outputs; nothing is executed and nothing comes from a CDN."
import json
from pathlib import Path

from boig import __version__
from boig.zoo import resolve

BANDS = {"00_core": "Core", "10_data": "Data", "20_zoo": "The pocket zoo", "30_perception": "Perception", "40_metrics": "Metrics", "45_rewards": "Rewards", "48_benches": "Benchmarks",
         "50_diffusion": "Diffusion", "60_behaviour": "Behaviour", "70_preference": "Preference", "80_personalise": "Personalisation", "90_experiments": "Experiments", "95_front": "The front door"}
HERE = Path(__file__).parent

project, author, release = "boig", "The boig authors", __version__
copyright = "2026 onwards, The boig authors"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["**/.ipynb_checkpoints", "_*"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
html_theme = "pydata_sphinx_theme"
html_title = "boig"
html_theme_options = {"show_toc_level": 2, "navbar_center": [], "navbar_end": ["theme-switcher"], "footer_start": ["copyright"], "footer_end": []}
html_sidebars = {"**": ["globaltoc.html"]}
html_static_path = ["_static", str(resolve("mathjax"))]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"
html_show_sphinx = False


def without_directives(notebook: dict):
    "Drop nbdev's directives, and the cells that it hides."
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            said = " ".join(l for l in lines if l.startswith("#|"))
            cell["source"] = "\n".join(l for l in lines if not l.startswith("#|"))
            if "hide" in said or not cell["source"].strip(): continue
        cells.append(cell)
    notebook["cells"] = cells


def prepare(app, docname, source):
    "Notebooks as a site shows them, and on the front page a list of all, band by band; the files themselves are not touched."
    notebook = json.loads(source[0])
    without_directives(notebook)
    if docname == "index": add_contents(notebook)
    source[0] = json.dumps(notebook)


def add_contents(notebook: dict):
    "The lists that become the side bar."
    trees = ["```{toctree}\n:maxdepth: 1\n:hidden:\n\nfindings\n```"] + ["\n".join(["```{toctree}", ":maxdepth: 1", ":hidden:", f":caption: {title}", "", *(f"{band}/{p.stem}" for p in sorted((HERE/band).glob("*.ipynb"))), "```"])
             for band, title in BANDS.items() if any((HERE/band).glob("*.ipynb"))]
    notebook["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": "\n\n".join(trees)})


def setup(app): app.connect("source-read", prepare)
