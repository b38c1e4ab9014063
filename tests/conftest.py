"""What tests in several files ask for."""

import gc
import logging

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Trainer collects garbage after each training, and would look through all imported libraries each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tokenizer():
    """Of the vocabulary of `tiny_pairs.py`, in which each test may change what it likes."""
    from tests.tiny_pairs import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def messages(caplog):
    """What this package and transformers log, whose logger keeps its records to itself."""
    for name in ("transformers", "normbt_kernels"):
        caplog.set_level(logging.INFO, logger=name)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
