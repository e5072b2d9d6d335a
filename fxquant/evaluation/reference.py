"""Reference images: statistics files of ADM's evaluation, or folders of images."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.evaluation.features import Extractor
from fxquant.evaluation.frechet import Array, Moments

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 32
_STATISTICS = {"mu": 1, "sigma": 2, "mu_s": 1, "sigma_s": 2}


@dataclass
class Reference:
    """What images are compared with.

    Attributes:
        mean: Mean of the pooled features, ``[d]``.
        covariance: Their covariance, ``[d, d]``.
        spatial_mean: Mean of the spatial features of sFID; None if they are not known.
        spatial_covariance: Their covariance.
        pooled: The pooled features themselves, float32 ``[n, d]``, for precision and recall; None if unknown.
    """

    mean: Array
    covariance: Array
    spatial_mean: Array | None = None
    spatial_covariance: Array | None = None
    pooled: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write the statistics as an npz of ADM's evaluation: ``mu``, ``sigma``, and ``mu_s``, ``sigma_s``."""
        arrays = {"mu": self.mean, "sigma": self.covariance}
        if self.spatial_mean is not None and self.spatial_covariance is not None:
            arrays |= {"mu_s": self.spatial_mean, "sigma_s": self.spatial_covariance}
        if self.pooled is not None:
            arrays |= {"pooled": self.pooled.numpy()}
        with whole_file(path) as scratch, scratch.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def check_reference(path: Path) -> bool:
    """Refuse a file or folder that cannot be a reference, before anything slow.

    Returns:
        Whether precision and recall can be computed: whether there are images or features.

    Raises:
        CheckpointError: If there is nothing, or something else.
    """
    if path.is_dir():
        if not _pictures(path):
            raise CheckpointError(f"{path} holds no images ({', '.join(SUFFIXES)}); give another folder or an npz")
        return True
    names = _names(path)
    if "arr_0" not in names and not {"mu", "sigma"} <= names:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}; a reference has mu and sigma, or images in arr_0, "
            "as the reference batches of openai/guided-diffusion have"
        )
    return bool(names & {"arr_0", "pooled"})


def has_spatial(path: Path) -> bool:
    """Whether a reference holds spatial statistics, or images to compute them from."""
    return path.is_dir() or bool(_names(path) & {"mu_s", "arr_0"})


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """A reference from an npz or a folder of images; images go through the extractor.

    An npz of ADM's evaluation holds the statistics ``mu``, ``sigma``, ``mu_s`` and ``sigma_s`` of all real images, and
    10,000 images as ``arr_0`` for precision and recall. Statistics that are there are used as they are.

    Raises:
        CheckpointError: If it cannot be read.
        ConfigurationError: If its statistics have another number of features than the extractor finds.
    """
    if path.is_dir():
        return reference_of(_read_pictures(path), extractor)
    names = _names(path)
    found: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name], np.float64) for name in _STATISTICS if name in names}
            pooled = torch.from_numpy(np.asarray(file["pooled"], np.float32)) if "pooled" in names else None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
    for name, array in found.items():
        if array.ndim != _STATISTICS[name] or len({*array.shape}) != 1 or not np.isfinite(array).all():
            raise CheckpointError(f"{path}: {name} of shape {array.shape} is not a mean or covariance; copy it again")
    computed = None
    if "arr_0" in names and (pooled is None or "mu" not in found):
        computed = reference_of(_images_of(path), extractor)
        pooled = computed.pooled
    if "mu" not in found:
        assert computed is not None
        return computed
    return Reference(found["mu"], found["sigma"], found.get("mu_s"), found.get("sigma_s"), pooled)


def reference_of(batches: Iterable[Tensor], extractor: Extractor) -> Reference:
    """The reference that batches of uint8 images ``[n, 3, H, W]`` are."""
    moments, spatial, pooled = Moments(), Moments(), []
    for images in batches:
        found = extractor(images)
        moments.add(found.pooled)
        pooled.append(found.pooled)
        if found.spatial is not None:
            spatial.add(found.spatial)
    whole = torch.cat(pooled)
    if not spatial.count:
        return Reference(moments.mean, moments.covariance, pooled=whole)
    return Reference(moments.mean, moments.covariance, spatial.mean, spatial.covariance, whole)


def _names(path: Path) -> set[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(getattr(file, "files", ()))
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read as an npz: {error}; give the reference batch of openai/guided-diffusion, or a "
            "folder of images"
        ) from error


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _read_pictures(folder: Path) -> Iterator[Tensor]:
    from PIL import Image

    held: list[Tensor] = []
    for path in _pictures(folder):
        try:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as an image: {error}; remove it") from error
        if held and (len(held) == _BATCH or held[0].shape != pixels.shape):
            yield torch.stack(held)
            held = []
        held.append(pixels)
    if held:
        yield torch.stack(held)


def _images_of(path: Path) -> Iterator[Tensor]:
    """The images ``arr_0`` of an npz, ``[n, H, W, 3]`` there, of which only a batch is in memory at a time."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not shape[0]:
            raise CheckpointError(f"{path}: arr_0 should be uint8 images [n, H, W, 3], not {dtype} {shape}")
        for start in range(0, shape[0], _BATCH):
            count = min(_BATCH, shape[0] - start)
            data = file.read(count * shape[1] * shape[2] * 3)
            array = np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])
            yield torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def check_features(reference: Reference, pooled: int, spatial: int | None, where: object) -> None:
    """Refuse statistics of another extractor.

    Raises:
        ConfigurationError: Names both numbers of features.
    """
    known = None if reference.spatial_mean is None else len(reference.spatial_mean)
    for there, here in ((len(reference.mean), pooled), (known, spatial)):
        if there is not None and here is not None and there != here:
            raise ConfigurationError(
                f"{where} has statistics of {there} features, but the extractor finds {here}; use the network that the "
                "statistics were made with"
            )
