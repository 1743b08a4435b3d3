"""GELU of an FP8 product, to codes, by the kernel."""

import jax.numpy as jnp

from longlive_jax.kernels import gelu_fp8
from longlive_jax.ops import quantized
from tests.kernels.checks import Case, Chunk, Public, kernel_tests
from tests.kernels.rows import OTHER_CODES, check, gelu_quantize, product, shaped_product


def out_of_the_ordinary():
    x = product(8, 3072)
    return (
        x.replace(
            sums=x.sums.at[2].set(0).at[3, 7].set(jnp.nan).at[4, 9].set(jnp.inf),
            row=x.row.at[1].set(2.0**-100).at[5].set(jnp.nan),
        ),
    )


def sized(rows, n):  # of 4, 2 and 1 slices together
    return Case(lambda: (product(rows, n),), other_codes=OTHER_CODES)


def public(rows, n):
    function, how = quantized.gelu_quantize_rows, {"other_codes": OTHER_CODES}
    return Public(function, gelu_quantize, lambda: (product(rows, n),), how)


REFUSED = [
    ("sums: float32", shaped_product(4, 1024, dtype=jnp.float32)),
    ("must hold rows of a multiple of 1024", shaped_product(4, 1000)),
    ("at most 16384", shaped_product(1, 17408)),
    ("must hold rows", shaped_product(0, 1024)),
]

TestGeluFP8 = kernel_tests(
    gelu_fp8,
    gelu_quantize,
    check,
    cases={
        "3 slices": sized(8, 3072),
        "2 slices": sized(6, 2048),
        "1 slice": sized(3, 1024),
        "out of the ordinary": Case(
            out_of_the_ordinary, other_codes=OTHER_CODES, no_scale=(3, 4, 5)
        ),
    },
    publics={"gelu_quantize_rows": public(4, 1024)},
    chunks={
        "FFN": Chunk(quantized.gelu_quantize_rows, (shaped_product(1, 1, 8, 880, 14336),)),
    },
    left=[x[1:] for x in REFUSED],
    refused=REFUSED,
)
