"""Chooses what is damaged in a folder, and how."""

from __future__ import annotations

import random
from pathlib import Path

from tests.mutations import raw
from tests.mutations.damage import damage, damage_values, sign, sign_alone


def changed(folder: Path, others: list[Path], rng: random.Random) -> str:
    """Damage one file of a folder; its digests are right again in nine of ten cases."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".npz"))
    path = rng.choice(files)
    if rng.random() < 0.08:
        told = raw.swap(path, [*files, *others], rng)
    elif rng.random() < 0.12:
        told = raw.damage_bytes(path, rng)
    elif path.suffix == ".npz":
        told = raw.damage_array(path, rng)
    elif path.suffix == ".json":
        told = damage_values(path, rng) if rng.random() < 0.7 else raw.damage_text(path, rng)
    else:
        told = damage_values(path, rng) if rng.random() < 0.5 else raw.damage_header(path, rng)
    if rng.random() < 0.9:
        sign_alone(path)
        sign(path.parent)
    return f"{path.name}: {told}"


def changed_values(folder: Path, others: list[Path], rng: random.Random) -> str:
    """The same for models, whose values a check cannot tell from others: so these are only changed to wrong ones."""
    if rng.random() < 0.6:
        return damage(folder, rng)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = rng.choice(files)
    if rng.random() < 0.3:
        told = raw.swap(path, others, rng)
    elif path.suffix == ".json":
        told = raw.damage_text(path, rng)
    else:
        told = raw.damage_header(path, rng)
    sign(folder)
    return f"{path.name}: {told}"
