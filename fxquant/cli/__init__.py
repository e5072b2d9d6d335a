"""The command line, ``fxquant``."""
