"""Reference images: statistics files of ADM's evaluation, or folders of images."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.disk.files import few
from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError, ConfigurationError, EvaluationError, FxquantError, QualityWarning
from fxquant.evaluation.features import Extractor
from fxquant.evaluation.frechet import Array, Moments

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 32
_STATISTICS = {"mu": 1, "sigma": 2, "mu_s": 1, "sigma_s": 2}
_PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_ROUNDING = 1e-6  # Of the largest covariance: how far files of covariances are from symmetric.
_DEEP = ("I", "F")  # Modes of pictures with more than 8 bits per channel begin so; PIL cuts them off.


@dataclass
class Reference:
    """What images are compared with.

    Attributes:
        mean: Mean of the pooled features, ``[d]``.
        covariance: Their covariance, ``[d, d]``.
        spatial_mean: Mean of the spatial features of sFID; None if they are not known.
        spatial_covariance: Their covariance.
        pooled: The pooled features themselves, float32 ``[n, d]``, for precision and recall; None if unknown.
        images: From how many images the statistics were computed; None if unknown.
        sizes: Width and height of the images, all that occur; empty if unknown.
    """

    mean: Array
    covariance: Array
    spatial_mean: Array | None = None
    spatial_covariance: Array | None = None
    pooled: Tensor | None = None
    images: int | None = None
    sizes: frozenset[tuple[int, int]] = frozenset()

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
    for pair in _PAIRS:
        held = names.intersection(pair)
        if len(held) == 1:
            other = next(name for name in pair if name not in held)
            raise CheckpointError(f"{path} holds {held.pop()} but not {other}; copy it again")
    if not names & {"arr_0", "mu"}:
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
        EvaluationError: If the extractor fails on its images, for example because of their size.
    """
    if path.is_dir():
        return _computed(path, _read_pictures(path), extractor)
    names = _names(path)
    with _reading(path), np.load(path, allow_pickle=False) as file:
        found = {name: _numbers(file[name]) for name in _STATISTICS if name in names}
        pooled = torch.from_numpy(_numbers(file["pooled"]).astype(np.float32)) if "pooled" in names else None
    for name, array in found.items():
        _check_statistic(path, name, array)
    for first, second in _PAIRS:
        if first in found and len(found[first]) != len(found[second]):
            raise CheckpointError(
                f"{path}: {first} has {len(found[first])} features and {second} {len(found[second])}; copy it again"
            )
    if pooled is not None and not (pooled.ndim == 2 and len(pooled) and pooled.isfinite().all()):
        raise CheckpointError(f"{path}: pooled of shape {tuple(pooled.shape)} does not hold features; copy it again")
    computed = None
    if "arr_0" in names and (pooled is None or "mu" not in found):
        computed = _computed(path, _images_of(path), extractor)
        pooled = computed.pooled
    if "mu" not in found:
        assert computed is not None
        return computed
    sizes = frozenset() if computed is None else computed.sizes
    return Reference(found["mu"], found["sigma"], found.get("mu_s"), found.get("sigma_s"), pooled, sizes=sizes)


def _numbers(array: Any) -> Array:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype} where numbers are expected")
    return np.asarray(array, np.float64)


def _check_statistic(path: Path, name: str, array: Array) -> None:
    good = array.ndim == _STATISTICS[name] and len({*array.shape}) == 1 and array.size and np.isfinite(array).all()
    if not good or (array.ndim == 2 and not _is_covariance(array)):
        raise CheckpointError(f"{path}: {name} of shape {array.shape} is not a mean or covariance; copy it again")


def _is_covariance(array: Array) -> bool:
    """Whether a matrix is symmetric and no variance negative, in any direction and but for rounding in float32."""
    if np.abs(array - array.T).max() > _ROUNDING * np.abs(array).max():
        return False
    try:
        np.linalg.cholesky(array + (_ROUNDING * np.trace(array) + np.finfo(np.float64).tiny) * np.eye(len(array)))
    except np.linalg.LinAlgError:
        return False
    return True


def reference_of(batches: Iterable[Tensor], extractor: Extractor) -> Reference:
    """The reference that batches of uint8 images ``[n, 3, H, W]`` are."""
    moments, spatial, pooled = Moments(), Moments(), []
    sizes = set()
    for images in batches:
        sizes.add((images.shape[3], images.shape[2]))
        found = extractor(images)
        moments.add(found.pooled)
        pooled.append(found.pooled)
        if found.spatial is not None:
            spatial.add(found.spatial)
    whole = torch.cat(pooled)
    found_all = Reference(moments.mean, moments.covariance, pooled=whole, images=len(whole), sizes=frozenset(sizes))
    if not spatial.count:
        return found_all
    return replace(found_all, spatial_mean=spatial.mean, spatial_covariance=spatial.covariance)


def _computed(path: Path, batches: Iterable[Tensor], extractor: Extractor) -> Reference:
    """The reference that the images of a file or folder are; errors of the extractor name it."""
    try:
        return reference_of(batches, extractor)
    except EvaluationError as error:
        raise EvaluationError(f"{path}: {error}") from error


def _names(path: Path) -> set[str]:
    with _reading(path, "give the reference batch of openai/guided-diffusion, or a folder of images"):
        if not path.exists():
            raise ValueError("there is no such file")
        if path.suffix.lower() in SUFFIXES:
            raise ValueError("it is one picture")
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, as npy files do; write it with numpy.savez")
        with file:
            return set(file.files)


@contextmanager
def _reading(path: Path, then: str = "copy it again") -> Iterator[None]:
    """Say which npz cannot be read, and what to do then."""
    try:
        yield
    except FxquantError:
        raise
    except Exception as error:  # A damaged zip file raises nearly anything.
        raise CheckpointError(f"{path} cannot be read as an npz: {error}; {then}") from error


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _read_pictures(folder: Path) -> Iterator[Tensor]:
    from PIL import Image

    held: list[Tensor] = []
    for path in _pictures(folder):
        try:
            with Image.open(path) as image:
                if image.mode.startswith(_DEEP):
                    raise ValueError("it has more than 8 bits per channel")
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # A damaged image raises nearly anything.
            raise CheckpointError(f"{path} cannot be read as an image: {error}; remove or convert it") from error
        if held and (len(held) == _BATCH or held[0].shape != pixels.shape):
            yield torch.stack(held)
            held = []
        held.append(pixels)
    if held:
        yield torch.stack(held)


def _images_of(path: Path) -> Iterator[Tensor]:
    """The images ``arr_0`` of an npz, ``[n, H, W, 3]`` there, of which only a batch is in memory at a time."""
    with _reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise CheckpointError(f"{path}: arr_0 should be uint8 images [n, H, W, 3], not {dtype} {shape}")
        for start in range(0, shape[0], _BATCH):
            count = min(_BATCH, shape[0] - start)
            data = file.read(count * shape[1] * shape[2] * 3)
            array = np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])
            yield torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def check_sizes(reference: Reference, width: int, height: int, where: object) -> None:
    """Warn if real images have another size than the generated ones: networks see other details then."""
    others = sorted(reference.sizes - {(width, height)})
    if others:
        shown = few([f"{across} x {down}" for across, down in others])
        warnings.warn(
            f"{where} has images of {shown} pixels, and the generated ones have {width} x {height}; figures that "
            "compare them are not those of the papers. Cut the real images to the same shape and resize them to "
            f"{width} x {height}, as ADM does, or give statistics of such images",
            QualityWarning,
            stacklevel=2,
        )


def check_features(reference: Reference, pooled: int, spatial: int | None, where: object) -> None:
    """Refuse statistics of another extractor.

    Raises:
        ConfigurationError: Names both numbers of features, or says that the statistics are not finite.
    """
    for held in (reference.mean, reference.covariance, reference.spatial_mean, reference.spatial_covariance):
        if held is not None and not np.isfinite(held).all():
            raise ConfigurationError(f"{where} has statistics with NaN or infinity; compute them again")
    known = None if reference.spatial_mean is None else len(reference.spatial_mean)
    features = None if reference.pooled is None else reference.pooled.shape[1]
    for there, here in ((len(reference.mean), pooled), (features, pooled), (known, spatial)):
        if there is not None and here is not None and there != here:
            raise ConfigurationError(
                f"{where} has statistics of {there} features, but the extractor finds {here}; use the network that the "
                "statistics were made with"
            )
