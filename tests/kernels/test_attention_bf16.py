"""bfloat16 attention over the cache: the program interpreted, its fallback, its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.kernels import attention_bf16 as ab
from longlive_jax.kernels import attention_bf16_hopper as hopper
from longlive_jax.ops import attention as dense
from tests.kernels.checks import error

HEAD_DIM = hopper.HEAD_DIM
TUNINGS = {
    "64 keys": hopper.Tuning(tile=64, stages=4),
    "3 stages": hopper.Tuning(stages=3),
    "default": hopper.Tuning(),
}


@functools.cache
def inputs(rows=1, queries=128, tokens=128, slots=2, layers=2, heads=1, dtype=jnp.bfloat16):
    """q, k, v, past_k, past_v, layer, filled: all slots but `rows` - 1, then one more a row."""
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key, *shape):
        return jax.random.normal(key, shape, dtype)

    past = (layers, rows, slots, tokens, heads, HEAD_DIM)
    return (
        draw(keys[0], rows, queries, heads, HEAD_DIM) * 2,
        draw(keys[1], rows, tokens, heads, HEAD_DIM),
        draw(keys[2], rows, tokens, heads, HEAD_DIM),
        draw(keys[3], *past),
        draw(keys[4], *past),
        jnp.int32(layers - 1),
        jnp.arange(slots - rows + 1, slots + 1, dtype=jnp.int32),
    )


def exact(q, k, v, past_k, past_v, layer, filled):
    """Attention in float64, the real slots picked by hand."""
    out = []
    for row, n in enumerate(np.asarray(filled)):
        q_row = np.asarray(q[row], np.float64)
        kv = ((k, past_k), (v, past_v))
        keys, values = (
            np.asarray(jnp.concatenate([x[row], *past[layer, row, :n]]), np.float64)
            for x, past in kv
        )
        logits = np.einsum("qhd,khd->hqk", q_row, keys) / HEAD_DIM**0.5
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out.append(np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), values))
    return np.stack(out)


def interpreted(args, tuning=TUNINGS["default"]):
    params = plgpu.InterpretGPUParams(detect_races=True)
    return hopper.attention(*args, tuning=tuning, interpret=params)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_kernel_is_attention(tuning):
    args = inputs()
    assert error(interpreted(args, tuning), ab.reference(*args)) < 3e-3


def test_kernel_finds_its_row_head_and_slots():
    args = inputs(rows=2, heads=2)
    assert args[-1].tolist() == [1, 2]
    assert error(interpreted(args), ab.reference(*args)) < 3e-3


def test_two_blocks_of_queries_and_two_tiles_a_slot():
    args = inputs(queries=256, tokens=256, slots=1)
    assert error(interpreted(args), ab.reference(*args)) < 3e-3


def test_an_empty_cache_is_not_read():
    """With nothing filled one tile is all there is, and the rest may be no number."""
    q, k, v, past_k, past_v, layer, _ = inputs()
    nothing = jnp.zeros(1, jnp.int32)
    clean = (q, k, v, past_k, past_v, layer, nothing)
    dirty = (
        q,
        k,
        v,
        jnp.full_like(past_k, jnp.nan),
        jnp.full_like(past_v, jnp.nan),
        layer,
        nothing,
    )
    np.testing.assert_array_equal(ab.reference(*dirty), ab.reference(*clean))
    assert error(interpreted(dirty), ab.reference(*clean)) < 3e-3


def test_slots_that_are_not_filled_are_not_read():
    q, k, v, past_k, past_v, layer, _ = inputs()
    args = (q, k, v, past_k.at[:, :, 1:].set(jnp.nan), past_v.at[:, :, 1:].set(jnp.nan), layer)
    args = (*args, jnp.ones(1, jnp.int32))
    assert error(interpreted(args), exact(*args)) < 3e-3


def test_logits_that_grow_from_tile_to_tile():
    """Each tile's maximum is far above the last one's: the past all but vanishes."""
    q, k, v, past_k, past_v, layer, filled = inputs()
    size = jnp.asarray([4, 16], jnp.bfloat16).reshape(1, 1, 2, 1, 1, 1)
    args = (q, k, v, past_k * size, past_v, layer, filled)
    assert error(interpreted(args), ab.reference(*args)) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_many_tiles(tuning):
    args = inputs(rows=2, tokens=256, slots=3, heads=2)
    assert error(interpreted(args, tuning), ab.reference(*args)) < 3e-3


def test_oracle_is_attention():
    args = inputs(rows=2, tokens=64, slots=3, heads=2)
    assert error(ab.reference(*args), exact(*args)) < 3e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_without_the_hardware_it_is_dense_attention(dtype):
    """To the bit what copying the layer behind the chunk gives."""
    q, k, v, past_k, past_v, layer, filled = inputs(rows=2, slots=3, heads=2, dtype=dtype)
    assert not ab.supports(q, 128)
    keys, values = (
        jnp.concatenate([fresh, past[1].reshape(2, 3 * 128, 2, HEAD_DIM)], axis=1)
        for fresh, past in ((k, past_k), (v, past_v))
    )
    out = ab.attention(q, k, v, past_k, past_v, layer, filled, dense.attention)
    expected = dense.attention(q, keys, values, (1 + filled) * 128)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected)


def test_a_cache_of_another_dtype_is_read_as_the_chunk():
    q, k, v, past_k, past_v, layer, filled = inputs(dtype=jnp.float32)
    half = (past_k.astype(jnp.bfloat16), past_v.astype(jnp.bfloat16))
    out = ab.attention(q, k, v, *half, layer, filled, dense.attention)
    rounded = (x.astype(jnp.float32) for x in half)
    expected = ab.attention(q, k, v, *rounded, layer, filled, dense.attention)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_lowers_for_hopper(tuning):
    f = jax.jit(functools.partial(hopper.attention, tuning=tuning))
    lowered = f.trace(*inputs()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_kernel_refuses_parts_of_a_tile():
    with pytest.raises(InputError, match="128 queries and slots of 64 tokens"):
        hopper.attention(*inputs(tokens=64))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[..., :64], r"k is \(1, 128, 1, 128\)"),
        (1, lambda k: k[:, :64], r"k is \(1, 64, 1, 128\)"),
        (2, lambda v: jnp.swapaxes(v, 1, 2), r"v is \(1, 1, 128, 128\)"),
        (4, lambda past_v: past_v[:, :, :1], "past_v is .* and 2 slots of 128 tokens it must be"),
    ],
)
def test_refuses(index, change, message):
    args = list(inputs())
    args[index] = change(args[index])
    with pytest.raises(InputError, match=message):
        ab.attention(*args, dense.attention)
