"""The 16-point random Hadamard transform, which spreads an outlier over its 16 neighbours."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.errors import InputError
from longlive_jax.formats import exact

POINTS = 16
# The random signs, fixed once: those of the original (and of NVIDIA's Transformer Engine), so that
# tensors transformed by either meet in one product.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def matrix() -> np.ndarray:
    """R = diag(SIGNS) H / 4, float32 [16, 16] with entries of 1/4 and -1/4; R R^T = 1 exactly."""
    h = np.ones((1, 1), np.float32)
    while len(h) < POINTS:
        h = np.block([[h, h], [h, -h]])
    return np.asarray(SIGNS, np.float32)[:, None] * h / 4


def random_hadamard(x: jax.Array) -> jax.Array:
    """x [..., n] times `matrix` along each 16 of the last axis, summed in float32, in x's dtype.

    Applied to both operands of a product along the axis they are contracted over, it cancels.

    Raises:
      InputError: the last axis is not a multiple of 16.
    """
    if x.ndim == 0 or x.shape[-1] % POINTS:
        raise InputError(
            f"hadamard: shape {x.shape} must end in a multiple of {POINTS}; pad it with zeros"
        )
    info = jnp.finfo(x.dtype)
    groups = exact.round_input(x).reshape(*x.shape[:-1], -1, POINTS)
    # One term after the other: a matrix product leaves the order of its sums to the backend, and
    # on a GPU it may round its factors. The products are exact, so contraction changes nothing.
    rows = matrix().reshape(POINTS, *(1,) * (groups.ndim - 1), POINTS)
    y = functools.reduce(operator.add, (groups[..., i, None] * r for i, r in enumerate(rows)))
    # Made explicit, as in `exact.round_input`.
    y = jax.lax.reduce_precision(y, info.nexp, info.nmant)
    return y.astype(x.dtype).reshape(x.shape)
