"""What a file of tests needs; it asks by `pytest.mark.usefixtures`."""

import os

# Tests of speed start commands of their own: leave them memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

from longlive_jax.kernels import chip


@pytest.fixture
def needs_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU; set LONGLIVE_TEST_PLATFORM=gpu on a machine that has one")


@pytest.fixture
def needs_hopper(needs_gpu):
    if not chip.is_hopper():
        pytest.skip(f"{jax.local_devices()[0].device_kind} is no Hopper GPU")
