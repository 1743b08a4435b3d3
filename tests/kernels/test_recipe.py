"""CONTRIBUTING's recipe for a kernel, followed once: what a kernel and its test are at least."""

import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.kernels import chip, mosaic, rows
from tests.kernels.checks import Case, Chunk, Public, kernel_tests, shaped


def supports(x):
    return chip.takes(x) and not rows.misfit("x", x, rows.MAX_COLUMNS)


def kernel(x, interpret=None):
    if misfit := rows.misfit("x", x, rows.MAX_COLUMNS):
        raise InputError(f"double kernel: {misfit}; or use double")
    y = rows.tiled(x)
    run = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct(y.shape, y.dtype), grid=y.shape[:1], grid_names=("row",),
        kernel_name="double", compiler_params=rows.COMPILER, interpret=interpret,
    )  # fmt: skip
    return run(y).reshape(x.shape)


def body(x, out):
    row = lax.axis_index("row")
    for i in map(rows.lines, range(x.shape[1] // rows.LINES)):
        mosaic.store(out.at[row, i, :], rows.load(x.at[row, i, :]) * 2)


def double(x):  # in ops/
    return kernel(x) if supports(x) else oracle(x)


def oracle(x):
    return x + x


TestDouble = kernel_tests(
    sys.modules[__name__],  # elsewhere kernels/double.py
    oracle,
    cases={"rows": Case(lambda: (jax.random.normal(jax.random.key(0), (3, 2048), jnp.bfloat16),))},
    publics={"double": Public(double, oracle, lambda: (jnp.ones((2, 1024), jnp.bfloat16),))},
    chunks={"chunk": Chunk(double, (shaped(7040, 3072),), specs=(jax.P("seq"),), out_specs=jax.P("seq"))},
    left=[(shaped(4, 1000),)],
    refused=[("multiple of 1024", shaped(4, 1000))],
)  # fmt: skip
