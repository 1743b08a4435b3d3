"""Fresh keys and values packed by the kernels, in interpret mode, and their lowering for Hopper."""

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
from longlive_jax.kernels import attention_fp8
from longlive_jax.kernels import pack_fp8 as lib
from tests.kernels.checks import pretend_hopper

SHAPE = (2, 256, 3, 128)  # two rows of two tiles, three heads


def oracle(k, v):
    return attention_fp8.pack(lib.quantize_heads(k), lib.quantize_heads(v))


@functools.cache
def normal():
    k, v = jax.random.normal(jax.random.key(0), (2, *SHAPE), jnp.bfloat16)
    return k, 3 * v


def extremes():
    """Heads of each kind, in k and, in another order, in v; a NaN and an Inf in the last tile."""
    x = normal()[0].astype(jnp.float32)
    x = x.at[0, :, 0].set(0).at[0, :, 1].multiply(2.0**-124).at[0, 200, 2, 77].set(jnp.nan)
    x = x.at[1, :, 0].set(jnp.clip(x[1, :, 0], -1, 1) * 3.3e38).at[1, 255, 1, 127].set(-jnp.inf)
    spread = 2.0 ** jnp.arange(-20, 4, dtype=jnp.float32)
    spread = jax.random.choice(jax.random.key(1), spread, x[1, :, 2].shape)
    x = x.at[1, :, 2].multiply(spread).astype(jnp.bfloat16)
    return x, jnp.roll(x[::-1], 1, axis=2)


def check(result, expected):
    """Codes, signs of zeros included, and scales have the same bits; a NaN may be any NaN."""
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a), np.asarray(b)
        nan = np.isnan(b.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), nan)
        unsigned = f"u{a.itemsize}"
        np.testing.assert_array_equal(a.view(unsigned)[~nan], b.view(unsigned)[~nan])


@functools.cache
def kernel():
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(functools.partial(lib.kernel, interpret=interpret))


@pytest.mark.parametrize("inputs", (normal, extremes))
def test_bits_are_the_oracles(inputs):
    k, v = inputs()
    check(kernel()(k, v), jax.jit(oracle)(k, v))


def test_heads_out_of_the_ordinary():
    k, _ = extremes()
    packed, _ = kernel()(k, k)
    tiny = np.asarray(packed.scale)[0, 0, :2, 0]
    assert tiny.tolist() == [2.0**-126] * 2
    nan = np.isnan(np.asarray(packed.dequantize(jnp.float32)))
    assert nan.all(axis=(1, 3)).tolist() == [[False, False, True], [False, True, False]]
    assert nan.any(axis=(1, 3)).sum() == 2


def test_quantize_heads_is_the_format_head_by_head():
    k, v = extremes()
    for x in (k, v.astype(jnp.float32)):
        whole = lib.quantize_heads(x)
        for row, head in np.ndindex(x.shape[0], x.shape[2]):
            one = formats.quantize_fp8(x[row, :, head])
            here = formats.FP8Tensor(
                whole.values[row, :, head], whole.scale[row, 0, head, 0], whole.dtype
            )
            check(here, one)


@pytest.mark.parametrize("dtype, tokens", ((jnp.bfloat16, 128), (jnp.float32, 48)))
def test_elsewhere_it_is_the_oracle(dtype, tokens):
    k, v = (x[:, :tokens].astype(dtype) for x in normal())
    assert not lib.supports(k)
    check(lib.pack(k, v), oracle(k, v))


CHUNK = jax.ShapeDtypeStruct((1, 7040, 24, 128), jnp.bfloat16)


def test_what_is_supported(monkeypatch):
    assert not lib.supports(CHUNK)
    pretend_hopper(monkeypatch)
    assert lib.supports(CHUNK)
    others = ((1, 7040, 24, 64), (1, 7000, 24, 128), (0, 7040, 24, 128), (7040, 24, 128))
    assert not any(lib.supports(jax.ShapeDtypeStruct(s, jnp.bfloat16)) for s in others)
    assert not lib.supports(jax.ShapeDtypeStruct(CHUNK.shape, jnp.float32))


@pytest.mark.parametrize("rows", (1, 2))
def test_it_lowers_for_hopper(monkeypatch, rows):
    x = jax.ShapeDtypeStruct((rows, *CHUNK.shape[1:]), CHUNK.dtype)
    expected = jax.eval_shape(oracle, x, x)
    pretend_hopper(monkeypatch)
    traced = jax.jit(lib.pack).trace(x, x)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 3
    assert jax.tree.map(jax.typeof, traced.out_info) == jax.tree.map(jax.typeof, expected)


def test_it_lowers_in_a_manual_shard_map(monkeypatch):
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=1, seq=8))
    monkeypatch.setattr(lib, "supports", lambda _: True)
    heads = jax.P(None, None, "seq")
    k, v = jax.eval_shape(oracle, CHUNK, CHUNK)
    specs = (
        k.replace(values=heads, scale=heads),
        v.replace(values=jax.P(None, "seq"), scale=jax.P(None, "seq")),
    )
    run = jax.shard_map(lib.pack, mesh=mesh, in_specs=(heads, heads), out_specs=specs)
    x = jax.ShapeDtypeStruct(CHUNK.shape, CHUNK.dtype, sharding=jax.NamedSharding(mesh, heads))
    with jax.set_mesh(mesh):
        text = jax.jit(run).trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


X = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)


@pytest.mark.parametrize(
    "function, shapes, dtype, message",
    (
        (lib.pack, (X.shape, (1, 128, 3, 128)), X.dtype, r"\(1, 128, 3, 128\); both must be"),
        (lib.pack, (X.shape[1:],) * 2, X.dtype, "both must be"),
        (lib.pack, ((1, 40, 2, 128),) * 2, X.dtype, "40 tokens; they must be a multiple of 16"),
        (lib.pack, (X.shape,) * 2, jnp.float16, "must be bfloat16 or float32"),
        (lib.kernel, (X.shape,) * 2, jnp.float32, "it takes bfloat16"),
        (lib.kernel, ((1, 64, 2, 128),) * 2, X.dtype, "tokens a multiple of 128"),
        (lib.kernel, ((1, 128, 2, 64),) * 2, X.dtype, "head_dim 128"),
        (lib.kernel, (X.shape, (2, 128, 2, 128)), X.dtype, "must be alike"),
    ),
)
def test_what_is_refused(function, shapes, dtype, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes))
