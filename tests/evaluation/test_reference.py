"""Real images: statistics of ADM's evaluation, and folders of images."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fxquant.errors import CheckpointError, ConfigurationError, EvaluationError, QualityWarning
from fxquant.evaluation import reference as module
from fxquant.evaluation.features import Extractor
from fxquant.evaluation.reference import check_features, check_reference, check_sizes, has_spatial, read_reference
from tests.evaluation.pipes import Pooled

EXTRACTOR = Extractor(Pooled())
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """As ADM's evaluation computes them."""
    found = EXTRACTOR(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert found.spatial is not None
    pooled, spatial = found.pooled.double().numpy(), found.spatial.double().numpy()
    return {
        "mu": pooled.mean(axis=0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(axis=0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }


def test_statistics_and_images_of_adm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 4)
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, arr_0=IMAGES[:5], **statistics(IMAGES))
    assert check_reference(path) and has_spatial(path)
    found = read_reference(path, EXTRACTOR)
    np.testing.assert_array_equal(found.mean, statistics(IMAGES)["mu"])  # Of all images, not of the five.
    assert found.pooled is not None and len(found.pooled) == 5
    np.savez(path, **{name: statistics(IMAGES)[name].astype(np.float32) for name in ("mu", "sigma")})
    assert not check_reference(path) and not has_spatial(path)
    found = read_reference(path, EXTRACTOR)
    assert found.pooled is None and found.spatial_mean is None and found.mean.dtype == np.float64


@pytest.mark.parametrize("kind", ["npz", "compressed", "folder"])
def test_images_give_the_same_statistics(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 4)
    path = tmp_path / "images.npz"
    if kind == "folder":
        path = tmp_path / "images" / "deep"
        path.mkdir(parents=True)
        for number, image in enumerate(IMAGES):
            Image.fromarray(image).save(path / f"{number:02d}.png")
        path = path.parent
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, arr_0=IMAGES)
    assert check_reference(path) and has_spatial(path)
    found, expected = read_reference(path, EXTRACTOR), statistics(IMAGES)
    np.testing.assert_allclose(found.mean, expected["mu"], rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected["sigma"], rtol=1e-9)
    np.testing.assert_allclose(found.spatial_covariance, expected["sigma_s"], rtol=1e-9)
    assert found.pooled is not None and len(found.pooled) == 11


def test_saved_statistics_are_read_back(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    made = read_reference(tmp_path / "images.npz", EXTRACTOR)
    made.save(tmp_path / "saved.npz")
    assert check_reference(tmp_path / "saved.npz") and has_spatial(tmp_path / "saved.npz")
    found = read_reference(tmp_path / "saved.npz", EXTRACTOR)
    np.testing.assert_array_equal(found.covariance, made.covariance)
    assert found.pooled is not None and made.pooled is not None and torch.equal(found.pooled, made.pooled)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    cases: list[tuple[Any, str]] = [
        (lambda: None, r"r.npz cannot be read as an npz: there is no such file"),
        (lambda: path.write_bytes(b"PK nothing"), r"r.npz cannot be read as an npz"),
        (lambda: np.savez(path, x=IMAGES), r"r.npz holds x; a reference has mu and sigma"),
        (lambda: np.savez(path, mu=np.zeros(6)), r"r.npz holds mu but not sigma"),
        (lambda: np.savez(path, mu=np.zeros(6), sigma=np.zeros((6, 5))), r"sigma of shape \(6, 5\)"),
        (lambda: np.savez(path, mu=np.full(6, np.nan), sigma=np.zeros((6, 6))), r"mu of shape"),
        (lambda: np.savez(path, mu=np.zeros(2), sigma=np.array([[1.0, 3], [3, 1]])), r"sigma of shape"),
        (lambda: np.savez(path, arr_0=IMAGES.astype(np.float32)), r"arr_0 should be uint8 images"),
        (lambda: np.savez(path, mu=np.array([None]), sigma=np.zeros((1, 1))), r"r.npz cannot be read"),
    ]
    for make, reason in cases:
        make()
        with pytest.raises(CheckpointError, match=reason):
            check_reference(path)
            read_reference(path, EXTRACTOR)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="empty holds no images"):
        check_reference(empty)
    (empty / "a.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"a.png cannot be read as an npz: it is one picture; .*or a folder"):
        check_reference(empty / "a.png")
    with pytest.raises(CheckpointError, match=r"a.png cannot be read"):
        read_reference(empty, EXTRACTOR)


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", **statistics(IMAGES))
    found = read_reference(tmp_path / "r.npz", EXTRACTOR)
    check_features(found, 6, 8, "r.npz")
    for sizes in ((2048, 8), (6, 2023)):
        with pytest.raises(ConfigurationError, match=r"r.npz has statistics of \d features, but the extractor finds 2"):
            check_features(found, *sizes, "r.npz")


def test_files_that_numpy_reads_but_no_tool_wrote_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    good = statistics(IMAGES)
    own = {name: good[name] for name in ("mu", "sigma")}

    def member(name: str, data: bytes) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, data)

    def images(shape: tuple[int, ...]) -> None:
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        member("arr_0.npy", file.getvalue() + IMAGES.tobytes())

    def damaged() -> None:
        np.savez(path, arr_0=IMAGES)
        data = bytearray(path.read_bytes())
        data[400] ^= 255
        path.write_bytes(data)

    cases: list[tuple[Any, str]] = [
        (lambda: np.save(path.open("wb"), IMAGES), "it holds one array, as npy files do"),
        (lambda: member("arr_0", b"text"), "cannot be read as an npz"),
        (lambda: member("arr_0.npy", b""), "cannot be read as an npz"),
        (lambda: member("arr_0.npy", b"text" * 9), "cannot be read as an npz"),
        (damaged, "cannot be read as an npz: Bad CRC"),
        (lambda: images((10**9, 16, 16, 3)), "cannot be read as an npz"),
        (lambda: images((-5, 16, 16, 3)), r"arr_0 should be uint8 images \[n, H, W, 3\], not uint8 \(-5"),
        (lambda: images((11, 16, 0, 3)), "arr_0 should be uint8 images"),
        (lambda: np.savez(path, **own, mu_s=good["mu_s"]), "holds mu_s but not sigma_s"),
        (lambda: np.savez(path, arr_0=IMAGES, sigma=good["sigma"]), "holds sigma but not mu"),
        (lambda: np.savez(path, mu=good["mu"], sigma=np.eye(7)), "mu has 6 features and sigma 7"),
        (lambda: np.savez(path, **own, mu_s=good["mu_s"], sigma_s=np.eye(3)), "mu_s has 8 features and sigma_s 3"),
        (lambda: np.savez(path, mu=good["mu"], sigma=good["sigma"] * 1j), "holds complex128 where numbers"),
        (lambda: np.savez(path, mu=np.zeros(6, [("a", "f4")]), sigma=good["sigma"]), "where numbers are expected"),
        (lambda: np.savez(path, mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu of shape"),
        (lambda: np.savez(path, mu=good["mu"], sigma=-good["sigma"]), "is not a mean or covariance"),
        (lambda: np.savez(path, mu=good["mu"], sigma=np.triu(good["sigma"])), "is not a mean or covariance"),
        (lambda: np.savez(path, **own, pooled=np.full((9, 6), np.nan)), "pooled of shape"),
        (lambda: np.savez(path, **own, pooled=np.zeros(6)), "pooled of shape"),
    ]
    for make, reason in cases:
        make()
        with pytest.raises(CheckpointError, match=reason):
            check_reference(path)
            read_reference(path, EXTRACTOR)


def test_pictures_that_bytes_cannot_hold_are_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # Unpacked it would have 10 GB.
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(CheckpointError, match=r"bomb.png cannot be read as an image: Image size"):
        read_reference(tmp_path, EXTRACTOR)
    (tmp_path / "bomb.png").unlink()
    Image.fromarray(IMAGES[0, :, :, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(CheckpointError, match=r"deep.png cannot be read as an image: it has more than 8 bits"):
        read_reference(tmp_path, EXTRACTOR)


def test_features_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", **statistics(IMAGES), pooled=np.zeros((9, 5)))
    found = read_reference(tmp_path / "r.npz", EXTRACTOR)
    with pytest.raises(ConfigurationError, match=r"statistics of 5 features, but the extractor finds 6"):
        check_features(found, 6, 8, "r.npz")


def test_real_images_of_another_size_cause_a_warning(tmp_path: Path) -> None:
    """Also if only precision and recall use them: then they are those of the reference of another resolution."""
    path = tmp_path / "r.npz"
    np.savez(path, arr_0=IMAGES, **statistics(IMAGES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sizes(read_reference(path, EXTRACTOR), 16, 16, "r.npz")
    with pytest.warns(QualityWarning, match=r"r.npz has images of 16 x 16 pixels, and the generated ones have 32 x 20"):
        check_sizes(read_reference(path, EXTRACTOR), 32, 20, "r.npz")
    for number, size in enumerate([(16, 16), (24, 16), (16, 16)]):
        Image.new("L", size).save(tmp_path / f"{number}.png")
    assert read_reference(tmp_path, EXTRACTOR).sizes == {(16, 16), (24, 16)}
    with pytest.warns(QualityWarning, match=r"has images of 24 x 16 pixels"):
        check_sizes(read_reference(tmp_path, EXTRACTOR), 16, 16, tmp_path)


def test_an_extractor_that_fails_on_real_images_names_them(tmp_path: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    np.savez(tmp_path / "r.npz", arr_0=IMAGES)
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    for path in (tmp_path / "r.npz", tmp_path):
        with pytest.raises(EvaluationError, match=rf"{path}: the feature extractor Sequential failed on unit images"):
            read_reference(path, Extractor(linear))
