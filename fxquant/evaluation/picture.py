"""A picture of some images: the float model's above the quantized model's, and their difference below."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fxquant.disk.folders import check_writable
from fxquant.disk.whole_file import whole_file
from fxquant.errors import ConfigurationError, WriteError

COLUMNS = 8
DIFFERENCE = 4
"""Factor of the shown difference, so that small ones can be seen."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_picture(path: Path) -> None:
    """Refuse a name that no picture can have, or a place where none can be written.

    Raises:
        ConfigurationError: Says which names can.
        WriteError: If a folder has the name, or the folder of the picture cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"{path} is not the name of a picture; give one such as grid.png")
    if path.is_dir():
        raise WriteError(f"{path} is a folder; choose another name for the picture")
    check_writable(path.resolve().parent)


def grid(images: Tensor, reference: Tensor | None = None, columns: int = COLUMNS) -> Tensor:
    """Images side by side in rows.

    Args:
        images: uint8 ``[n, 3, H, W]`` of the quantized model.
        reference: Those of the float model. Each row of them is above the row of ``images``; below is the absolute
            difference, times :data:`DIFFERENCE`.
        columns: Images per row.

    Returns:
        uint8 ``[3, rows * H, columns * W]``.
    """
    bands = []
    for start in range(0, len(images), columns):
        made = images[start : start + columns]
        rows = [made]
        if reference is not None:
            truth = reference[start : start + columns]
            difference = (made.int() - truth.int()).abs() * DIFFERENCE
            rows = [truth, made, difference.clamp(max=255).byte()]
        for row in rows:
            blank = torch.zeros(columns - len(row), *row.shape[1:], dtype=torch.uint8)
            bands.append(torch.cat([*row, *blank], dim=2))
    return torch.cat(bands, dim=1)


def write_grid(path: str | Path, images: Tensor, reference: Tensor | None = None, columns: int = COLUMNS) -> None:
    """Write :func:`grid` as a picture.

    Raises:
        ConfigurationError: If the name is not one of a picture.
        WriteError: If it cannot be written.
    """
    from PIL import Image

    path = Path(path)
    check_picture(path)
    kind = Image.registered_extensions()[path.suffix.lower()]
    with whole_file(path) as scratch, scratch.open("wb") as file:
        Image.fromarray(grid(images, reference, columns).permute(1, 2, 0).numpy()).save(file, kind)
