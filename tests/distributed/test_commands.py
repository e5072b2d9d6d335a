"""``fxquant`` in several processes."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from tests.distributed.commands import command
from tests.distributed.ranks import Ended, run_ranks
from tests.tiny import make_pipeline

QUANTIZE = ("quantize", "float", "--recipe", "ptq4dit-gptq-w4a8", "--samples", "16", "--steps", "2", "--out", "made")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "float"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    (tmp_path / "float").symlink_to(source)
    return tmp_path


def run(folder, *arguments, size=2, accident="", on=1, others=None):
    """Exit codes, and what the processes printed on stdout and stderr."""
    own = [list(others or arguments) if rank else list(arguments) for rank in range(size)]
    found = run_ranks(command, size, folder, own, accident, on)
    assert all(isinstance(result, Ended) for result in found), found
    printed = [[(folder / f"{rank}.{name}").read_text() for rank in range(size)] for name in ("out", "err")]
    return [result.args[0] for result in found], *printed


def only_message(printed):
    """The one message that all processes printed together."""
    assert sum(text.count("error:") for text in printed) == 1, printed
    assert not any("Traceback" in text for text in printed), printed
    return next(" ".join(text.split()) for text in printed if "error:" in text)


def assert_nothing_written(folder):
    assert sorted(path.name for path in folder.iterdir() if path.suffix not in (".out", ".err")) == ["float"]


@pytest.mark.slow
def test_quantize(folder):
    codes, out, err = run(folder, *QUANTIZE, "--keep-statistics", "dit.statistics")
    assert codes == [0, 0], err
    assert "output SQNR" in out[0]
    assert "written to made" in err[0]
    assert out[1] == err[1] == ""
    assert (folder / "made" / "transformer" / "plan.json").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    together = fxquant.Statistics.load(folder / "dit.statistics")
    options = [str(folder / name) if name in ("float", "made") else name for name in QUANTIZE]
    alone = CliRunner().invoke(app, [*options, "--overwrite", "--keep-statistics", str(folder / "one.statistics")])
    assert alone.exit_code == 0, alone.output
    one = fxquant.Statistics.load(folder / "one.statistics")
    assert list(together) == list(one)
    assert together.calls.seen == one.calls.seen == 4
    for key, channels in one.items():
        assert torch.equal(together[key].minimum, channels.minimum)
        assert torch.equal(together[key].maximum, channels.maximum)
    for call, other in zip(together.calls, one.calls, strict=True):
        assert all(map(torch.equal, call.inputs, other.inputs))


def test_rank_that_fails(folder):
    codes, out, err = run(folder, *QUANTIZE, accident="fails_in_calibration")
    assert codes == [2, 2]
    assert only_message(err).endswith(
        "rank 1: DiTPipeline failed while it ran to calibrate: ValueError: no more ink. The option --debug shows where"
    )
    assert out == ["", ""]
    assert_nothing_written(folder)


def test_rank_that_is_killed(folder):
    codes, _, err = run(folder, *QUANTIZE, accident="killed_in_calibration")
    assert codes == [2, -9]
    assert "rank 1 died without a message" in only_message(err)
    assert_nothing_written(folder)


@pytest.mark.slow
def test_rank_that_is_killed_while_it_writes(folder):
    codes, _, err = run(folder, *QUANTIZE, accident="killed_in_writing", on=0)
    assert codes == [-9, 2]
    assert "rank 0 died without a message" in only_message(err[1:])
    assert_nothing_written(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_rank_that_is_killed_while_it_learns(rank, folder):
    command = [part.replace("gptq", "reconstruct") for part in QUANTIZE]
    codes, _, err = run(folder, *command, accident="killed_in_learning", on=rank)
    assert codes == ([-9, 2] if rank == 0 else [2, -9])
    assert f"rank {rank} died without a message" in only_message(err)
    assert_nothing_written(folder)


def test_too_few_samples(folder):
    codes, _, err = run(folder, *QUANTIZE[:4], "--samples", "8", "--out", "made")
    assert codes == [2, 2]
    assert "8 samples are 1 batch of 8, too few for 2 processes; give at least 9 samples" in only_message(err)


def test_other_options(folder):
    others = [part.replace("w4a8", "w8a8") for part in QUANTIZE]
    codes, _, err = run(folder, *QUANTIZE, others=others)
    assert codes == [2, 2]
    wanted = "rank 1 has another --recipe than rank 0: ptq4dit-gptq-w8a8, not ptq4dit-gptq-w4a8"
    assert wanted in only_message(err)
    assert_nothing_written(folder)


def test_other_files(source, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        shutil.copytree(source, tmp_path / str(rank) / "float")
    config = tmp_path / "1" / "float" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}))
    codes, _, err = run(tmp_path, *QUANTIZE)
    assert codes == [2, 2]
    assert "rank 1 has another file scheduler/scheduler_config.json than rank 0" in only_message(err)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_process_lacks(rank, tmp_path):
    """The process fails before it has met the others, which wait for it."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / str(1 - rank) / "prompts.txt").write_text("a cat")
    began = time.monotonic()
    codes, _, err = run(tmp_path, *QUANTIZE, "--prompts", "prompts.txt")
    assert codes == [2, 2]
    assert "prompts.txt" in only_message(err)
    assert (f"rank {rank}: " in only_message(err)) == bool(rank)
    assert time.monotonic() - began < 600  # Others would wait for half an hour.
    assert [path.name for path in (tmp_path / str(rank)).iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "float", "--size", "0.2"), "fxquant search runs in one process, and 2 were started"),
        (("sensitivity", "float"), "fxquant sensitivity runs in one process, and 2 were started"),
        ((*QUANTIZE, "--attribute"), "--attribute runs in one process"),
        ((*QUANTIZE, "--recipe", "nonsense-w4a8"), "nonsense"),
    ],
)
def test_refusals(folder, arguments, message):
    codes, out, err = run(folder, *arguments)
    assert codes == [2, 2]
    assert message in only_message(err)
    assert out == ["", ""]


def test_evaluation_runs_in_each_process(folder):
    """Processes of an evaluation do not join, so each prints its error."""
    codes, _, err = run(folder, "eval", "float", "--images", "2", "--metrics", "nonsense")
    assert codes == [2, 2]
    for rank in range(2):
        assert f"rank {rank}:" in only_message(err[rank : rank + 1])


def test_mistake_in_the_arguments(folder):
    codes, _, err = run(folder, *QUANTIZE, "--nonsense")
    assert codes == [2, 2]
    assert "--nonsense" in err[0]
    assert err[1] == ""


def test_commands_that_show_something_run_once(folder):
    codes, out, err = run(folder, "list", "backends")
    assert codes == [0, 0]
    assert "fake-quant" in out[0]
    assert out[1] == err[0] == err[1] == ""
