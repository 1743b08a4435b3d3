"""A product with NVFP4 weights that are never bfloat16 in memory: interface and fallback.

y[.., out] = sum over in of x[.., in] * code[out, in] * scale[out, in / 16], in float32. What scales
whole rows or tensors, such as amax, is left to the caller. A code times its block's scale has 6
significant bits, so that weights are exact in bfloat16, and so are activations of the same format:
only the sum rounds. The kernel is in `matmul_nvfp4_hopper`; it reads the weights at 5 bits each.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import NVFP4Tensor, nvfp4
from longlive_jax.kernels import matmul_nvfp4_hopper as hopper
from longlive_jax.kernels.chip import is_hopper, is_local

TUNING = hopper.Tuning()
DTYPES = ("bfloat16", "float32")


def supports(x: jax.Array, w: NVFP4Tensor) -> bool:
    """Whether the kernel takes these: bfloat16, local, on a Hopper GPU, in whole tiles."""
    return (
        is_hopper()
        and all(map(is_local, (x, w.values, w.scales)))
        and x.dtype == jnp.bfloat16
        and x.shape[-1] == w.shape[-1]
        and hopper.divides(math.prod(x.shape[:-1]), math.prod(w.shape[:-1]), w.shape[-1])
    )


def matmul(x: jax.Array, w: NVFP4Tensor, dtype=jnp.float32) -> jax.Array:
    """x [.., in] times w's codes and block scales [out, in] -> [.., out], sums in float32.

    By the kernel where `supports` says so, else by XLA: the same but for the order of sums. w's
    amax is not in the result.

    Args:
      x: bfloat16 or float32. float32 is multiplied as such, by XLA.
      w: [out, in], or [part, out, in], whose parts lie one behind the other in the result.
      dtype: of the result: bfloat16 or float32.

    Raises:
      InputError: another number of channels, or dtype.
    """
    if x.shape[-1:] != w.shape[-1:]:
        raise InputError(
            f"matmul_nvfp4: x {x.shape} and w {w.shape}; the last axes must be equal: both are in"
        )
    _validate_dtype(dtype)
    if not supports(x, w):
        return _by_xla(x, w, dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = kernel(rows, _packed(w), w.scales.reshape(-1, w.scales.shape[-1]), dtype)
    return y.reshape(*x.shape[:-1], -1)


def _by_xla(x, w, dtype):
    """`matmul` with weights expanded in memory."""
    blocks = w.values.astype(x.dtype).reshape(*w.scales.shape, nvfp4.BLOCK)
    weights = (blocks * w.scales.astype(x.dtype)[..., None]).reshape(-1, w.shape[-1])
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weights, contract, preferred_element_type=jnp.float32).astype(dtype)


def _packed(w):
    """w's codes [out, in / 2], uint8: on a GPU the same bytes."""
    pairs = w.values.reshape(-1, w.shape[-1] // 2, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint8)


def kernel(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    dtype=jnp.float32,
    tuning: hopper.Tuning = TUNING,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    XLA reorders codes and scales first (`matmul_nvfp4_hopper.pack`), a small pass over them. Where
    weights stay, pack them once and call `matmul_nvfp4_hopper.matmul`.

    Args:
      x: bfloat16 [m, in].
      codes: uint8 [out, in / 2], the even column in the low four bits.
      scales: float8_e4m3fn [out, in / 16]. A NaN makes its column of the result NaN.
      dtype: of the result: bfloat16 or float32.
      tuning: results do not depend on it.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      [m, out].

    Raises:
      InputError: other dtypes, shapes that do not belong together or that tiles do not divide.
    """
    _validate(x, codes, scales)
    _validate_dtype(dtype)
    return hopper.matmul(x, *hopper.pack(codes, scales), dtype, tuning, interpret)


def _validate_dtype(dtype):
    if jnp.dtype(dtype) not in DTYPES:
        raise InputError(
            f"matmul_nvfp4: dtype {jnp.dtype(dtype)}; it must be {' or '.join(DTYPES)}: cast later"
        )


def _validate(x, codes, scales):
    wanted = {"x": (x, jnp.bfloat16), "codes": (codes, jnp.uint8)}
    wanted["scales"] = (scales, jnp.float8_e4m3fn)
    for name, (array, dtype) in wanted.items():
        if array.dtype != dtype or array.ndim != 2:
            raise InputError(
                f"matmul_nvfp4 kernel: {name} is {array.dtype} {array.shape}; it must be a matrix "
                f"of {jnp.dtype(dtype)}: cast and reshape it, or use matmul"
            )
    (m, depth), out = x.shape, len(codes)
    if codes.shape[1] * 2 != depth or scales.shape != (out, depth // nvfp4.BLOCK):
        raise InputError(
            f"matmul_nvfp4 kernel: codes {codes.shape} and scales {scales.shape} beside x "
            f"{x.shape}; they must be [out, in / 2] and [out, in / {nvfp4.BLOCK}], two codes a byte"
        )
    if not hopper.divides(m, out, depth):
        raise InputError(
            f"matmul_nvfp4 kernel: {m} rows, {depth} in, {out} out; the kernel takes multiples of "
            f"{hopper.ROWS}, {hopper.DEPTH} and {hopper.COLUMNS}; use matmul"
        )
