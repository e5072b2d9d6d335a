"""What the JSON files of checkpoints and packages may hold: types, ranges and sizes, checked before anything is built.

Each file has a pydantic model in a module of its own. The models check what one file says by itself; whether the files
belong together is checked on loading (:mod:`fxquant.storage.checkpoint`).
"""
