"""Number formats as pytrees: quantise and dequantise in plain JAX, the oracle of every kernel."""

from longlive_jax.formats.fp8 import FP8, FP8Pair, FP8Tensor, quantize_fp8
from longlive_jax.formats.hadamard import random_hadamard
from longlive_jax.formats.nvfp4 import (
    NVFP4,
    NVFP4Tensor,
    from_hardware_order,
    from_packed,
    quantize_nvfp4,
    to_hardware_order,
)
from longlive_jax.formats.pending import PendingMatmul
from longlive_jax.formats.tensor import Format, Quantized

__all__ = [
    "FP8",
    "NVFP4",
    "FP8Pair",
    "FP8Tensor",
    "Format",
    "NVFP4Tensor",
    "PendingMatmul",
    "Quantized",
    "from_hardware_order",
    "from_packed",
    "quantize_fp8",
    "quantize_nvfp4",
    "random_hadamard",
    "to_hardware_order",
]
