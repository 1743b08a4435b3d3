"""The quantiser of columns: the oracle's bits in interpret mode, and its lowering for Hopper."""

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
from longlive_jax.formats import NVFP4, exact, nvfp4
from longlive_jax.kernels import quantize_nvfp4_columns as lib
from longlive_jax.kernels import threefry
from longlive_jax.quant import operands
from tests.kernels.checks import pretend_hopper
from tests.kernels.test_quantize_nvfp4 import arrays as of_rows
from tests.kernels.test_quantize_nvfp4 import compare, equal

SHAPE = (128, 256)  # two tiles of tokens, two of channels
RULE = "static_6"


@functools.cache
def arrays():
    """name -> bfloat16 of SHAPE: those of the quantiser of rows, by columns."""
    return {
        name: np.tile(np.asarray(x).reshape(-1, 128).T, (1, 4)) for name, x in of_rows().items()
    }


@functools.cache
def kernel(rule, transform, stochastic):
    interpret = plgpu.InterpretGPUParams(detect_races=True)

    def run(x, amax, key):
        seeds = threefry.seeds(key) if stochastic else None
        return lib.kernel(x, amax, rule, transform, seeds, interpret=interpret)

    return jax.jit(run)


@functools.partial(jax.jit, static_argnames=("rule", "transform"))
def oracle(x, amax, rule, transform, key):
    tensor = formats.quantize_nvfp4(x.T, rule, hadamard=transform, key=key, amax=amax)
    return tensor.packed(), tensor.scales


@functools.cache
def largest():
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(lambda x: lib.largest_magnitude(x, interpret=interpret))


def check(x, amax, rule, transform, stochastic):
    key = jax.random.key(5)
    result = kernel(rule, transform, stochastic)(x, amax, key)
    compare(result, oracle(x, amax, rule, transform, key if stochastic else None))


@pytest.mark.slow  # `test_operands_by_the_kernel` and `test_every_tile_gives_the_same` are not
@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("transform", (False, True))
@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_bits_are_the_oracles(rule, transform, stochastic):
    for name, x in arrays().items():
        print(name)
        columns = formats.random_hadamard(x.T) if transform else jnp.asarray(x.T)
        check(x, exact.largest_magnitude(columns), rule, transform, stochastic)
        for given in (0.3, 1000.0) if name in ("normal", "inf", "nan") else ():
            check(x, jnp.float32(given), rule, transform, stochastic)


def test_the_largest_magnitude_is_the_oracles():
    for name, x in arrays().items():
        print(name)
        expected = exact.largest_magnitude(formats.random_hadamard(x.T))
        np.testing.assert_array_equal(np.asarray(largest()(x)), np.asarray(expected))


@pytest.mark.parametrize("tile", lib.TILES)
def test_every_tile_gives_the_same(tile):
    x = arrays()["normal"]
    interpret = plgpu.InterpretGPUParams()
    amax = lib.largest_magnitude(x, tile, interpret)
    result = lib.kernel(x, amax, RULE, True, tile=tile, interpret=interpret)
    compare(result, oracle(x, None, RULE, True, None))


def run_columns(y, fmt, lead, keys):
    """`operands.columns`, traced anew, in interpret mode where a kernel is called."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.jit(lambda y, keys: operands.columns(fmt, y, lead, (), keys))(y, keys)


@pytest.mark.parametrize(
    "transform, stochastic",
    [pytest.param(False, False, marks=pytest.mark.slow), (True, False), (True, True)],
)
def test_operands_by_the_kernel(monkeypatch, transform, stochastic):
    """[part, sample, group, row, n]: tensors are parts' samples, each with an amax of its own."""
    fmt = NVFP4(RULE, hadamard=transform, stochastic=stochastic)
    y = jax.random.normal(jax.random.key(0), (2, 1, 2, 128, 128), jnp.bfloat16)
    y = y.at[1].multiply(3)
    keys = jax.random.split(jax.random.key(1), (2, 1, 2))
    expected = run_columns(y, fmt, 2, keys)
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    called = []
    monkeypatch.setattr(lib, "kernel", lambda *x, f=lib.kernel: called.append(x) or f(*x))
    result = run_columns(y, fmt, 2, keys)
    assert len(called) == 2 and result.shape == (2, 1, 128, 256) and result.amax.shape == (2, 1)
    equal(result, expected)


CHUNK = jax.ShapeDtypeStruct((7040, 3072), jnp.bfloat16)


@pytest.mark.parametrize("stochastic", (False, True))
def test_it_lowers_for_hopper(stochastic):
    seeds = jax.ShapeDtypeStruct((2, 2), jnp.uint32) if stochastic else None

    def run(x, seeds):
        return lib.kernel(x, lib.largest_magnitude(x), "mse", True, seeds)

    text = jax.jit(run).trace(CHUNK, seeds).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("quantize_nvfp4_columns", "quantize_nvfp4_columns_largest"):
        assert name in text


def test_operands_lower_on_a_mesh(monkeypatch):
    """In a manual region, with a sample spread over devices."""
    pretend_hopper(monkeypatch)
    fmt = NVFP4(RULE, hadamard=True, stochastic=True)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    spec = jax.P("fsdp", "seq")

    def placed(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    y = placed((4, 2, 64, 128), jnp.bfloat16)  # [sample, group, row, n]
    keys = placed((4, 2), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    out = formats.NVFP4Tensor(
        jax.P("fsdp", None, "seq"),
        jax.P("fsdp", None, "seq"),
        jax.P("fsdp"),
        RULE,
        (1, 16),
        y.dtype,
    )
    run = jax.shard_map(
        lambda y, keys: operands.columns(fmt, y, 1, ("seq",), keys),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=out,
    )
    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(y, keys)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert traced.out_info.shape == (4, 128, 128) and traced.out_info.amax.shape == (4,)
    for name in ("quantize_nvfp4_columns_stochastic", "quantize_nvfp4_columns_largest"):
        assert name in text


def test_what_is_supported(monkeypatch):
    assert not lib.supports(CHUNK)
    pretend_hopper(monkeypatch)
    assert lib.supports(CHUNK) and lib.supports(
        jax.ShapeDtypeStruct((3, *CHUNK.shape), CHUNK.dtype)
    )
    assert not lib.supports(CHUNK, "best") and not lib.supports(CHUNK, "mse", (16, 16))
    others = ((7040, 3000), (7000, 3072), (0, 128), (7040,))
    assert not any(lib.supports(jax.ShapeDtypeStruct(s, jnp.bfloat16)) for s in others)
    assert not lib.supports(jax.ShapeDtypeStruct(CHUNK.shape, jnp.float32))
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    with jax.set_mesh(mesh):  # outside of a manual region
        assert not lib.supports(jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=sharding))


@pytest.mark.parametrize(
    "shape, dtype, rule, seeds, message",
    (
        ((64, 128), jnp.float32, "mse", None, "must be bfloat16"),
        ((96, 128), jnp.bfloat16, "mse", None, "tokens a multiple of 64"),
        ((64, 64), jnp.bfloat16, "mse", None, "n of 128"),
        ((2, 64, 128), jnp.bfloat16, "mse", None, r"must be \[token, n\]"),
        ((64, 128), jnp.bfloat16, "best", None, "unknown rule 'best'"),
        ((64, 128), jnp.bfloat16, "mse", ((1, 2), jnp.int32), "seeds are int32"),
        ((64, 128), jnp.bfloat16, "mse", ((2, 2), jnp.uint32), "in each of 2 groups"),
    ),
)
def test_what_the_kernel_refuses(shape, dtype, rule, seeds, message):
    seeds = None if seeds is None else jnp.zeros(*seeds)
    with pytest.raises(InputError, match=message):
        lib.kernel(jnp.zeros(shape, dtype), jnp.float32(1), rule, seeds=seeds)


def test_what_has_no_largest_magnitude():
    for x in (jnp.zeros((64, 128)), jnp.zeros((100, 128), jnp.bfloat16)):
        with pytest.raises(InputError, match="nvfp4 columns"):
            lib.largest_magnitude(x)
