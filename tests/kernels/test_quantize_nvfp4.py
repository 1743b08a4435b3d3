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
from tests.kernels.checks import check_quotients

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
def kernel(rule):
    interpret = plgpu.InterpretGPUParams()
    return jax.jit(lambda x, amax: lib.kernel(x, amax, rule, (2, 2), interpret))


@functools.partial(jax.jit, static_argnames="rule")
def oracle(x, amax, rule):
    tensor = formats.quantize_nvfp4(x, rule, amax=amax)
    return tensor.packed(), tensor.scales


def check(x, amax, rule):
    codes, scales = (np.asarray(y) for y in kernel(rule)(x, amax))
    expected = [np.asarray(y) for y in oracle(x, amax, rule)]
    assert codes.dtype == np.uint8 and scales.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(codes, expected[0])
    # A NaN's sign is nobody's business.
    is_nan = np.isnan(scales.astype(np.float32))
    np.testing.assert_array_equal(is_nan, np.isnan(expected[1].astype(np.float32)))
    np.testing.assert_array_equal(
        scales.view(np.uint8)[~is_nan], expected[1].view(np.uint8)[~is_nan]
    )


# Of the adaptive rules mse is the one that recipes use.
QUICK = ("mse",)


@pytest.mark.parametrize(
    "rule", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in nvfp4.RULES]
)
def test_bits_are_the_oracles(rule):
    for name, x in arrays().items():
        print(name)
        check(x, jnp.float32(np.max(np.abs(np.asarray(x, np.float32)))), rule)
        # A part of a larger whole, or of a smaller.
        for given in (0.3, 1.7, 1000.0) if name in ("normal", "ties", "inf", "nan") else ():
            check(x, jnp.float32(given), rule)


def test_a_sixth_is_rounded_once():
    check_quotients(lib._SIXTH, 6)


@pytest.mark.parametrize("rule", ("static_4", "mse"))
def test_it_lowers_for_hopper(rule):
    x = jax.ShapeDtypeStruct((7040, 3072), jnp.bfloat16)
    amax = jax.ShapeDtypeStruct((), jnp.float32)
    traced = jax.jit(lambda x, amax: lib.kernel(x, amax, rule)).trace(x, amax)
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


@pytest.mark.parametrize("hadamard", (False, True))
def test_the_public_function_by_the_kernel(monkeypatch, hadamard):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    x = arrays()["normal"]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        tensor = jax.jit(lambda x: lib.quantize_nvfp4(x, RULE, hadamard=hadamard))(x)
    equal(tensor, formats.quantize_nvfp4(x, RULE, hadamard=hadamard))


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
