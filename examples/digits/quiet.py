"""Hides what libraries log when they are imported, if this module is imported before them."""

from fxquant.cli.output import quiet_imports

quiet_imports()
