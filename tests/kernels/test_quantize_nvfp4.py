"""The NVFP4 quantiser as a kernel: the oracle's bits in interpret mode, and its lowering for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import nvfp4
from longlive_jax.kernels import quantize_nvfp4 as lib
from longlive_jax.kernels import threefry
from tests.kernels.checks import check_quotients, pretend_hopper

SHAPE = (32, 256)  # 512 blocks: four to a thread
RULE = "static_6"  # the fastest to compile, where the rule does not matter
# Codes, what lies halfway between them, and what saturates.
TIES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 6.5, 7)


def arrays():
    """name -> numbers of SHAPE, float32, by block [512, 16] where that matters."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((512, 16))
    by_block = rng.choice(2.0 ** np.arange(-20, 1), (512, 1))
    sign = rng.choice((-1, 1), (512, 16))
    nan, inf = normal.copy(), normal.copy()
    nan[3, 5], inf[7, 0] = np.nan, -np.inf
    data = {
        "normal": normal,
        "of many magnitudes": normal * by_block,
        "ties": rng.choice(TIES, (512, 16)) * sign * by_block,
        "equal in a block": np.repeat(normal[:, :1], 16, axis=1) * sign,
        "sparse": normal * (rng.random((512, 16)) < 0.2),
        "zeros of both signs": 0 * sign,
        "tiny": normal * 2.0**-118,
        "huge": np.clip(normal, -1, 1) * 3.3e38,
        "nan": nan,
        "inf": inf,
    }
    return {name: jnp.asarray(x.reshape(SHAPE), jnp.bfloat16) for name, x in data.items()}


@functools.cache
def kernel(rule, stochastic):
    interpret = plgpu.InterpretGPUParams()

    def run(x, amax, key):
        seeds = threefry.seeds(key) if stochastic else None
        return lib.kernel(x, amax, rule, (2, 2), interpret, seeds)

    return jax.jit(run)


@functools.partial(jax.jit, static_argnames="rule")
def oracle(x, amax, rule, key):
    tensor = formats.quantize_nvfp4(x, rule, key=key, amax=amax)
    return tensor.packed(), tensor.scales


def compare(result, expected):
    """Packed codes, and scales, bit for bit."""
    codes, scales = (np.asarray(y) for y in result)
    expected = [np.asarray(y) for y in expected]
    assert codes.dtype == np.uint8 and scales.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(codes, expected[0])
    # A NaN's sign is nobody's business.
    is_nan = np.isnan(scales.astype(np.float32))
    np.testing.assert_array_equal(is_nan, np.isnan(expected[1].astype(np.float32)))
    np.testing.assert_array_equal(
        scales.view(np.uint8)[~is_nan], expected[1].view(np.uint8)[~is_nan]
    )


def check(x, amax, rule, stochastic):
    key = jax.random.key(5)
    result = kernel(rule, stochastic)(x, amax, key)
    compare(result, oracle(x, amax, rule, key if stochastic else None))


# Of the adaptive rules mse is the one that recipes use.
QUICK = ("mse",)


@pytest.mark.parametrize(
    "rule", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in nvfp4.RULES]
)
@pytest.mark.parametrize("stochastic", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_bits_are_the_oracles(rule, stochastic):
    for name, x in arrays().items():
        print(name)
        check(x, jnp.float32(np.max(np.abs(np.asarray(x, np.float32)))), rule, stochastic)
        # A part of a larger whole, or of a smaller.
        for given in (0.3, 1.7, 1000.0) if name in ("normal", "ties", "inf", "nan") else ():
            check(x, jnp.float32(given), rule, stochastic)


def test_floors_are_exact():
    """Of float32 within 8 steps of a code, and of small ones."""
    grid = np.float32([0.5, 1, 1.5, 2, 3, 4, 6])
    near = grid.view(np.uint32)[:, None] + np.arange(-8, 9).astype(np.uint32)
    small = 2.0 ** np.arange(-18, -1, dtype=np.float32)
    x = np.sort(np.concatenate([near.view(np.float32).ravel(), small, np.float32([6.9])]))
    code = np.searchsorted(grid, x, side="right")
    lifted = lib._lift(jnp.asarray(x))
    np.testing.assert_array_equal((np.asarray(lifted).view(np.uint32) >> 22) - lib._ZERO, code)
    np.testing.assert_array_equal(lib._floor(lifted), np.append(np.float32(0), grid)[code])


@pytest.mark.parametrize("groups", ((), (2,)))
def test_each_tensor_by_its_keys(monkeypatch, groups):
    x = jax.random.normal(jax.random.key(0), (2, 2, 16, 128), jnp.bfloat16)
    amax, keys = jnp.float32([4, 5]), jax.random.split(jax.random.key(1), (2, *groups))

    def run():
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            return jax.jit(lambda *x: lib.quantize_each(*x[:2], RULE, keys=x[2]))(x, amax, keys)

    expected = run()
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    equal(run(), expected)


def test_groups_of_several_steps():
    """Two of two tiles each, which a program makes both, or one."""
    x, keys = arrays()["normal"], jax.random.split(jax.random.key(1), 2)
    parts = x.reshape(2, 16, 256)
    one = functools.partial(oracle, amax=jnp.float32(4), rule=RULE)
    expected = [y.reshape(32, -1) for y in jax.vmap(lambda x, key: one(x, key=key))(parts, keys)]
    for steps in (1, 2):
        interpret = plgpu.InterpretGPUParams()
        seeds = threefry.seeds(keys)
        compare(lib.kernel(x, jnp.float32(4), RULE, (steps, 2), interpret, seeds), expected)


def test_what_is_supported(monkeypatch):
    key, x = jax.random.key(0), jax.ShapeDtypeStruct((7040, 3072), jnp.bfloat16)
    assert not lib.supports(x, key=key)
    pretend_hopper(monkeypatch)
    assert lib.supports(x) and lib.supports(x, key=key)
    assert not lib.supports(x, key=jax.random.split(key, 2))
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    placed = jax.ShapeDtypeStruct((512, 256), x.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        assert lib.supports(placed) and not lib.supports(placed, key=key)


def test_a_sixth_is_rounded_once():
    check_quotients(lib._SIXTH, 6)


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("rule", ("static_4", "mse"))
def test_it_lowers_for_hopper(rule, stochastic):
    x = jax.ShapeDtypeStruct((7040, 3072), jnp.bfloat16)
    seeds = jax.ShapeDtypeStruct((2, 2), jnp.uint32) if stochastic else None
    amax = jax.ShapeDtypeStruct((), jnp.float32)
    run = jax.jit(lambda x, amax, seeds: lib.kernel(x, amax, rule, seeds=seeds))
    traced = run.trace(x, amax, seeds)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("spec", (jax.P(), jax.P("fsdp", "seq")))
def test_it_lowers_on_a_mesh(monkeypatch, spec):
    """Of explicit axes; each device its part."""
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda x: lib.quantize_nvfp4(x, RULE)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        expected = jax.eval_shape(lambda x: formats.quantize_nvfp4(x, RULE), x)
    assert "mosaic_gpu" in text
    assert jax.tree.map(jax.typeof, traced.out_info) == jax.tree.map(jax.typeof, expected)


def equal(tensor, expected):
    assert jax.tree.structure(tensor) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tensor), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("hadamard, seed", ((False, None), (True, None), (True, 3)))
def test_the_public_function_by_the_kernel(monkeypatch, hadamard, seed):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    x, key = arrays()["normal"], None if seed is None else jax.random.key(seed)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        tensor = jax.jit(lambda x: lib.quantize_nvfp4(x, RULE, hadamard=hadamard, key=key))(x)
    equal(tensor, formats.quantize_nvfp4(x, RULE, hadamard=hadamard, key=key))


def test_the_public_function_elsewhere():
    x = arrays()["normal"].astype(jnp.float32)
    assert not lib.supports(x)
    equal(lib.quantize_nvfp4(x, "mae", (16, 16)), formats.quantize_nvfp4(x, "mae", (16, 16)))
    with pytest.raises(InputError, match="unknown rule 'best'"):
        lib.quantize_nvfp4(x, "best")


@pytest.mark.parametrize(
    "shape, dtype, rule, message",
    (
        ((128, 16), jnp.float32, "mse", "must be bfloat16"),
        ((100, 16), jnp.bfloat16, "mse", "multiple of 2048 numbers"),
        ((256, 8), jnp.bfloat16, "mse", "must end in a multiple of 16"),
        ((0, 16), jnp.bfloat16, "mse", "multiple of 2048 numbers"),
        ((128, 16), jnp.bfloat16, "best", "unknown rule 'best'"),
    ),
)
def test_what_the_kernel_refuses(shape, dtype, rule, message):
    with pytest.raises(InputError, match=message):
        lib.kernel(jnp.zeros(shape, dtype), jnp.float32(1), rule)


@pytest.mark.parametrize(
    "seeds, message",
    (
        (
            jnp.zeros((1, 2), jnp.int32),
            r"seeds are int32 \(1, 2\); they must be uint32 \[group, 2\]",
        ),
        (jnp.zeros((2,), jnp.uint32), r"seeds are uint32 \(2,\)"),
        (jnp.zeros((0, 2), jnp.uint32), r"seeds are uint32 \(0, 2\)"),
        (jnp.zeros((2, 2), jnp.uint32), "multiple of 2048 numbers for each of 2 groups"),
    ),
)
def test_seeds_that_are_not_the_inputs(seeds, message):
    with pytest.raises(InputError, match=message):
        lib.kernel(jnp.zeros((128, 16), jnp.bfloat16), jnp.float32(1), RULE, seeds=seeds)
