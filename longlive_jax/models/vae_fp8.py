"""FP8 for the VAE's decoder: the convolutions of its residual blocks multiply E4M3 codes.

Codes are made by what comes before a convolution, norm and SiLU. After them a value is at most
sqrt(channels) * |gamma| in size, so an activation's scale is known from the weights: nothing is
measured, and frames do not depend on how many are decoded together. Weights have a scale for each
output channel. Products are added in float32, and the scales, one vector, are multiplied onto the
sums. The first and the last convolution, the middle block and the changes of size stay as they are:
in a simulation with all of them in FP8 pictures had 6 dB less.
"""

import math

import jax
import jax.numpy as jnp

from longlive_jax.params import Tree

FORMAT = jnp.float8_e4m3fn
_LARGEST = 448.0  # of E4M3


def quantize(params: Tree) -> Tree:
    """A decoder's parameters, {"conv2", "decoder"}, with codes for weights where there is FP8.

    Such a convolution has {"codes", "scale", "bias"}: FORMAT as the weight's shape, float32 [out].
    """
    blocks = params["decoder"]["upsamples"]
    blocks = {
        i: {"upsamples": {j: _block(b) for j, b in stage["upsamples"].items()}}
        for i, stage in blocks.items()
    }
    return {**params, "decoder": {**params["decoder"], "upsamples": blocks}}


def _block(params: Tree) -> Tree:
    if "residual" not in params:  # a change of size
        return params
    inner = {k: _convolution(p) if "weight" in p else p for k, p in params["residual"].items()}
    return {**params, "residual": inner}


def _convolution(params: Tree) -> Tree:
    weight = params["weight"].astype(jnp.float32)
    inputs = tuple(range(weight.ndim - 1))
    scale = _scale(jnp.max(jnp.abs(weight), axis=inputs, keepdims=True))
    codes = (weight / scale).astype(FORMAT)
    return {"codes": codes, "scale": scale.reshape(-1), "bias": params["bias"]}


def step(gamma: jax.Array) -> jax.Array:
    """What a code of 1 is worth after norm and SiLU, float32 []: no value exceeds the format."""
    return _scale(jnp.max(jnp.abs(gamma.astype(jnp.float32))) * math.sqrt(gamma.size))


def _scale(largest: jax.Array) -> jax.Array:
    """What a code of 1 is worth, where the largest number becomes the largest code."""
    return jnp.maximum(largest / _LARGEST, jnp.finfo(jnp.float32).tiny)  # all may be zero


def codes(x: jax.Array, step: jax.Array) -> jax.Array:
    """float32 values as codes."""
    return (x / step).astype(FORMAT)
