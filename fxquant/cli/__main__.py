"""The entry point of the command line. Help lists the commands in the order of these imports."""

from fxquant.cli.quantize import quantize  # isort: skip
from fxquant.cli.generate import generate  # isort: skip
from fxquant.cli.eval import evaluate  # isort: skip
from fxquant.cli.export import export  # isort: skip
from fxquant.cli.balance import balance  # isort: skip
from fxquant.cli.report import report  # isort: skip
from fxquant.cli.attribute import attribute  # isort: skip
from fxquant.cli.allocate import search, sensitivity  # isort: skip
from fxquant.cli.statistics import merge_statistics, statistics  # isort: skip
from fxquant.cli.inspect import inspect  # isort: skip
from fxquant.cli.explain import explain  # isort: skip
from fxquant.cli.diff import diff  # isort: skip
from fxquant.cli.graph import graph  # isort: skip
from fxquant.cli.opt import opt  # isort: skip
from fxquant.cli.profile import profile  # isort: skip
from fxquant.cli.plot import plot  # isort: skip
from fxquant.cli.list import list_  # isort: skip
from fxquant.cli.doctor import doctor  # isort: skip
from fxquant.cli.new_pass import new_pass  # isort: skip
from fxquant.cli.app import app

__all__ = [
    "app",
    "attribute",
    "balance",
    "diff",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "generate",
    "graph",
    "inspect",
    "list_",
    "main",
    "merge_statistics",
    "new_pass",
    "opt",
    "plot",
    "profile",
    "quantize",
    "report",
    "search",
    "sensitivity",
    "statistics",
]


def main() -> None:
    """Run the command line. This is the console entry point."""
    app()


if __name__ == "__main__":
    main()
