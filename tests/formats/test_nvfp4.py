"""NVFP4 against the original's quantiser, bit for bit, and by its properties."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import formats
from longlive_jax.errors import InputError
from longlive_jax.formats import nvfp4
from tests import golden_files

ROWS, SQUARES = nvfp4.BLOCKS
CODES = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NAMES = ("randn", "randn_f32", "w002", "ints", "zeros", "ones", "zeroblk", "ladder", "rht_randn")
DENOMINATORS = {"static_6": 2688, "static_4": 1792, "mse": 1536, "mae": 1536, "abs_max": 1536}


def normal(seed, shape=(32, 64), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def codes(t):
    return np.asarray(t.codes())


def scale_bits(t):
    return np.asarray(t.scales).view(np.uint8)


def assert_same(a, b):
    np.testing.assert_array_equal(codes(a), codes(b))
    np.testing.assert_array_equal(scale_bits(a), scale_bits(b))
    np.testing.assert_array_equal(a.amax, b.amax)


# --- The original's numbers.


def tall(x: np.ndarray, width: int, rows: int = 256) -> np.ndarray:
    """[r, c] cut in columns of `width`, one below the other, padded with zeros to `rows` rows.

    So all cases have one shape. Blocks stay whole; zeros change no amax.
    """
    x = np.concatenate(np.split(x, x.shape[1] // width, axis=1))
    return np.pad(x, ((0, rows - len(x)), (0, 0)))


def golden_input(name: str, transposed: int) -> jax.Array:
    """float32, or bfloat16 [r, c]."""
    x = jnp.asarray(golden_files.arrays("nvfp4")[f"{name}|x"])
    x = x if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    x = x.T if transposed else x
    return formats.random_hadamard(x) if name in ("rht_randn", "step|rht") else x


def golden_output(key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes with 0 for -0, scale bits (both as `tall`), amax."""
    file = golden_files.arrays("nvfp4")
    packed = file[f"{key}|v"]
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    scales = formats.from_hardware_order(file[f"{key}|s"], len(values), values.shape[1] // 16)
    values = np.where(values == 8, 0, values)
    return tall(values, 128), tall(np.asarray(scales), 8), file[f"{key}|a"]


def check_golden(cases, dtype, rule, block):
    """`cases`: (name of the input, transposed, key of the output)."""
    x = [golden_input(name, transposed).astype(dtype) for name, transposed, _ in cases]
    stack = jnp.asarray(np.stack([tall(np.asarray(y), 128) for y in x]))
    t = jax.jit(jax.vmap(lambda x: formats.quantize_nvfp4(x, rule, block)))(stack)
    for i, (name, transposed, key) in enumerate(cases):
        values, scales, amax = golden_output(key)
        case = f"{name}, transposed {transposed}"
        np.testing.assert_array_equal(codes(t[i]), values, case)
        np.testing.assert_array_equal(scale_bits(t[i]), scales, case)
        np.testing.assert_array_equal(t.amax[i], amax, case)


@pytest.mark.parametrize("block", nvfp4.BLOCKS)
@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_golden(rule, block):
    cases = [
        (name, t, f"{name}|{rule}|{int(block == SQUARES)}|{t}") for name in NAMES for t in (0, 1)
    ]
    if (rule, block) == ("mse", ROWS):
        cases += [("step|rht", t, f"step|rht|{t}") for t in (0, 1)]
    check_golden(cases, jnp.float32, rule, block)


def test_golden_from_bfloat16():
    names = [name for name in NAMES if name != "randn_f32"]
    cases = [(name, t, f"{name}|mse|0|{t}") for name in names for t in (0, 1)]
    check_golden(cases, jnp.bfloat16, "mse", ROWS)


@pytest.mark.parametrize("block", nvfp4.BLOCKS)
def test_golden_in_optimised_code(block):
    """The tests' own code is not optimised; contraction of products and sums needs that it is."""
    quantize = jax.jit(
        lambda x: formats.quantize_nvfp4(x, block=block),
        compiler_options={"xla_backend_optimization_level": 3},
    )
    x = golden_input("randn", 0)
    t = quantize(x.astype(jnp.float32))
    values, scales, amax = golden_output(f"randn|mse|{int(block == SQUARES)}|0")
    np.testing.assert_array_equal(tall(codes(t), 128), values)
    np.testing.assert_array_equal(tall(scale_bits(t), 8), scales)
    np.testing.assert_array_equal(t.amax, amax)


def test_hadamard_is_that_of_what_is_quantised():
    x = normal(0, (4, 32), jnp.bfloat16)
    expected = formats.quantize_nvfp4(formats.random_hadamard(x), "static_6")
    assert_same(formats.quantize_nvfp4(x, "static_6", hadamard=True), expected)


# --- Tables.


@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_every_code_with_every_scale_decodes(rule):
    packed = np.arange(16, dtype=np.uint8).reshape(8, 2) @ np.uint8([1, 16])
    scales = np.arange(256, dtype=np.uint8)
    amax = np.float32(1.7)
    packed = np.broadcast_to(packed, (256, 8))
    t = formats.from_packed(jnp.asarray(packed), scales[:, None], amax, rule, dtype=jnp.float32)
    signed = np.concatenate([CODES, -CODES])
    product = signed * scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
    expected = product * amax / np.float32(DENOMINATORS[rule])
    assert np.isnan(expected).sum() == 32
    np.testing.assert_array_equal(t.dequantize(), expected)
    rounded = t.dequantize(jnp.bfloat16)
    expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(rounded.astype(jnp.float32), expected)
    np.testing.assert_array_equal(t.packed(), packed)


def test_every_scale_is_made_and_all_numbers_rounded_to_the_nearest_code():
    # With this amax the scale is that of a block whose largest number is 6, times its largest / 6.
    scales = np.arange(1, 127, dtype=np.uint8)
    x = np.linspace(-6, 6, 16 * 48 + 1, dtype=np.float32)[:-1].reshape(48, 16)
    x[:, 0] = 6
    y = np.concatenate([x, np.float32(CODES[1:] + CODES[:-1]).repeat(16).reshape(7, 16) / 2])
    y[48:, 0], y[48:, 1::2] = 6, -y[48:, 1::2]
    factor = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None, None]
    every = factor * y
    t = formats.quantize_nvfp4(jnp.asarray(every), "static_6", amax=jnp.float32(2688))
    np.testing.assert_array_equal(
        scale_bits(t), np.broadcast_to(scales[:, None, None], (126, 55, 1))
    )
    # Where 1 / factor is not exact, some ties are none.
    y = every * (1 / factor)
    nearest = y.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(codes(t), np.where(nearest == 8, 0, nearest))


def test_hardware_order():
    rows, columns = 160, 6
    scales = np.random.default_rng(0).integers(0, 256, (rows, columns), np.uint8)
    flat = np.asarray(formats.to_hardware_order(scales))
    assert flat.shape == (2 * 2 * 512,)
    r, c = np.indices((rows, columns))
    at = (r // 128 * 2 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    np.testing.assert_array_equal(flat[at], scales)
    assert np.count_nonzero(np.delete(flat, at)) == 0
    np.testing.assert_array_equal(formats.from_hardware_order(flat, rows, columns), scales)
    with pytest.raises(InputError, match="2048 scales in hardware order; 300 rows of 6"):
        formats.from_hardware_order(flat, 300, 6)


# --- Properties.

cases = settings(max_examples=12, deadline=None)


@cases
@given(
    seed=st.integers(0, 1 << 30),
    power=st.integers(-60, 60),
    layout=st.sampled_from([("static_6", ROWS), ("mse", ROWS), ("mae", SQUARES)]),
)
def test_properties(seed, power, layout):
    rule, block = layout
    # Magnitudes that keep scales among the normal E4M3 numbers.
    x = np.asarray(normal(seed))
    x = np.sign(x) * np.clip(np.abs(x), 2**-5, 8)
    quantize = functools.partial(formats.quantize_nvfp4, rule=rule, block=block)
    t = quantize(x)
    y = np.asarray(t.dequantize())

    scales = np.asarray(t.scales, np.float32)
    step = scales.repeat(16, -1) * np.float32(t.amax) / DENOMINATORS[rule]
    assert np.all(np.abs(y - x) <= step * (1 + 1e-5)), "half the widest gap between codes is 1"

    again = quantize(y)
    np.testing.assert_allclose(again.dequantize(), y, 1e-5, 0, err_msg="idempotence")

    scaled = quantize(x * np.float32(2.0**power))
    assert_same(scaled, t.replace(amax=t.amax * jnp.float32(2.0**power)))

    negative = quantize(-x)
    flipped = np.where(codes(t) == 0, 0, codes(t) ^ 8)
    np.testing.assert_array_equal(codes(negative), flipped)
    np.testing.assert_array_equal(scale_bits(negative), scale_bits(t))

    back = formats.from_packed(t.packed(), t.scales, t.amax, rule, block, jnp.float32)
    assert jax.tree.structure(back) == jax.tree.structure(t)
    assert_same(back, t)


@cases
@given(seed=st.integers(0, 1 << 30), power=st.floats(0.2, 3))
def test_adaptive_rules_err_less_in_their_own_measure(seed, power):
    x = np.asarray(normal(seed))
    x = np.sign(x) * np.abs(x) ** np.float32(power)
    measures = {
        "mse": lambda d: np.sum(d**2),
        "mae": lambda d: np.sum(np.abs(d)),
        "abs_max": lambda d: np.sum(np.abs(d).reshape(-1, 16).max(-1)),
    }
    # The six alone, from the same tensor scale: all candidates for 6, none for 4.
    for rule, measure in measures.items():
        t = formats.quantize_nvfp4(x, rule)
        six = formats.quantize_nvfp4(x, "static_6", amax=t.amax * jnp.float32(448 / 256))
        error, of_six = (measure(q.dequantize() - x) for q in (t, six))
        assert error <= of_six * (1 + 1e-5), rule


def test_squares_share_a_scale_and_transpose():
    x = normal(1, (2, 32, 32))
    t = formats.quantize_nvfp4(x, "static_6", SQUARES)
    scales = scale_bits(t).reshape(2, 2, 16, 2)
    np.testing.assert_array_equal(scales, scales[:, :, :1].repeat(16, 2))
    transposed = formats.quantize_nvfp4(x.mT, "static_6", SQUARES)
    np.testing.assert_array_equal(transposed.dequantize(), t.dequantize().mT)


# --- Stochastic rounding.


@pytest.mark.parametrize("block", nvfp4.BLOCKS)
def test_stochastic_rounding_is_unbiased(block):
    rows = 8192
    # Scale 1 by this amax. Even rows of the table are between codes, 6 keeps the scale.
    row = np.float32(
        [6, 0.1, -0.3, 0.5, 0.8, -1.1, 1.4, 1.75, 1.9, 2.25, -2.6, 3, 3.7, 4.5, 5.9, 0]
    )
    x = jnp.asarray(np.broadcast_to(row, (rows, 16)))
    quantize = functools.partial(formats.quantize_nvfp4, rule="static_6", block=block)
    t = quantize(x, key=jax.random.key(0), amax=jnp.float32(2688))
    y = np.asarray(t.dequantize(jnp.float32))
    above = np.searchsorted(CODES, np.abs(row))
    high, low = CODES[above], CODES[np.maximum(above - (CODES[above] != np.abs(row)), 0)]
    assert np.all((np.abs(y) == high) | (np.abs(y) == low))
    step = high - low
    # 131,072 draws: five standard deviations of the mean of each number's, and of all.
    chance = np.where(step > 0, (np.abs(row) - low) / np.maximum(step, 0.5), 0)
    deviation = step * np.sqrt(chance * (1 - chance) / rows)
    assert np.all(np.abs(y.mean(0) - row) <= 5 * deviation + 1e-6)
    assert abs((y - row).mean()) <= 5 * np.sqrt(np.sum(deviation**2)) / 16
    assert_same(quantize(x, key=jax.random.key(0), amax=jnp.float32(2688)), t)
    other = quantize(x, key=jax.random.key(1), amax=jnp.float32(2688))
    assert np.any(codes(other) != codes(t))


def test_random_bits_are_uniform_and_independent():
    """At each of a block's 16 places, which share four calls of the generator."""
    bits = np.asarray(nvfp4.random_bits(jax.random.key(0), (1 << 16, 16)))
    assert bits.dtype == np.uint16
    for byte in (bits >> 8, bits & 255):
        counts = np.apply_along_axis(np.bincount, 0, byte, minlength=256)
        chi2 = np.sum((counts - 256) ** 2 / 256, axis=0)  # 255 degrees of freedom, deviation 22.6
        assert (abs(chi2 - 255) < 5 * 22.6).all()
    correlation = np.corrcoef(bits.T.astype(np.float64)) - np.eye(16)
    assert abs(correlation).max() < 5 / 2**8  # of 2^16 draws: a deviation of 2^-8


def test_random_bits_depend_on_the_place_alone():
    key = jax.random.key(3)
    bits = nvfp4.random_bits(key, (4, 8, 32))
    np.testing.assert_array_equal(nvfp4.random_bits(key, (1024,)), np.ravel(bits))
    np.testing.assert_array_equal(nvfp4.random_bits(key, (2, 8, 32)), bits[:2])
    assert (np.asarray(nvfp4.random_bits(jax.random.key(4), (4, 8, 32))) != bits).mean() > 0.99
    assert nvfp4.random_bits(jax.random.key(0, impl="rbg"), (3, 16)).shape == (3, 16)


def test_stochastic_rounding_of_an_adaptive_rule_judges_the_drawn_codes():
    x = normal(3)
    draws = [formats.quantize_nvfp4(x, key=jax.random.key(i)) for i in range(32)]
    y = np.stack([t.dequantize() for t in draws])
    nearest = np.asarray(formats.quantize_nvfp4(x).dequantize())
    one, mean = np.mean((y[0] - x) ** 2), np.mean((y.mean(0) - x) ** 2)
    assert mean < one / 8 < np.mean((nearest - x) ** 2)
    six = formats.quantize_nvfp4(x, "static_6", key=jax.random.key(0)).dequantize()
    assert one < np.mean((six - x) ** 2)


# --- What is out of the ordinary.


def test_zeros_tiny_and_huge():
    x = np.asarray(normal(4))
    t = formats.quantize_nvfp4(jnp.zeros_like(x))
    assert not codes(t).any() and not scale_bits(t).any() and not np.any(t.dequantize())
    expected = formats.quantize_nvfp4(x)
    y = np.asarray(expected.dequantize())
    for power in (-110, 125):
        factor = np.float32(2.0**power)
        t = formats.quantize_nvfp4(x * factor)
        assert_same(t, expected.replace(amax=expected.amax * factor))
        np.testing.assert_array_equal(t.dequantize(), y * factor)
    largest = formats.quantize_nvfp4(np.full_like(x, 3.4e38)).dequantize()
    np.testing.assert_allclose(largest, 3.4e38, 1e-6)
    assert not np.any(formats.quantize_nvfp4(np.full_like(x, 1e-39)).dequantize())
    # Blocks too small for a scale, and for all but the smallest, beside a large one.
    x = np.ones_like(x)
    x[1], x[2] = 2.0**-19, 2.0**-17
    t = formats.quantize_nvfp4(x)
    np.testing.assert_array_equal(scale_bits(t)[:3, 0] > 0, [True, False, True])
    assert not codes(t)[1].any() and np.all(t.dequantize()[2] > 0)
    assert codes(formats.quantize_nvfp4(-x)).min() == 0, "no negative zero"
    assert not np.any(codes(formats.quantize_nvfp4(-x)) == 8)


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_inf_and_nan(rule):
    for bad in (np.inf, -np.inf, np.nan):
        x = np.tile(np.asarray(normal(5)), (8, 4))
        x[1, 2] = bad
        t = formats.quantize_nvfp4(x, rule)
        assert not np.isfinite(t.amax)
        assert np.isnan(t.dequantize()).all()
        given = formats.quantize_nvfp4(x, rule, amax=jnp.float32(4)).dequantize()
        np.testing.assert_array_equal(np.isnan(given[:3, :16]).all(-1), [0, np.isnan(bad), 0])
        assert np.isnan(given).sum() == 16 * np.isnan(bad)
        limit = 7 if rule == "mse" else 4
        assert np.all(np.isnan(given) | (np.abs(given) <= limit * (1 + 1e-6)))
        if not np.isnan(bad):
            np.testing.assert_allclose(given[1, 2], np.sign(bad) * limit, 1e-6)


def test_a_given_amax_is_the_whole_tensors():
    x = normal(6)
    whole = formats.quantize_nvfp4(x, key=None)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def dequantized(x):
        amax = jax.lax.pmax(jnp.max(jnp.abs(x)), "data")
        return formats.quantize_nvfp4(x, amax=amax).dequantize()

    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_array_equal(jax.jit(dequantized)(placed), whole.dequantize())
    constant = jax.jit(lambda x: formats.quantize_nvfp4(x, amax=float(whole.amax)))
    assert_same(constant(x), whole)


def test_numbers_are_those_of_the_input_not_of_what_xla_computed_it_from():
    a = normal(7)

    def product(a):
        return (a * jnp.float32(0.3)).astype(jnp.bfloat16)

    fused = jax.jit(lambda a: formats.quantize_nvfp4(product(a)))(a)
    assert_same(fused, formats.quantize_nvfp4(product(a)))


# --- An array among arrays.


def test_stacks_scan_index_donate_and_map():
    x = normal(8, (3, 16, 32), jnp.bfloat16)
    quantize = functools.partial(formats.quantize_nvfp4, rule="static_6", block=SQUARES)
    stack = jax.vmap(quantize)(x)
    assert (stack.shape, stack.ndim, stack.dtype) == (x.shape, 3, jnp.bfloat16)
    assert stack.amax.shape == (3,)
    whole = stack.dequantize()
    assert whole.dtype == jnp.bfloat16
    _, scanned = jax.lax.scan(lambda c, t: (c, t.dequantize()), 0, stack)
    np.testing.assert_array_equal(scanned, whole)
    for i in range(3):
        assert_same(stack[i], quantize(x[i]))
        np.testing.assert_array_equal(stack[i].dequantize(), whole[i])
    with pytest.raises(TypeError, match="not iterable"):
        iter(stack)
    kept = stack.packed()
    moved = jax.jit(lambda t: jax.tree.map(lambda leaf: leaf[::-1], t), donate_argnums=0)(stack)
    np.testing.assert_array_equal(moved.packed(), kept[::-1])
    assert stack.values.is_deleted()


@pytest.mark.slow
def test_sharded_like_the_array_it_stands_for():
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "seq"), axis_types=(jax.sharding.AxisType.Explicit,) * 3
    )
    sharding = jax.NamedSharding(mesh, jax.P("data", "fsdp", "seq"))
    x, key = normal(9, (2, 32, 64)), jax.random.key(0)
    quantize = functools.partial(formats.quantize_nvfp4, block=SQUARES, hadamard=True)
    expected = quantize(x, key=key)
    amax = jax.NamedSharding(mesh, jax.P())
    placed = jax.device_put(expected, expected.replace(values=sharding, scales=sharding, amax=amax))
    with jax.set_mesh(mesh):
        made = jax.jit(lambda x, key: quantize(x, key=key))(jax.device_put(x, sharding), key)
        y, packed = jax.jit(lambda t: (t.dequantize(), t.packed()))(placed)
    for leaf in (made.values, made.scales, y, packed):
        assert leaf.sharding.spec == sharding.spec
    assert_same(made, expected)
    np.testing.assert_array_equal(y, expected.dequantize())


def test_an_amax_of_shape_one_is_one_number():
    packed, scales, amax = np.zeros((4, 16), np.uint8), np.zeros((4, 2), np.uint8), np.ones(1)
    assert formats.from_packed(packed, scales, amax, "mse").amax.shape == ()
    assert formats.from_packed(packed[None], scales[None], amax, "mse").amax.shape == (1,)


# --- Bad input.


@pytest.mark.parametrize(
    "x, arguments, message",
    [
        (jnp.zeros((16, 24)), {}, r"\(16, 24\) must end in a multiple of 16; pad"),
        (jnp.zeros(()), {}, "must end in a multiple of 16"),
        (jnp.zeros((0, 16)), {}, "is empty"),
        (jnp.zeros((24, 16)), {"block": SQUARES}, "multiple of 16 rows; pad them"),
        (jnp.zeros(16), {"block": SQUARES}, "multiple of 16 rows"),
        (jnp.zeros((16, 16)), {"block": (16, 1)}, r"block \(16, 1\) must be one of"),
        (jnp.zeros(16), {"rule": "always_6"}, "unknown rule 'always_6'; rules: static_6, static_4"),
        (jnp.zeros(16, jnp.int8), {}, "input is int8; it must be bfloat16 or float32"),
        (jnp.zeros(16, jnp.float16), {}, "input is float16"),
        (
            jnp.zeros((2, 16)),
            {"amax": jnp.ones(2)},
            r"amax has shape \(2,\); it must be one number",
        ),
        (jnp.zeros((2, 8)), {"hadamard": True}, "multiple of 16"),
    ],
)
def test_bad_input(x, arguments, message):
    with pytest.raises(InputError, match=message):
        formats.quantize_nvfp4(x, **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packed": jnp.zeros((4, 16), jnp.int8)}, "packed codes are int8"),
        ({"scales": jnp.zeros((4, 2))}, "scales are float32"),
        ({"scales": jnp.zeros(8, jnp.uint8)}, r"they must be \(4, 2\), in row-major order"),
        ({"amax": jnp.ones(3)}, r"amax of shape \(3,\) beside codes for \(4, 32\)"),
        ({"rule": "mean"}, "unknown rule 'mean'"),
        ({"packed": jnp.zeros((4, 12), jnp.uint8)}, "multiple of 16"),
    ],
)
def test_bad_packed_input(change, message):
    good = {
        "packed": jnp.zeros((4, 16), jnp.uint8),
        "scales": jnp.zeros((4, 2), jnp.uint8),
        "amax": jnp.ones(()),
        "rule": "mse",
    }
    with pytest.raises(InputError, match=message):
        formats.from_packed(**(good | change))


def test_packing_is_nothing_where_codes_lie_packed(monkeypatch):
    """As on a GPU. A CPU has such casts, too, but not in every program."""
    q = formats.quantize_nvfp4(normal(0, (3, 5, 96)))
    packed = q.packed()
    monkeypatch.setattr(nvfp4, "_lie_packed", lambda: True)
    # Unjitted: JAX would find what it traced before.
    np.testing.assert_array_equal(formats.NVFP4Tensor.packed.__wrapped__(q), packed)
    back = formats.from_packed(packed, q.scales, q.amax, "mse")
    np.testing.assert_array_equal(codes(back), codes(q))
