"""The command ``fxquant export``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fxquant.cli.app import Debug, Folder, app
from fxquant.cli.completion import backends
from fxquant.cli.output import err, print_plain, quiet, status
from fxquant.errors import ConfigurationError


class Format(StrEnum):
    """Forms in which other tools read a quantized model."""

    onnx = "onnx"
    openvino = "openvino"
    compressed_tensors = "compressed-tensors"
    comfyui = "comfyui"
    int8 = "int8"


class Names(StrEnum):
    """Names of tensors in ComfyUI's file."""

    comfyui = "comfyui"
    of_the_class = "class"


_EXPORT_EXAMPLES = """[bold]Examples[/]

  fxquant export dit-w8a8 dit-w8a8-compiled --aot --backend native

  fxquant generate dit-w8a8-compiled --labels 207,360,387 --allow-packages --out grid.png

  fxquant export dit-w8a8 dit-w8a8-onnx --format onnx
"""


@app.command(epilog=_EXPORT_EXAMPLES, no_args_is_help=True)
def export(
    folder: Folder,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the exported model to.")],
    aot: Annotated[bool, typer.Option("--aot", help="Compile ahead of time, with AOTInductor.")] = False,
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="Write the model in a form that another tool reads.")
    ] = None,
    part: Annotated[
        str, typer.Option("--part", help="With --format: the quantized part of a pipeline to write.")
    ] = "transformer",
    names: Annotated[
        Names | None,
        typer.Option(
            "--names", help="With --format comfyui: the names that ComfyUI reads (the default), or those of the class."
        ),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            "--original",
            help="With a --format that holds only weights: folder of the float pipeline or model, for tensors that no "
            "call reads.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "-b", autocompletion=backends, help="With --aot: by default the one it was quantized for."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --aot: replace what is at OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Compile a quantized model for this machine, or write it in a form that another tool reads.

    A compiled model loads in a second and runs without tracing. It is a program, which runs when loaded: load only
    programs from people you trust. Compiling needs a C++ compiler.
    """
    if aot == (format is not None):
        raise ConfigurationError("pass --aot to compile for this machine, or --format to write for another tool")
    if format is not None:
        if backend is not None or overwrite:
            raise ConfigurationError("--backend and --overwrite are for --aot; --format writes a new folder")
        if names is not None and format is not Format.comfyui:
            raise ConfigurationError(f"--names is for --format comfyui, and {format.value} has the names of the class")
        if original is not None and format in (Format.onnx, Format.openvino):
            raise ConfigurationError(f"--original is for forms that hold only weights, and {format.value} holds graphs")
        _export_format(folder, out_folder, format, part, original, {} if names is None else {"names": names.value})
        return
    if names is not None or original is not None:
        raise ConfigurationError("--names is for --format comfyui, and --original for forms that hold only weights")
    with quiet(), status("importing torch"):
        from fxquant.storage.aot.export import export_folder

        def progress(number: int, total: int, seconds: float | None) -> None:
            if seconds is not None:
                err.print(f"graph {number + 1} of {total}: compiled in {seconds:.0f} s", highlight=False)

    with quiet(), status("compiling, which takes minutes"):
        found = export_folder(folder, out_folder, backend=backend, overwrite=overwrite, progress=progress)
    print_plain(f"compiled in {sum(found.seconds):.0f} s, {found.bytes / 1e6:.1f} MB, written to {out_folder}")


def _export_format(
    folder: Path, out_folder: Path, format: Format, part: str, original: Path | None, named: Mapping[str, str]
) -> None:
    with quiet(), status("importing torch"):
        import fxquant
        from fxquant.export.formats import FORMATS
        from fxquant.storage.pipeline_folders import INDEX_FILE

    inner = folder / part if (folder / INDEX_FILE).is_file() else folder
    with quiet(), status(f"reading {inner}"):
        model = fxquant.load(inner, backend="fake-quant")
    options: dict[str, Any] = dict(named)
    if original is not None:
        with quiet(), status(f"reading {original}"):
            inside = {"subfolder": part} if (original / INDEX_FILE).is_file() else {}
            options["original"] = type(model.architecture.skeleton).from_pretrained(original, **inside)
    with quiet(), status(f"writing {out_folder}"):
        FORMATS[format.value](model, out_folder, **options)
    size = sum(path.stat().st_size for path in out_folder.rglob("*") if path.is_file())
    print_plain(f"{format.value}: {size / 1e6:.1f} MB, written to {out_folder}")
