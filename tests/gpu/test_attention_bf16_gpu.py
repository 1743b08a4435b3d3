"""bfloat16 attention over the cache on a Hopper GPU: against its oracle, and its speed.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_attention_bf16_gpu.py
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.kernels import attention_bf16
from longlive_jax.ops import cached_attention
from longlive_jax.ops.attention import attention
from tests.kernels.attention import flat, inputs
from tests.kernels.checks import error
from tests.kernels.test_attention_bf16 import TUNINGS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
kernel = flat(attention_bf16)


@functools.cache
def oracle(filled):
    args = small(filled)
    return jax.jit(cached_attention.reference)(*args)


def small(filled):
    """Slots that are not visible are no numbers."""
    q, fresh, past, layer, _ = inputs(rows=2, queries=256, tokens=384, slots=3, heads=3)
    visible = jnp.arange(3)[None, :] < jnp.asarray(filled)[:, None]
    visible = visible.reshape(1, 2, 3, 1, 1, 1)
    past = tuple(jnp.where(visible, x, jnp.nan) for x in past)
    return q, fresh, past, layer, jnp.asarray(filled, jnp.int32)


@pytest.mark.parametrize("filled", [(3, 3), (1, 2), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_kernel_is_its_oracle(tuning, filled):
    out = jax.jit(functools.partial(kernel, tuning=tuning))(*small(filled))
    assert error(out, oracle(filled)) < 5e-3


def test_attention_takes_the_kernel():
    assert "mosaic_gpu" in jax.jit(cached_attention.attend).lower(*small((1, 2))).as_text()


def test_of_a_mask_the_kernel_sees_the_same_slots():
    *args, filled = small((1, 2))
    mask = jnp.arange(3)[None] < filled[:, None]
    run = jax.jit(cached_attention.attend)
    assert "mosaic_gpu" in run.lower(*args, mask).as_text()
    np.testing.assert_array_equal(*(np.asarray(run(*args, x), np.float32) for x in (filled, mask)))


def window():
    """A chunk over a window of four, all heads."""
    args = inputs(queries=7040, tokens=7040, slots=3, heads=24)
    return (*args[:-1], jnp.full(1, 3, jnp.int32))


def behind(q, fresh, past, layer, filled):
    """cuDNN over the chunk's and the cache's keys and values, copied together."""

    def join(fresh, table):
        past = jax.lax.dynamic_index_in_dim(table, layer, keepdims=False)
        return jnp.concatenate([fresh, past.reshape(1, -1, *fresh.shape[2:])], axis=1)

    return attention(q, *map(join, fresh, past))


def test_error_over_a_window():
    args = window()
    assert error(jax.jit(kernel)(*args), jax.jit(behind)(*args)) < 5e-3


@pytest.mark.parametrize("run", [kernel, behind], ids=["kernel", "cuDNN"])
def test_speed(run):
    args, run = window(), jax.jit(run)
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    for _ in range(20):
        out = run(*args)
    jax.block_until_ready(out)
    seconds = (time.perf_counter() - start) / 20
    print(f"\n{seconds * 1e3:.2f} ms, {4 * 7040 * 28160 * 24 * 128 / seconds / 1e12:.0f} TFLOP/s")
