"""An experiment notebook in a real JupyterLab: `python bench/jupyterlab.py --lab FOLDER/bin/jupyter-lab` opens it in headless Chromium, clicks Run > Run All Cells, waits,
looks at what is on the screen, and writes bench/results/jupyterlab.json.

JupyterLab is no dependency of boig: `python -m venv FOLDER && FOLDER/bin/pip install jupyterlab`. The kernel is the Python that runs this file. The notebook is a copy with the
smoke scale's values in a cell beneath its parameters, as papermill writes it; nothing else differs, and its results go into a temporary folder.
"""
import argparse
import base64
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from boig.core import BoigError, project_root, provenance, write_json
from boig.scales import load_scale
from boig.stages import load_stages

sys.path.insert(0, str(project_root()/"tests"))
from test_questionnaire import Chromium  # noqa: E402

RESULTS = Path(__file__).parent/"results"/"jupyterlab.json"
CODE = "[...document.querySelectorAll('.jp-NotebookPanel .jp-CodeCell')]"
PROMPTS = CODE + ".map(c => c.querySelector('.jp-InputArea-prompt').textContent.trim())"
IDLE = "document.querySelector('.jp-NotebookPanel-toolbar [data-status=idle]') != null"
PLOTS = """[...document.querySelectorAll('.jp-OutputArea-output img')].map(i => {
    const c = document.createElement('canvas'); [c.width, c.height] = [i.naturalWidth, i.naturalHeight];
    const p = c.getContext('2d'); p.drawImage(i, 0, 0);
    return [c.width, c.height, new Set(new Uint32Array(p.getImageData(0, 0, c.width, c.height).data.buffer)).size]})"""  # width, height, colours


def copy(stage: str, folder: Path) -> Path:
    "The stage's notebook with the smoke scale's values and without outputs."
    s = load_stages()[stage]
    book = load_notebook_node(str(project_root()/"nbs"/s.notebook))
    book = parameterize_notebook(book, dict(results=str(folder/"results"), run_dir=str(folder/"run"), **s.parameters(load_scale("smoke"))))
    for cell in book.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    nbformat.write(book, folder/Path(s.notebook).name)
    return folder/Path(s.notebook).name


def serve(lab: str, folder: Path) -> tuple[subprocess.Popen, int]:
    "JupyterLab in a folder, its one kernel this Python; every cell is drawn, on the screen or not."
    kernel, settings = folder/".kernels"/"kernels"/"python3", folder/".settings"/"@jupyterlab"/"notebook-extension"
    write_json(kernel/"kernel.json", {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "boig", "language": "python"})
    write_json(settings/"tracker.jupyterlab-settings", {"windowingMode": "none"})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_PATH": str(folder/".kernels"), "JUPYTERLAB_SETTINGS_DIR": str(folder/".settings"), "JUPYTER_CONFIG_DIR": str(folder/".config"), "JUPYTER_DATA_DIR": str(folder/".data")}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--allow-root", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder/".lab.log", "w") as log: server = subprocess.Popen([lab, *options], cwd=folder, env=env, stdout=log, stderr=log)
    for _ in range(600):
        if server.poll() is not None: raise BoigError(f"JupyterLab ended at once:\n{(folder/'.lab.log').read_text()[-2000:]}")
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: return server, port
        time.sleep(0.1)
    raise BoigError("JupyterLab doesn't answer.")


def until(page: Chromium, code: str, seconds: float, what: str):
    "Wait for a value that is true."
    limit = time.time() + seconds
    while not (value := page.js(code)):
        if time.time() > limit: raise BoigError(f"After {seconds:.0f} s still no {what}.")
        time.sleep(0.25)
    return value


def run_all(page: Chromium, url: str, seconds: float) -> tuple[float, list, list]: # seconds of the run; what each prompt says; what failed
    "Open a notebook, click Run > Run All Cells, wait."
    page.send("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)
    page.send("Page.navigate", url=url)
    until(page, f"document.readyState == 'complete' && {CODE}.length > 0 && {IDLE}", 120, "notebook with an idle kernel")
    menu = "[...document.querySelectorAll('#jp-MainMenu .lm-MenuBar-item')].find(e => e.textContent.trim() == 'Run')"
    item, asks = "document.querySelector('.lm-Menu [data-command=\"runmenu:run-all\"]')", "document.querySelector('.jp-Dialog .jp-mod-accept')"
    time.sleep(4)
    if page.js(f"{asks} != null"):  # which kernel? JupyterLab proposes the right one, and starts it
        page.click(asks)
        time.sleep(4)
        until(page, IDLE, 60, "idle kernel")
    page.click(menu)
    until(page, f"{item} != null", 20, "menu")
    x, y = page.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({item}.getBoundingClientRect())")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)  # a menu runs the item that the mouse is over
    began = time.time()
    page.click(item)
    until(page, PROMPTS + ".some(t => t != '[ ]:')", 60, "cell that began")
    failed = "[...document.querySelectorAll('.jp-OutputArea-output[data-mime-type=\"application/vnd.jupyter.error\"]')].map(e => e.textContent)"
    until(page, f"{PROMPTS}.every(t => /^\\[\\d+\\]:$/.test(t)) || {failed}.length > 0", seconds, "end of the run")
    return time.time() - began, page.js(PROMPTS), page.js(failed)


def look(page: Chromium, png: Path) -> list:
    "Width, height and number of colours of every picture on the page; a picture of the first one on the screen."
    until(page, "[...document.querySelectorAll('.jp-OutputArea-output img')].every(i => i.complete)", 30, "pictures")
    if page.js("document.querySelector('.jp-OutputArea-output img') != null"): page.js("document.querySelector('.jp-OutputArea-output img').scrollIntoView({block: 'center'})")
    time.sleep(1)
    png.write_bytes(base64.b64decode(page.send("Page.captureScreenshot", format="png")["data"]))
    return page.js(PLOTS)


def main(lab: str, stage: str, seconds: float, screen: str):
    folder, chromium = Path(tempfile.mkdtemp()), shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: raise BoigError("No Chromium here.")
    book = copy(stage, folder)
    cells = sum(c.cell_type == "code" for c in nbformat.read(book, 4).cells)
    (folder/".browser").mkdir()
    server, port = serve(lab, folder)
    try:
        page = Chromium(chromium, folder/".browser")
        try:
            took, prompts, failed = run_all(page, f"http://127.0.0.1:{port}/lab/tree/{book.name}", seconds)
            plots = look(page, Path(screen))
            browser = page.js("navigator.userAgent.match(/Chrom\\w+\\/[\\d.]+/)[0]")
        finally: page.close()
    finally:
        server.terminate()
        server.wait(30)
    written = sorted(p.relative_to(folder/"results").as_posix() for p in (folder/"results").rglob("*") if p.is_file())
    version = subprocess.run([lab, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    write_json(RESULTS, dict(about=f"bench/jupyterlab.py: {stage}'s notebook with the values of the scale smoke in JupyterLab, by Run > Run All Cells in headless Chromium.", jupyterlab=version, chromium=browser, stage=stage,
        notebook=load_stages()[stage].notebook, code_cells=cells, cells_run=sum(p != "[ ]:" for p in prompts), cells_failed=len(failed), errors=[f[-500:] for f in failed],
        pictures=[dict(width=w, height=h, colours=c) for w, h, c in plots], written=written, seconds=round(took, 1), provenance=provenance()))
    if failed or len(prompts) != cells or not plots or any(c < 50 for *_, c in plots): raise BoigError(f"Not as it should be; see {RESULTS}.")
    print(f"{cells} cells in {took:.1f} s, {len(plots)} pictures, {', '.join(written)}: JupyterLab {version}, {browser}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lab", default="jupyter-lab", help="the command")
    options.add_argument("--stage", default="pocket_world", help="of the stage table; one that needs no other's results")
    options.add_argument("--seconds", type=float, default=600, help="that the run may take")
    options.add_argument("--screen", default=str(Path(tempfile.gettempdir())/"jupyterlab.png"), help="where a picture of the screen goes")
    main(**vars(options.parse_args()))
