"""Attention over a chunk and the cache: its oracles, what runs without a kernel, and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import InputError
from longlive_jax.kernels import attention_bf16, attention_fp8
from longlive_jax.ops import attention, cached_attention, rope
from tests.kernels.attention import HEAD_DIM, beyond, inputs, inputs_fp8, stored
from tests.kernels.checks import RACES, alone, error

LIBS = {
    "bfloat16": (cached_attention.attend, cached_attention.reference, inputs, attention_bf16),
    "fp8": (cached_attention.attend_fp8, cached_attention.reference_fp8, inputs_fp8, attention_fp8),
}
MASK = [[True, False, True], [False, True, False]]
each = pytest.mark.parametrize("attend, reference, make, lib", LIBS.values(), ids=LIBS)


def numbers(keys, values):
    """What is stored, as float64 [.., token, head, head_dim]."""
    if isinstance(keys, jax.Array):
        return np.asarray(keys, np.float64), np.asarray(values, np.float64)
    keys, values = (x.dequantize(jnp.float32) for x in (keys, values))
    return numbers(attention_fp8.unpack_keys(keys), attention_fp8.unpack_values(values))


def exact(q, fresh, past, layer, visible):
    """Attention in float64, the visible slots picked by hand."""
    if visible.dtype != jnp.bool_:
        visible = np.arange(past[0].shape[2]) < np.asarray(visible)[:, None]
    fresh, past = numbers(*fresh), numbers(*past)
    out = []
    for row, seen in enumerate(np.asarray(visible)):
        keys, values = (np.concatenate([x[row], *y[layer, row][seen]]) for x, y in zip(fresh, past))
        logits = np.einsum("qhd,khd->hqk", np.asarray(q[row], np.float64), keys) / HEAD_DIM**0.5
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out.append(np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), values))
    return np.stack(out)


def masked(make, **sizes):
    return *make(rows=2, slots=3, **sizes)[:-1], jnp.asarray(MASK)


@pytest.mark.parametrize("visible", ("count", "mask"))
def test_oracle_is_attention(visible):
    make = masked if visible == "mask" else lambda make, **sizes: make(rows=2, slots=3, **sizes)
    args = make(inputs, tokens=64, heads=2)
    assert error(cached_attention.reference(*args), exact(*args)) < 3e-3
    args = make(inputs_fp8)
    # Independent keys and values: nothing averages the roundings out.
    assert 0.01 < error(cached_attention.reference_fp8(*args), exact(*args)) < 0.06


@each
def test_slots_that_are_not_visible_are_not_read(attend, reference, make, lib):
    args = make()
    for filled in (0, 1):
        clean, dirty = (beyond(args, value, filled) for value in (0, jnp.nan))
        np.testing.assert_array_equal(reference(*dirty), reference(*clean))


@each
def test_a_mask_of_the_first_slots_is_their_count(attend, reference, make, lib):
    *args, filled = make(rows=2, slots=3)
    mask = jnp.arange(3)[None] < filled[:, None]
    for function in (attend, reference):
        np.testing.assert_array_equal(function(*args, filled), function(*args, mask))


@each
def test_any_slots_may_be_visible(attend, reference, make, lib):
    args = masked(make)
    assert error(attend(*args), exact(*args)) < 0.01


@each
def test_any_slots_may_be_visible_to_the_kernel(monkeypatch, attend, reference, make, lib):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    monkeypatch.setattr(lib, "kernel", functools.partial(lib.kernel, interpret=RACES))
    args = *make()[:-1], jnp.asarray([[False, True]])
    assert error(alone(attend)(*args), reference(*args)) < 3e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_without_the_hardware_it_is_dense_attention(dtype):
    """To the bit what copying the layer behind the chunk gives."""
    q, fresh, past, layer, filled = inputs(rows=2, slots=3, heads=2, dtype=dtype)
    keys, values = (
        jnp.concatenate([x, y[1].reshape(2, 3 * 128, 2, HEAD_DIM)], axis=1)
        for x, y in zip(fresh, past)
    )
    out = cached_attention.attend(q, fresh, past, layer, filled)
    expected = attention.attention(q, keys, values, (1 + filled) * 128)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected)


def test_a_cache_of_another_dtype_is_read_as_the_chunk():
    q, fresh, past, *rest = inputs(dtype=jnp.float32)
    half = tuple(x.astype(jnp.bfloat16) for x in past)
    out = cached_attention.attend(q, fresh, half, *rest)
    rounded = tuple(x.astype(jnp.float32) for x in half)
    np.testing.assert_array_equal(out, cached_attention.attend(q, fresh, rounded, *rest))


def test_without_the_hardware_fp8_is_dense_attention():
    args = inputs_fp8(rows=2, slots=3)
    out = cached_attention.attend_fp8(*args)
    assert out.dtype == jnp.bfloat16
    assert error(out, exact(*args)) < 0.01


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
def test_error_of_fp8_on_a_video():
    q, k, v = video()
    expected = jax.nn.dot_product_attention(q, k, v)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    empty = jnp.zeros((1, 1, *k.shape), jnp.bfloat16)
    args = (q, stored(k, v), stored(empty, empty), jnp.int32(0), jnp.zeros(1, jnp.int32))
    assert 0.02 < error(cached_attention.reference_fp8(*args), expected) < 0.05


def refused(make, attend, change, message):
    """change: of a list [q, k, v, past_k, past_v, layer, visible]."""
    q, fresh, past, *rest = make()
    args = [q, *fresh, *past, *rest]
    index, f = change
    args[index] = f(args[index])
    with pytest.raises(InputError, match=message):
        attend(args[0], tuple(args[1:3]), tuple(args[3:5]), *args[5:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, lambda q: q[..., :64]), r"k is \(1, 128, 1, 128\)"),
        ((1, lambda k: k[:, :64]), r"k is \(1, 64, 1, 128\)"),
        ((2, lambda v: jnp.swapaxes(v, 1, 2)), r"v is \(1, 1, 128, 128\)"),
        ((4, lambda v: v[:, :, :1]), "past_v is .* and 2 slots of 128 tokens it must be"),
        ((6, lambda n: jnp.tile(n, 2)), r"visible is \(2,\)"),
        ((6, lambda n: jnp.ones((1, 3), bool)), r"visible is \(1, 3\); .* it must be \(1, 2\)"),
    ],
)
def test_refuses(change, message):
    refused(inputs, cached_attention.attend, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, lambda q: q[..., :64]), "k is"),
        ((1, lambda k: k.replace(values=k.values.astype(jnp.float8_e5m2))), "float8_e5m2"),
        ((2, lambda v: v.replace(values=jnp.swapaxes(v.values, -1, -2)[..., :64])), "v is"),
        ((4, lambda v: v.replace(scale=v.scale[..., 0])), "past_v's scale"),
        ((6, lambda n: n[None]), r"visible is \(1, 1\)"),
    ],
)
def test_refuses_of_fp8(change, message):
    refused(inputs_fp8, cached_attention.attend_fp8, change, message)
