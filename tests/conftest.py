"""Fixtures for tests in several files."""

import atexit
import gc
import logging
from pathlib import Path

import pytest

# What is imported is no garbage, nor is most of what a test makes. Trainer collects garbage after each training, and
# pytest at the end: without this, they would search all libraries and all earlier tests each time.
gc.set_threshold(100_000, 50, 100)
atexit.register(gc.unfreeze)  # so that nothing is reported as leaked


@pytest.fixture(autouse=True)
def _nothing_before_a_test_is_its_garbage():
    gc.freeze()


def pytest_collection_finish():
    gc.freeze()


def pytest_sessionfinish():
    gc.freeze()


@pytest.fixture
def tokenizer():
    """A tokenizer with the vocabulary of `tiny_pairs.py`. Each test has its own, and may change it."""
    from tests.tiny_pairs import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def messages(caplog):
    """The log of this package and of transformers, whose logger does not pass its records on."""
    for name in ("transformers", "normbt_kernels"):
        caplog.set_level(logging.INFO, logger=name)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def empty_figures(monkeypatch):
    """Figures are made, and saved as empty files: laying one out and drawing it takes half a second."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **options: Path(path).write_bytes(b""))


@pytest.fixture(scope="module")
def built_in_checkpoint(tmp_path_factory):
    """The folder of a model and tokenizer of the built-in default, untrained."""
    import torch

    from normbt_kernels.data import generated

    folder, tokenizer = tmp_path_factory.mktemp("built-in"), generated.make_tokenizer()
    torch.manual_seed(0)
    generated.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
