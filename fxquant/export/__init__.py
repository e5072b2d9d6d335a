"""Ways out to other tools: balanced float models, and files that other tools read.

Nothing here changes a model of the caller. This room writes files through :mod:`fxquant.disk`.
"""
