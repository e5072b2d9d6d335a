"""Feature extractors: what they are called on, what they may return, and the Inception network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CheckpointError, ConfigurationError, EvaluationError, MissingPackageError, QualityWarning
from fxquant.evaluation import features as module
from fxquant.evaluation.features import Extractor, InceptionFeatures, inception, named_extractor
from fxquant.evaluation.weights import INCEPTION, find_weights, load_weights, require
from tests.evaluation.pipes import Pooled

IMAGES = torch.randint(0, 256, (3, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, images: Tensor) -> Any:
        return self.what


def test_images_are_floats_or_bytes() -> None:
    assert torch.equal(Extractor(Flat())(IMAGES).pooled, IMAGES.flatten(1) / 255)
    assert torch.equal(Extractor(Flat(), "uint8")(IMAGES).pooled, IMAGES.flatten(1).float())
    with pytest.raises(ConfigurationError, match="'unit' or 'uint8'"):
        Extractor(Flat(), "bytes")  # type: ignore[arg-type]


def test_mappings_have_names() -> None:
    found = Extractor(Pooled())(IMAGES)
    assert found.tensors().keys() == {"pooled", "spatial", "logits"}
    assert found.pooled.shape == found.logits.shape == (3, 6)  # type: ignore[union-attr]
    for what in ({"spatial": torch.zeros(3, 2)}, {"features": torch.zeros(3, 2), "extra": torch.zeros(3, 2)}):
        with pytest.raises(EvaluationError, match="'features', and optionally"):
            Extractor(Returns(what))(IMAGES)


@pytest.mark.parametrize("what", [torch.zeros(3, 4, 5, 5), torch.zeros(2, 4), [1, 2, 3]])
def test_other_results_are_refused(what: Any) -> None:
    with pytest.raises(EvaluationError, match=r"\[3, d\] is needed"):
        Extractor(Returns(what))(IMAGES)


def test_a_network_that_fails_is_named() -> None:
    with pytest.raises(EvaluationError, match=r"extractor Linear failed on unit images \(3, 3, 8, 10\): RuntimeError"):
        Extractor(nn.Linear(4, 4))(IMAGES)


def test_keys_depend_on_weights_class_and_input() -> None:
    def linear(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(4, 4)

    keys = [
        Extractor(linear(0)).key,
        Extractor(linear(1)).key,
        Extractor(linear(0), "uint8").key,
        Extractor(Flat()).key,
    ]
    assert len({*keys}) == 4
    assert Extractor(linear(0)).key == keys[0]


def test_keys_depend_on_options_and_code() -> None:
    def scaled(factor: float) -> Any:
        return lambda images: factor * images.mean((2, 3))

    class Options(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, : self.size, 0]

    def other() -> type[nn.Module]:
        class Options(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images[:, 0, :, 1]

        Options.__qualname__ = "test_keys_depend_on_options_and_code.<locals>.Options"
        return Options

    def pooled(size: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())

    made: list[Any] = [pooled(1), pooled(2), scaled(1), scaled(2), lambda images: images.amax((2, 3))]
    made += [lambda images: images.amin((2, 3)), Options(1), Options(2), other()()]
    keys = [Extractor(one).key for one in made]
    assert len({*keys}) == len(made)
    assert [Extractor(one).key for one in (pooled(2), scaled(2), Options(2))] == [keys[1], keys[3], keys[7]]


@pytest.mark.parametrize("make", [
    lambda images: images.mean((2, 3)) * float("nan"),
    lambda images: {"features": images.mean((2, 3)), "logits": images.mean((2, 3)) / 0},
    lambda images: images.mean((2, 3)).double() * 1e300,
    lambda images: images.mean((2, 3)) * 1j,
    lambda images: images.mean((2, 3))[:, :0],
    lambda images: images.mean((2, 3)).to("meta"),
    lambda images: images.mean((2, 3)).to_sparse(),
])  # fmt: skip
def test_features_that_are_not_finite_real_numbers_are_refused(make: Any) -> None:
    with pytest.raises(EvaluationError, match=r"NaN or infinity|real numbers|cannot be read"):
        Extractor(make)(IMAGES)


def test_extractors_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = named_extractor("tests.evaluation.pipes:pooled")
    assert found.name == "tests.evaluation.pipes:pooled"
    assert torch.equal(found(IMAGES).pooled, Extractor(Pooled())(IMAGES).pooled)
    (tmp_path / "my_network_of_the_test.py").write_text("import torch\nnetwork = torch.nn.Flatten()\n")
    monkeypatch.chdir(tmp_path)
    assert named_extractor("my_network_of_the_test:network")(IMAGES).pooled.shape == (3, 240)
    for text, reason in (
        ("tests.evaluation.pipes", "module:attribute"),
        ("tests.evaluation.pipes:nothing", "AttributeError"),
        ("no_such_module_here:network", "ModuleNotFoundError"),
        ("math:pi", "TypeError"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            named_extractor(text)


def test_weights_are_found_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setenv("FXQUANT_INCEPTION", str(path))
    assert find_weights(INCEPTION, None) == path
    assert load_weights(path, INCEPTION)["a"].tolist() == [1, 1]
    monkeypatch.delenv("FXQUANT_INCEPTION")
    assert find_weights(INCEPTION, None) is None
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"w.pth cannot be read.*pt_inception"):
        load_weights(path, INCEPTION)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match=r"w.pth does not hold"):
        load_weights(path, INCEPTION)
    torch.save({"a": torch.tensor([1.0, math.nan])}, path)
    with pytest.raises(CheckpointError, match=r"w.pth: a holds NaN or infinity; get pt_inception"):
        load_weights(path, INCEPTION)


class Planted:
    """A pickle of this class would run code."""

    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_code_in_weights_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2), "b": Planted()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path / "w.pth", INCEPTION)
    assert "code ran" not in capsys.readouterr().out


def test_missing_and_broken_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackageError, match=r"no-such-package-here is not installed: pip install 'fxquant\[eval"):
        require("no_such_package_here")
    (tmp_path / "broken_package_of_the_test.py").write_text("raise RuntimeError('operator does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"operator does not exist. torchvision must be of the same build"):
        require("broken_package_of_the_test")


def test_spatial_features_are_positions_of_seven_channels() -> None:
    """The order is that of TensorFlow: height, width, channel."""

    class Branch(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.repeat(1, 4, 1, 1) * torch.arange(12).view(1, 12, 1, 1)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Mixed_6d = nn.ModuleDict({"branch1x1": Branch()})

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            self.Mixed_6d["branch1x1"](images.float())
            return images.float().mean((2, 3)), torch.zeros(len(images), 5)

    found = Extractor(InceptionFeatures(Network()), "uint8")(IMAGES)
    assert found.spatial is not None and found.spatial.shape == (3, 8 * 10 * 7)
    assert found.spatial.view(3, 8, 10, 7)[1, 2, 3].tolist() == [
        int(IMAGES[1, channel % 3, 2, 3]) * channel for channel in range(7)
    ]


def test_the_inception_network(tmp_path: Path) -> None:
    """With random weights; its features are those of torch-fidelity itself."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    path = tmp_path / "w.pth"

    class Random(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return None

    torch.save({}, path)
    plain = Random("inception-v3", ["2048", "logits_unbiased", "768"], feature_extractor_weights_path=path)
    torch.save(plain.state_dict(), path)
    with pytest.warns(QualityWarning, match="not the published file"):
        extractor = inception(path)
    seen: list[Tensor] = []
    plain.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    pooled, logits, _ = plain(IMAGES)
    found = extractor(IMAGES)
    assert torch.equal(found.pooled, pooled) and torch.equal(found.logits, logits)  # type: ignore[arg-type]
    assert found.spatial is not None and found.spatial.shape == (3, 2023)
    assert torch.equal(found.spatial, seen[0][:, :7].permute(0, 2, 3, 1).reshape(3, -1))
    torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    with pytest.warns(QualityWarning), pytest.raises(CheckpointError, match=r"w.pth does not hold the weights"):
        inception(path)
    assert module.SPATIAL_CHANNELS == 7
