"""The quantiser of columns: the oracle's bits."""

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
from longlive_jax.kernels import quantize_nvfp4_columns, threefry
from longlive_jax.quant import operands
from tests.kernels.checks import (
    RACES,
    Case,
    Chunk,
    alone,
    kernel_tests,
    lowered,
    pretend_hopper,
    same_bits,
    shaped,
    zeros,
)
from tests.kernels.test_quantize_nvfp4 import NAMES, ONE, RULE
from tests.kernels.test_quantize_nvfp4 import arrays as of_rows

SHAPE = (128, 256)  # two tiles of tokens, two of channels


@functools.cache
def arrays():
    """name -> bfloat16 of SHAPE: those of the quantiser of rows, by columns."""
    return {
        name: np.tile(np.asarray(x).reshape(-1, 128).T, (1, 4)) for name, x in of_rows().items()
    }


def run(x, amax, key, *, rule, transform, stochastic=False, **how):
    seeds = threefry.seeds(key) if stochastic else None
    return quantize_nvfp4_columns.kernel(x, amax, rule, transform, seeds, **how)


@functools.partial(jax.jit, static_argnames=("rule", "transform", "stochastic", "tile"))
def oracle(x, amax, key, rule, transform, stochastic=False, tile=None):
    key = key if stochastic else None
    tensor = formats.quantize_nvfp4(x.T, rule, hadamard=transform, key=key, amax=amax)
    return tensor.packed(), tensor.scales


def given(name, amax, transform):
    x = arrays()[name]
    if amax is None:
        columns = formats.random_hadamard(x.T) if transform else jnp.asarray(x.T)
        amax = exact.largest_magnitude(columns)
    return x, jnp.float32(amax), jax.random.key(5)


def cases():
    for tile in quantize_nvfp4_columns.TILES:
        make = functools.partial(given, "normal", None, True)
        yield f"tile {tile}", Case(make, {"rule": RULE, "transform": True, "tile": tile})
    # Slow: those above and `test_operands_by_the_kernel` are not.
    for rule in nvfp4.RULES:
        for flags in ((transform, stochastic) for transform in (0, 1) for stochastic in (0, 1)):
            options = {"rule": rule, "transform": bool(flags[0]), "stochastic": bool(flags[1])}
            for name in NAMES:
                for amax in (None, *((0.3, 1000.0) if name in ("normal", "inf", "nan") else ())):
                    make = functools.partial(given, name, amax, options["transform"])
                    names = ("Hadamard, " * flags[0], "stochastic, " * flags[1])
                    yield f"{rule}, {''.join(names)}{name}, {amax}", Case(make, options, slow=True)


def gradient(x, seeds):
    largest = quantize_nvfp4_columns.largest_magnitude(x)
    return quantize_nvfp4_columns.kernel(x, largest, "mse", True, seeds)


def supports(x, *how):
    """Of arguments of `gradient`, or of the function itself."""
    return quantize_nvfp4_columns.supports(x, *(y for y in how if isinstance(y, str | tuple)))


CHUNK, SEEDS = shaped(7040, 3072), shaped(2, 2, dtype=jnp.uint32)

TestQuantizeNVFP4Columns = kernel_tests(
    quantize_nvfp4_columns,
    oracle,
    kernel=run,
    supports=supports,
    cases=dict(cases()),
    chunks={
        "nearest": Chunk(gradient, (CHUNK, None), calls=3),
        "stochastic": Chunk(gradient, (CHUNK, SEEDS), calls=3),
    },
    left=[
        (CHUNK, "best"),
        (CHUNK, "mse", (16, 16)),
        (shaped(7040, 3000),),
        (shaped(7000, 3072),),
        (shaped(0, 128),),
        (shaped(7040),),
        (shaped(7040, 3072, dtype=jnp.float32),),
    ],
    refused=[
        ("must be bfloat16", zeros(64, 128, dtype=np.float32), ONE, "mse"),
        ("tokens a multiple of 64", zeros(96, 128), ONE, "mse"),
        ("n of 128", zeros(64, 64), ONE, "mse"),
        (r"must be \[token, n\]", zeros(2, 64, 128), ONE, "mse"),
        ("unknown rule 'best'", zeros(64, 128), ONE, "best"),
        ("seeds are int32", zeros(64, 128), ONE, "mse", False, np.zeros((1, 2), np.int32)),
        ("in each of 2 groups", zeros(64, 128), ONE, "mse", False, np.zeros((2, 2), np.uint32)),
    ],
)


@pytest.mark.parametrize("tile", quantize_nvfp4_columns.TILES)
def test_the_largest_magnitude_is_the_oracles(tile):
    largest = functools.partial(
        quantize_nvfp4_columns.largest_magnitude, tile=tile, interpret=RACES
    )
    for name in NAMES if tile == quantize_nvfp4_columns.TILES[0] else ["normal"]:
        print(name)
        x = arrays()[name]
        expected = exact.largest_magnitude(formats.random_hadamard(x.T))
        np.testing.assert_array_equal(np.asarray(largest(x)), np.asarray(expected))


def test_what_has_no_largest_magnitude():
    for x in (jnp.zeros((64, 128)), jnp.zeros((100, 128), jnp.bfloat16)):
        with pytest.raises(InputError, match="nvfp4 columns"):
            quantize_nvfp4_columns.largest_magnitude(x)


def run_columns(y, fmt, lead, keys):
    """`operands.columns`, traced anew, in interpret mode where a kernel is called."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        columns = jax.jit(lambda y, keys: operands.columns(fmt, y, lead, (), keys))
        return alone(columns)(y, keys)


@pytest.mark.parametrize(
    "transform, stochastic",
    [
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        (True, True),
    ],
)
def test_operands_by_the_kernel(monkeypatch, transform, stochastic):
    """[part, sample, group, row, n]: tensors are parts' samples, each with an amax of its own."""
    lib, fmt = quantize_nvfp4_columns, NVFP4(RULE, hadamard=transform, stochastic=stochastic)
    y = jax.random.normal(jax.random.key(0), (2, 1, 2, 128, 128), jnp.bfloat16)
    y = y.at[1].multiply(3)
    keys = jax.random.split(jax.random.key(1), (2, 1, 2))
    expected = run_columns(y, fmt, 2, keys)
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    called = []
    monkeypatch.setattr(lib, "kernel", lambda *x, f=lib.kernel: called.append(x) or f(*x))
    result = run_columns(y, fmt, 2, keys)
    assert len(called) == 2 and result.shape == (2, 1, 128, 256) and result.amax.shape == (2, 1)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    same_bits(result, expected)


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
    of_columns = jax.P("fsdp", None, "seq")
    out = formats.NVFP4Tensor(of_columns, of_columns, jax.P("fsdp"), RULE, (1, 16), y.dtype)
    run = jax.shard_map(
        lambda y, keys: operands.columns(fmt, y, 1, ("seq",), keys),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=out,
    )
    with jax.set_mesh(mesh):
        # Outside of a manual region it is left to XLA.
        assert not quantize_nvfp4_columns.supports(placed((256, 128), jnp.bfloat16))
        text, result = lowered(run, y, keys)
    assert result.shape == (4, 128, 128) and result.amax.shape == (4,)
    for name in ("quantize_nvfp4_columns_stochastic", "quantize_nvfp4_columns_largest"):
        assert name in text
