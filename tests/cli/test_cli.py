"""The command line, as somebody types it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fxquant
from fxquant.cli import output
from fxquant.cli import quantize as command_quantize
from fxquant.cli.__main__ import app
from fxquant.disk.claims import claimed
from fxquant.disk.files import digest_of
from fxquant.disk.finished_work import working_in
from fxquant.errors import CheckpointError, PortabilityWarning, QualityWarning, SpeedWarning
from fxquant.pipeline.recipes import make_recipe
from fxquant.pretrained import together
from fxquant.storage import diffusers_io

FAST = ("--samples", "2", "--steps", "2")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The message of a command that fails as it should: exit code 2, one message, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def quantized(float_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    result = run("quantize", float_folder, "--recipe", "ptq4dit-w4a8", "--out", folder / "dit", *FAST)
    assert result.exit_code == 0, result.output
    assert "times smaller" in result.stdout
    assert str(folder / "dit") in result.stderr.replace("\n", "")
    assert [path.name for path in folder.iterdir()] == ["dit"]
    return folder / "dit"


class TestHelp:
    def test_version(self):
        assert run("--version").stdout == f"fxquant {fxquant.__version__}\n"

    @pytest.mark.parametrize(
        "command",
        [
            [],
            ["quantize"],
            ["generate"],
            ["export"],
            ["balance"],
            ["report"],
            ["attribute"],
            ["statistics"],
            ["profile"],
            ["list"],
        ],
    )
    def test_help(self, command):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout
        assert command in ([], ["list"]) or "Examples" in result.stdout

    def test_help_needs_no_torch(self):
        code = (
            "import sys; from fxquant.cli.__main__ import app; from typer.testing import CliRunner; "
            "assert CliRunner().invoke(app, ['quantize', '--help']).exit_code == 0; "
            "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestList:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("recipes", "ptq4dit-w<bits>a<bits>"),
            ("passes", "absorb-affines"),
            ("backends", "fake-quant"),
            ("rules", "scaled_dot_product_attention"),
            ("formats", "nvfp4"),
        ],
    )
    def test_one_line_each(self, kind, expected):
        result = run("list", kind)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert sum(line.startswith(expected) for line in lines) == 1
        assert all("  " in line.strip() for line in lines), "something lacks a docstring"

    def test_rules_are_grouped(self):
        assert any(line.startswith("conv1d conv2d conv3d ") for line in run("list", "rules").stdout.splitlines())

    def test_unknown_kind(self):
        assert run("list", "colours").exit_code == 2


class TestQuantize:
    def test_the_pipeline_is_whole(self, quantized):
        names = {path.name for path in quantized.iterdir()}
        assert names == {"README.md", "model_index.json", "scheduler", "transformer", "vae"}

    def test_json_is_all_there_is_on_stdout(self, float_folder, tmp_path):
        result = run(
            "quantize", float_folder, "-r", "rtn-w8a8", "--out", tmp_path / "q", "--json", "--measure", 0,
            "--dump-graphs", tmp_path / "graphs", "--layers", "blocks", "--guidance", 1, "--seed", 3, *FAST,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        assert data["totals"]["mean_sqnr_db"] is None
        assert data["totals"]["layers_by_precision"]["w8a8"] == 7
        assert any("quantize-linears" in path.name for path in (tmp_path / "graphs").iterdir())

    def test_block_reconstruction_keeps_what_is_finished(self, float_folder, tmp_path):
        recipe = make_recipe("rtn-reconstruct-w4a8").with_options("reconstruct-blocks", iterations=3)
        options = ("-r", str(recipe), "--resume", tmp_path / "parts", "--measure", 0, *FAST)
        result = run("quantize", float_folder, *options, "--out", tmp_path / "q")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "parts" / "transformer_blocks.0.safetensors").exists()

    def test_a_second_command_for_one_folder_is_refused_at_once(self, float_folder, tmp_path):
        options = ("quantize", float_folder, "-r", "rtn-w8a8", "--out", tmp_path / "q", "--resume", tmp_path / "parts")
        with claimed(tmp_path / "q"):
            assert "another process is making" in refused(*options, *FAST)
        with working_in(tmp_path / "parts"):
            assert "another process works in" in refused(*options, *FAST)
        assert list(tmp_path.iterdir()) == []
        assert run(*options, *FAST).exit_code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "q"]

    def test_mistakes_cost_no_time(self, float_folder, quantized, tmp_path):
        out = ("--out", tmp_path / "x")
        assert "there is no folder" in refused("quantize", tmp_path / "nowhere", *out)
        assert "exists" in refused("quantize", float_folder, "--out", quantized)
        assert "is the input, or contains it" in refused("quantize", float_folder, "--out", float_folder, "--overwrite")
        assert "is the input, or contains it" in refused("quantize", float_folder, "--out", float_folder.parent)
        assert "unknown recipe 'magic'" in refused("quantize", float_folder, "--recipe", "magic-w4a8", *out)
        assert "unknown backend 'abacus'" in refused("quantize", float_folder, "--backend", "abacus", *out)
        assert "cannot be read" in refused("quantize", float_folder, "--prompts", tmp_path / "no.txt", *out)
        assert "is not a pipeline" in refused("quantize", quantized / "transformer", *out)
        assert "device 'abacus' cannot be used" in refused("quantize", float_folder, "--device", "abacus", *out)
        assert list(tmp_path.iterdir()) == []

    def test_in_16_bits_and_back(self, float_folder, tmp_path):
        options = ("-r", "rtn-w8a8", "--dtype", "bfloat16", "--device", "cpu", *FAST)
        result = run("quantize", float_folder, "--out", tmp_path / "q", *options)
        assert result.exit_code == 0, result.output
        pipe = fxquant.load_pipeline(tmp_path / "q")
        assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.bfloat16)
        drawn = run("generate", tmp_path / "q", "-l", "1", "--steps", 2, "--out", tmp_path / "x.png")
        assert drawn.exit_code == 0, drawn.output
        mixed = {"transformer": torch.bfloat16, "default": torch.float32}
        assert fxquant.load_pipeline(tmp_path / "q", torch_dtype=mixed).vae.dtype == torch.float32

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    def test_on_a_gpu(self, float_folder, tmp_path):
        options = ("-r", "rtn-w8a8", "-b", "native", "--dtype", "bfloat16", "--device", "cuda", *FAST)
        result = run("quantize", float_folder, "--out", tmp_path / "q", *options)
        assert result.exit_code == 0, result.output
        on_gpu = ("--device", "cuda")
        drawn = run("generate", tmp_path / "q", "-l", "1", "--steps", 2, "--out", tmp_path / "x.png", *on_gpu)
        assert drawn.exit_code == 0, drawn.output
        assert "native triton" in run("report", tmp_path / "q", *on_gpu).stdout
        assert run("profile", tmp_path / "q", "--rounds", 1, *on_gpu).exit_code == 0

    def test_a_quantized_pipeline_is_refused(self, quantized, tmp_path):
        assert "made by fxquant" in refused("quantize", quantized, "--out", tmp_path / "x", *FAST)

    def test_prompts_for_classes(self, float_folder, tmp_path):
        (tmp_path / "prompts.txt").write_text("a fox\n\n a harbour \n")
        message = refused("quantize", float_folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "x")
        assert "takes class labels, not prompts" in message

    def test_overwrite(self, float_folder, quantized, tmp_path):
        target = shutil.copytree(quantized, tmp_path / "q")
        (target / "notes.txt").write_text("")
        options = ("--out", target, "--overwrite", "-r", "rtn-w8a8", *FAST)
        assert "holds more than a pipeline (notes.txt)" in refused("quantize", float_folder, *options)
        (target / "notes.txt").unlink()
        result = run("quantize", float_folder, *options)
        assert result.exit_code == 0, result.output
        before, after = (json.loads((folder / "transformer/plan.json").read_text()) for folder in (quantized, target))
        assert before["recipe"] != after["recipe"]
        assert "is the input" in refused("quantize", float_folder, "--out", float_folder.parent, "--overwrite")

    def test_a_model_linked_from_elsewhere_is_not_replaced(self, float_folder, tmp_path):
        shutil.copytree(float_folder, tmp_path / "real")
        (tmp_path / "linked").mkdir()
        for path in (tmp_path / "real").iterdir():
            (tmp_path / "linked" / path.name).symlink_to(path)
        message = refused("quantize", tmp_path / "linked", "--out", tmp_path / "real" / "transformer", "--overwrite")
        assert "is the input, or contains it" in message

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--out", "file"), "is a file"),
            (("--out", "file/q"), "cannot be written: "),
            (("--out", "x" * 300), "cannot be written: "),
            (("--out", "q", "--dump-graphs", "file"), "cannot be written: "),
            (("--out", "q", "--dump-graphs", "q/graphs"), "lies in --out"),
            (("--out", "q", "--resume", "file/parts"), "cannot be written: "),
            (("--out", "q", "--resume", "q"), "lies in --out"),
            (("--out", "q", "--guidance", "nan"), "guidance nan is not a finite number"),
            (("--out", "q", "--guidance", "inf"), "guidance inf is not a finite number"),
            (("--out", "q", "--seed", 2**64), "does not fit 64 bits"),
        ],
    )
    def test_places_and_numbers_are_looked_at_first(self, float_folder, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("precious")
        monkeypatch.setattr(together, "compile_model", None)
        assert message in refused("quantize", float_folder, *options)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_what_cannot_be_written_after_all_is_kept(self, float_folder, tmp_path, monkeypatch):
        out, compiled = tmp_path / "out", fxquant.compile

        def compile_meanwhile(*args, **options):
            (out / "q").mkdir(parents=True)
            (out / "q" / "theirs").write_text("precious")
            return compiled(*args, **options)

        monkeypatch.setattr(together, "compile_model", compile_meanwhile)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        message = refused("quantize", float_folder, "-r", "rtn-w8a8", "--measure", 0, "--out", out / "q", *FAST)
        assert f"{out / 'q'} exists" in message
        kept = Path(re.search(r"The quantized pipeline is in (.*/q);", message)[1])
        assert isinstance(fxquant.load_pipeline(kept).transformer, fxquant.runtime.model.GraphModel)
        assert [path.name for path in (out / "q").iterdir()] == ["theirs"]

    def test_what_can_be_written_nowhere_leaves_no_folder(self, tmp_path, monkeypatch):
        def refused(*_, **__):
            raise CheckpointError("q cannot be saved")

        monkeypatch.setattr(diffusers_io, "save_pipeline", refused)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(CheckpointError, match="q cannot be saved"):
            command_quantize._save(None, tmp_path / "q", overwrite=False)
        assert list(tmp_path.iterdir()) == []

    def test_a_pipeline_that_fails_is_no_callable_of_the_users(self, float_folder, tmp_path, monkeypatch):
        from diffusers import DDIMScheduler

        def fails(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(DDIMScheduler, "step", fails)
        message = refused("quantize", float_folder, "-r", "rtn-w8a8", "--out", tmp_path / "q", *FAST)
        said = (
            "DiTPipeline failed while it ran to calibrate: RuntimeError: out of memory. The option --debug shows where"
        )
        assert message == f"error: {said}\n"
        assert list(tmp_path.iterdir()) == []

    def test_names_that_look_like_markup(self, float_folder, tmp_path):
        result = run("quantize", float_folder, "-r", "rtn-w8a8", "--measure", 0, "--out", tmp_path / "q[bold]", *FAST)
        assert result.exit_code == 0, result.output
        assert "q[bold]" in result.stderr.replace("\n", "")

    def test_ctrl_c_leaves_nothing(self, float_folder, tmp_path, monkeypatch):
        from diffusers import DDIMScheduler

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(DDIMScheduler, "save_pretrained", interrupted)
        result = run("quantize", float_folder, "-r", "rtn-w8a8", "--out", tmp_path / "q", *FAST)
        assert result.exit_code == 130
        assert "interrupted" in result.stderr
        assert list(tmp_path.iterdir()) == []


class TestGenerate:
    def test_a_grid(self, quantized, tmp_path):
        result = run("generate", quantized, "--labels", "1,2,5-7", "--out", tmp_path / "grid.png", "--steps", 1)
        assert result.exit_code == 0, result.output
        assert Image.open(tmp_path / "grid.png").size == (24, 16)
        assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]

    def test_columns(self, float_folder, tmp_path):
        run("generate", float_folder, "-l", "0-3", "--columns", 4, "-o", tmp_path / "grid.jpg", "--steps", 1)
        assert Image.open(tmp_path / "grid.jpg").size == (32, 8)

    def test_a_folder(self, float_folder, tmp_path):
        result = run("generate", float_folder, "--labels", "1,2", "--out", tmp_path / "images", "--steps", 1)
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000.png", "001.png"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "give either --labels"),
            (("--labels", "1", "--prompts", "a fox"), "give either --labels"),
            (("--labels", "one"), "'one' is not a class number"),
            (("--labels", "5-2"), "names no class"),
            (("--labels", "1000"), "label 1000 is out of range"),
            (("--labels", "0-999999999"), "asks for 1000000000 images; at most 10000"),
            (("--labels", "0-9999,0-9999"), "asks for 20000 images"),
            (("--labels", "1", "--guidance", "nan"), "guidance nan is not a finite number"),
            (("--labels", "1", "--seed", 2**64), "does not fit 64 bits"),
            (("--prompts", "a fox"), "takes class labels, not prompts"),
        ],
    )
    def test_mistakes(self, float_folder, tmp_path, arguments, message):
        assert message in refused("generate", float_folder, *arguments, "--out", tmp_path / "x.png")

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("x.docx", ".docx is not an image format"),
            ("x.psd", ".psd cannot hold such images"),
            ("x.xbm", ".xbm cannot hold such images"),
            ("file/x.png", "cannot be written: "),
            ("file/images", "cannot be written: "),
            ("x" * 300 + "/x.png", "cannot be written: "),
        ],
    )
    def test_no_image_can_be_there(self, tmp_path, out, message):
        """Before anything is read."""
        (tmp_path / "file").write_text("")
        assert message in refused("generate", tmp_path / "nowhere", "-l", 1, "--out", tmp_path / out)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_no_images_among_the_files_of_a_model(self, quantized):
        before = sorted(quantized.rglob("*"))
        for folder, held in ((quantized, "model_index.json"), (quantized / "transformer", "plan.json")):
            for out in (folder, folder / "grid.png"):
                message = refused("generate", quantized, "-l", 1, "--steps", 1, "--out", out)
                assert f"{folder} holds a model ({held}); give another folder for the images" in message
        assert sorted(quantized.rglob("*")) == before

    def test_images_that_cannot_be_written_are_kept(self, float_folder, tmp_path, monkeypatch):
        replace = Path.replace

        def full(path, target):
            if target.name == "x.png":
                raise OSError(28, "No space left on device")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", full)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        options = ("-l", "1,2", "--steps", 1, "--out", tmp_path / "out" / "x.png")
        message = refused("generate", float_folder, *options)
        assert "x.png cannot be written: No space left on device" in message
        assert list((tmp_path / "out").iterdir()) == []
        kept = Path(re.search(r"The images are in (.*)", message)[1])
        assert sorted(path.name for path in kept.iterdir()) == ["000.png", "001.png"]

    def test_a_pipeline_that_fails(self, float_folder, tmp_path):
        message = refused("generate", float_folder, "-l", 1, "--steps", 1001, "--out", tmp_path / "x.png")
        assert message.startswith("error: DiTPipeline failed while it ran: ValueError: `num_inference_steps`: 1001")
        assert message.endswith("The option --debug shows where\n")
        debugged = run("generate", float_folder, "-l", 1, "--steps", 1001, "--out", tmp_path / "x.png", "--debug")
        assert isinstance(debugged.exception.__cause__, ValueError)

    def test_packages_must_be_allowed(self, quantized, tmp_path):
        target = shutil.copytree(quantized, tmp_path / "q")
        (target / "transformer" / "plan.json").rename(target / "transformer" / "package.json")
        options = ("-l", "1", "--steps", 1, "--out", tmp_path / "x.png")
        assert "--allow-packages" in refused("generate", target, *options)
        assert "package.json" in refused("generate", target, *options, "--allow-packages")  # It is read, and is none.


class TestReport:
    def test_table(self, quantized):
        result = run("report", quantized)
        assert result.exit_code == 0
        assert result.stdout.rstrip("\n") == str(fxquant.report(quantized))
        assert "transformer_blocks.0" in run("report", quantized / "transformer", "--all").stdout

    def test_json(self, quantized):
        assert json.loads(run("report", quantized, "--json").stdout) == fxquant.report(quantized).to_json()

    def test_another_device(self, quantized, tmp_path):
        assert run("report", quantized, "--device", "cpu").stdout == run("report", quantized).stdout
        assert "device 'abacus' cannot be used" in refused("report", quantized, "--device", "abacus")
        assert "device 'abacus' cannot be used" in refused("profile", quantized, "--device", "abacus")
        out = ("--out", tmp_path / "x.png", "--device", "abacus")
        assert "device 'abacus' cannot be used" in refused("generate", quantized, "-l", 1, *out)

    def test_a_float_pipeline(self, float_folder):
        assert "holds no plan.json: no part of this pipeline is quantized" in refused("report", float_folder)

    def test_a_package_is_named(self, quantized, tmp_path):
        target = shutil.copytree(quantized, tmp_path / "q")
        (target / "transformer" / "plan.json").rename(target / "transformer" / "package.json")
        for folder in (target, target / "transformer"):
            assert "holds a package, compiled ahead of time, which has no plan" in refused("report", folder)
            assert "holds a package, compiled ahead of time, which has no plan" in refused("profile", folder)
        message = refused("export", target, tmp_path / "again", "--aot")
        assert "holds a package, which is already compiled; give what it was exported from" in message

    def test_debug_shows_the_traceback(self, tmp_path):
        result = run("report", tmp_path, "--debug")
        assert isinstance(result.exception, fxquant.FxquantError)


class TestNamesFromFiles:
    """What a stranger wrote into a plan reaches no terminal as it is."""

    @staticmethod
    def renamed(folder, name):
        path = folder / "transformer" / "plan.json"
        data = json.loads(path.read_text())
        data["layers"][name] = data["layers"].pop("transformer_blocks.0.attn1.to_q")
        data.pop("digest")
        path.write_text(json.dumps(data | {"digest": digest_of(data)}, indent=1) + "\n")

    @pytest.mark.parametrize("name", ["a\x1b[2J\x9b1mb", "x" * 10**7, "a\u202eb"], ids=["escapes", "long", "backwards"])
    def test_of_layers(self, quantized, tmp_path, name):
        target = shutil.copytree(quantized, tmp_path / "q")
        self.renamed(target, name)
        for command in (("report", target), ("report", target, "--all"), ("generate", target, "-l", 1, "-o", "x.png")):
            result = run(*command)
            printed = result.stdout + result.stderr
            assert len(printed) < 100_000
            assert printed.replace("\n", "").isprintable()

    def test_of_warnings_and_tables(self, capsys):
        output.show_warning(UserWarning("a\x1b[2Jb"))
        output.print_plain("a\x1b]0;title\x07b" + "y" * 10_000)
        printed = "".join(capsys.readouterr())
        assert printed.replace("\n", "").isprintable()
        assert "more characters" in printed


@pytest.mark.parametrize("category", [PortabilityWarning, QualityWarning, SpeedWarning])
def test_warnings_of_calls_are_shown_whoever_made_them(capsys, category):
    """They name the line that called the model, which is one of torch or diffusers."""
    with output.quiet():
        warnings.warn_explicit("far from float", category, "module.py", 1, module="torch.nn.modules.module")
        warnings.warn_explicit("of no use to users", UserWarning, "module.py", 2, module="torch.nn.modules.module")
    assert capsys.readouterr().err == "warning: far from float\n"


class TestProfile:
    def test_table(self, quantized):
        result = run("profile", quantized, "--backend", "native", "--rounds", 1, "--top", 2)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("model        DiTTransformer2DModel on native, batch 2\n")
        assert "more rows" in result.stdout

    def test_json(self, quantized):
        result = run("profile", quantized / "transformer", "--rounds", 1, "--json", "--no-float", "--batch", 3)
        data = json.loads(result.stdout)
        assert (data["batch"], data["backend"], list(data["calls"])) == (3, "fake-quant", ["quantized"])
        assert any("fallback" in warning for warning in data["warnings"])

    def test_mistakes(self, float_folder, quantized, tmp_path):
        assert "there is no folder" in refused("profile", tmp_path / "nowhere")
        assert "holds no plan.json" in refused("profile", float_folder)
        assert "unknown backend 'abacus'" in refused("profile", quantized, "--backend", "abacus")
        assert "a batch of 0 is too small" in refused("profile", quantized, "--batch", 0)


@pytest.mark.slow
def test_the_installed_command(quantized):
    """One real process: an error and a report, without the noise of the libraries."""
    command = [sys.executable, "-m", "fxquant.cli"]
    good = subprocess.run([*command, "report", str(quantized)], capture_output=True, text=True, check=True)
    assert good.stdout.startswith("model        DiTTransformer2DModel on fake-quant\n")
    assert good.stderr == ""
    bad = subprocess.run([*command, "report", "nowhere"], check=False, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: there is no folder nowhere\n")
