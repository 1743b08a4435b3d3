"""The NVFP4 quantiser as a kernel: the oracle's bits."""

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
from longlive_jax.kernels import blocks, quantize_nvfp4, threefry
from tests.kernels.checks import (
    Case,
    Chunk,
    Public,
    alone,
    check_quotients,
    f32,
    kernel_tests,
    lowered,
    pretend_hopper,
    same_bits,
    shaped,
    zeros,
)

SHAPE = (32, 256)  # 512 blocks: four to a thread
RULE = "static_6"  # the fastest to compile, where the rule does not matter
# Codes, what lies halfway between them, and what saturates.
TIES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 6.5, 7)
NAMES = (
    "normal", "of many magnitudes", "ties", "equal in a block", "sparse", "zeros of both signs",
    "tiny", "huge", "nan", "inf",
)  # fmt: skip


@functools.cache
def arrays():
    """name -> numbers of SHAPE, bfloat16, by block [512, 16] where that matters."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((512, 16))
    by_block = rng.choice(2.0 ** np.arange(-20, 1), (512, 1))
    sign = rng.choice((-1, 1), (512, 16))
    nan, inf = normal.copy(), normal.copy()
    nan[3, 5], inf[7, 0] = np.nan, -np.inf
    data = (
        normal,
        normal * by_block,
        rng.choice(TIES, (512, 16)) * sign * by_block,
        np.repeat(normal[:, :1], 16, axis=1) * sign,
        normal * (rng.random((512, 16)) < 0.2),
        0 * sign,
        normal * 2.0**-118,
        np.clip(normal, -1, 1) * 3.3e38,
        nan,
        inf,
    )
    return {name: jnp.asarray(x.reshape(SHAPE), jnp.bfloat16) for name, x in zip(NAMES, data)}


def largest(x):
    return jnp.float32(np.max(np.abs(np.asarray(x, np.float32))))


def run(x, amax, key, *, rule, stochastic, interpret):
    seeds = threefry.seeds(key) if stochastic else None
    return quantize_nvfp4.kernel(x, amax, rule, (2, 2), interpret, seeds)


@functools.partial(jax.jit, static_argnames=("rule", "stochastic"))
def oracle(x, amax, key, rule, stochastic):
    key = key if stochastic else None
    tensor = formats.quantize_nvfp4(x, rule, key=key, amax=amax)
    return tensor.packed(), tensor.scales


def given(name, amax):
    """An array, its largest magnitude (or that of a larger whole, or of a smaller), and a key."""
    x = arrays()[name]
    return x, largest(x) if amax is None else jnp.float32(amax), jax.random.key(5)


def cases():
    for rule in nvfp4.RULES:
        for stochastic in (False, True):
            # Of the adaptive rules mse is the one that recipes use.
            slow = rule != "mse" or stochastic
            options = {"rule": rule, "stochastic": stochastic}
            for name in NAMES:
                others = (0.3, 1.7, 1000.0) if name in ("normal", "ties", "inf", "nan") else ()
                for amax in (None, *others):
                    make = functools.partial(given, name, amax)
                    rounding = ", stochastic" if stochastic else ""
                    yield f"{rule}{rounding}: {name}, {amax}", Case(make, options, slow)


def public(hadamard, seed):
    key = None if seed is None else jax.random.key(seed)
    how = {"rule": RULE, "hadamard": hadamard, "key": key}
    return Public(
        functools.partial(quantize_nvfp4.quantize_nvfp4, **how),
        functools.partial(formats.quantize_nvfp4, **how),
        lambda: (arrays()["normal"],),
    )


def chunk(rule, stochastic):
    seeds = shaped(2, 2, dtype=jnp.uint32) if stochastic else None

    def function(x, amax, seeds):
        return quantize_nvfp4.kernel(x, amax, rule, seeds=seeds)

    return Chunk(function, (shaped(7040, 3072), f32(), seeds), calls=2)


ONE = np.float32(1)

TestQuantizeNVFP4 = kernel_tests(
    quantize_nvfp4,
    oracle,
    kernel=run,
    supports=lambda x, *_: quantize_nvfp4.supports(x),
    interpret=plgpu.InterpretGPUParams(),
    cases=dict(cases()),
    publics={
        "alone": public(False, None),
        "Hadamard": public(True, None),
        "Hadamard, stochastic": public(True, 3),
    },
    chunks={
        f"{rule}{', stochastic' if stochastic else ''}": chunk(rule, stochastic)
        for rule in ("static_4", "mse")
        for stochastic in (False, True)
    },
    refused=[
        ("must be bfloat16", zeros(128, 16, dtype=np.float32), ONE, "mse"),
        ("multiple of 2048 numbers", zeros(100, 16), ONE, "mse"),
        ("must end in a multiple of 16", zeros(256, 8), ONE, "mse"),
        ("multiple of 2048 numbers", zeros(0, 16), ONE, "mse"),
        ("unknown rule 'best'", zeros(128, 16), ONE, "best"),
    ],
)


def test_floors_are_exact():
    """Of float32 within 8 steps of a code, and of small ones."""
    grid = np.float32([0.5, 1, 1.5, 2, 3, 4, 6])
    near = grid.view(np.uint32)[:, None] + np.arange(-8, 9).astype(np.uint32)
    small = 2.0 ** np.arange(-18, -1, dtype=np.float32)
    x = np.sort(np.concatenate([near.view(np.float32).ravel(), small, np.float32([6.9])]))
    code = np.searchsorted(grid, x, side="right")
    lifted = blocks._lift(jnp.asarray(x))
    np.testing.assert_array_equal((np.asarray(lifted).view(np.uint32) >> 22) - blocks._ZERO, code)
    np.testing.assert_array_equal(blocks._floor(lifted), np.append(np.float32(0), grid)[code])


@pytest.mark.parametrize("groups", ((), (2,)))
def test_each_tensor_by_its_keys(monkeypatch, groups):
    lib = quantize_nvfp4
    x = jax.random.normal(jax.random.key(0), (2, 2, 16, 128), jnp.bfloat16)
    amax, keys = jnp.float32([4, 5]), jax.random.split(jax.random.key(1), (2, *groups))

    def run():
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            each = jax.jit(lambda *x: lib.quantize_each(*x[:2], RULE, keys=x[2]))
            return alone(each)(x, amax, keys)

    expected = run()
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    same_bits(run(), expected)


@pytest.mark.slow
def test_groups_of_several_steps():
    """Two of two tiles each, which a program makes both, or one."""
    x, keys = arrays()["normal"], jax.random.split(jax.random.key(1), 2)
    parts = x.reshape(2, 16, 256)
    one = functools.partial(oracle, rule=RULE, stochastic=True)
    expected = jax.vmap(one, (0, None, 0))(parts, jnp.float32(4), keys)
    expected = [y.reshape(32, -1) for y in expected]
    for steps in (1, 2):
        interpret = plgpu.InterpretGPUParams()
        seeds = threefry.seeds(keys)
        kernel = alone(quantize_nvfp4.kernel)
        result = kernel(x, jnp.float32(4), RULE, (steps, 2), interpret, seeds)
        same_bits(result, expected)


def test_with_a_key_the_array_must_be_local(monkeypatch):
    supports = quantize_nvfp4.supports
    key, x = jax.random.key(0), shaped(7040, 3072)
    pretend_hopper(monkeypatch)
    assert supports(x) and supports(x, key=key)
    assert not supports(x, key=jax.random.split(key, 2))
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    placed = jax.ShapeDtypeStruct((512, 256), x.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        assert supports(placed) and not supports(placed, key=key)


def test_a_sixth_is_rounded_once():
    check_quotients(blocks._SIXTH, 6)


@pytest.mark.parametrize("spec", (jax.P(), jax.P("fsdp", "seq")))
def test_it_lowers_on_a_mesh(monkeypatch, spec):
    """Of explicit axes; each device its part."""
    monkeypatch.setattr(quantize_nvfp4, "supports", lambda *_: True)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        text, out = lowered(functools.partial(quantize_nvfp4.quantize_nvfp4, rule=RULE), x)
        expected = jax.eval_shape(lambda x: formats.quantize_nvfp4(x, RULE), x)
    assert "mosaic_gpu" in text
    assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, expected)


def test_other_dtypes_and_blocks_are_left_to_xla():
    x = arrays()["normal"].astype(jnp.float32)
    result = quantize_nvfp4.quantize_nvfp4(x, "mae", (16, 16))
    same_bits(result, formats.quantize_nvfp4(x, "mae", (16, 16)))
    with pytest.raises(InputError, match="unknown rule 'best'"):
        quantize_nvfp4.quantize_nvfp4(x, "best")


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
        quantize_nvfp4.kernel(zeros(128, 16), ONE, RULE, seeds=seeds)
