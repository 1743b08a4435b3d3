"""The original's outputs at tiny size, as our configs, parameter trees and layouts."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout
from longlive_jax.models import dit

FOLDER = pathlib.Path(__file__).parent / "golden"

MODEL = config_lib.Model(
    dim=48, ffn_dim=64, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=16,
    freq_dim=32,
)  # fmt: skip


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def transformer_params(name: str = "dit_tiny", prefix: str = "weights/") -> params_lib.Tree:
    """The original's weights, through the importer's layout rules."""
    spec, file = dit.spec(MODEL), arrays(name)
    rows: dict = {}
    for w in layout.weights(spec):
        rows.setdefault(w.path, []).append(w.from_torch([file[prefix + k] for k in w.keys]))
    stacked = params_lib.flatten(spec)
    return params_lib.unflatten(
        {
            path: jnp.asarray(np.stack(r) if len(stacked[path].shape) > r[0].ndim else r[0])
            for path, r in rows.items()
        }
    )


def config(**sample) -> config_lib.Config:
    return config_lib.Config(
        model=MODEL,
        vae=config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
        video=config_lib.Video(height=64, width=96),
        sample=config_lib.Sample(**sample),
        dtype="float32",
    )


def rollout(name: str) -> tuple[config_lib.Config, dict[str, np.ndarray]]:
    """Config and arrays of a sampling case; latents [1, frame, h, w, channel]."""
    file = arrays("dit_tiny")
    meta = json.loads(str(file[f"{name}_meta"]))
    cfg = config(
        steps=meta["steps"],
        guidance_scale=meta["guidance_scale"],
        sink_frames=meta["sink"],
        rope_offset=meta["phi"],
        multi_shot_sink=meta["multi_shot_sink"],
    )
    out = {key: file[f"{name}_{key}"] for key in ("noise", "ctx", "neg", "cut", "out")}
    return cfg, out | {key: np.moveaxis(out[key], 2, -1) for key in ("noise", "out")}


def chunks_of_channels_first(x: np.ndarray, frames: int = 8) -> jax.Array:
    """[batch, channel, frame, h, w] -> [batch, chunk, frame, h, w, channel]."""
    x = np.moveaxis(x, 1, -1)
    return jnp.asarray(x.reshape(x.shape[0], -1, frames, *x.shape[2:]))
