"""Parts of a job come back as they were kept, and only where they belong."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fxquant.disk.finished_work import FinishedWork, Part, check_numbers, digest_of_tensor, working_in
from fxquant.errors import FolderInUseError, ResumeWarning, WriteError

FROM = {"weights": "1", "options": "a"}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[FinishedWork]:
    with working_in(tmp_path / "work") as opened:
        assert opened is not None
        yield opened


def tensors() -> dict[str, Tensor]:
    whole = torch.arange(12.0).reshape(3, 4)
    return {
        "plain": whole,
        "view of it": whole[1:],
        "turned": whole.T,
        "small": torch.tensor(True),
        "none": torch.empty(0, 3),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "complex": torch.complex(torch.ones(2), torch.zeros(2)),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    }


def test_tensors_of_all_kinds_and_values_come_back(work: FinishedWork) -> None:
    work.save("a/b", FROM, tensors(), {"list": [1, 2.5, None], "nan": float("inf")})
    found = work.load("a/b", FROM)
    assert found is not None and found.data == {"list": [1, 2.5, None], "nan": float("inf")}
    assert found.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert digest_of_tensor(found.tensors[name]) == digest_of_tensor(tensor), name
    work.save("empty", FROM)
    assert work.load("empty", FROM) == Part({}, None)


def test_digests_do_not_depend_on_layouts() -> None:
    """Kernels for processors without AVX-512 keep weights in a layout of oneDNN."""
    tensor = torch.eye(3)
    found = {digest_of_tensor(tensor), digest_of_tensor(tensor.to_sparse())}
    if torch.backends.mkldnn.is_available():
        found.add(digest_of_tensor(tensor.to_mkldnn()))
    assert len(found) == 1 and digest_of_tensor(2 * tensor) not in found


def test_a_part_is_computed_once(work: FinishedWork) -> None:
    computed: list[int] = []

    def compute() -> Part:
        computed.append(1)
        return Part({"x": torch.ones(2)}, len(computed))

    first, second = work.part("p", FROM, compute), work.part("p", FROM, compute)
    assert first.data == second.data == 1 and len(computed) == 1


def test_the_warning_names_what_differs_and_comes_once(work: FinishedWork) -> None:
    for name in ("one", "two"):
        work.save(name, FROM)
    other = {**FROM, "weights": "2"}
    with pytest.warns(ResumeWarning, match="another run, which differs in weights; they are not used, and one"):
        assert work.load("one", other) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert work.load("two", other) is None
        assert work.room("inner").load("two", other) is None
    with pytest.warns(ResumeWarning, match="differs in options"):
        assert work.load("two", {**FROM, "options": "b"}) is None


def test_another_version_computes_anew(tmp_path: Path) -> None:
    with working_in(tmp_path, {"version of torch": "2.13"}) as work:
        assert work is not None
        work.save("p", FROM)
    with working_in(tmp_path, {"version of torch": "2.14"}) as work:
        assert work is not None
        with pytest.warns(ResumeWarning, match="differs in version of torch"):
            assert work.load("p", FROM) is None


def test_every_damage_is_found(work: FinishedWork) -> None:
    work.save("p", FROM, {"x": torch.arange(8.0)}, {"n": 1})
    path = work.path("p")
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        position = int(torch.randint(len(whole), (), generator=generator))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << number % 8
        path.write_bytes(damaged if number % 2 else whole[:position])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = work.load("p", FROM)
        # The bits of the metadata's "format" entry are the only ones that stand for nothing.
        assert found is None or (torch.equal(found.tensors["x"], torch.arange(8.0)) and found.data == {"n": 1})
        assert found is not None or (len(caught) == 1 and "is damaged" in str(caught[0].message))


def test_long_names_have_files_of_their_own(work: FinishedWork) -> None:
    first, second = "x" * 300 + "1", "x" * 300 + "2"
    work.save(first, FROM, data=1)
    work.save(second, FROM, data=2)
    assert [part.data for part in (work.load(first, FROM), work.load(second, FROM)) if part] == [1, 2]


def test_other_parts_are_removed(work: FinishedWork) -> None:
    for name in ("a", "b", "c"):
        work.save(name, FROM)
    work.room("r").save("a", FROM)
    work.keep_only(["b"])
    assert [path.name for path in work.folder.glob("*.safetensors")] == ["b.safetensors"]
    assert work.room("r").load("a", FROM) is not None


def test_a_second_job_is_refused_at_once(work: FinishedWork) -> None:
    with pytest.raises(FolderInUseError, match=r"another process works in .*work; wait"), working_in(work.folder):
        pass


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with working_in(tmp_path / "work") as opened:
            assert opened is not None
            opened.save("done", FROM)
            (opened.folder / ".half.safetensors.saving-01234567").write_bytes(b"half")
            os.write(writer, b".")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(FolderInUseError), working_in(tmp_path / "work"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with working_in(tmp_path / "work") as opened:
        assert opened is not None and opened.load("done", FROM) is not None
        assert [path.name for path in opened.folder.iterdir()] == ["done.safetensors"]


def test_unfinished_output_in_the_folder_stays(tmp_path: Path) -> None:
    """Another command may be writing it, or a killed one left it, of which its own next save takes care."""
    (tmp_path / ".out.saving-01234567").mkdir()
    (tmp_path / "evaluation").mkdir()
    other = tmp_path / "evaluation" / ".settings.json.saving-01234567"
    other.write_text("{")
    with working_in(tmp_path) as opened:
        assert opened is not None
        opened.save("done", FROM)
    assert other.exists() and (tmp_path / ".out.saving-01234567").is_dir()


def test_no_folder_keeps_nothing_and_an_empty_one_goes(tmp_path: Path) -> None:
    with working_in(None) as nothing:
        assert nothing is None
    with working_in(tmp_path / "new" / "er"):
        assert (tmp_path / "new" / "er").is_dir()
    assert not (tmp_path / "new" / "er").exists()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="cannot be written"), working_in(tmp_path / "file" / "work"):
        pass
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WriteError, match="is a pipeline; choose another folder"), working_in(tmp_path):
        pass


def test_files_of_the_user_stay(work: FinishedWork) -> None:
    """The folder may be one that holds other things."""
    for name in ("kept", "other"):
        work.save(name, FROM, tensors())
    own = work.folder / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, own)
    broken = work.folder / "broken.safetensors"
    broken.write_bytes(b"text")
    work.keep_only(["kept"])
    assert own.is_file() and broken.is_file() and work.path("kept").is_file() and not work.path("other").exists()


def test_a_part_that_its_reader_refuses_is_computed_anew(work: FinishedWork) -> None:
    """A folder may come from anybody, so a right digest says nothing about the values."""
    work.save("a", FROM, data={"rows": 3})
    with pytest.warns(ResumeWarning, match=r"a\.safetensors is damaged \('missing'\); a is computed anew"):
        assert work.load("a", FROM, lambda part: part.data["missing"]) is None
    assert work.load("a", FROM, lambda part: part.data["rows"]) == 3
    with pytest.warns(ResumeWarning, match="it holds no numbers of shape"):
        found = work.part("a", FROM, lambda: Part({}, [1.0, 2.0]), lambda part: check_numbers(part, 2))
    assert found.data == [1.0, 2.0]
    assert work.part("a", FROM, lambda: Part({}, None), lambda part: check_numbers(part, 2)).data == [1.0, 2.0]


@pytest.mark.parametrize("wrong", [[1.0], [1.0, float("nan")], ["1", "2"], [[1.0], [2.0, 3.0]], None, [1.0, 10**400]])
def test_what_are_not_numbers_is_refused(wrong: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        check_numbers(Part({}, wrong), 2)
    with pytest.raises(ValueError, match="it holds no numbers"):
        check_numbers(Part({}, [1.0, 0.0]), 2, least=0.5)
