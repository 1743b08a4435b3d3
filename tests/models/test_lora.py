"""Adapters of the transformer: the original's outputs, any mesh, any base, training and sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes
from longlive_jax.checkpoints import peft
from longlive_jax.errors import InputError
from longlive_jax.models import dit, lora
from longlive_jax.quant import weights as weights_lib
from longlive_jax.sampling import stream
from tests import golden_files
from tests.sampling import test_stream

MODEL = dataclasses.replace(golden_files.MODEL, num_heads=2)
SPECS = dit.spec(MODEL)
LORA = config_lib.LoRA(rank=4, alpha=8.0)
ADAPTERS = lora.specs(SPECS, LORA)


@pytest.fixture(scope="module")
def golden():
    return golden_files.arrays("lora_tiny")


@pytest.fixture(scope="module")
def base():
    return golden_files.transformer_params("lora_tiny")


@pytest.fixture(scope="module")
def adapters(golden):
    state = {k.removeprefix("lora_weights/"): v for k, v in golden.items()}
    state = {k: v for k, v in state.items() if k.startswith(peft.PREFIX)}
    return jax.tree.map(jnp.asarray, peft.from_peft(state, ADAPTERS))


def close(out, expected, limit=1e-5):
    out, expected = np.asarray(out), np.asarray(expected)
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() <= limit * np.abs(expected).max()


def inputs(golden, batch=1, chunks=3):
    """Latents, timesteps, positions and text of the golden case."""
    x = golden_files.chunks_of_channels_first(golden["lora/x"])
    timesteps = jnp.asarray(golden["lora/t"]).reshape(1, 3, 8)
    positions = jnp.arange(24, dtype=jnp.int32).reshape(1, 3, 8)
    text = jnp.asarray(golden["lora/text"])[None]
    every = (x, timesteps, positions, text)
    return tuple(jnp.concatenate([v[:, :chunks]] * batch) for v in every)


def forward(params, x, timesteps, positions, text, **settings):
    return dit.block_causal(params, MODEL, x, timesteps, positions, text=text, **settings)


def test_outputs_and_merged_weights_are_the_originals(golden, base, adapters):
    run, given = jax.jit(forward), inputs(golden)
    split = golden_files.chunks_of_channels_first
    close(run(base, *given), split(golden["lora/out_base"]))
    close(run(lora.attach(base, adapters, LORA.scale), *given), split(golden["lora/out"]))
    merged = jax.jit(lora.merge, static_argnums=2)(base, adapters, LORA.scale)
    close(run(merged, *given), split(golden["lora/out_merged"]))
    q = merged["blocks"]["self_attn"]["qkv"]["weight"][0, :, : MODEL.dim]
    close(q.T, golden["lora/merged/blocks.0.self_attn.q.weight"], 1e-6)
    ffn = merged["blocks"]["ffn"]["2"]["weight"][1]
    close(ffn.T, golden["lora/merged/blocks.1.ffn.2.weight"], 1e-6)
    back = jax.jit(lora.unmerge, static_argnums=2)(merged, adapters, LORA.scale)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), back, base)


def loss(adapters, base, *given, **settings):
    params = lora.attach(base, adapters, LORA.scale)
    return jnp.sum(forward(params, *given, remat="block", **settings) ** 2)


@pytest.fixture(scope="module")
def trained(golden, base, adapters):
    """Inputs, the loss, and its gradients of adapters and of the base, on one device."""
    given = inputs(golden, batch=4, chunks=2)
    return given, *jax.jit(jax.value_and_grad(loss, (0, 1)))(adapters, base, *given)


@pytest.mark.slow
def test_the_base_has_no_gradient(trained):
    _, _, (gradient, of_base) = trained
    assert not any(np.any(g) for g in jax.tree.leaves(of_base))
    assert all(np.any(g) for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_any_mesh_gives_the_same_loss_gradient_and_merged_weights(trained, base, adapters):
    """Base and adapters sharded over fsdp and seq, gathered a layer at a time; remat."""
    given, expected, (gradient, _) = trained
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, fsdp=2, seq=2))
    sharding, where = dit.Sharding.training(), mesh_lib.spec(("batch", "chunk"))

    def local(adapters, base, *given):
        value, gradient = jax.value_and_grad(loss)(adapters, base, *given, sharding=sharding)
        return sharding.sum(value), sharding.sum_gradients(gradient, ADAPTERS)

    parts = params_lib.partition_specs(ADAPTERS)
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(parts, params_lib.partition_specs(SPECS), *(where,) * 4),
        out_specs=(jax.P(), parts),
        check_vma=False,
    )
    placed = jax.device_put(adapters, params_lib.shardings(ADAPTERS, mesh))
    base_there = jax.device_put(base, params_lib.shardings(SPECS, mesh))
    data = jax.device_put(given, jax.NamedSharding(mesh, where))
    value, got = jax.jit(sharded)(placed, base_there, *data)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, g in params_lib.flatten(gradient).items():
        close(params_lib.flatten(got)[path], g, 3e-4)

    program = jax.jit(lora.merge, static_argnums=2)
    merged = program(base_there, placed, LORA.scale)
    assert jax.tree.map(lambda x: x.sharding, merged) == params_lib.shardings(SPECS, mesh)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), merged, program(base, adapters, LORA.scale))


@pytest.mark.slow  # a gradient through quantised layers: tests/quant/test_adapted.py has one
def test_a_base_in_fp8_trains_adapters(trained, base, adapters):
    """Loss and gradient are near those over the plain base."""
    given, plain, (expected, _) = trained
    recipe, dtype = recipes.get("fp8_train"), jnp.dtype(jnp.float32)
    quantized = weights_lib.quantize_params(base, SPECS, recipe, dtype=dtype)
    program = jax.jit(jax.value_and_grad(loss), static_argnames="precision")
    precision = dit.Precision(recipe, dtype)
    value, gradient = program(adapters, quantized, *given, precision=precision)
    assert 0 < abs(value - plain) < 0.02 * plain
    for g, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert 0 < np.linalg.norm(g - e) < 0.3 * np.linalg.norm(e)
    with pytest.raises(InputError, match="no recipe is given"):
        loss(adapters, quantized, *given)


def test_a_sampler_has_adapters_beside_its_weights_on_any_mesh():
    """A denoising pass equals that of the merged weights."""
    model = test_stream.MODEL
    base = jax.tree.map(jnp.asarray, test_stream.random_params())
    tree = lora.specs(dit.spec(model), LORA)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    drawn = jax.tree.map(
        lambda s: 0.1 * jax.random.normal(next(keys), s.shape), tree, is_leaf=params_lib.is_spec
    )
    merged = jax.jit(lora.merge, static_argnums=2)(base, drawn, LORA.scale)

    def velocity(cfg, sampler, placed):
        state = sampler.init_state(2, *test_stream.SIZE)
        (chunk,) = test_stream.make_inputs(cfg, 1, batch=2)
        return sampler.denoise(placed, state, sampler.place(chunk))

    cfg = test_stream.make_config()
    plain, _ = test_stream.sampler_of(cfg)
    expected = velocity(cfg, plain, plain.prepare(merged))
    cfg = test_stream.make_config(config_lib.Mesh(fsdp=2, seq=2))
    sampler = stream.Sampler(cfg, mesh_lib.make_mesh(cfg.mesh), LORA)
    close(velocity(cfg, sampler, sampler.prepare(base, drawn)), expected)


def test_new_adapters_are_pefts_and_change_nothing():
    settings = dataclasses.replace(LORA, targets="self_attn.qkv,ffn.2")
    new = params_lib.init(lora.specs(SPECS, settings), jax.random.key(0))
    for (*_, side), leaf in params_lib.flatten(new).items():
        if side == "b":
            assert not np.any(leaf)
            continue
        bound = leaf.shape[1] ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        assert abs(np.std(leaf) / bound - 3**-0.5) < 0.08
        assert np.any(np.asarray(leaf[0]) != np.asarray(leaf[1]))


def test_full_size_has_the_originals_number_of_parameters():
    model = config_lib.Model()
    tree = lora.specs(dit.spec(model), config_lib.LoRA())
    assert params_lib.count(tree) == 322_437_120
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2, seq=4))
    for leaf in jax.tree.leaves(params_lib.abstract(tree, mesh)):
        leaf.sharding.shard_shape(leaf.shape)  # raises where the mesh does not divide it


def test_targets_choose_layers():
    settings = config_lib.LoRA(rank=4, targets="self_attn.qkv, cross_attn.o")
    assert set(lora.specs(SPECS, settings)["blocks"]) == {"self_attn", "cross_attn"}
    assert len(params_lib.flatten(lora.specs(SPECS, settings))) == 4


def test_bad_settings_and_bases_are_refused(base, adapters):
    for wrong, words in {"self_attn.q": "names 'self_attn.q'", "ffn.0,ffn.0": "twice"}.items():
        with pytest.raises(InputError, match=words):
            config_lib.LoRA(targets=wrong)
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(InputError, match="distill"):
            config_lib.LoRA(**wrong)
    with pytest.raises(InputError, match="rank=64 must be at most model"):
        config_lib.LoRA(rank=64).check(MODEL)
    attached = lora.attach(base, adapters, 1.0)
    with pytest.raises(InputError, match="weight has adapters already"):
        lora.attach(attached, adapters, 1.0)
    with pytest.raises(InputError, match="weight is an Adapted"):
        lora.merge(attached, adapters, 1.0)
    one = {"blocks": {"ffn": {"0": adapters["blocks"]["ffn"]["0"]}}}
    specs = weights_lib.quantize_specs(SPECS, recipes.get("fp8"))
    with pytest.raises(InputError, match="blocks/ffn/0/weight is an FP8Tensor"):
        lora.merge(specs, one, 1.0)
    with pytest.raises(InputError, match="blocks/ffn/3/weight is no layer"):
        lora.attach(base, {"blocks": {"ffn": {"3": one["blocks"]["ffn"]["0"]}}}, 1.0)
