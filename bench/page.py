"""The results page in a real browser: python bench/page.py PAGE --axe axe.min.js opens it in headless Chromium on a desktop and on a phone, asks axe-core for accessibility
violations (npm pack axe-core), looks for sideways scrolling and for pictures that did not load, prints it to PDF, and writes bench/results/page.json."""
import argparse
import base64
import json
import shutil
import sys
import tempfile
from pathlib import Path

from boig.core import BoigError, project_root, provenance, sha256_file, write_json

sys.path.insert(0, str(project_root()/"tests"))
from test_questionnaire import Chromium  # noqa: E402

RESULTS = Path(__file__).parent/"results"/"page.json"
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}


def look(browser, axe: str, width: int, height: int) -> dict:
    "What is wrong with the open page on a screen of this size."
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.js("window.found = null; axe.run(document, {resultTypes: ['violations']}).then(r => window.found = r)" if browser.js("'axe' in window") else axe + ";window.found = null; axe.run(document, {resultTypes: ['violations']}).then(r => window.found = r); 0")
    browser.wait("window.found != null")
    violations = json.loads(browser.js("JSON.stringify(window.found.violations.map(v => ({rule: v.id, impact: v.impact, help: v.help, places: v.nodes.length, first: v.nodes[0].html.slice(0, 200)})))"))
    return {"violations": violations, "rules_passed": browser.js("window.found.passes.length"), "wider_than_the_screen_by": browser.js("document.documentElement.scrollWidth - innerWidth"),
            "pictures": browser.js("document.images.length"), "pictures_that_did_not_load": browser.js("[...document.images].filter(i => !i.naturalWidth).length")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of axe-core")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots and the PDF")
    a = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: raise BoigError("There is no Chromium here. On Debian: apt install chromium")
    axe, found = a.axe.read_text(encoding="utf-8"), {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Chromium(chromium, folder)
        try:
            browser.send("Page.navigate", url=a.page.resolve().as_uri())
            browser.wait("document.readyState == 'complete'")
            pdf = base64.b64decode(browser.send("Page.printToPDF", printBackground=True)["data"])
            for name, size in SCREENS.items():
                found[name] = look(browser, axe, *size)
                if a.pictures:
                    a.pictures.mkdir(parents=True, exist_ok=True)
                    (a.pictures/f"{name}.png").write_bytes(base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"]))
            if a.pictures: (a.pictures/"page.pdf").write_bytes(pdf)
        finally: browser.close()
    write_json(RESULTS, {"about": "bench/page.py: the results page in headless Chromium, judged by axe-core.", "axe": axe.split("\n")[0].strip("/*! "), "page_sha256": sha256_file(a.page),
                         "pdf_bytes": len(pdf), **found, "provenance": provenance()})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    try: main()
    except BoigError as problem: sys.exit(str(problem))
