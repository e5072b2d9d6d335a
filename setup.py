"""Finds the packages: the root folders passes/ and backends/ are installed as fxquant.passes and fxquant.backends.

All other settings are in pyproject.toml. This file exists because a table there cannot find packages under another
name, and a manual list would silently leave a new backend out of the wheel.
"""

from setuptools import find_packages, setup

ROOTS = {"fxquant": "fxquant", "fxquant.passes": "passes", "fxquant.backends": "backends"}

setup(
    package_dir=ROOTS,
    packages=[
        package
        for root, folder in ROOTS.items()
        for package in (root, *(f"{root}.{below}" for below in find_packages(folder)))
    ],
)
