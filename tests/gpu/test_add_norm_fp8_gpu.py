"""A residual sum, its norm and codes by the kernel on a Hopper GPU, against their oracles there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_add_norm_fp8_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.kernels import add_norm_fp8 as lib
from longlive_jax.ops import quantized, residual
from tests.gpu.test_quantize_fp8_gpu import OTHER_CODES
from tests.kernels.rows import check, layer_norm_quantize
from tests.kernels.test_add_norm_fp8 import arguments

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]


@pytest.mark.parametrize("n", (1024, 3072, 5120))
@pytest.mark.parametrize("gated, of", ((True, (1, 5, 1)), (True, (1, 1, 1)), (False, (1, 5, 1))))
def test_sum_and_codes(n, gated, of):
    x, y, *rest = arguments((1, 5, 37, n), gated, of)
    assert lib.supports(x, y, *rest)
    total, q = jax.jit(quantized.add_layer_norm_quantize_rows)(x, y, *rest)
    want = jax.jit(residual.add)(x, y, rest[0])
    other = np.asarray(total != want)
    print(f"other sums: {other.mean():.1e}")
    np.testing.assert_allclose(
        *(np.asarray(z, np.float32) for z in (total, want)), rtol=2**-7, atol=1e-6
    )
    assert other.mean() < 1e-3
    expected = jax.jit(layer_norm_quantize)(jnp.asarray(total), *rest[1:])
    check((q.values, q.scale), expected, OTHER_CODES)
