"""A residual sum, its norm and codes by the kernel."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.kernels import add_norm_fp8
from longlive_jax.ops import quantized, residual
from tests.kernels.checks import Case, Chunk, Public, f32, kernel_tests, next_numbers, shaped
from tests.kernels.rows import (
    OTHER_CODES,
    check,
    layer_norm_quantize,
    product,
    shaped_product,
)  # fmt: skip

SHAPE = (1, 2, 3, 2048)  # two runs of three rows
SMALL = (1, 2, 2, 1024)


def arguments(shape=SHAPE, gated=True, of=(1, 2, 1), dtype=jnp.float32):
    """x, a product, a gate for each run, and a norm's scale and shift of these leading axes."""
    keys = jax.random.split(jax.random.key(1), 4)
    n = shape[-1]
    y = product(np.prod(shape[:-1]), n)
    y = y.replace(sums=y.sums.reshape(shape), row=y.row.reshape(*shape[:-1], 1))
    x = 3 * jax.random.normal(keys[0], shape, jnp.bfloat16)
    gate = jax.random.normal(keys[1], (*shape[:-2], 1, n)).astype(dtype) if gated else None
    scale, shift = (jax.random.normal(key, (*of, n)).astype(dtype) for key in keys[2:])
    return x, y, gate, 1 + scale, shift


def out_of_the_ordinary():
    x, y, *rest = arguments()
    x = x.at[0, 0, 1].set(0).at[0, 1, 0, 5].set(jnp.nan)
    sums = y.sums.at[0, 0, 1].set(0).at[0, 1, 1, 7].set(jnp.inf)
    return x, y.replace(sums=sums, bias=jnp.zeros_like(y.bias)), *rest


def oracle(x, y, gate, scale, shift):
    total = residual.add(x, y, gate)
    return total, layer_norm_quantize(total, scale, shift)


def given(result, expected, arguments):
    """Codes of the kernel's own sum, so that a number that is another does not count twice."""
    total, *_ = jax.tree.leaves(result)
    return expected[0], layer_norm_quantize(total, *arguments[3:])


def check_both(result, expected, other_codes=0.0, no_scale=()):
    """The sum may be bfloat16's next number, where a product was contracted into it."""
    total, *codes = jax.tree.leaves(result)
    next_numbers(total, expected[0])
    check(codes, expected[1], other_codes, no_scale)


def shapes(n, *lead, gate=(), of=(), dtype=jnp.bfloat16):
    """As `arguments`. gate, of: their axes but the last; of no gate: None."""
    x, y = shaped(*lead, n, dtype=dtype), shaped_product(*lead, n)
    scale = f32(*of, n)
    return x, y, None if gate is None else f32(*gate, n), scale, scale


FUSED = quantized.add_layer_norm_quantize_rows
LEAD, FRAMES, ONE = (1, 1, 8, 880), (1, 1, 8, 1), (1, 1, 1, 1)
X, Y, _, SCALE, SHIFT = shapes(1024, 2, gate=None, of=(2,))


def fused(make, **how):
    return Case(make, other_codes=OTHER_CODES, **how)


REFUSED = [
    ("x: float32", *shapes(1024, 2, gate=None, of=(2,), dtype=jnp.float32)),
    ("must have one shape", shaped(1, 1024), Y, None, SCALE, SHIFT),
    ("must hold rows of a multiple of 1024", *shapes(1000, 2, gate=(1,), of=(2,))),
    ("at most 5120", *shapes(6144, 1, gate=(1,), of=(1,))),
    ("broadcast them", X, Y, None, f32(1024), SHIFT),
    ("broadcast them", X, Y, None, SCALE, f32(2, 1)),
    ("broadcast them", X, Y, f32(3, 1024), SCALE, SHIFT),
]

TestAddNormFP8 = kernel_tests(
    add_norm_fp8,
    oracle,
    check_both,
    given=given,
    cases={
        "modulated": fused(arguments),
        "modulated, bfloat16": fused(lambda: arguments(dtype=jnp.bfloat16)),
        "no gate": fused(lambda: arguments(gated=False)),
        "gate by runs, norm of one weight": fused(lambda: arguments(SMALL, of=(1, 1, 1))),
        "out of the ordinary": fused(out_of_the_ordinary, no_scale=(3, 4)),
    },
    publics={
        "add_layer_norm_quantize_rows": Public(
            FUSED, oracle, lambda: arguments(SMALL), {"other_codes": OTHER_CODES}
        )
    },
    chunks={
        "gated": Chunk(FUSED, shapes(3072, *LEAD, gate=FRAMES, of=ONE)),
        "no gate": Chunk(FUSED, shapes(3072, *LEAD, gate=None, of=FRAMES)),
    },
    left=[x[1:] for x in REFUSED],
    refused=REFUSED,
)


def test_of_an_array_it_is_the_sum_and_its_norm():
    x, y, *rest = arguments(SMALL)
    y = y.astype(x.dtype)
    total, q = FUSED(x, y, *rest)
    np.testing.assert_array_equal(total, residual.add(x, y, rest[0]))
    check((q.values, q.scale), layer_norm_quantize(total, *rest[1:]))
