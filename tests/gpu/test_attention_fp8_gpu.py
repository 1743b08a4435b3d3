"""FP8 attention on a Hopper GPU: against its oracle, against bfloat16, and its speed.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_attention_fp8_gpu.py
"""

import functools
import time

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.kernels import attention_fp8
from longlive_jax.ops import cached_attention
from longlive_jax.ops.attention import attention
from tests.kernels.attention import flat, inputs_fp8, stored
from tests.kernels.checks import error
from tests.kernels.test_attention_fp8 import TUNINGS
from tests.ops.test_cached_attention import video

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
kernel = flat(attention_fp8)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_kernel_is_its_oracle(tuning):
    args = inputs_fp8(rows=2, queries=256, tokens=384, slots=3, heads=3)
    out = jax.jit(functools.partial(kernel, tuning=tuning))(*args)
    # The tensor cores keep 13 bits of a sum, and a probability may round the other way.
    assert error(out, jax.jit(cached_attention.reference_fp8)(*args)) < 0.01


def test_attention_takes_the_kernel():
    args = inputs_fp8(rows=2, queries=256, tokens=384, slots=3, heads=3)
    assert "mosaic_gpu" in jax.jit(cached_attention.attend_fp8).lower(*args).as_text()


def test_error_over_a_window():
    """A chunk over four chunks of a video: cuDNN in bfloat16 is the truth, to 0.3 %."""
    q, k, v = video(frames=32, height=22, width=40, heads=4)
    q = q[:, -7040:].astype(jnp.bfloat16)

    def chunks(x):
        return x.astype(jnp.bfloat16).reshape(1, 1, 4, 7040, 4, 128)

    kv = (k, v)
    expected = attention(q, *(x.astype(jnp.bfloat16) for x in kv))
    all_four = stored(chunks(k), chunks(v))
    fresh = jax.tree.map(lambda leaf: leaf[0, :, 3], all_four)
    past = jax.tree.map(lambda leaf: leaf[:, :, :3], all_four)
    out = jax.jit(kernel)(q, fresh, past, jnp.int32(0), jnp.full(1, 3, jnp.int32))
    print(f"\nerror: {100 * error(out, expected):.2f} %")
    assert error(out, expected) < 0.03


def test_speed():
    """A chunk over a window of four, all heads."""
    args = inputs_fp8(queries=7040, tokens=7040, slots=3, heads=24)
    args = (*args[:-1], jnp.full(1, 3, jnp.int32))
    run = jax.jit(kernel)
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    for _ in range(20):
        out = run(*args)
    jax.block_until_ready(out)
    seconds = (time.perf_counter() - start) / 20
    print(f"\n{seconds * 1e3:.2f} ms, {4 * 7040 * 28160 * 24 * 128 / seconds / 1e12:.0f} TFLOP/s")
