"""The streaming sampler on a GPU: the original's numbers, and cuDNN's attention over a prefix.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_sampler_gpu.py
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout
from longlive_jax.models import dit
from longlive_jax.ops.attention import attention
from longlive_jax.sampling import stream
from tests.sampling.test_stream import steps

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_gpu")]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dit_tiny.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def golden_params(golden, specs):
    """Our tree of the original's weights."""
    layers = {}
    for w in layout.weights(specs):
        array = w.from_torch([golden[f"weights/{key}"] for key in w.keys])
        layers.setdefault(w.path, []).append((w.layer, array))
    return params_lib.unflatten(
        {
            path: arrays[0][1] if arrays[0][0] is None else np.stack([a for _, a in arrays])
            for path, arrays in layers.items()
        }
    )


@pytest.mark.parametrize("name", ("single4", "multi4", "cfg4"))
def test_golden_rollout_in_float32(golden, name):
    meta = json.loads(str(golden[f"{name}_meta"]))
    guidance = meta["guidance_scale"]
    cfg = config_lib.Config(
        model=config_lib.Model(
            dim=48, ffn_dim=64, num_heads=4, num_layers=2, in_dim=4, out_dim=4,
            text_dim=8, text_len=16, freq_dim=32,
        ),
        vae=config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
        video=config_lib.Video(height=64, width=96),
        sample=config_lib.Sample(steps=meta["steps"], guidance_scale=guidance),
        dtype="float32",
    )  # fmt: skip
    noise = np.moveaxis(golden[f"{name}_noise"], 2, -1)
    negative = jnp.asarray(golden[f"{name}_neg"]) if guidance != 1.0 else None
    inputs = [
        stream.ChunkInput(
            noise=jnp.asarray(noise[:, 8 * i : 8 * i + 8]),
            text=jnp.asarray(golden[f"{name}_ctx"][i : i + 1]),
            cut=jnp.asarray(golden[f"{name}_cut"][i : i + 1]),
            negative=negative,
        )
        for i in range(len(golden[f"{name}_cut"]))
    ]
    sampler = stream.Sampler(cfg, mesh_lib.make_mesh(cfg.mesh))
    params = golden_params(golden, dit.spec(cfg.model))
    params = sampler.prepare(params)
    with jax.default_matmul_precision("highest"):
        state = sampler.init_state(1, *noise.shape[2:4])
        latents = [np.asarray(x) for _, x in steps(sampler, params, state, inputs)]
    expected = np.moveaxis(golden[f"{name}_out"], 2, -1)
    error = np.abs(np.concatenate(latents, axis=1) - expected).max() / np.abs(expected).max()
    print(f"{name}: {len(inputs)} chunks, largest error {error:.1e} of the largest value")
    assert error < 1e-4


def draw(queries, keys, heads, batch=2):
    shapes = [(batch, n, heads, 128) for n in (queries, keys, keys)]
    make = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(make, shapes))


@pytest.mark.parametrize("tail", (None, 1e3, 3e38))
@pytest.mark.parametrize(
    "queries, keys, heads, lengths",
    (
        (256, 1024, 3, (1024, 1024)),
        (256, 1024, 3, (256, 768)),
        (200, 777, 3, (1, 500)),
        (7040, 28160, 24, (7040,)),
        (7040, 28160, 24, (21120,)),
    ),
)
def test_cudnn_attends_to_the_prefix_alone(queries, keys, heads, lengths, tail):
    """Against float32 XLA on just the real keys, whatever lies behind them."""
    q, k, v = draw(queries, keys, heads, len(lengths))
    kv_len = jnp.asarray(lengths, jnp.int32)
    if tail is not None:
        real = jnp.arange(keys)[None, :, None, None] < kv_len[:, None, None, None]
        k, v = (jnp.where(real, x, jnp.asarray(tail, x.dtype)) for x in (k, v))
    compiled = jax.jit(attention).lower(q, k, v, kv_len).compile()
    assert "__cudnn$fmha" in compiled.as_text()
    out = np.asarray(compiled(q, k, v, kv_len), np.float32)
    for row, length in enumerate(lengths):
        with jax.default_matmul_precision("highest"):
            args = (x[row : row + 1].astype(jnp.float32) for x in (q, k[:, :length], v[:, :length]))
            exact = np.asarray(jax.jit(attention)(*args))[0]
        error = np.linalg.norm(out[row] - exact) / np.linalg.norm(exact)
        print(f"{queries} queries, {length} of {keys} keys, tail {tail}: error {error:.1e}")
        assert error < 1e-2


def test_bfloat16_stream_stays_near_float32():
    """Six chunks by cuDNN in bfloat16, by XLA in float32: the cache fills and turns over."""
    model = config_lib.Model(
        dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=4, out_dim=4,
        text_dim=8, text_len=16, freq_dim=32,
    )  # fmt: skip
    vae = config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
    params = params_lib.init(dit.spec(model), jax.random.key(0))
    params["head"]["head"]["weight"] = 0.02 * jax.random.normal(jax.random.key(1), (256, 16))
    rollouts = {}
    for dtype in ("float32", "bfloat16"):
        video = config_lib.Video(height=128, width=192)
        cfg = config_lib.Config(model=model, vae=vae, video=video, dtype=dtype)
        sampler = stream.Sampler(cfg, mesh_lib.make_mesh(cfg.mesh))
        placed = sampler.prepare(jax.tree.map(lambda x, d=dtype: x.astype(d), params))
        inputs = [
            stream.ChunkInput(
                noise=jax.random.normal(jax.random.key(10 + i), (1, 8, 8, 12, 4)),
                text=jax.random.normal(jax.random.key(2), (1, 16, 8)),
                cut=jnp.asarray([i == 3]),
            )
            for i in range(6)
        ]
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            state = sampler.init_state(1, 8, 12)
            latents = [np.asarray(x, np.float32) for _, x in steps(sampler, placed, state, inputs)]
            rollouts[dtype] = np.concatenate(latents, axis=1)
    exact = rollouts["float32"]
    error = np.linalg.norm(rollouts["bfloat16"] - exact) / np.linalg.norm(exact)
    print(f"bfloat16 against float32 over six chunks: {error:.1e}")
    assert error < 2e-2
