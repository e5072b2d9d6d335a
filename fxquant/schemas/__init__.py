"""What the JSON files of checkpoints and packages may hold: types, ranges and sizes, checked before anything is built.

Each file has a pydantic model in a module of its own. A model checks one file alone; loading checks whether the files
belong together (:mod:`fxquant.storage.checkpoint`).
"""
