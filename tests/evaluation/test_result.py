"""Results: tables, JSON and limits."""

from __future__ import annotations

import json
import math

import pytest

from fxquant.errors import ConfigurationError, GateError, MetricWeightsError, UnknownNameError
from fxquant.evaluation.choice import METRICS, Given, choose
from fxquant.evaluation.result import Evaluation

FOUND = Evaluation(
    {"fid": 7.09, "sfid": 19.23, "psnr": 31.5, "lpips": 0.1234, "ssim": math.nan},
    {"fid": 4.53, "sfid": 17.93},
    images=50_000,
    counts={"sfid": 10_000},
    left_out={"clip_score": "needs prompts", "recall": "needs real images", "precision": "needs real images"},
)

TABLE = """\
metric      quantized    float  better      images
--------  -----------  -------  --------  --------
fid              7.09     4.53  lower        50000
sfid            19.23    17.93  lower        10000
psnr            31.50           higher       50000
lpips          0.1234           lower        50000
ssim              nan           higher       50000

Not computed:
  clip_score: needs prompts
  recall, precision: needs real images"""


def test_table() -> None:
    assert str(FOUND) == TABLE


def test_json() -> None:
    data = json.loads(json.dumps(FOUND.to_json(), allow_nan=False))
    assert data["metrics"]["ssim"] == "nan" and data["counts"] == {"sfid": 10_000}


def test_limits() -> None:
    FOUND.check({"fid": 7.09, "psnr": 31.5, "lpips": 0.2})
    with pytest.raises(GateError) as caught:
        FOUND.check({"fid": 7, "psnr": 32, "lpips": 0.1, "ssim": 0.5, "sfid": 20})
    assert caught.value.failures == {
        "fid": "fid is 7.09, 0.09 above its limit 7",
        "psnr": "psnr is 31.50, 0.50 below its limit 32",
        "lpips": "lpips is 0.1234, 0.0234 above its limit 0.1",
        "ssim": "ssim is not a number, so it does not keep its limit 0.5",
    }
    with pytest.raises(GateError) as caught:  # Rounded, they would seem to keep their limits.
        FOUND.check({"psnr": 31.5001, "lpips": 0.1233999})
    assert caught.value.failures == {
        "psnr": "psnr is 31.5, 0.0001 below its limit 31.5001",
        "lpips": "lpips is 0.1234, 1e-07 above its limit 0.1233999",
    }
    with pytest.raises(ConfigurationError, match="recall needs real images"):
        FOUND.check({"recall": 0.5})
    with pytest.raises(ConfigurationError, match="inception_score is not among"):
        FOUND.check({"inception_score": 5})
    with pytest.raises(UnknownNameError, match="psnr"):
        FOUND["fjd"]
    assert FOUND["lpips"] == 0.1234


ALL = Given(*[True] * 8)


def test_everything_runs_with_everything() -> None:
    assert choose(ALL).run == {*METRICS}
    assert choose(ALL, ["fid"], ["psnr"]).run == {"fid", "psnr"}


def test_what_is_missing_is_named() -> None:
    statistics = choose(Given(extractor=True, real=True))
    assert statistics.run == {"fid", "inception_score"}
    assert "arr_0" in statistics.left_out["recall"] and "mu_s" in statistics.left_out["sfid"]
    with pytest.raises(MetricWeightsError, match="FXQUANT_CLIP"):
        choose(Given(float_model=True, prompts=True), ["clip_score"])
    with pytest.raises(ConfigurationError, match="clip_score needs prompts"):
        choose(Given(float_model=True, clip=True), ["clip_score"])
    with pytest.raises(ConfigurationError, match="choose from"):
        choose(ALL, [])
    with pytest.raises(MetricWeightsError, match="lpips needs the weights of AlexNet"):
        choose(Given(float_model=True), None, ["lpips"])
    with pytest.raises(ConfigurationError, match=r"no metric can run: give the float model \(--reference\)"):
        choose(Given())
    choice = choose(ALL, None, ["fid"])
    choice.drop("recall", "is too slow")
    assert "recall" not in choice.run and choice.left_out == {"recall": "is too slow"}
    with pytest.raises(ConfigurationError, match="fid is not here"):
        choice.drop("fid", "is not here")
