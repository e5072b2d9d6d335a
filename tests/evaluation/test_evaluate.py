"""Evaluations of a small pipeline: figures, resuming, shares, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.disk.files import write_tensors
from fxquant.errors import (
    CheckpointError,
    ConfigurationError,
    EvaluationError,
    MetricWeightsError,
    UnknownNameError,
    WriteError,
)
from fxquant.evaluation.choice import Choice
from fxquant.evaluation.evaluate import evaluate
from fxquant.evaluation.frechet import Moments, frechet_distance
from fxquant.evaluation.generation import Sampling, identity
from fxquant.evaluation.measuring import Extent, Networks, check_possible
from fxquant.evaluation.result import Evaluation
from fxquant.evaluation.store import one_process
from tests.evaluation.pipes import Pooled, make_pipe, quantized_pipe

OPTIONS: dict[str, Any] = {"images": 13, "batch": 5, "steps": 2, "features": Pooled()}


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    return quantized_pipe(), make_pipe()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images."""
    folder = tmp_path_factory.mktemp("real")
    generator = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def whole(both: tuple[Any, Any], real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """One evaluation with all metrics that need no weights, and its folder."""
    work = tmp_path_factory.mktemp("work")
    found = evaluate(*both, **OPTIONS, against=real, work=work, picture=work / "grid.png")
    assert found is not None
    return found, work


def images_of(pipe: Any, count: int = 13, **options: Any) -> torch.Tensor:
    sampling = Sampling(batch=5, steps=2, **options)
    return torch.cat([sampling.batch_of(pipe, number) for number in range(-(-count // 5))])[:count]


def test_figures_are_those_of_the_images(whole: tuple[Evaluation, Path], both: tuple[Any, Any], real: Path) -> None:
    found = whole[0]
    made, truth = (images_of(pipe) for pipe in both)
    assert found.images == 13
    mean = (made.double() - truth.double()).square().mean().item()
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / mean))
    assert 0.5 < found["ssim"] < 1
    files = sorted(real.iterdir())
    others = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files])
    moments = []
    for images in (made, truth, others):
        moments.append(Moments())
        moments[-1].add(Pooled()(images.float() / 255)["features"])
    mine, theirs, photos = ((each.mean, each.covariance) for each in moments)
    assert found["fid"] == pytest.approx(frechet_distance(*mine, *photos), rel=1e-9)
    assert found["fid_to_float"] == pytest.approx(frechet_distance(*mine, *theirs), rel=1e-6)
    assert found.float_metrics["fid"] == pytest.approx(frechet_distance(*theirs, *photos), rel=1e-9)
    assert {"sfid", "inception_score", "precision", "recall"} <= found.metrics.keys() & found.float_metrics.keys()
    assert found.left_out.keys() == {"clip_score", "lpips"}


def test_the_picture_shows_float_above_quantized(whole: tuple[Evaluation, Path], both: tuple[Any, Any]) -> None:
    with Image.open(whole[1] / "grid.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).int()
    assert pixels.shape == (3, 2 * 3 * 16, 8 * 16)
    made, truth = (images_of(pipe, 10) for pipe in both)
    assert torch.equal(pixels[:, :16, :16], truth[0].int())
    assert torch.equal(pixels[:, 16:32, 16:32], made[1].int())
    difference = (made[1].int() - truth[1].int()).abs()
    assert torch.equal(pixels[:, 32:48, 16:32], (4 * difference).clamp(max=255))
    assert torch.equal(pixels[:, 48:64, 16:32], truth[9].int() if len(truth) > 9 else truth[0].int())


def test_batches_do_not_depend_on_each_other_or_on_torch(both: tuple[Any, Any]) -> None:
    sampling = Sampling(batch=3, steps=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    second = sampling.batch_of(both[1], 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    sampling.batch_of(both[1], 0)
    assert torch.equal(sampling.batch_of(both[1], 1), second)
    assert not torch.equal(sampling.batch_of(both[1], 2), second)
    assert not torch.equal(Sampling(batch=3, steps=2, seed=1).batch_of(both[1], 1), second)


def test_a_scheduler_that_draws_noise_gives_equal_batches() -> None:
    from diffusers import DDPMScheduler

    pipe: Any = make_pipe()
    pipe.scheduler = DDPMScheduler()
    sampling = Sampling(batch=2, steps=3)
    torch.manual_seed(0)
    first = sampling.batch_of(pipe, 0)
    torch.manual_seed(1)
    assert torch.equal(sampling.batch_of(pipe, 0), first)


def test_labels() -> None:
    classes = list(range(1000))
    balanced = [label for number in range(125) for label in Sampling(batch=16).labels_of(number, classes)]
    assert sorted(balanced) == sorted(classes * 2)
    assert np.std(np.histogram(balanced[:100], 10, (0, 1000))[0]) < 1.5
    drawn = Sampling(batch=500, labels="uniform").labels_of(3, classes)
    assert drawn == Sampling(batch=500, labels="uniform").labels_of(3, classes)
    assert drawn != Sampling(batch=500, labels="uniform", seed=1).labels_of(3, classes)
    assert 300 < len(set(drawn)) < 480  # 1000 (1 - 1/e^(1/2)) = 393 are expected.
    assert Sampling(batch=4, labels=(7, 8, 9)).labels_of(1, classes) == [8, 9, 7, 8]


def test_the_same_call_continues(whole: tuple[Evaluation, Path], both: tuple[Any, Any], real: Path) -> None:
    found, work = whole
    lost = work / "quantized" / "images-000001.safetensors"
    kept = {path.name: path.stat().st_mtime_ns for path in lost.parent.glob("images-*")}
    before = lost.read_bytes()
    lost.unlink()
    for path in work.glob("*/features-*"):
        path.unlink()
    again = evaluate(*both, **OPTIONS, against=real, work=work)
    assert again is not None
    assert (again.metrics, again.float_metrics) == (found.metrics, found.float_metrics)
    assert lost.read_bytes() == before
    assert all(path.stat().st_mtime_ns == kept[path.name] for path in lost.parent.glob("images-*") if path != lost)
    assert "2 of 3 batches" in again.notes[0]


def test_more_images_are_made_in_the_same_folder(both: tuple[Any, Any], tmp_path: Path) -> None:
    evaluate(both[0], **OPTIONS | {"images": 11}, work=tmp_path)
    more = evaluate(both[0], **OPTIONS | {"images": 17}, work=tmp_path)
    alone = evaluate(both[0], **OPTIONS | {"images": 17})
    assert more is not None and alone is not None
    assert more.metrics == alone.metrics
    assert "3 of 4 batches" in more.notes[0]


def test_a_folder_that_was_begun_with_few_images_is_continued(both: tuple[Any, Any], tmp_path: Path) -> None:
    """Its batches are smaller than ``batch``, because they were limited to the number of images."""
    few = OPTIONS | {"images": 3, "features": None}
    first = evaluate(*both, **few, work=tmp_path)
    kept = [folder / "images-000000.safetensors" for folder in (tmp_path / "quantized", tmp_path / "float")]
    before = [path.read_bytes() for path in kept]
    more = evaluate(*both, **few | {"images": 7}, work=tmp_path)
    alone = evaluate(*both, **few | {"images": 7, "batch": 3})
    assert first is not None and more is not None and alone is not None
    assert more.metrics == alone.metrics and more.settings["batch"] == 3
    assert [path.read_bytes() for path in kept] == before
    less = evaluate(*both, **few | {"images": 2}, work=tmp_path)  # Of the batch of three.
    assert less is not None and less.images == 2 and less.notes[0].startswith("1 of 1 batches")
    other = evaluate(both[1], both[1], **few | {"images": 7}, work=tmp_path / "b", float_work=tmp_path / "float")
    assert other is not None and other.settings["batch"] == 3
    with pytest.raises(EvaluationError, match=r"holds batches of 3 images, not 2; give --batch 3"):
        evaluate(*both, **few | {"batch": 2}, work=tmp_path)


def test_other_settings_are_refused_or_replaced(
    whole: tuple[Evaluation, Path], both: tuple[Any, Any], tmp_path: Path
) -> None:
    work = whole[1]
    before = sorted(work.rglob("*"))
    with pytest.raises(EvaluationError, match="steps 2, not 3"):
        evaluate(*both, **OPTIONS | {"steps": 3}, work=work)
    with pytest.raises(EvaluationError, match="another model"):
        evaluate(both[1], **OPTIONS, work=work)
    assert sorted(work.rglob("*")) == before
    evaluate(both[0], **OPTIONS, work=tmp_path)
    (tmp_path / "quantized" / "mine.txt").write_text("stays")
    anew = evaluate(both[0], **OPTIONS | {"steps": 3}, work=tmp_path, overwrite=True)
    alone = evaluate(both[0], **OPTIONS | {"steps": 3})
    assert anew is not None and alone is not None and anew.metrics == alone.metrics
    assert "were removed" in anew.notes[0]
    assert (tmp_path / "quantized" / "mine.txt").exists()


def test_damaged_files_are_named(both: tuple[Any, Any], tmp_path: Path) -> None:
    evaluate(both[0], **OPTIONS, work=tmp_path)
    path = tmp_path / "quantized" / "images-000001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    for features in tmp_path.glob("*/features-*"):
        features.unlink()
    with pytest.raises(CheckpointError, match=r"images-000001.*remove it"):
        evaluate(both[0], **OPTIONS, work=tmp_path)
    path.unlink()
    assert evaluate(both[0], **OPTIONS, work=tmp_path) is not None
    features = next(tmp_path.glob("*/features-*-000001*"))
    write_tensors({"other": torch.zeros(2, 3)}, features)
    with pytest.raises(CheckpointError, match=r"features-.*-000001.* does not hold the features of"):
        evaluate(both[0], **OPTIONS, work=tmp_path)
    features.unlink()
    (tmp_path / "quantized" / "settings.json").unlink()
    with pytest.raises(CheckpointError, match=r"settings.json is missing"):
        evaluate(both[0], **OPTIONS, work=tmp_path)


def test_shares_give_the_images_of_one_process(
    whole: tuple[Evaluation, Path], both: tuple[Any, Any], real: Path, tmp_path: Path
) -> None:
    for number in (1, 0):
        assert evaluate(*both, **OPTIONS, against=real, work=tmp_path, shard=(number, 2)) is None
    found = evaluate(*both, **OPTIONS, against=real, work=tmp_path)
    assert found is not None
    assert found.metrics == whole[0].metrics
    assert found.notes == [f"3 of 3 batches in {tmp_path / name} were there before" for name in ("quantized", "float")]
    with pytest.raises(ConfigurationError, match="one folder"):
        evaluate(*both, **OPTIONS, shard=(0, 2))
    with pytest.raises(ConfigurationError, match="shard 2/2"):
        evaluate(*both, **OPTIONS, shard=(2, 2), work=tmp_path)


def _rank(rank: int, work: str, results: Any) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2"})
    torch.set_num_threads(1)
    found = evaluate(make_pipe(), **OPTIONS, work=work)
    results.put(None if found is None else found.metrics)


@pytest.mark.slow
def test_ranks_share_the_images_and_the_first_one_measures(both: tuple[Any, Any], tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=240) for _ in ranks]
    for rank in ranks:
        rank.join()
    alone = evaluate(both[1], **OPTIONS)
    assert alone is not None
    assert [metrics for metrics in found if metrics is not None] == [alone.metrics]
    assert len(found) == 2


def test_evaluations_share_images_of_the_float_model(both: tuple[Any, Any], tmp_path: Path) -> None:
    first = evaluate(*both, **OPTIONS, work=tmp_path / "a", float_work=tmp_path / "float")
    second = evaluate(both[1], both[1], **OPTIONS, work=tmp_path / "b", float_work=tmp_path / "float")
    assert first is not None and second is not None
    assert second.notes[-1] == f"3 of 3 batches in {tmp_path / 'float'} were there before"
    assert second["psnr"] == float("inf") and not (tmp_path / "b" / "float").exists()


def test_two_processes_in_one_folder(both: tuple[Any, Any], tmp_path: Path) -> None:
    with one_process(tmp_path, (0, 1)), pytest.raises(EvaluationError, match="another process"):
        evaluate(both[0], **OPTIONS, work=tmp_path)
    with one_process(tmp_path, (1, 4)), pytest.raises(EvaluationError, match=r"another process makes share 1/4"):
        evaluate(both[0], **OPTIONS, work=tmp_path)  # It would remove what the other one is writing.
    with one_process(tmp_path, (1, 2)), one_process(tmp_path, (0, 2)):
        pass
    assert evaluate(both[0], **OPTIONS, work=tmp_path) is not None


def test_too_few_images(both: tuple[Any, Any], real: Path) -> None:
    few = evaluate(*both, **OPTIONS | {"images": 6, "batch": 6}, against=real)
    assert few is not None
    assert few.left_out["fid"] == "needs at least 7 images, because it has 6 features; there are 6"
    assert few.left_out["inception_score"].startswith("needs at least 10 images")
    assert "psnr" in few.metrics and "precision" in few.metrics
    for options in ({"metrics": ["fid"]}, {"limits": {"fid": 1.0}}):
        with pytest.raises(ConfigurationError, match="fid needs at least 7 images"):
            evaluate(*both, **OPTIONS | {"images": 6}, against=real, **options)
    some = evaluate(both[0], **OPTIONS, against=real, metrics=["sfid"], sfid_images=9)
    assert some is not None and some.counts == {"sfid": 9}
    with pytest.raises(ConfigurationError, match="sfid needs at least 9 images"):
        evaluate(both[0], **OPTIONS, against=real, metrics=["sfid"], sfid_images=8)


def test_too_small_images() -> None:
    extent = Extent(samples=4, batch=4, frames=1, sfid=4)
    for pixels, missing in ((10, {"ssim", "lpips"}), (16, {"lpips"}), (31, set())):
        choice = Choice({"psnr", "ssim", "lpips"})
        check_possible(choice, extent, torch.zeros(4, 3, 40, pixels, dtype=torch.uint8), None, Networks())
        assert choice.left_out.keys() == missing
        assert all(f"these have {pixels} x 40" in reason for reason in choice.left_out.values())


def test_too_few_real_images(both: tuple[Any, Any], real: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(real.iterdir())[:2]:
        (few / path.name).write_bytes(path.read_bytes())
    options: dict[str, Any] = {"images": 10, "batch": 5, "steps": 1, "features": Pooled()}
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)

    with pytest.raises(ConfigurationError, match=r"precision needs at least 4 real images.* there are 2"):
        evaluate(both[0], against=few, metrics=["precision"], progress=progress, **options)
    assert "measure" not in told
    found = evaluate(both[0], against=few, **options)
    assert found is not None and "fid" not in found.metrics
    assert "needs at least 7 real images" in found.left_out["fid"]
    assert "needs at least 9 real images" in found.left_out["sfid"]


def test_missing_weights(both: tuple[Any, Any], real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("INCEPTION", "LPIPS", "CLIP"):
        monkeypatch.delenv(f"FXQUANT_{name}", raising=False)
    options = OPTIONS | {"features": None}
    with pytest.raises(MetricWeightsError, match=r"pt_inception-2015-12-05-6726825d.pth.*Without it run: psnr, ssim"):
        evaluate(*both, **options, against=real, metrics=["fid"])
    with pytest.raises(MetricWeightsError, match=r"alexnet-owt-7be5be79.pth.*FXQUANT_LPIPS"):
        evaluate(*both, **options, limits={"lpips": 0.1})
    with pytest.raises(MetricWeightsError, match=r"FXQUANT_INCEPTION.*no metrics; a float model"):
        evaluate(both[0], **options, metrics=["inception_score"])
    monkeypatch.setenv("FXQUANT_LPIPS", str(tmp_path / "nowhere.pth"))
    with pytest.raises(MetricWeightsError, match=r"FXQUANT_LPIPS .*nowhere.pth is not a file"):
        evaluate(*both, **options)
    monkeypatch.delenv("FXQUANT_LPIPS")
    found = evaluate(*both, **options)
    assert found is not None
    assert found.metrics.keys() == {"psnr", "psnr_per_image", "ssim"}
    assert "FXQUANT_LPIPS" in found.table()


def test_other_options_that_do_not_fit(both: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="inception_score"):
        evaluate(*both, **OPTIONS, metrics=["fjd"])
    with pytest.raises(ConfigurationError, match="class labels, not prompts"):
        evaluate(*both, **OPTIONS, prompts=["a fox"])
    with pytest.raises(ConfigurationError, match="fid needs real images"):
        evaluate(*both, **OPTIONS, metrics=["fid"])
    with pytest.raises(ConfigurationError, match="not the name of a picture"):
        evaluate(*both, **OPTIONS, picture="grid.txt")
    with pytest.raises(CheckpointError, match="is not a pipeline"):
        evaluate(both[0], tmp_path, **OPTIONS)
    with pytest.raises(ConfigurationError, match="not a number"):
        evaluate(*both, **OPTIONS, limits={"psnr": float("nan")})
    with pytest.raises(ConfigurationError, match="at least 1"):
        evaluate(*both, **OPTIONS | {"images": 0})
    with pytest.raises(ConfigurationError, match="classes 0 to 999"):
        evaluate(both[0], **OPTIONS, labels=[4000])


def test_pipelines_with_other_classes_are_refused(both: tuple[Any, Any]) -> None:
    from diffusers import DiTPipeline

    other = DiTPipeline(**make_pipe().components, id2label={0: "zero", 1: "one", 5: "five"})
    other.set_progress_bar_config(disable=True)
    with pytest.raises(ConfigurationError, match=r"classes 0 to 999 and the float one 3 of 0 to 5.*--labels"):
        evaluate(both[0], other, **OPTIONS)
    assert evaluate(both[0], other, **OPTIONS, labels=[0, 5]) is not None


def test_a_pipeline_that_fails_is_named(tmp_path: Path) -> None:
    pipe: Any = make_pipe()
    pipe.vae.decode = None
    with pytest.raises(EvaluationError, match=r"DiTPipeline failed while it made batch 0: TypeError"):
        evaluate(pipe, **OPTIONS, work=tmp_path)
    assert not list(tmp_path.rglob("images-*"))


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_images_of_nan_are_refused(both: tuple[Any, Any], part: str) -> None:
    """They would be black, and equal for both models."""
    broken = make_pipe()
    weight = broken.vae.decoder.conv_out.weight if part == "vae" else broken.transformer.proj_out_2.weight
    torch.nn.init.constant_(weight, float("nan"))
    with pytest.raises(EvaluationError, match="DiTPipeline made images of NaN or infinity"):
        evaluate(broken, broken, images=2, batch=2, steps=1)
    with pytest.raises(EvaluationError, match="DiTPipeline made images of NaN or infinity"):
        evaluate(both[0], broken, images=2, batch=2, steps=1)


def test_equal_pipelines(both: tuple[Any, Any]) -> None:
    found = evaluate(both[1], make_pipe(), **OPTIONS)
    assert found is not None
    assert found["psnr"] == found["psnr_per_image"] == float("inf")
    assert found.notes == ["the first pipeline is not quantized"]
    assert found["ssim"] == pytest.approx(1)
    assert found["fid_to_float"] == pytest.approx(0, abs=1e-9)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["metrics"]["psnr"] == "inf"


def test_features_may_be_the_class_scores_too(both: tuple[Any, Any]) -> None:
    class Shared(Pooled):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            pooled = super().forward(images)["features"]
            return {"features": pooled, "logits": pooled}

    found = evaluate(*both, **OPTIONS | {"features": Shared()})
    assert found is not None and {"inception_score", "fid_to_float"} <= found.metrics.keys()


def test_it_is_public() -> None:
    assert fxquant.evaluate is evaluate
    assert fxquant.Evaluation is Evaluation


def test_prompts_and_frames_of_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts repeat over images, and the frames of a clip count as images."""
    from tests import lives

    pipe, _ = lives.wan()
    pipe.set_progress_bar_config(disable=True)
    embedded = torch.randn(1, 5, pipe.transformer.config.text_dim, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt, **_: (embedded.expand(len(prompt), -1, -1), None))
    options: dict[str, Any] = {"images": 3, "batch": 2, "steps": 1, "features": Pooled(), "guidance": 1.0}
    sizes = {"height": 16, "width": 16, "num_frames": 5}
    with pytest.raises(ConfigurationError, match="draws what a prompt says"):
        evaluate(pipe, pipe, **options, sizes=sizes)
    with pytest.raises(ConfigurationError, match="takes prompts, not class labels"):
        evaluate(pipe, pipe, **options, prompts=["a"], labels="uniform")
    found = evaluate(pipe, pipe, **options, sizes=sizes, prompts=["a fox", "snow"])
    assert found is not None
    assert found.images == 15 and found["psnr"] == float("inf")
    assert found.settings["prompts"] == 2 and found.settings["labels"] is None
    assert Sampling(batch=3, prompts=("a", "b")).prompts_of(1) == ["b", "a", "b"]


def test_backends_are_told_apart_and_models_known_again(both: tuple[Any, Any], tmp_path: Path) -> None:
    """A model that was saved and loaded continues in the folder; the same model on another backend does not."""
    fxquant.save(both[0].transformer, tmp_path / "dit")
    pipe: Any = make_pipe()
    pipe.transformer = fxquant.load(tmp_path / "dit")
    assert identity(pipe) == identity(both[0])
    pipe.transformer = fxquant.load(tmp_path / "dit", backend="native")
    assert identity(pipe) != identity(both[0])
    pipe.scheduler.register_to_config(beta_schedule="scaled_linear")
    assert identity(pipe) != identity(both[0])


def test_the_float_images_have_another_folder(both: tuple[Any, Any], tmp_path: Path) -> None:
    """With overwrite, the float pipeline's images would take the place of those that they are compared with."""
    options: dict[str, Any] = {"images": 2, "batch": 2, "steps": 1, "work": tmp_path, "overwrite": True}
    with pytest.raises(ConfigurationError, match="holds the quantized pipeline's images; give another float_work"):
        evaluate(*both, float_work=tmp_path / "quantized", **options)
    with one_process(tmp_path / "shared", (0, 1)), pytest.raises(EvaluationError, match="another process evaluates in"):
        evaluate(*both, float_work=tmp_path / "shared", **options)


def test_a_killed_overwrite_is_repeated(both: tuple[Any, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"images": 4, "batch": 2, "steps": 1, "work": tmp_path}
    evaluate(*both, **options)
    (tmp_path / "quantized" / "settings.json").unlink()
    with pytest.raises(CheckpointError, match=r"settings.json is missing.*--overwrite"):
        evaluate(*both, **options)
    (tmp_path / "quantized" / "settings.json").write_text('{"model"')  # Damaged, as after a power failure.
    with pytest.raises(CheckpointError, match=r"settings.json cannot be read.*--overwrite"):
        evaluate(*both, **options)
    assert evaluate(*both, overwrite=True, **options) is not None


def test_files_of_other_runs_are_refused(both: tuple[Any, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"images": 10, "batch": 5, "steps": 1, "features": Pooled(), "work": tmp_path}
    evaluate(*both, **options)
    folder = tmp_path / "quantized"
    features = next(folder.glob("features-*-000001.safetensors"))
    kept = features.read_bytes()
    good = load_file(features)
    wrong: list[dict[str, torch.Tensor]] = [
        {"other": torch.zeros(5, 6)},
        {**good, "pooled": good["pooled"][:3]},
        {**good, "pooled": good["pooled"] * float("nan")},
        {**good, "pooled": good["pooled"].double()},
    ]
    for tensors in wrong:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, features)
        with pytest.raises(CheckpointError, match="does not hold the features of 5 images"):
            evaluate(*both, **options)
    features.write_bytes(kept)
    save_file({"images": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)}, folder / "images-000001.safetensors")
    with pytest.raises(CheckpointError, match=r"images-000001.safetensors holds images of shape \(3, 3, 16, 16\)"):
        evaluate(*both, **options)


@pytest.mark.parametrize("options", [
    {"pipe": None}, {"pipe": 3}, {"pipe": lambda: None}, {"reference": 3}, {"reference": lambda: 3}, {"against": 5},
    {"prompts": "a cat"}, {"images": 2.5}, {"batch": 1.5}, {"steps": "3"}, {"shard": (0, 0)},
    {"limits": {"psnr": "a"}}, {"limits": {"psnr": None}}, {"limits": [1]}, {"images": "5"}, {"batch": None},
    {"labels": 3}, {"labels": ["a"]}, {"sizes": 4}, {"metrics": "psnr"}, {"metrics": [3]}, {"shard": 3},
    {"shard": ("a", 2)}, {"shard": (0, 1, 2)}, {"picture": 3}, {"work": 3}, {"device": "gpu"},
])  # fmt: skip
def test_arguments_of_other_kinds(both: tuple[Any, Any], options: dict[str, Any], tmp_path: Path) -> None:
    given = {"pipe": both[0], "reference": both[1], "images": 2, "batch": 2, "steps": 1, "work": tmp_path, **options}
    with pytest.raises(ConfigurationError):
        evaluate(**given)


def test_a_transformer_is_not_a_pipeline(both: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigurationError, match="a GraphModel was given where a diffusers pipeline"):
        evaluate(both[0].transformer, both[1], images=2, batch=2, steps=1)


def test_a_picture_that_cannot_be_written_is_refused_at_once(both: tuple[Any, Any], tmp_path: Path) -> None:
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)

    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for picture in (tmp_path / "folder.png", tmp_path / "file" / "grid.png"):
        with pytest.raises(WriteError):
            evaluate(*both, images=2, batch=2, steps=1, picture=picture, progress=progress)
    assert not told
