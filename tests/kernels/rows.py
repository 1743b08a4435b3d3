"""What tests of kernels on rows share: a product, oracles, and how codes may differ from theirs.

What is quantised alone has the oracle's bits. Norm and GELU have it within float32's rounding: that
takes a number to bfloat16's next one only where it is near a tie, one in about 2^12 with some bits
of error, and to another code where that in turn is at a tie of E4M3.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import formats
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.norm import layer_norm
from tests.kernels.checks import f32, shaped

OTHER_CODES = 1e-3  # the share that GELU and norm may have; each is one step away


def product(rows, n):
    """Of sums in the hundreds and a scale and a bias for each column; numbers of about 3."""
    keys = jax.random.split(jax.random.key(0), 4)
    return formats.PendingMatmul(
        sums=256 * jax.random.normal(keys[0], (rows, n), jnp.bfloat16),
        row=jnp.exp(jax.random.normal(keys[1], (rows, 1))) / 256,
        column=jnp.exp(jax.random.normal(keys[2], (n,))),
        bias=jax.random.normal(keys[3], (n,), jnp.bfloat16),
    )


def shaped_product(*shape, dtype=jnp.bfloat16):
    n = shape[-1]
    sums, bias = (shaped(*s, dtype=dtype) for s in (shape, (n,)))
    return formats.PendingMatmul(sums=sums, row=f32(*shape[:-1], 1), column=f32(n), bias=bias)


def quantize(x):
    return formats.quantize_fp8(x, axis=-1)


def gelu_quantize(x):
    return quantize(gelu(x.astype(jnp.float32)).astype(x.dtype))


def layer_norm_quantize(x, scale, shift):
    return quantize(layer_norm(x, scale, shift))


def check(result, expected, other_codes=0.0, no_scale=()):
    """Values and scales: scales are equal, NaN included; so are codes but for a share.

    Those of that share are one step away. With one, a row in a hundred may have another scale,
    whose largest number was at a tie.

    no_scale: indices of the rows that must decode to NaN, and are the only ones.
    """
    values, scale = map(np.asarray, jax.tree.leaves(result))
    assert values.dtype == jnp.float8_e4m3fn and scale.dtype == np.float32
    assert values.shape == expected.values.shape and scale.shape == expected.scale.shape
    values, scale = values.reshape(-1, values.shape[-1]), scale.reshape(-1)
    wanted = np.asarray(expected.scale).reshape(-1)
    moved = [i for i in np.flatnonzero(scale != wanted) if i not in no_scale]
    assert len(moved) <= (len(scale) // 100 if other_codes else 0)
    np.testing.assert_allclose(scale, wanted, rtol=2**-7 if other_codes else 0)
    decoded = values.astype(np.float32) * scale[:, None]
    for i, row in enumerate(decoded):
        assert np.isnan(row).all() if i in no_scale else np.isfinite(row).all(), i
    kept = [i for i in range(len(scale)) if i not in (*no_scale, *moved)]
    codes = [np.asarray(x).reshape(values.shape)[kept] for x in (values, expected.values)]
    steps = np.abs(np.subtract(*(_ordered(x.view(np.uint8)) for x in codes)))
    assert steps.max() <= (other_codes > 0)
    assert (steps > 0).mean() <= other_codes


def _ordered(codes):
    """Codes of E4M3 as integers in the order of their numbers; both zeros are 0."""
    magnitude = (codes & 0x7F).astype(int)
    return np.where(codes >= 0x80, -magnitude, magnitude)
