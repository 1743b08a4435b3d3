"""A cache takes the chunks that the transformer takes, whatever its blocks of tokens and numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes
from longlive_jax.quant import kv
from longlive_jax.sampling import stream
from tests.sampling import test_stream

# Tokens and numbers of a head: 2 latents at 480x832; less than a block of either; odd multiples.
SIZES = [(780, 128), (6, 10), (15, 8), (33, 24)]
HEADS, SLOTS = 2, 3
LIMITS = {"bf16": 1e-5, "fp8": 0.06, "nvfp4": 0.15}


def tables(fmt, chunks):
    """Stored keys and values, [layer, row, slot, ...], of chunks [slot, token, head, head_dim]."""
    stored = [kv.store_pair(fmt, *(x[None] for x in chunk)) for chunk in chunks]
    return jax.tree.map(lambda *slots: jnp.stack(slots, axis=1)[None], *stored)


def exact(q, keys, values):
    logits = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(q.shape[-1])
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), values)


@pytest.mark.parametrize("name", recipes.KV_FORMATS)
@pytest.mark.parametrize("tokens, head_dim", SIZES)
def test_attention_reads_what_was_stored_and_nothing_else(name, tokens, head_dim):
    fmt, draw = recipes.KV_FORMATS[name], np.random.default_rng(tokens)
    x = draw.standard_normal((2 + 2 * SLOTS, tokens, HEADS, head_dim)).astype(np.float32)
    q, own, past = x[0][:16] * 2, (x[0], x[1]), [(x[2 + 2 * i], x[3 + 2 * i]) for i in range(SLOTS)]

    def attend(own, past, visible):
        own = tuple(jnp.asarray(one)[None] for one in own)
        counts = jnp.asarray([visible], jnp.int32)
        return np.asarray(kv.attend(fmt, jnp.asarray(q)[None], own, tables(fmt, past), 0, counts))

    for visible in (0, SLOTS - 1, SLOTS):
        seen = [own, *past[:visible]]
        expected = exact(q, *(np.concatenate([pair[i] for pair in seen]) for i in (0, 1)))
        found = attend(own, past, visible)[0]
        assert np.linalg.norm(found - expected) < LIMITS[name] * np.linalg.norm(expected)
    # Zeros that fill a chunk up would take weight away from values that are all one.
    ones = [(k, np.ones_like(k)) for k, _ in past]
    np.testing.assert_allclose(attend((own[0], ones[0][1]), ones, SLOTS), 1, atol=1e-2)


def test_sizes_of_small_chunks_are_configs():
    """At 480x832, with chunks of 2, 3 and 4 latents and heads that no block divides."""
    for frames in (2, 3, 4):
        for name in recipes.KV_FORMATS:
            lib.Config(
                model=lib.Model(dim=1536, ffn_dim=8960, num_heads=12, chunk_frames=frames),
                video=lib.Video(height=480, width=832),
                sample=lib.Sample(window_frames=6 * frames, sink_frames=frames),
                quant=lib.Quant(kv=name),
            )
            small = lib.Model(dim=80, num_heads=8, chunk_frames=frames)
            window = lib.Sample(window_frames=6 * frames, sink_frames=frames)
            lib.Config(model=small, sample=window, quant=lib.Quant(kv=name))


@pytest.mark.slow
@pytest.mark.parametrize("name, limit", [("fp8", 0.02), ("nvfp4", 0.06)])
@pytest.mark.parametrize("frames", [2, 3])
def test_streams_of_small_chunks(name, limit, frames):
    """8 and 12 tokens a chunk, heads of 8 numbers: past a full window and a cut."""
    made = {}
    for kind in ("bf16", name):
        window = {"window_frames": 4 * frames, "sink_frames": frames}
        cfg = test_stream.make_config()
        model = dataclasses.replace(cfg.model, chunk_frames=frames)
        sample = dataclasses.replace(cfg.sample, **window)
        cfg = dataclasses.replace(cfg, model=model, sample=sample, quant=lib.Quant(kv=kind))
        sampler = stream.Sampler(cfg, mesh_lib.make_mesh(cfg.mesh))
        params = sampler.prepare(test_stream.random_params())
        state, latents = sampler.init_state(1, *test_stream.SIZE), []
        inputs = test_stream.make_inputs(cfg, 6, cuts=(3,))
        for _, chunk in test_stream.steps(sampler, params, state, inputs):
            latents.append(np.asarray(chunk))
        made[kind] = np.concatenate(latents, axis=1)
    difference = np.linalg.norm(made[name] - made["bf16"]) / np.linalg.norm(made["bf16"])
    assert 0 < difference < limit
