import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.errors import InputError
from longlive_jax.formats import quantize_fp8

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# Half a step, relative to a normal number.
RELATIVE = {E4M3: 2**-4, E5M2: 2**-3}


def normal(seed, shape=(16, 32), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def bits(values):
    return np.asarray(values).view(np.uint8)


@pytest.mark.parametrize(
    "dtype, axis, x_dtype",
    [
        (E4M3, None, jnp.float32),
        (E4M3, -1, jnp.bfloat16),
        (E4M3, 1, jnp.bfloat16),
        (E5M2, None, jnp.bfloat16),
        (E5M2, 0, jnp.float32),
    ],
)
def test_values_and_scales(dtype, axis, x_dtype):
    x = normal(0, (4, 6, 32), x_dtype) * jnp.asarray(2.0, x_dtype) ** jnp.arange(
        -6, 0, dtype=x_dtype
    ).reshape(1, 6, 1)
    t = quantize_fp8(x, dtype, axis)
    assert (t.values.dtype, t.shape, t.ndim, t.dtype) == (dtype, x.shape, 3, x_dtype)
    y = np.asarray(x, np.float32)
    scale = np.abs(y).max(axis, keepdims=axis is not None) / np.float32(LARGEST[dtype])
    np.testing.assert_array_equal(t.scale, scale)
    expected = (y * (np.float32(1) / scale)).astype(dtype)
    np.testing.assert_array_equal(bits(t.values), bits(expected))
    # A quotient gives the same but at ties.
    assert np.mean(bits(t.values) != bits((y / scale).astype(dtype))) < 0.01
    decoded = t.dequantize()
    assert decoded.dtype == x_dtype
    np.testing.assert_array_equal(
        decoded, jnp.asarray(expected.astype(np.float32) * scale, x_dtype)
    )


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_number_of_the_format_is_kept(dtype):
    codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    x = codes[np.isfinite(codes)]
    for power in (-20, 0, 20):
        t = quantize_fp8(jnp.asarray(x * np.float32(2.0**power)), dtype)
        np.testing.assert_array_equal(np.asarray(t.values, np.float32), x)
        np.testing.assert_array_equal(t.dequantize(), x * np.float32(2.0**power))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), power=st.integers(-60, 60), dtype=st.sampled_from([E4M3, E5M2])
)
def test_properties(seed, power, dtype):
    x = np.asarray(normal(seed))
    t = quantize_fp8(x, dtype, -1)
    y = np.asarray(t.dequantize())
    floor = np.asarray(t.scale) * float(jnp.finfo(dtype).smallest_subnormal) / 2
    assert np.all(np.abs(y - x) <= np.maximum(np.abs(x) * RELATIVE[dtype], floor) * (1 + 1e-6))
    scaled = quantize_fp8(x * np.float32(2.0**power), dtype, -1)
    np.testing.assert_array_equal(bits(scaled.values), bits(t.values))
    np.testing.assert_array_equal(scaled.scale, np.asarray(t.scale) * np.float32(2.0**power))
    negative = quantize_fp8(-x, dtype, -1)
    np.testing.assert_array_equal(bits(negative.values), bits(t.values) ^ 128)
    again = quantize_fp8(y, dtype, -1)
    np.testing.assert_array_equal(bits(again.values), bits(t.values))


def test_zeros_tiny_and_huge():
    x = np.float32([[0.0] * 4, [2**-126, -(2**-125), 0, 2**-124], [3e38, -1e38, 3.4e38, 1]])
    t = quantize_fp8(jnp.asarray(x), E4M3, -1)
    assert t.scale[0, 0] == 2**-126
    np.testing.assert_array_equal(t.dequantize()[:2], x[:2])
    np.testing.assert_allclose(t.dequantize()[2], x[2], RELATIVE[E4M3], 1e33)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_inf_and_nan_spoil_what_shares_their_scale(dtype, bad):
    x = np.asarray(normal(0, (3, 16))).copy()
    x[1, 3] = bad
    y = np.asarray(quantize_fp8(jnp.asarray(x), dtype, -1).dequantize())
    np.testing.assert_array_equal(np.isnan(y).all(-1), [False, True, False])
    assert np.isfinite(y[[0, 2]]).all()
    assert np.isnan(quantize_fp8(jnp.asarray(x), dtype).dequantize()).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_given_amax_is_the_scale_and_what_is_above_saturates(dtype):
    x = jnp.float32([[1, -3, 0.5, 1000], [0.25, 2, -1e30, 0]])
    t = quantize_fp8(x, dtype, amax=jnp.float32(2))
    assert t.scale == np.float32(2) / np.float32(LARGEST[dtype])
    np.testing.assert_allclose(t.dequantize(), np.clip(x, -2, 2), 1e-6)
    rows = quantize_fp8(x, dtype, -1, amax=jnp.float32([[2], [1]]))
    np.testing.assert_allclose(rows.dequantize()[1], np.clip(x[1], -1, 1), 1e-6)


def test_stacks_scan_index_and_vmap():
    x = normal(2, (3, 4, 32))
    for axis in (None, -1):
        stack = jax.vmap(lambda x, axis=axis: quantize_fp8(x, axis=axis))(x)
        whole = stack.dequantize()
        _, scanned = jax.lax.scan(lambda c, t: (c, t.dequantize()), 0, stack)
        np.testing.assert_array_equal(scanned, whole)
        for i in range(3):
            one = quantize_fp8(x[i], axis=axis)
            np.testing.assert_array_equal(one.dequantize(), whole[i])
            np.testing.assert_array_equal(stack[i].dequantize(), whole[i])
    with pytest.raises(TypeError, match="not iterable"):
        iter(stack)


@pytest.mark.parametrize("axis, scale_spec", [(None, jax.P()), (-1, jax.P("data", None))])
def test_sharded_like_the_array_it_stands_for(axis, scale_spec):
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = normal(3)
    expected = quantize_fp8(x, axis=axis)
    sharding = jax.NamedSharding(mesh, jax.P("data", "seq"))
    scale = jax.NamedSharding(mesh, scale_spec)
    placed = jax.device_put(expected, expected.replace(values=sharding, scale=scale))
    with jax.set_mesh(mesh):
        made = jax.jit(lambda x: quantize_fp8(x, axis=axis))(jax.device_put(x, sharding))
        y = jax.jit(lambda t: t.dequantize())(placed)
    assert made.values.sharding.spec == y.sharding.spec == sharding.spec
    np.testing.assert_array_equal(bits(made.values), bits(expected.values))
    np.testing.assert_array_equal(made.scale, expected.scale)
    np.testing.assert_array_equal(y, expected.dequantize())


@pytest.mark.parametrize(
    "x, arguments, message",
    [
        (jnp.zeros(16, jnp.int32), {}, "input is int32"),
        (jnp.zeros(16, jnp.float16), {}, "input is float16"),
        (jnp.zeros(16), {"dtype": jnp.int8}, "must be float8_e4m3fn or float8_e5m2"),
        (jnp.zeros((0, 16)), {}, "is empty"),
        (jnp.zeros((2, 16)), {"axis": 2}, "axis 2 of shape .2, 16.; it has 2 axes"),
        (jnp.zeros((2, 16)), {"axis": 1, "amax": jnp.float32(1)}, r"it must be \(2, 1\)"),
        (jnp.zeros((2, 16)), {"amax": jnp.ones(2)}, r"it must be \(\)"),
    ],
)
def test_bad_input(x, arguments, message):
    with pytest.raises(InputError, match=message):
        quantize_fp8(x, **arguments)
