"""The command ``fxquant doctor``."""

from __future__ import annotations

from typing import Any

from fxquant.cli.app import AsJson, Debug, app
from fxquant.cli.output import print_json, print_plain, quiet, status


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Show versions, processor, devices and caches, and what each backend runs on this machine.

    Kernels that are compiled at first use are compiled now, if they can be.
    """
    with quiet(), status("importing torch and examining the machine"):
        from fxquant.inspect.machine import examine

        found = examine()
    if as_json:
        print_json(found)
    else:
        print_plain("\n\n".join(_section(name, rows) for name, rows in found.items()))


def _section(name: str, rows: dict[str, Any]) -> str:
    lines = [_line(key, value) for key, value in rows.items()]
    return "\n".join([name, *(f"  {line}" for line in lines)])


def _line(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        value = {True: "yes", False: "no", None: "not installed"}[value]
    if isinstance(value, dict):
        return "\n    ".join([key, *(f"{device}: {told}" for device, told in value.items())])
    return f"{key:<24}{value}"
