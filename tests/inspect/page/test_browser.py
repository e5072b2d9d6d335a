"""The page in a real browser."""

from __future__ import annotations

from fxquant.inspect.page.build import page_html
from fxquant.inspect.page.write import inspect_page
from tests.inspect.page.conftest import Page, data_of

TABS = ("graph", "layers", "errors", "salience", "timesteps", "absorption", "passes")
TO_Q = "transformer_blocks.1.attn1.to_q"
HOSTILE = '</script><img src=x onerror="window.wasRun=1"><script>window.wasRun=1</script>'


def names(page: Page) -> list[str]:
    return page.run("page.graphTab.graph.steps.map((step) => step.name)")


def search(page: Page, text: str) -> None:
    page.run("(page.graphTab.search.input.value = arguments[0], page.graphTab.search.run())", text)


class TestGraph:
    def test_opens_on_the_last_change_with_the_first_block_open(self, page, folder):
        page.open(folder / "full.html")
        assert page.run("page.graphTab.open.has('transformer_blocks.0')")
        assert page.painted() > 8
        assert "DiTTransformer2DModel" in page.text("#title")
        steps = names(page)
        assert steps[0] == "captured" and steps[-1] == "lower" and "quantize-linears" in steps
        assert page.text("#details").startswith("quantize-embeddings")

    def test_steps_through_the_passes_by_keys_and_clicks(self, page, folder):
        page.open(folder / "full.html")
        step = page.run("page.graphTab.step")
        page.keys("[")
        assert page.run("page.graphTab.step") == step - 1
        page.keys("]")
        assert page.run("page.graphTab.step") == step
        number = names(page).index("quantize-linears")
        page.run("document.querySelectorAll('#steps button')[arguments[0]].click()", number)
        assert page.text("#details").startswith("quantize-linears")
        kinds = page.run("[...page.graphTab.graph.changes(page.graphTab.step).values()]")
        assert {"added", "removed", "rewired"} <= set(kinds)
        page.run("page.graphTab.setStep(arguments[0])", names(page).index("absorb-affines"))
        assert "tensor" in page.run("[...page.graphTab.graph.changes(page.graphTab.step).values()]")
        assert "times" in page.text("#details")

    def test_removed_nodes_are_drawn_and_can_be_hidden(self, page, folder):
        page.open(folder / "full.html")
        page.run("page.graphTab.setStep(arguments[0])", names(page).index("quantize-linears"))
        removed = "[...page.graphTab.drawn.values()].filter(({change}) => change === 'removed').length"
        assert page.run(removed) > 0
        page.run("document.querySelector('#tools input').click()")
        assert page.run(removed) == 0

    def test_search_finds_a_layer_and_shows_everything_about_it(self, page, folder):
        page.open(folder / "full.html")
        page.keys("/")
        page.keys("attn1.to_q linear_default")
        assert page.run("document.querySelectorAll('#results [role=option]').length") >= 3
        search(page, "blocks.1.attn1.to_q fxquant::linear")
        page.keys("\ue007")  # Enter
        shown = page.text("#details")
        assert page.run("page.graphTab.open.has('transformer_blocks.1')")
        parts = (
            "fxquant::linear",
            TO_Q,
            "w4a8",
            "quantize-linears",
            "diffusers/models",
            "weight_packed",
            "absorbed in",
        )
        for part in parts:
            assert part.lower() in shown.lower(), part
        assert "t >" in shown  # A range for each group of timesteps.

    def test_a_click_on_the_canvas_selects_what_is_there(self, page, folder):
        from selenium.webdriver.common.action_chains import ActionChains

        page.open(folder / "full.html")
        page.run("page.graphTab.goLayer(arguments[0])", TO_Q)
        key = page.run("page.graphTab.selected")
        spot = page.run(
            "(() => { const view = page.graphTab.view; const item = view.picture.byKey.get(arguments[0]);"
            "return [view.x + (item.x + item.width / 2) * view.scale, view.y + (item.y + 20) * view.scale]; })()",
            key,
        )
        page.run("page.graphTab.choose(null)")
        canvas = page.driver.find_element("css selector", ".view canvas")
        half = (canvas.size["width"] / 2, canvas.size["height"] / 2)
        move = ActionChains(page.driver).move_to_element_with_offset(canvas, spot[0] - half[0], spot[1] - half[1])
        move.click().perform()
        assert page.run("page.graphTab.selected") == key
        scale = page.run("page.graphTab.view.scale")
        page.run("page.graphTab.view.canvas.dispatchEvent(new WheelEvent('wheel', {deltaY: -200, cancelable: true}))")
        assert page.run("page.graphTab.view.scale") > scale

    def test_a_click_on_a_port_selects_the_node_whose_value_it_is(self, page, folder):
        page.open(folder / "full.html")
        name = page.run(
            "(() => { const view = page.graphTab.view; const port = view.picture.ports.find("
            "({name}) => view.picture.byKey.has(`n:${name}`));"
            "view.drag = {moved: false};"
            "const [x, y] = [port.x + 40, port.y + 9];"
            "view._release({offsetX: view.x + x * view.scale, offsetY: view.y + y * view.scale});"
            "return port.name; })()"
        )
        assert page.run("page.graphTab.selected") == f"n:{name}"
        assert name in page.text("#details")

    def test_identical_blocks_share_one_layout_and_one_is_open_at_a_time(self, page, folder):
        page.open(folder / "full.html")
        page.run("page.graphTab.toggle('transformer_blocks.1')")
        runs = page.run("page.graphTab.layouts.runs")
        page.run("page.graphTab.toggle('transformer_blocks.2')")
        assert page.run("page.graphTab.layouts.runs") <= runs + 1  # The model around the block has another layout.
        assert page.run("['0', '1', '2'].filter((n) => page.graphTab.open.has(`transformer_blocks.${n}`))") == ["2"]

    def test_keys_walk_along_the_graph(self, page, folder):
        page.open(folder / "full.html")
        page.run("page.graphTab.goLayer(arguments[0])", TO_Q)
        node = page.run("page.graphTab.selected")
        page.keys("d")
        reader = page.run("page.graphTab.selected")
        assert reader != node
        page.keys("u")
        assert page.run("page.graphTab.selected") != reader
        page.keys("n")
        name = page.run("page.graphTab.selected.slice(2)")
        assert page.run("page.graphTab.graph.changes(page.graphTab.step).has(arguments[0])", name)


class TestTabs:
    def test_every_tab_shows_its_data_and_fits_1280_pixels(self, page, folder):
        page.open(folder / "full.html")
        for number, tab in enumerate(TABS, 1):
            page.keys(str(number))
            assert page.run("page.tab") == tab
            assert page.run("document.documentElement.scrollWidth") <= 1280
            shown = "graph" if tab == "graph" else "panel"
            assert page.run("document.getElementById(arguments[0]).scrollWidth", shown) <= 1280
            assert page.run("document.querySelectorAll('#panel .missing').length") == 0
        page.run("page.show('salience', arguments[0])", "transformer_blocks.0.attn1.to_q")
        assert page.run("document.querySelectorAll('#panel .uplot').length") == 5
        page.run("page.show('timesteps')")
        assert page.run("document.querySelectorAll('#panel canvas').length") == 2
        page.run("page.show('errors')")
        assert "made up" in page.text("#panel")
        kinds = page.run("[...document.querySelectorAll('#panel .row option')].map((entry) => entry.text)")
        assert len(kinds) == 3 and "weight" in kinds[2]  # Of the inputs nothing was measured.
        page.run("page.show('layers')")
        page.run("document.querySelectorAll('#panel th')[10].click()")  # By the SQNR of the weight.
        values = page.run("[...document.querySelectorAll('#panel tbody tr')].map((row) => row.cells[10].innerText)")
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=True) and len(numbers) > 3

    def test_without_statistics_and_errors_the_tabs_say_how_to_get_them(self, page, folder):
        page.open(folder / "bare.html")
        advice = {
            "salience": "statistics",
            "errors": "fxquant.attribute",
            "timesteps": "htg",
            "absorption": "nothing",
        }
        for tab, text in advice.items():
            page.run("page.show(arguments[0])", tab)
            assert text in page.text("#panel .missing")

    def test_a_row_leads_to_the_layer_in_the_graph(self, page, folder):
        page.open(folder / "full.html")
        page.run("page.show('absorption')")
        page.run("document.querySelector('#panel tbody tr').click()")
        assert page.run("page.tab") == "graph"
        assert "transformer_blocks.0" in page.text("#details")


class TestTwoModels:
    def test_shows_the_decisions_that_differ(self, page, folder):
        page.open(folder / "two.html")
        page.run("page.show('compare')")
        shown = page.text("#panel")
        assert "htg-w4a8" in shown and "rtn-w8a8" in shown and "w4a8" in shown and "w8a8" in shown
        assert "differ" in shown
        page.run("document.querySelector('#panel tbody tr.link').click()")
        assert page.run("page.tab") == "graph"

    def test_side_by_side(self, page, folder):
        page.open(folder / "two.html")
        page.run("document.querySelectorAll('#tools input')[1].click()")
        assert page.run("document.querySelectorAll('.view canvas').length") == 2
        sizes = page.run("page.graphTab.views.map((view) => view.picture.tree.root.size)")
        assert sizes[0] != sizes[1]
        before = page.run("page.graphTab.views.map((view) => view.scale)")
        page.run("page.graphTab.view.zoom(2)")
        assert page.run("page.graphTab.views.map((view) => view.scale)") == [2 * scale for scale in before]
        page.run("page.graphTab._focus(1)")
        assert page.run("page.model.name") == "rtn-w8a8"
        page.run("document.querySelectorAll('#tools input')[1].click()")
        assert page.run("document.querySelectorAll('.view canvas').length") == 1


class TestThemes:
    def test_follows_the_system_and_the_button(self, page, folder):
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        page.open(folder / "full.html")
        dark = page.run("getComputedStyle(document.body).backgroundColor")
        pixel = (
            "(() => { page.graphTab.view.paint(); const c = document.querySelector('.view canvas');"
            "return [...c.getContext('2d').getImageData(1, c.height - 2, 1, 1).data]; })()"
        )
        assert max(page.run(pixel)[:3]) < 64
        page.keys("t")
        assert page.run("getComputedStyle(document.body).backgroundColor") != dark
        assert min(page.run(pixel)[:3]) > 200


class TestHostileText:
    def test_no_name_can_run_a_script(self, page, folder, tmp_path):
        def spoiled(value):
            if isinstance(value, str):
                return value.replace("to_q", f"to_q{HOSTILE}").replace("quantize-linears", f"quantize-linears{HOSTILE}")
            if isinstance(value, dict):
                return {spoiled(key): spoiled(entry) for key, entry in value.items()}
            return [spoiled(entry) for entry in value] if isinstance(value, list) else value

        data = spoiled(data_of(folder / "full.html"))
        data["models"][0]["name"] = HOSTILE
        (tmp_path / "page.html").write_text(page_html(data, HOSTILE), encoding="utf-8")
        page.open(tmp_path / "page.html")
        assert page.driver.title == HOSTILE
        for tab in TABS:
            page.run("page.show(arguments[0])", tab)
        page.run("page.goLayer(arguments[0])", spoiled(TO_Q))
        assert HOSTILE in page.text("#details")
        search(page, "to_q")
        assert HOSTILE in page.text("#results")
        assert page.run("[typeof window.wasRun, document.images.length]") == ["undefined", 0]

    def test_even_markup_in_the_page_could_not_run_a_script(self, page, folder):
        page.open(folder / "bare.html")
        markup = '<img src="data:," onerror="window.wasRun=1">'
        page.run("(document.body.insertAdjacentHTML('beforeend', arguments[0]), 0)", markup)
        page.run("new Promise((done) => setTimeout(done, 100))")
        assert page.run("typeof window.wasRun") == "undefined"
        assert all("Content Security Policy" in line for line in page.console())


def test_each_kind_of_call_has_its_graph(page, tmp_path):
    import torch
    from torch import nn

    import fxquant

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
            y = self.first(x) * timestep.view(-1, 1)
            return y if more is None else y + self.second(more)

    torch.manual_seed(0)
    model = Two().eval()
    every = fxquant.make_recipe("rtn-w8a8").with_options("assign-precision", layers="all")

    def run() -> None:
        for step in (900.0, 100.0):
            model(torch.randn(2, 8), torch.full((2,), step))
            model(torch.randn(2, 8), torch.full((2,), step), torch.randn(2, 8))

    quantized = fxquant.compile(model, recipe=every, calibrate=run)
    page.open(inspect_page(quantized, tmp_path / "two.html"))
    assert page.run("document.querySelectorAll('#pickers option').length") == 2
    layers = "[...page.graphTab.drawn.values()].map(({node}) => node.layer)"
    seen = []
    for number in (0, 1):
        page.run("page.graphTab.setGraph(arguments[0])", number)
        seen.append("second" in page.run(layers))
        assert page.painted() > 3
    assert sorted(seen) == [False, True]
    assert "kinds of call" not in page.run("document.querySelector('#pickers').textContent")


def test_kinds_of_call_that_are_not_shown_are_counted(page, tmp_path):
    import torch
    from torch import nn

    import fxquant

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.only(x) * timestep.view(-1, *[1] * (x.dim() - 1))

    model = Net().eval()
    every = fxquant.make_recipe("rtn-w8a8").with_options("assign-precision", layers="all")

    def run() -> None:
        for extra in range(5):
            model(torch.randn(2, *[3] * extra, 8), torch.full((2,), 500.0))

    quantized = fxquant.compile(model, recipe=every, calibrate=run, measure=0)
    assert len(quantized.graphs) == 5
    page.open(inspect_page(quantized, tmp_path / "five.html"))
    assert page.run("document.querySelectorAll('#pickers option').length") == 4
    assert "4 of 5 kinds of call" in page.run("document.querySelector('#pickers').textContent")


def test_a_model_of_one_layer(page, tmp_path):
    import torch
    from torch import nn

    import fxquant

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.only(x) * timestep.view(-1, 1)

    torch.manual_seed(0)
    model = One().eval()
    every = fxquant.make_recipe("rtn-w8a8").with_options("assign-precision", layers="all")

    def run() -> None:
        for step in (900.0, 100.0):
            model(torch.randn(2, 8), torch.full((2,), step))

    quantized = fxquant.compile(model, recipe=every, calibrate=run)
    page.open(inspect_page(quantized, tmp_path / "one.html"))
    assert page.painted() > 3
    page.run("page.goLayer('only')")
    assert "w8a8" in page.text("#details")
    for tab in TABS:
        page.run("page.show(arguments[0])", tab)
