"""Fresh keys and values packed by the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import formats
from longlive_jax.errors import InputError
from longlive_jax.kernels import attention_fp8, pack_fp8
from tests.kernels.checks import Case, Chunk, Public, kernel_tests, same_bits, shaped

SHAPE = (2, 256, 3, 128)  # two rows of two tiles, three heads


def oracle(k, v):
    return attention_fp8.pack(*map(pack_fp8.quantize_heads, (k, v)))


@functools.cache
def normal():
    k, v = jax.random.normal(jax.random.key(0), (2, *SHAPE), jnp.bfloat16)
    return k, 3 * v


def extremes():
    """Heads of each kind, in k and, in another order, in v; a NaN and an Inf in the last tile."""
    x = normal()[0].astype(jnp.float32)
    x = x.at[0, :, 0].set(0).at[0, :, 1].multiply(2.0**-124).at[0, 200, 2, 77].set(jnp.nan)
    x = x.at[1, :, 0].set(jnp.clip(x[1, :, 0], -1, 1) * 3.3e38).at[1, 255, 1, 127].set(-jnp.inf)
    spread = 2.0 ** jnp.arange(-20, 4, dtype=jnp.float32)
    spread = jax.random.choice(jax.random.key(1), spread, x[1, :, 2].shape)
    x = x.at[1, :, 2].multiply(spread).astype(jnp.bfloat16)
    return x, jnp.roll(x[::-1], 1, axis=2)


def check(result, expected, heads=False):
    """heads: those of `extremes`' k."""
    same_bits(result, expected)
    if heads:
        packed, _ = result
        assert np.asarray(packed.scale)[0, 0, :2, 0].tolist() == [2.0**-126] * 2
        nan = np.isnan(np.asarray(packed.dequantize(jnp.float32)))
        assert nan.all(axis=(1, 3)).tolist() == [[False, False, True], [False, True, False]]
        assert nan.any(axis=(1, 3)).sum() == 2


def chunk(rows, **how):
    x = shaped(rows, 7040, 24, 128)
    return Chunk(pack_fp8.pack, (x, x), calls=3, **how)


HEADS = jax.P(None, None, "seq")
PACKED = tuple(
    formats.FP8Tensor(spec, spec, np.dtype(jnp.bfloat16)) for spec in (HEADS, jax.P(None, "seq"))
)
X = shaped(1, 128, 2, 128)

TestPackFP8 = kernel_tests(
    pack_fp8,
    jax.jit(oracle),
    check,
    supports=lambda k, v=None: pack_fp8.supports(k),
    cases={"normal": Case(normal), "extremes": Case(extremes, heads=True)},
    publics={"pack": Public(pack_fp8.pack, oracle, normal)},
    chunks={
        "1 row": chunk(1, specs=(HEADS, HEADS), out_specs=PACKED),
        "2 rows": chunk(2),
    },
    left=[
        (shaped(1, 7040, 24, 64),),
        (shaped(1, 7000, 24, 128),),
        (shaped(0, 7040, 24, 128),),
        (shaped(7040, 24, 128),),
        (shaped(1, 7040, 24, 128, dtype=jnp.float32),),
    ],
    refused=[
        ("it takes bfloat16", *[shaped(*X.shape, dtype=jnp.float32)] * 2),
        ("tokens a multiple of 128", *[shaped(1, 64, 2, 128)] * 2),
        ("head_dim 128", *[shaped(1, 128, 2, 64)] * 2),
        ("must be alike", X, shaped(2, 128, 2, 128)),
    ],
)


def test_quantize_heads_is_the_format_head_by_head():
    k, v = extremes()
    for x in (k, v.astype(jnp.float32)):
        whole = pack_fp8.quantize_heads(x)
        for row, head in np.ndindex(x.shape[0], x.shape[2]):
            one = formats.quantize_fp8(x[row, :, head])
            here = formats.FP8Tensor(
                whole.values[row, :, head], whole.scale[row, 0, head, 0], whole.dtype
            )
            same_bits(here, one)


def test_float32_is_left_to_xla():
    k, v = (x[:, :48].astype(jnp.float32) for x in normal())
    same_bits(pack_fp8.pack(k, v), oracle(k, v))


@pytest.mark.parametrize(
    "k, v, message",
    (
        (X, shaped(1, 128, 3, 128), r"\(1, 128, 3, 128\); both must be"),
        (shaped(128, 2, 128), shaped(128, 2, 128), "both must be"),
        (*[shaped(1, 40, 2, 128)] * 2, "40 tokens; they must be a multiple of 16"),
        (*[shaped(*X.shape, dtype=jnp.float16)] * 2, "must be bfloat16 or float32"),
    ),
)
def test_what_no_kernel_packs(k, v, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(pack_fp8.pack, k, v)
