"""The transformer against the original's outputs, and its four uses against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import nnx, params
from longlive_jax.models import dit
from longlive_jax.models.dit import conditioning
from tests import golden_files

POSITIONS = np.arange(24, dtype=np.int32).reshape(1, 3, 8)


@pytest.fixture(scope="module")
def weights():
    return golden_files.transformer_params()


def close(out, expected, limit=1e-5):
    out, expected = np.asarray(out), np.asarray(expected)
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() <= limit * np.abs(expected).max()


def golden_inputs():
    g = golden_files.arrays("dit_tiny")
    split = golden_files.chunks_of_channels_first
    return g, split


def test_block_causal_is_the_originals(weights):
    g, split = golden_inputs()
    out = jax.jit(dit.block_causal, static_argnums=1)(
        weights, golden_files.MODEL, split(g["bc_x"]), jnp.asarray(g["bc_t"]).reshape(1, 3, 8),
        POSITIONS, text=jnp.asarray(g["bc_ctx"])[None],
    )  # fmt: skip
    close(out, split(g["bc_out"]))


@pytest.mark.parametrize("name, offset", [("tf_out", 0), ("tfo_out", 8)])
def test_teacher_forcing_is_the_originals(weights, name, offset):
    g, split = golden_inputs()
    positions = np.where(POSITIONS >= 8, POSITIONS + offset, POSITIONS).astype(np.int32)
    out = jax.jit(dit.teacher_forcing, static_argnums=1)(
        weights, golden_files.MODEL, split(g["tf_clean"]), split(g["tf_x"]),
        jnp.asarray(g["tf_t"]).reshape(1, 3, 8), positions, text=jnp.asarray(g["tf_ctx"])[None],
    )  # fmt: skip
    close(out, split(g[name]))


def test_chunks_sharded_over_seq_give_the_same_training_forward_and_gradient(weights):
    """The whole forward in one manual shard_map, parameters sharded over fsdp and seq as well."""
    g, split = golden_inputs()
    clean, noisy = (jnp.tile(split(g[k]), (2, 1, 1, 1, 1, 1))[:, :2] for k in ("tf_clean", "tf_x"))
    t = jnp.tile(jnp.asarray(g["tf_t"]).reshape(1, 3, 8), (2, 1, 1))[:, :2]
    # Larger than the golden text: of logits that hardly differ the gradients are rounding errors.
    text = 8 * jnp.tile(jnp.asarray(g["tf_ctx"])[None], (2, 1, 1, 1))[:, :2]
    positions = jnp.tile(POSITIONS, (2, 1, 1))[:, :2]
    cfg = golden_files.MODEL

    def loss(p, *x, sharding=dit.Sharding()):
        *x, text = x
        return jnp.sum(dit.teacher_forcing(p, cfg, *x, text=text, sharding=sharding) ** 2)

    inputs = (clean, noisy, t, positions, text)
    expected = jax.jit(jax.value_and_grad(loss))(weights, *inputs)

    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=2, seq=2))
    sharding = dit.Sharding.training()
    specs = params.partition_specs(dit.spec(cfg))
    where = mesh_lib.spec(("batch", "chunk"))

    def local(p, *x):
        value, gradient = jax.value_and_grad(loss)(p, *x, sharding=sharding)
        return sharding.sum(value), sharding.sum_gradients(gradient, dit.spec(cfg))

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, *(where,) * 5),
        out_specs=(jax.P(), specs),
        check_vma=False,
    )
    put = jax.device_put(weights, params.shardings(dit.spec(cfg), mesh))
    data = jax.device_put(inputs, jax.NamedSharding(mesh, where))
    value, gradient = jax.jit(sharded)(put, *data)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for path, g_expected in params.flatten(expected[1]).items():
        got = params.flatten(gradient)[path]
        scale = np.abs(g_expected).max() + 1e-12
        assert np.abs(np.asarray(got) - np.asarray(g_expected)).max() < 3e-5 * scale, path
        assert got.sharding.spec == params.flatten(put)[path].sharding.spec, path


def test_full_size_has_the_published_parameters():
    cfg = config_lib.Model()
    spec = dit.spec(cfg)
    assert params.count(spec) == 4_999_787_712
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2, seq=4))
    abstract = params.abstract(spec, mesh, jnp.bfloat16)
    for leaf in jax.tree.leaves(abstract):
        leaf.sharding.shard_shape(leaf.shape)  # raises where the mesh does not divide it
    large = sum(
        x.size for x in jax.tree.leaves(abstract) if x.sharding.spec != jax.P() and x.size > 1e6
    )
    assert large > 0.99 * 4_999_787_712


def test_full_size_teacher_forcing_traces():
    cfg = config_lib.Model()
    p = params.abstract(dit.spec(cfg), dtype=jnp.bfloat16)
    latents = jax.ShapeDtypeStruct((1, 2, 8, 44, 80, 48), jnp.bfloat16)
    t = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, 2, 8), jnp.int32)
    text = jax.ShapeDtypeStruct((1, 2, 512, 4096), jnp.bfloat16)
    out = jax.eval_shape(
        lambda p, *x, text: dit.teacher_forcing(p, cfg, *x, text=text),
        p, latents, latents, t, positions, text=text,
    )  # fmt: skip
    assert out.shape == latents.shape and out.dtype == jnp.bfloat16


def test_bfloat16_stays_near_float32(weights):
    g, split = golden_inputs()
    args = (
        golden_files.MODEL, split(g["bc_x"]).astype(jnp.bfloat16),
        jnp.asarray(g["bc_t"]).reshape(1, 3, 8), POSITIONS,
    )  # fmt: skip
    text = jnp.asarray(g["bc_ctx"], jnp.bfloat16)[None]
    out = jax.jit(dit.block_causal, static_argnums=1)(weights, *args, text=text)
    assert out.dtype == jnp.bfloat16
    expected = np.asarray(split(g["bc_out"]))
    error = np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)
    assert error < 0.02


def test_a_timestep_may_be_a_fraction():
    exact = 937.25 * 10000.0 ** (-np.arange(16) / 16)
    wave = conditioning.sinusoid(jnp.float32(937.25)[None], 32)[0]
    np.testing.assert_allclose(wave[:16], np.cos(exact), atol=1e-6)
    np.testing.assert_allclose(wave[16:], np.sin(exact), atol=1e-6)


@pytest.mark.slow
def test_flax_module_gives_the_same_numbers(weights):
    g, split = golden_inputs()
    model = nnx.Transformer(golden_files.MODEL, weights)
    args = (
        split(g["tf_clean"]), split(g["tf_x"]), jnp.asarray(g["tf_t"]).reshape(1, 3, 8), POSITIONS,
        jnp.asarray(g["tf_ctx"])[None],
    )  # fmt: skip
    close(flax_nnx.jit(lambda m, *a: m(*a))(model, *args), split(g["tf_out"]))
    bc = model.block_causal(*args[1:])
    close(bc, dit.block_causal(weights, golden_files.MODEL, *args[1:4], text=args[4]), 1e-6)
    _, state = flax_nnx.split(model)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(weights))
    jax.tree.map(np.testing.assert_array_equal, model.tree(), weights)
