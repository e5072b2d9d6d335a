"""Where compiled kernels are kept: in a folder of the user's own, under the digest of what was compiled."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from fxquant.backends.native.compiled import build
from fxquant.backends.native.machine import Instructions
from fxquant.disk.files import digest

FLAGS = ("-mavx2",)
needs_owners = pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owners here")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, a compiler that writes a few bytes, and what it has written so far."""
    made: list[Path] = []

    def compile_(_: str, __: tuple[str, ...], folder: Path) -> Path:
        path = folder / "library.so"
        path.write_bytes(b"library")
        made.append(path)
        return path

    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_compiler", lambda: "c++")
    monkeypatch.setattr(build, "_digest", lambda *_: "0123")
    monkeypatch.setattr(build, "_compile", compile_)
    return made


def test_it_is_compiled_once(compiled: list[Path]) -> None:
    path = build._library(FLAGS)
    assert path.name == f"native-0123-{digest(path)}.so"
    assert build._library(FLAGS) == path
    assert len(compiled) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@needs_owners
def test_nobody_else_can_open_the_folder(compiled: list[Path]) -> None:
    before = os.umask(0)
    try:
        folder = build._library(FLAGS).parent
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()


@pytest.mark.parametrize("content", [b"librarx", b"libr", b""], ids=["flipped", "cut", "empty"])
def test_a_damaged_library_is_compiled_again(
    compiled: list[Path], caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = build._library(FLAGS)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert build._library(FLAGS) == path
    assert path.read_bytes() == b"library"
    assert len(compiled) == 2
    assert "is damaged and will be compiled again" in caplog.text


def test_a_damaged_library_that_another_process_removes_first(
    compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build._library(FLAGS)
    path.write_bytes(b"damaged")
    digest = build.digest

    def late(of: Path) -> str:
        path.unlink(missing_ok=True)
        return digest(of)

    monkeypatch.setattr(build, "digest", late)
    assert build._library(FLAGS).read_bytes() == b"library"
    assert len(compiled) == 2


def test_a_library_without_a_digest_is_not_loaded(compiled: list[Path]) -> None:
    folder = build.kernel_folder()
    for name in ("native-0123.so", "native-0123-planted.so"):
        (folder / name).write_bytes(b"planted")
    assert build._library(FLAGS).read_bytes() == b"library"
    assert not (folder / "native-0123-planted.so").exists()


@needs_owners
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to(compiled: list[Path], mode: int) -> None:
    folder = build._library(FLAGS).parent
    folder.chmod(mode)
    with pytest.raises(build.BuildError, match=r"can be written to by others.*FXQUANT_CACHE"):
        build._library(FLAGS)


@needs_owners
def test_a_folder_of_somebody_else(compiled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (build.cache_folder() / f"native-{other}").mkdir(parents=True)  # As anybody may in a shared folder.
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build._library(FLAGS)
    assert not compiled


@needs_owners
def test_a_link_in_place_of_the_folder(compiled: list[Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    build.cache_folder().mkdir()
    (build.cache_folder() / f"native-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.BuildError, match="is not a folder"):
        build._library(FLAGS)


def test_a_folder_that_cannot_be_made(compiled: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(build.BuildError, match=r"cannot be kept in .*FXQUANT_CACHE"):
        build._library(FLAGS)


def test_a_user_without_a_home(compiled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert build._library(FLAGS).exists()  # FXQUANT_CACHE is named.
    for name in ("FXQUANT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(build.BuildError, match=r"no home folder.*FXQUANT_CACHE"):
        build._library(FLAGS)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
def test_every_source_is_compiled_in_one_batch(most: int) -> None:
    sources = sorted(build.SOURCES.glob("*.cpp"))
    batches = build._batches(sources, most)
    assert len(batches) == min(most, len(sources))
    assert all(batches)
    assert sorted(source for batch in batches for source in batch) == sources


def test_batches_are_of_about_the_same_size() -> None:
    sizes = [sum(path.stat().st_size for path in batch) for batch in build._batches([*build.SOURCES.glob("*.cpp")], 2)]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3])
def test_sources_can_share_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(build, "_cores", lambda: most)
    assert build._compile(build._compiler(), Instructions.AVX2.flags, tmp_path).stat().st_size > 0
    assert len([*tmp_path.glob("*.o")]) == most


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to cores here")
def test_no_more_batches_than_cores_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert build._cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert build._cores() == len(allowed)
