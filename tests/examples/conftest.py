"""The shipped models, loaded once for all tests of the examples."""

import pytest
from diffusers import DiTPipeline

from examples.digits import DigitClassifier, load_classifier, load_pipeline


@pytest.fixture(scope="session")
def pipe() -> DiTPipeline:
    return load_pipeline()


@pytest.fixture(scope="session")
def classifier() -> DigitClassifier:
    return load_classifier()
