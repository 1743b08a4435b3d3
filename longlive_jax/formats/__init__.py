"""Number formats as pytrees: quantise and dequantise in plain JAX, the oracle of every kernel."""

from longlive_jax.formats.fp8 import FP8Tensor, quantize_fp8
from longlive_jax.formats.hadamard import random_hadamard
from longlive_jax.formats.nvfp4 import (
    NVFP4Tensor,
    from_hardware_order,
    from_packed,
    quantize_nvfp4,
    to_hardware_order,
)
from longlive_jax.formats.product import Product
from longlive_jax.formats.tensor import Quantized

__all__ = [
    "FP8Tensor",
    "NVFP4Tensor",
    "Product",
    "Quantized",
    "from_hardware_order",
    "from_packed",
    "quantize_fp8",
    "quantize_nvfp4",
    "random_hadamard",
    "to_hardware_order",
]
