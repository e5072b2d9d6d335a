"""Hook of MkDocs: a page with all commands and their options, read from the command line application itself."""

from __future__ import annotations

import re
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from fxquant.cli.__main__ import app

PAGE = "reference/commands.md"
_MARKUP = re.compile(r"\[/?[a-z]*\]")


def on_files(files: Files, config: Any) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=text_of(typer.main.get_command(app))))
    return files


def text_of(group: Any) -> str:
    """The page, as Markdown."""
    parts = ["# Commands\n", "`fxquant COMMAND --help` prints the same. `--debug` shows the traceback of an error.\n"]
    for name, command in group.commands.items():
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join(["fxquant", name, *(_shown(one) for one in arguments), "[OPTIONS]"])
        parts += [f"## {name}\n", f"{command.help}\n", f"```console\n$ {usage}\n```\n"]
        parts += ["| | default | |", "|---|---|---|", *(_row(one) for one in command.params if one.name != "debug"), ""]
    return "\n".join(parts)


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{_shown(parameter)}`"
    default = "required" if parameter.required else parameter.default
    shown = "" if default is None or default is False else str(getattr(default, "value", default))
    help_text = _MARKUP.sub("", parameter.help or "").replace("|", "\\|")
    return f"| {names} | {shown} | {help_text} |"
