"""The checks of `device_checks.py`, which bench/gpu_check.sh also runs where there is no pytest."""

import pytest
from device_checks import CHECKS


# Overflow is what some of them are about; the interpreter's NumPy warns of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.slow
def test_device_check(check):
    if reason := check():
        pytest.skip(reason)
