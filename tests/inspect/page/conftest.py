"""A headless Chromium, and pages of tiny models to open in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant.inspect.page.write import inspect_page
from tests.tiny import calibrate, make_dit
from tests.traces import traced_once

STEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


def chromium() -> str:
    """Path of a Chromium or Chrome; skips the test if there is none, or no driver."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None or shutil.which("chromedriver") is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium of 1280 x 800 pixels."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield driver
    driver.quit()


class Page:
    """One page in the browser.

    Attributes:
        driver: The browser.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> Page:
        """Open a file, with an empty console."""
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of an expression in the page."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def keys(self, text: str) -> None:
        """Press keys, one after the other."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(text).perform()

    def text(self, selector: str) -> str:
        """The text that an element shows."""
        return str(self.run("document.querySelector(arguments[0]).innerText", selector))

    def console(self) -> list[str]:
        """What the console says since the page was opened, but for advice about the reading of canvases by tests."""
        lines = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [line for line in lines if "willReadFrequently" not in line]

    def painted(self) -> int:
        """The number of different colours in the middle of the first canvas, of up to 10,000 points."""
        return int(
            self.run(
                "(() => { page.graphTab.view.paint(); const c = document.querySelector('.view canvas');"
                "const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = new Set();"
                "const step = 4 * Math.ceil(data.length / 40000);"
                "for (let i = 0; i < data.length; i += step) seen.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);"
                "return seen.size; })()"
            )
        )


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """The browser, with a check that nothing was reported in its console."""
    shown = Page(browser)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    yield shown
    assert shown.console() == []


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``full.html`` (with statistics, errors, groups of timesteps), ``two.html`` (two models), ``bare.html``."""
    folder = tmp_path_factory.mktemp("pages")
    with traced_once():
        grouped = fxquant.make_recipe("htg-w4a8").with_options("group-timesteps", groups=2)
        for name, recipe in {"htg-w4a8": grouped, "rtn-w8a8": "rtn-w8a8"}.items():
            model = make_dit(layers=3)
            statistics = fxquant.Statistics()
            run = calibrate(model, steps=STEPS)
            quantized = fxquant.compile(model, recipe=recipe, calibrate=run, statistics=statistics)
            fxquant.save(quantized, folder / name)
            if name == "htg-w4a8":
                made_up = errors(quantized.plan)
                inspect_page(folder / name, folder / "full.html", statistics=statistics, errors=made_up)
            else:
                inspect_page(quantized, folder / "bare.html")
        inspect_page(folder / "htg-w4a8", folder / "two.html", against=folder / "rtn-w8a8")
    return folder


def errors(plan: fxquant.Plan) -> dict[str, Any]:
    """Errors by layer and timestep in the form of an attribution, made up; the first was not measured."""
    layers, steps = list(plan.layers), sorted(plan.timesteps, reverse=True)
    local: list[list[float | None]] = [[0.001 * (row + 1 + t) for t in range(len(steps))] for row in range(len(layers))]
    local[0][0] = None
    nothing = [[None] * len(steps) for _ in layers]
    return {
        "method": "made up",
        "samples": 1,
        "probes": 8,
        "seconds": 1.0,
        "left_out": {},
        "layers": layers,
        "timesteps": steps,
        "output": [0.01] * len(steps),
        "local": local,
        "estimated": [[value and value / 10 for value in row] for row in local],
        "measured": nothing,
        "weights": local,
        "inputs": nothing,
    }


def data_of(path: Path) -> Any:
    """The data in a page."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])
