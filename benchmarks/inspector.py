"""Size and speed of the inspector page of DiT-XL/2 at full size, with random weights, in a headless Chromium.

    python -m benchmarks.inspector --layers 28 --recipe ptq4dit-w4a8 --page out/dit-xl.html

The page has the statistics of the calibration; an attribution of errors would add little. Milliseconds are those of
``performance.now()`` in the page, medians of several tries:

* ready: from opening the file to the first picture, with one block open.
* search: from a key to the list of results.
* open: opening the first block, whose layout is computed, and another block of the same structure.
* step: showing the graph after another pass.

It needs Chromium and its driver (``apt-get install chromium chromium-driver``) and the package selenium.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fxquant
from benchmarks.convert import build, call
from fxquant.inspect.page.write import inspect_page

_READY = "return page.ready ?? null"
_SEARCH = """
const input = document.getElementById('search');
const began = performance.now();
input.value = arguments[0];
input.dispatchEvent(new Event('input'));
document.getElementById('results').getBoundingClientRect();  // Includes the layout of the list.
return performance.now() - began;
"""
_OPEN = """
const tab = page.graphTab;
tab.closeAll();
if (arguments[1]) tab.layouts.known.clear();
const began = performance.now();
tab.toggle(arguments[0]);
return performance.now() - began;
"""
_STEP = """
const began = performance.now();
page.graphTab.setStep(arguments[0]);
page.graphTab.view.paint();
return performance.now() - began;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=28, help="transformer blocks; DiT-XL/2 has 28")
    parser.add_argument("--recipe", default="ptq4dit-w4a8")
    parser.add_argument("--timesteps", type=int, default=4, help="calibration forwards, one timestep each")
    parser.add_argument("--page", type=Path, help="where to keep the page")
    parser.add_argument("--tries", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (options.page or Path(folder) / "page.html").resolve()
        found = make(options.layers, options.recipe, options.timesteps, Path(folder) / "dit-xl", path)
        found |= measure(path, options.tries)
    print(json.dumps(found, indent=1))


def make(layers: int, recipe: str, timesteps: int, folder: Path, path: Path) -> dict[str, Any]:
    """Quantize the model, save it, and write its page; the seconds and bytes of that."""
    model = build(layers)
    kept = fxquant.Statistics()

    def calibrate() -> None:
        for number in range(timesteps):
            call(model, 2, number * 1000 // timesteps)

    began = time.perf_counter()
    quantized = fxquant.compile(model, recipe=recipe, calibrate=calibrate, statistics=kept, measure=1)
    compiled = time.perf_counter() - began
    fxquant.save(quantized, folder)
    del quantized
    began = time.perf_counter()
    inspect_page(folder, path, statistics=kept)
    return {
        "layers": layers,
        "recipe": recipe,
        "compile_seconds": round(compiled, 1),
        "page_seconds": round(time.perf_counter() - began, 1),
        "page_megabytes": round(path.stat().st_size / 1e6, 2),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def measure(path: Path, tries: int) -> dict[str, Any]:
    """Open the page several times, and time what users do; milliseconds."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "google-chrome")))) or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    times: dict[str, list[float]] = {}

    def note(name: str, milliseconds: float) -> None:
        times.setdefault(name, []).append(milliseconds)

    try:
        for _ in range(tries):
            driver.get(path.as_uri())
            while (ready := driver.execute_script(_READY)) is None:
                time.sleep(0.05)
            note("ready", ready)
            for text in ("to_q", "quantize", "blocks.17 linear"):
                note("search", driver.execute_script(_SEARCH, text))
            last = driver.execute_script("return page.graphTab.graph.steps.length - 1")
            modules = driver.execute_script("return [...page.graphTab.picture.tree.boxes.keys()]")
            blocks = [name for name in modules if name.rpartition(".")[2].isdigit() and name.count(".") == 1]
            note("open_first", driver.execute_script(_OPEN, blocks[0], True))
            note("open_next", driver.execute_script(_OPEN, blocks[-2], False))
            for step in range(last):
                note("step", driver.execute_script(_STEP, step))
        nodes = driver.execute_script("return page.graphTab.graph.snapshot(0).nodes.size")
    finally:
        driver.quit()
    medians = {f"{name}_ms": round(statistics.median(values), 1) for name, values in times.items()}
    worst = {f"{name}_worst_ms": round(max(values), 1) for name, values in times.items()}
    return {"nodes": nodes, **medians, **worst}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
