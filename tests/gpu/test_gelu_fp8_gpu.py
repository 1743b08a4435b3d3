"""GELU of an FP8 product by the kernel on a Hopper GPU, against its oracle there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_gelu_fp8_gpu.py
"""

import pytest

from longlive_jax.kernels import gelu_fp8 as lib
from longlive_jax.ops import quantized
from tests.gpu.test_quantize_fp8_gpu import OTHER_CODES, check
from tests.kernels.rows import gelu_quantize, product

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]


@pytest.mark.parametrize("rows, n", ((74, 1024), (75, 3072), (880, 14336), (37, 16384)))
def test_codes_and_scales(rows, n):
    x = product(rows, n)
    assert lib.supports(x)
    check(quantized.gelu_quantize_rows, (x,), gelu_quantize, OTHER_CODES)
