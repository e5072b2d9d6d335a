"""Pipelines: a quantized one is read and written whole, and calibration runs it the way it is used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import fxquant
from fxquant import pipelines
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.model import GraphModel
from fxquant.pipelines import calibration_call, generate, load_pipeline, save_pipeline, steps_watched
from tests.tiny import make_dit, make_pipeline


@pytest.fixture(scope="module")
def pipe():
    made = make_pipeline()
    calibrate = calibration_call(made, samples=2, steps=2)
    made.transformer = fxquant.compile(made.transformer, recipe="ptq4dit-w8a8", calibrate=calibrate)
    return made


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    written = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(pipe, written)
    return written


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


class TestDropIn:
    def test_the_pipeline_takes_the_model(self, pipe):
        assert pipe.to("cpu") is pipe
        assert isinstance(pipe.components["transformer"], GraphModel)
        assert pipe.dtype == torch.float32
        assert pipe.device == torch.device("cpu")

    def test_images_stay_close(self, pipe):
        # Untrained weights: what is compared is the whole pipeline's arithmetic, not the pictures.
        expected, actual = (pixels(generate(p, labels=[1, 2], steps=2)).astype(int) for p in (make_pipeline(), pipe))
        assert np.abs(expected - actual).max() < 40
        assert expected.std() > 5

    def test_another_batch_and_no_guidance(self, pipe):
        assert len(generate(pipe, labels=[3], steps=2, guidance=1.0)) == 1
        assert len(pipe.transformer.graphs) == 1


class TestSaveAndLoad:
    def test_round_trip_draws_the_same(self, pipe, folder):
        loaded = load_pipeline(folder)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe)
        assert isinstance(loaded.transformer, GraphModel)
        assert np.array_equal(*(pixels(generate(p, labels=[5, 6, 7], steps=3)) for p in (pipe, loaded)))

    def test_the_index_names_the_original_class(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
        assert index["_class_name"] == "DiTPipeline"

    def test_no_float_weights_are_kept(self, folder):
        assert {path.name for path in (folder / "transformer").iterdir()} == {
            "config.json", "plan.json", "plan.safetensors", "model.safetensors",
        }  # fmt: skip

    def test_saving_again_what_was_loaded(self, folder, tmp_path):
        save_pipeline(load_pipeline(folder), tmp_path / "again")
        names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in names:
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    def test_plain_diffusers_pipelines_too(self, tiny_pipeline, tmp_path):
        tiny_pipeline.save_pretrained(tmp_path)
        assert not isinstance(load_pipeline(tmp_path).transformer, GraphModel)

    def test_an_existing_folder_is_kept(self, pipe, tmp_path):
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(CheckpointError, match="exists"):
            save_pipeline(pipe, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_overwrite_replaces_it(self, pipe, tmp_path):
        target = tmp_path / "target"
        target.mkdir()
        (target / "old").write_text("")
        (target / "model_index.json").write_text("{}")
        save_pipeline(pipe, target, overwrite=True)
        assert not (target / "old").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["target"]

    def test_what_is_no_pipeline_is_never_replaced(self, pipe, tmp_path):
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(CheckpointError, match="holds no pipeline but other files"):
            save_pipeline(pipe, tmp_path, overwrite=True)
        assert (tmp_path / "mine").read_text() == "precious"

    def test_a_failed_rename_puts_the_old_one_back(self, pipe, tmp_path, monkeypatch):
        target = tmp_path / "target"
        target.mkdir()
        (target / "model_index.json").write_text("{}")
        rename = Path.rename

        def interrupted(path, other):
            if path.name == "new":
                raise KeyboardInterrupt
            return rename(path, other)

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pipeline(pipe, target, overwrite=True)
        assert (target / "model_index.json").read_text() == "{}"

    def test_a_failure_leaves_the_old_folder(self, pipe, tmp_path, monkeypatch):
        target = tmp_path / "target"
        target.mkdir()
        (target / "old").write_text("")
        (target / "model_index.json").write_text("{}")

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(pipe.scheduler, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pipeline(pipe, target, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert (target / "old").exists()

    def test_a_float_pipeline_is_refused(self, tiny_pipeline, tmp_path):
        with pytest.raises(ConfigurationError, match="no part of this DiTPipeline is quantized"):
            save_pipeline(tiny_pipeline, tmp_path / "x")

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (None, "there is no folder"),
            ("empty", r"no pipeline, for it has no model_index\.json"),
            ("transformer", r"one model; fxquant\.load reads it"),
            ("broken", "diffusers cannot read"),
        ],
    )
    def test_what_is_no_pipeline(self, folder, tmp_path, made, message):
        if made is None:
            source = tmp_path / "nowhere"
        elif made == "transformer":
            source = folder / "transformer"
        else:
            source = tmp_path
            if made == "broken":
                (source / "model_index.json").write_text("{")
        with pytest.raises(CheckpointError, match=message):
            load_pipeline(source)


class TestCalibrationCall:
    @staticmethod
    def record(pipe, **options):
        calls = []

        def listen(module, args, kwargs):
            calls.append((kwargs["class_labels"].tolist(), kwargs["timestep"][0].item(), args[0].clone()))

        handle = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
        calibration_call(pipe, **options)()
        handle.remove()
        return calls

    def test_the_setting_of_ptq4dit_is_the_default(self, tiny_pipeline):
        calls = self.record(tiny_pipeline)
        steps = {step for _, step, _ in calls}
        assert len(steps) == 25
        first = [label for labels, step, _ in calls for label in labels if step == max(steps)]
        assert len(first) == 64
        assert first.count(1000) == 32
        labels = sorted(set(first) - {1000})
        assert len(labels) == 32
        assert labels[0] < 50
        assert labels[-1] > 950

    def test_known_names_of_classes_come_first(self, tiny_pipeline):
        tiny_pipeline.labels = {"zero": 0, "naught": 0, "one": 1}
        calls = self.record(tiny_pipeline, samples=4, steps=1, guidance=1.0)
        assert calls[0][0] == [0, 1, 0, 1]

    def test_labels_of_ones_own(self, tiny_pipeline):
        assert self.record(tiny_pipeline, samples=3, steps=1, guidance=1.0, labels=[7, 8])[0][0] == [7, 8, 7]

    def test_it_repeats_itself(self, tiny_pipeline):
        first, again, other = (self.record(tiny_pipeline, samples=2, steps=2, seed=seed) for seed in (3, 3, 4))
        assert all(torch.equal(a[2], b[2]) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0][2], other[0][2])

    def test_no_time_goes_into_the_decoder(self, tiny_pipeline, monkeypatch):
        def decode(*args, **kwargs):
            raise AssertionError("decoded")

        monkeypatch.setattr(type(tiny_pipeline.vae), "decode", decode)
        calibration_call(tiny_pipeline, samples=1, steps=1)()
        assert "decode" not in tiny_pipeline.vae.__dict__

    def test_the_decoder_is_back_after_a_failure(self, tiny_pipeline):
        tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibration_call(tiny_pipeline, samples=1, steps=1)()
        assert "decode" not in tiny_pipeline.vae.__dict__

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 0}, "0 samples are too few"),
            ({"steps": 0}, "0 steps are too few"),
            ({"labels": [1000]}, "label 1000 is out of range"),
            ({"labels": [-1]}, "label -1 is out of range"),
            ({"prompts": ["a fox"]}, "takes class labels, not prompts"),
        ],
    )
    def test_mistakes_are_told_at_once(self, tiny_pipeline, options, message):
        with pytest.raises(ConfigurationError, match=message):
            calibration_call(tiny_pipeline, **options)


class TextPipeline(DiffusionPipeline):
    """A pipeline that takes prompts and can stop before it decodes."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.calls = []

    def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="pil"):
        self.calls.append((prompt, num_inference_steps, output_type))
        return SimpleNamespace(images=list(prompt) if output_type != "latent" else generator)


class TestTextPipelines:
    def test_prompts_are_repeated(self):
        pipe = TextPipeline(make_dit())
        calibration_call(pipe, samples=10, steps=3, prompts=["a", "b", "c"])()
        assert pipe.calls == [(["a", "b", "c", "a", "b", "c", "a", "b"], 3, "latent"), (["c", "a"], 3, "latent")]

    def test_without_prompts(self):
        with pytest.raises(ConfigurationError, match="there are no prompts"):
            calibration_call(TextPipeline(make_dit()))

    def test_without_guidance(self):
        with pytest.raises(ConfigurationError, match="no guidance scale"):
            calibration_call(TextPipeline(make_dit()), prompts=["a"], guidance=2.0)

    def test_labels_are_refused(self):
        with pytest.raises(ConfigurationError, match="takes prompts, not class labels"):
            generate(TextPipeline(make_dit()), labels=[1])

    def test_generate(self):
        assert generate(TextPipeline(make_dit()), prompts=list("abcdefghij"), steps=1) == list("abcdefghij")

    def test_other_needs(self):
        class ImagePipeline(TextPipeline):
            def __call__(self, prompt, image, num_inference_steps=50):
                raise AssertionError

        with pytest.raises(ConfigurationError, match="also needs image"):
            calibration_call(ImagePipeline(make_dit()), prompts=["a"])


def test_steps_are_watched(tiny_pipeline):
    ticks = []
    with steps_watched(tiny_pipeline, lambda: ticks.append(1)):
        generate(tiny_pipeline, labels=list(range(10)), steps=3)
    assert len(ticks) == 3 * pipelines.num_batches(10) == 6
    assert "step" not in tiny_pipeline.scheduler.__dict__


def test_nothing_to_generate(tiny_pipeline):
    with pytest.raises(ConfigurationError, match="nothing to generate"):
        generate(tiny_pipeline, labels=[])
