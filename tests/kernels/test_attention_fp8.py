"""FP8 attention over the cache by the kernel, and how keys and values are packed for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.kernels import attention_fp8
from longlive_jax.ops import cached_attention
from tests.kernels.attention import (
    HEAD_DIM,
    beyond,
    check,
    chunks,
    flat,
    inputs_fp8,
    quantized,
    stored,
    supports,
    window,
)
from tests.kernels.checks import Case, kernel_tests

TUNINGS = {"2 stages": attention_fp8.Tuning(stages=2), "default": attention_fp8.Tuning()}


def case(make=inputs_fp8, tuning="default", **how):
    return Case(make, {"tuning": TUNINGS[tuning]}, limit=1e-3, **how)


def zeros_and_tiny_queries():
    q, fresh, (past_k, _), *rest = inputs_fp8()
    zeros = jnp.zeros((2, 1, 2, 128, 1, HEAD_DIM), jnp.bfloat16)
    q = q.at[:, 0].set(0).at[:, 1].set(1e-38)
    return q, fresh, (past_k, stored(zeros, zeros)[1]), *rest


def reference(*arguments, tuning=None):
    return cached_attention.reference_fp8(*arguments)


Q, FRESH, PAST, *REST = jax.eval_shape(lambda: inputs_fp8(tokens=64))

TestAttentionFP8 = kernel_tests(
    attention_fp8,
    reference,
    check,
    kernel=flat(attention_fp8),
    supports=supports(attention_fp8),
    cases={
        **{name: case(tuning=name) for name in TUNINGS},
        "rows and heads": case(lambda: inputs_fp8(rows=2, heads=2, slots=1)),
        "blocks of queries": case(lambda: inputs_fp8(queries=256, slots=1), slow=True),
        "many tiles": case(lambda: inputs_fp8(rows=2, tokens=256, slots=3, heads=2), slow=True),
        "half empty": case(lambda: beyond(inputs_fp8())),
        "zeros, tiny queries": case(zeros_and_tiny_queries),
    },
    chunks=chunks(cached_attention.attend_fp8, attention_fp8, inputs_fp8, TUNINGS),
    left=[
        window(tokens=7000),
        window(queries=7000),
        window(head_dim=64),
        window(dtype=jnp.float32),
    ],
    refused=[("128 queries and slots of 64 tokens", Q, *FRESH, *PAST, *REST)],
)


def test_packed():
    k, v = (quantized(jax.random.normal(jax.random.key(i), (2, 32, 3, 4))) for i in range(2))
    packed_k, packed_v = attention_fp8.pack(k, v)
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    np.testing.assert_array_equal(packed_k.values[:, 16:], k.values[:, 16:][:, order])
    np.testing.assert_array_equal(attention_fp8.unpack_keys(packed_k.values), k.values)
    assert packed_v.shape == (2, 3, 4, 32) and packed_v.scale.shape == (2, 3, 1, 1)
    np.testing.assert_array_equal(attention_fp8.unpack_values(packed_v.values), v.values)
    with pytest.raises(InputError, match="24 tokens"):
        attention_fp8.pack_keys(k.values[:, :24])


def held(layout, x):
    """What each lane holds of matrix x: [warp, lane, lane, register, element]."""
    layout = layout.to_mgpu()
    for tile in layout.tiling.tiles:
        lead, last = x.shape[: x.ndim - len(tile)], x.shape[x.ndim - len(tile) :]
        split = [n for size, part in zip(last, tile) for n in (size // part, part)]
        x = x.reshape(*lead, *split)
        outer = range(len(lead), x.ndim, 2)
        x = x.transpose(*range(len(lead)), *outer, *(i + 1 for i in outer))
    lanes = (*layout.warp_dims, *layout.lane_dims)
    x = np.moveaxis(x, lanes, range(len(lanes)))
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def test_probabilities_stay_in_their_lanes():
    """Registers of the first product, of permuted keys, are an operand in the keys' own order."""
    x = np.arange(64 * 128).reshape(64, 128)
    permuted = np.asarray(attention_fp8.pack_keys(jnp.asarray(x.T)[:, None, :]))[:, 0].T
    product = held(plgpu.Layout.WGMMA, permuted)
    operand = held(plgpu.Layout.WGMMA_8BIT, x)
    numbers = attention_fp8.registers_of_operand(np.arange(product.shape[3]), x.shape)
    np.testing.assert_array_equal(
        operand, product[..., numbers.reshape(-1, 2), :].reshape(operand.shape)
    )
