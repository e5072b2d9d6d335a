"""Pipelines: a quantized one is read and written whole, and calibration runs it the way it is used."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    DiTPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn

import fxquant
from fxquant.calibration.pipeline_calls import calibration_call, generate, num_batches, steps_watched
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.runtime.model import GraphModel
from fxquant.storage import diffusers_io
from fxquant.storage.aot.model import PackagedModel
from fxquant.storage.diffusers_io import load_pipeline, save_pipeline
from fxquant.storage.pipeline_folders import parts_of
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

    def test_other_pipelines_take_it_over(self, pipe):
        """They drop what they take for a ModelMixin and is of another class than they name."""
        assert DiTPipeline.from_pipe(pipe).transformer is pipe.transformer

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
            "README.md", "config.json", "plan.json", "plan.safetensors", "diffusion_pytorch_model.safetensors",
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

    def test_overwrite_replaces_it(self, pipe, folder, tmp_path):
        target = shutil.copytree(folder, tmp_path / "target")
        (target / "vae" / "config.json").write_text("{}")
        save_pipeline(pipe, target, overwrite=True)
        assert (target / "vae" / "config.json").read_bytes() == (folder / "vae" / "config.json").read_bytes()
        assert [path.name for path in tmp_path.iterdir()] == ["target"]

    @pytest.mark.parametrize(
        "name",
        ["README.md", ".git/HEAD", "float/model_index.json", "vae/notes.md", "transformer/thesis.json", "vae/x/y"],
    )
    def test_what_else_lies_in_it_is_never_deleted(self, pipe, folder, tmp_path, name):
        target = shutil.copytree(folder, tmp_path / "target")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("precious")
        with pytest.raises(CheckpointError, match=r"holds more than a pipeline \((README|\.git|float|vae/|tran)"):
            save_pipeline(pipe, target, overwrite=True)
        assert (target / name).read_text() == "precious"

    def test_a_float_pipeline_is_never_replaced(self, pipe, tiny_pipeline, tmp_path):
        tiny_pipeline.save_pretrained(tmp_path / "float")
        with pytest.raises(CheckpointError, match="a pipeline without a quantized part"):
            save_pipeline(pipe, tmp_path / "float", overwrite=True)
        assert (tmp_path / "float" / "transformer" / "diffusion_pytorch_model.safetensors").exists()

    def test_everybody_may_read_it(self, folder, tmp_path):
        (tmp_path / "plain").touch()
        modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
        assert modes == {(tmp_path / "plain").stat().st_mode}

    def test_a_package_says_what_the_other_parts_compute_in(self, folder, tmp_path, monkeypatch):
        target = shutil.copytree(folder, tmp_path / "target")
        (target / "transformer" / "plan.json").rename(target / "transformer" / "package.json")
        config = json.loads((target / "transformer" / "config.json").read_text())
        info = {
            "signature": [],
            "dtype": "bfloat16",
            "model_class": "diffusers:DiTTransformer2DModel",
            "timestep": None,
        }
        package = PackagedModel(info, config, [], {})
        monkeypatch.setattr(diffusers_io, "load_package", lambda _: package)
        loaded = load_pipeline(target, trust_packages=True)
        assert loaded.transformer is package
        assert loaded.vae.dtype == torch.bfloat16
        assert load_pipeline(target, trust_packages=True, torch_dtype=torch.float32).vae.dtype == torch.float32

    def test_what_is_no_pipeline_is_never_replaced(self, pipe, tmp_path):
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(CheckpointError, match="holds files other than a pipeline"):
            save_pipeline(pipe, tmp_path, overwrite=True)
        assert (tmp_path / "mine").read_text() == "precious"

    def test_a_failure_leaves_the_old_folder(self, pipe, folder, tmp_path, monkeypatch):
        target = shutil.copytree(folder, tmp_path / "target")
        (target / "vae" / "config.json").write_text("old")

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(pipe.scheduler, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pipeline(pipe, target, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert (target / "vae" / "config.json").read_text() == "old"

    def test_a_part_that_could_not_be_read_back_is_refused(self, pipe, tmp_path, monkeypatch):
        class Own(nn.Module):
            def save_pretrained(self, folder):
                raise AssertionError("too late")

        vae, skeleton = pipe.vae, pipe.transformer.architecture.skeleton
        pipe.register_modules(vae=Own())
        try:
            with pytest.raises(ConfigurationError, match=r"part 'vae' of the pipeline is a Own.*fxquant\.save"):
                save_pipeline(pipe, tmp_path / "own")
        finally:
            pipe.register_modules(vae=vae)
        monkeypatch.setattr(skeleton, "__class__", type("Own", (type(skeleton),), {"__module__": "own"}))
        with pytest.raises(ConfigurationError, match="part 'transformer' of the pipeline is a Own from own"):
            save_pipeline(pipe, tmp_path / "own")
        assert not list(tmp_path.iterdir())

    def test_a_float_pipeline_is_refused(self, tiny_pipeline, tmp_path):
        with pytest.raises(ConfigurationError, match="no part of this DiTPipeline is quantized"):
            save_pipeline(tiny_pipeline, tmp_path / "x")

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (None, "there is no folder"),
            ("empty", r"not a pipeline, because it has no model_index\.json"),
            ("transformer", r"one quantized model, which fxquant\.load reads"),
            ("vae", r"one float model, which its class reads with from_pretrained"),
            ("broken", r"model_index\.json cannot be read"),
            ("file", r"file is a file, not a folder"),
        ],
    )
    def test_what_is_no_pipeline(self, folder, tmp_path, made, message):
        if made is None:
            source = tmp_path / "nowhere"
        elif made in ("transformer", "vae"):
            source = folder / made
        else:
            source = tmp_path
            if made == "file":
                source = tmp_path / "file"
                source.touch()
            if made == "broken":
                (source / "model_index.json").write_text("{")
        with pytest.raises(CheckpointError, match=message):
            load_pipeline(source)

    @pytest.mark.parametrize(
        "text",
        [b'{"weight_map": ' + 100_000 * b"[", b'{"a": ' * 100_000, b"\xff" * 5000, b"[]", b'{"weight_map": {"a": {}}}'],
    )
    def test_a_damaged_index_of_shards(self, folder, tmp_path, text):
        shutil.copytree(folder, tmp_path / "p")
        (tmp_path / "p" / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(text)
        with pytest.raises(CheckpointError, match="copy") as caught:
            load_pipeline(tmp_path / "p")
        assert len(str(caught.value)) < 600 + len(str(tmp_path))

    def test_a_part_of_a_size_that_its_weights_cannot_have(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "p")
        path = tmp_path / "p" / "vae" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 10**30}))
        with pytest.raises(CheckpointError, match=f"config.json: it holds the number {10**30}"):
            load_pipeline(tmp_path / "p")


class TestParts:
    def test_parts_that_the_index_does_not_name_are_ignored(self, folder, tmp_path):
        target = shutil.copytree(folder, tmp_path / "target")
        for name in ("evil", "evil_too"):
            (target / name).mkdir()
        (target / "evil" / "package.json").write_text("{}")
        (target / "evil_too" / "plan.json").write_text("{}")
        assert isinstance(load_pipeline(target).transformer, GraphModel)

    @pytest.mark.parametrize("name", ["../evil", "..", "a/b", "/evil"])
    def test_parts_outside_of_the_folder_are_none(self, tmp_path, name):
        (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"], "vae": ["diffusers", "X"]}))
        assert parts_of(tmp_path) == ["vae"]

    def test_packages_load_only_when_trusted(self, folder, tmp_path, monkeypatch):
        target = shutil.copytree(folder, tmp_path / "target")
        (target / "transformer" / "plan.json").rename(target / "transformer" / "package.json")
        loaded = []
        monkeypatch.setattr(diffusers_io, "load_package", loaded.append)
        with pytest.raises(CheckpointError, match=r"transformer is a package, a program.*trust_packages=True"):
            load_pipeline(target)
        assert not loaded
        with pytest.raises(AttributeError):  # What the stand-in above returns is no model.
            load_pipeline(target, trust_packages=True)
        assert loaded == [target / "transformer"]

    def test_a_part_that_is_given_is_not_read(self, pipe, folder, tmp_path):
        target = shutil.copytree(folder, tmp_path / "target")
        (target / "transformer" / "plan.json").write_text("damaged")
        given = make_dit()
        assert load_pipeline(target, transformer=given).transformer is given

    def test_a_quantized_part_that_is_given(self, pipe, tiny_pipeline, tmp_path):
        tiny_pipeline.save_pretrained(tmp_path / "float")
        assert load_pipeline(tmp_path / "float", transformer=pipe.transformer).transformer is pipe.transformer

    @pytest.mark.parametrize("name", ["trust_remote_code", "custom_pipeline", "torch_dtype", "self"])
    def test_a_part_is_no_option_of_diffusers(self, folder, tmp_path, name):
        target = shutil.copytree(folder, tmp_path / "target")
        shutil.copytree(target / "transformer", target / name)
        (target / "planted.py").write_text(
            f"import pathlib, diffusers\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
            "class Planted(diffusers.DiTPipeline):\n    pass\n"
        )
        index = json.loads((target / "model_index.json").read_text())
        index[name] = index["transformer"]
        for wanted in (["planted", "Planted"], "DiTPipeline"):
            (target / "model_index.json").write_text(json.dumps(index | {"_class_name": wanted}))
            with pytest.raises(CheckpointError, match=r"model_index\.json says that a .* has a part '"):
                load_pipeline(target)
        assert not (tmp_path / "ran").exists()

    def test_a_compiled_part_is_saved_as_it_is_without(self, pipe, folder, tmp_path):
        wrapped = make_pipeline(pipe.transformer)
        wrapped.transformer = torch.compile(pipe.transformer)
        save_pipeline(wrapped, tmp_path / "q")
        for name in ("model_index.json", "transformer/plan.json", "transformer/diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "q" / name).read_bytes() == (folder / name).read_bytes()

    @pytest.mark.parametrize("second", [None, "float", "quantized"])
    def test_optional_parts_and_a_second_transformer(self, tmp_path, second):
        """The transformers of ``WanPipeline`` are optional parts, which diffusers may read although they are given."""
        first, other = quantized_wan(), None if second is None else make_wan() if second == "float" else quantized_wan()
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        save_pipeline(WanPipeline(None, None, vae, UniPCMultistepScheduler(), first, other), tmp_path / "q")
        loaded = load_pipeline(tmp_path / "q")
        assert isinstance(loaded, WanPipeline)
        assert loaded.text_encoder is None
        assert torch.equal(run_wan(loaded.transformer), run_wan(first))
        assert type(loaded.transformer_2) is type(other)
        if other is not None:
            assert all(map(torch.equal, loaded.transformer_2.state_dict().values(), other.state_dict().values()))
            # Float products of some processors depend on the alignment of weights, which files map differently.
            torch.testing.assert_close(run_wan(loaded.transformer_2), run_wan(other))


def make_wan():
    """A Wan transformer for clips of 2 x 4 x 4 latents."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def quantized_wan():
    model = make_wan()
    return fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: run_wan(model), measure=0)


@torch.no_grad()
def run_wan(model):
    generator = torch.Generator().manual_seed(0)
    clip, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 8, 32, generator=generator)
    return model(hidden_states=clip, timestep=torch.tensor([500]), encoder_hidden_states=text).sample


class TestSavePretrained:
    """What pipelines do themselves, for which diffusers knows our class."""

    def test_the_transformer_is_in_it(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["transformer"] == ["fxquant", "GraphModel"]
        for loaded in (load_pipeline(tmp_path), DiTPipeline.from_pretrained(tmp_path)):
            loaded.set_progress_bar_config(disable=True)
            assert np.array_equal(*(pixels(generate(p, labels=[5], steps=2)) for p in (pipe, loaded)))
        save_pipeline(load_pipeline(tmp_path), tmp_path / "again")
        assert json.loads((tmp_path / "again" / "model_index.json").read_text())["transformer"][0] == "diffusers"

    def test_another_dtype(self, folder):
        assert GraphModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).dtype == torch.float32
        assert GraphModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_a_float_transformer_is_not_replaced(self, pipe, tiny_pipeline, tmp_path):
        tiny_pipeline.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"no plan\.json, so fxquant did not write it"):
            pipe.save_pretrained(tmp_path)


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
    assert len(ticks) == 3 * num_batches(10) == 6
    assert "step" not in tiny_pipeline.scheduler.__dict__


def test_nothing_to_generate(tiny_pipeline):
    with pytest.raises(ConfigurationError, match="nothing to generate"):
        generate(tiny_pipeline, labels=[])


def test_names_of_classes_are_kept(tmp_path):
    """diffusers reads them from the index, but does not write them."""
    pipe = DiTPipeline(**make_pipeline().components, id2label={0: "zero, 0", 1: "one", 12: "twelve"})
    pipe.transformer = fxquant.compile(
        pipe.transformer, recipe="rtn-w8a8", calibrate=calibration_call(pipe, 2, 2), measure=0
    )
    save_pipeline(pipe, tmp_path / "dit")
    found = load_pipeline(tmp_path / "dit")
    assert found.labels == pipe.labels == {"0": 0, "zero": 0, "one": 1, "twelve": 12}
    assert found.get_label_ids(["twelve", "zero"]) == [12, 0]
    save_pipeline(found, tmp_path / "again")
    assert load_pipeline(tmp_path / "again").labels == pipe.labels
