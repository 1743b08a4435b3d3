"""RMS norm of an FP8 product by the kernel on a Hopper GPU, against its oracle there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_norm_product_gpu.py
"""

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.kernels import norm_product as lib
from longlive_jax.ops import norm
from tests.kernels.rows import product
from tests.kernels.test_norm_product import check, oracle

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]


@pytest.mark.parametrize("rows, n", ((75, 1024), (880, 3072), (37, 6144)))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_numbers(rows, n, dtype):
    x = product(rows, n)
    weight = 1 + jax.random.normal(jax.random.key(2), (n,)).astype(dtype) / 4
    assert lib.supports(x, weight)
    check(jax.jit(norm.rms_norm_of)(x, weight), jax.jit(oracle)(x, weight))
