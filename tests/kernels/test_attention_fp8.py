"""FP8 attention: the program interpreted, its oracle, its layouts, and its lowering for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import FP8Tensor, quantize_fp8
from longlive_jax.kernels import attention_fp8 as af
from longlive_jax.kernels import attention_fp8_hopper as hopper
from longlive_jax.ops import attention as dense
from longlive_jax.ops import rope
from tests.kernels.checks import error

HEAD_DIM = hopper.HEAD_DIM
TUNINGS = {"2 stages": hopper.Tuning(stages=2), "default": hopper.Tuning()}


def quantized(x):
    """[..., token, head, head_dim] in E4M3, one scale for the tokens and channels of a head."""
    by_head = jnp.moveaxis(x, -2, -3)
    q = quantize_fp8(by_head.reshape(*by_head.shape[:-2], -1), axis=-1)
    values = jnp.moveaxis(q.values.reshape(by_head.shape), -3, -2)
    return FP8Tensor(values=values, scale=q.scale[..., None, :, :], dtype=q.dtype)


def stored(k, v):
    return af.pack(quantized(k), quantized(v))


@functools.cache
def inputs(rows=1, queries=128, tokens=128, slots=2, layers=2, heads=1):
    """q, k, v, past_k, past_v whose slots differ in size, layer, filled (not all, then all)."""
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    past = (layers, rows, slots, tokens, heads, HEAD_DIM)
    size = jnp.asarray([4.0**i for i in range(slots)], jnp.bfloat16)
    size = jnp.broadcast_to(size[:, None, None, None], past)
    fresh = (draw(key, rows, tokens, heads, HEAD_DIM) for key in keys[1:3])
    return (
        draw(keys[0], rows, queries, heads, HEAD_DIM) * 2,
        *stored(*fresh),
        *stored(draw(keys[3], *past), draw(keys[4], *past) / size),
        jnp.int32(layers - 1),
        jnp.arange(rows, dtype=jnp.int32) + (slots - 1),
    )


def exact(q, k, v, past_k, past_v, layer, filled):
    """Attention in float32 over what the codes stand for."""
    out = []
    for row in range(len(q)):
        n = 1 + int(filled[row])
        keys = [k[row].dequantize(jnp.float32)[None], past_k[layer, row].dequantize(jnp.float32)]
        values = [v[row].dequantize(jnp.float32)[None], past_v[layer, row].dequantize(jnp.float32)]
        keys = af.unpack_keys(jnp.concatenate(keys)[:n])
        keys = keys.reshape(-1, *keys.shape[2:])
        values = af.unpack_values(jnp.concatenate(values)[:n]).reshape(keys.shape)
        logits = jnp.einsum("qhd,khd->hqk", q[row].astype(jnp.float32), keys) / HEAD_DIM**0.5
        out.append(jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, axis=-1), values))
    return jnp.stack(out)


def interpreted(tuning, args):
    params = plgpu.InterpretGPUParams(detect_races=True)
    return hopper.attention(*args, tuning=tuning, interpret=params)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_kernel_is_its_oracle(tuning):
    args = inputs()
    assert error(interpreted(tuning, args), af.reference(*args)) < 1e-3


def test_kernel_finds_its_row_and_head():
    args = inputs(rows=2, heads=2, slots=1)
    assert error(interpreted(hopper.Tuning(), args), af.reference(*args)) < 1e-3


@pytest.mark.slow
def test_two_blocks_of_queries():
    args = inputs(queries=256, slots=1)
    assert error(interpreted(hopper.Tuning(), args), af.reference(*args)) < 1e-3


@pytest.mark.slow
def test_many_tiles():
    args = inputs(rows=2, tokens=256, slots=3, heads=2)
    assert error(interpreted(hopper.Tuning(), args), af.reference(*args)) < 1e-3


def test_oracle_is_attention():
    args = inputs(rows=2, slots=3)
    # Independent keys and values: nothing averages the roundings out.
    assert 0.01 < error(af.reference(*args), exact(*args)) < 0.06


def test_slots_that_are_not_filled_are_not_read():
    q, k, v, past_k, past_v, layer, filled = inputs()

    def nan(x):
        return jax.tree.map(lambda leaf: leaf.at[:, :, 1:].set(jnp.nan), x)

    clean = (q, k, v, past_k, past_v, layer, filled)
    dirty = (q, k, v, nan(past_k), nan(past_v), layer, filled)
    np.testing.assert_array_equal(af.reference(*dirty), af.reference(*clean))
    assert error(interpreted(hopper.Tuning(), dirty), af.reference(*clean)) < 1e-3


def test_slots_of_zeros_and_tiny_queries():
    q, k, v, past_k, past_v, layer, filled = inputs()
    zeros = jnp.zeros((2, 1, 2, 128, 1, HEAD_DIM), jnp.bfloat16)
    _, past_v = stored(zeros, zeros)
    q = q.at[:, 0].set(0).at[:, 1].set(1e-38)
    args = (q, k, v, past_k, past_v, layer, filled)
    out = interpreted(hopper.Tuning(), args)
    assert error(out, af.reference(*args)) < 1e-3
    assert error(af.reference(*args), exact(*args)) < 0.06


def test_without_the_hardware_it_is_dense_attention():
    args = inputs(rows=2, slots=3)
    assert not af.supports(args[0], 128)
    out = af.attention(*args, dense=dense.attention)
    assert out.dtype == jnp.bfloat16
    assert error(out, exact(*args)) < 0.01


def test_kernel_refuses_parts_of_a_tile():
    with pytest.raises(InputError, match="128 queries and slots of 64 tokens"):
        hopper.attention(*inputs(tokens=64))


def test_packed():
    k, v = (quantized(jax.random.normal(jax.random.key(i), (2, 32, 3, 4))) for i in range(2))
    packed_k, packed_v = af.pack(k, v)
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    np.testing.assert_array_equal(packed_k.values[:, 16:], k.values[:, 16:][:, order])
    np.testing.assert_array_equal(af.unpack_keys(packed_k.values), k.values)
    assert packed_v.shape == (2, 3, 4, 32) and packed_v.scale.shape == (2, 3, 1, 1)
    np.testing.assert_array_equal(af.unpack_values(packed_v.values), v.values)
    with pytest.raises(InputError, match="24 tokens"):
        af.pack_keys(k.values[:, :24])


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
    permuted = np.asarray(af.pack_keys(jnp.asarray(x.T)[:, None, :]))[:, 0].T
    product = held(plgpu.Layout.WGMMA, permuted)
    operand = held(plgpu.Layout.WGMMA_8BIT, x)
    numbers = hopper.registers_of_operand(np.arange(product.shape[3]), x.shape)
    np.testing.assert_array_equal(
        operand, product[..., numbers.reshape(-1, 2), :].reshape(operand.shape)
    )


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_lowers_for_hopper(tuning):
    f = jax.jit(functools.partial(hopper.attention, tuning=tuning))
    lowered = f.trace(*inputs()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def video(frames=8, height=8, width=8, heads=2, dim=256):
    """q, k, v as a transformer makes them of a smooth video: normed, with gains, rotated."""
    tokens = frames * height * width
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    def project():
        return (x @ draw(dim, heads * HEAD_DIM) / dim**0.5)[None]

    def normed(x):
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        x = x * jnp.exp(0.4 * draw(1, 1, x.shape[-1]))
        return rope.rotate(x.reshape(1, tokens, heads, HEAD_DIM), angle)

    where = [jnp.linspace(0, 1, n) for n in (frames, height, width)]
    where = jnp.stack(jnp.meshgrid(*where, indexing="ij"), axis=-1).reshape(tokens, 3)
    waves = jnp.cos(12 * where @ draw(3, 48) + 3 * draw(1, 48))
    x = waves @ draw(48, dim) / 48**0.5 + 0.5 * draw(tokens, dim)
    angle = rope.angles(jnp.arange(frames), height, width, HEAD_DIM).reshape(1, tokens, -1)
    return normed(project()), normed(project()), project().reshape(1, tokens, heads, HEAD_DIM)


@pytest.mark.slow
def test_error_on_a_video():
    q, k, v = video()
    expected = jax.nn.dot_product_attention(q, k, v)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    empty = jnp.zeros((1, 1, *k.shape), jnp.bfloat16)
    args = (q, *stored(k, v), *stored(empty, empty))
    out = af.reference(*args, jnp.int32(0), jnp.zeros(1, jnp.int32))
    assert 0.02 < error(out, expected) < 0.05


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[..., :64], "k is"),
        (1, lambda k: k.replace(values=k.values.astype(jnp.float8_e5m2)), "float8_e5m2"),
        (2, lambda v: v.replace(values=jnp.swapaxes(v.values, -1, -2)[..., :64]), "v is"),
        (4, lambda v: v.replace(scale=v.scale[..., 0]), "past_v's scale"),
    ],
)
def test_refuses(index, change, message):
    args = list(inputs())
    args[index] = change(args[index])
    with pytest.raises(InputError, match=message):
        af.reference(*args)
