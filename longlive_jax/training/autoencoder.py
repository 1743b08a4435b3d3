"""Trains a small VAE of the Wan2.2 architecture: its loss, a step, what becomes of its weights.

The videos lie decoded in the device's memory and clips are drawn there, so that no step waits for a
file. A clip goes through the encoder and the decoder as a stream does: its first frame alone, then
the others together. `autoencoder_run` reads the videos and runs the steps.

Draws are keyed by (seed, step, row), never by device.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.models import vae

ROWS = ("data", "fsdp")  # mesh axes that clips are spread over
_WHOLE = jax.P()
_WINDOW, _NOISE = range(2)  # uses of a clip's key


# The model and its loss.


def moments(params: params_lib.Tree, cfg: config_lib.VAE, frames: jax.Array):
    """The posterior of clips: mean and log-variance, each [batch, latent, h, w, z_dim].

    frames: [batch, 1 + 4 k, height, width, 3] in [-1, 1]; their dtype is the dtype of compute.
    """
    # To the encoder, log-variances are further channels of its last, pointwise convolution.
    n = 2 * cfg.z_dim
    both = dataclasses.replace(cfg, z_dim=n, latent_mean=(0.0,) * n, latent_std=(1.0,) * n)
    size = (frames.shape[2] // vae.PIXELS, frames.shape[3] // vae.PIXELS)
    state = vae.init_encode_state(both, frames.shape[0], *size, frames.dtype)
    call = functools.partial(vae.encode, params, both, axis=mesh_lib.SEQ)
    return jnp.split(_clip(call, state, frames), 2, axis=-1)


def decode(params: params_lib.Tree, cfg: config_lib.VAE, latents: jax.Array) -> jax.Array:
    """Clips of latents: [batch, 1 + k, h, w, z_dim] -> [batch, 1 + 4 k, 16 h, 16 w, 3]."""
    state = vae.init_decode_state(cfg, latents.shape[0], *latents.shape[2:4], latents.dtype)
    call = functools.partial(vae.decode, params, cfg, axis=mesh_lib.SEQ)
    return _clip(call, state, latents)


def _clip(call, state, x):
    state, first = call(state, x[:, :1], first=True)
    return jnp.concatenate([first, call(state, x[:, 1:], first=False)[1]], axis=1)


def loss(
    params: params_lib.Tree, cfg: config_lib.Config, frames: jax.Array, noise: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 of pixels, L1 of their differences to their neighbours, divergence from a unit Gaussian.

    Args:
      frames: [batch, frame, height, width, 3] in compute dtype.
      noise: float32 [batch, latent, h, w, z_dim], unit Gaussian: the posterior is sampled with it.

    Returns:
      The loss, and {"loss", "l1", "kl", "mse"}, all float32 means over the batch.
    """
    t = cfg.train_vae
    mean, log_var = (x.astype(jnp.float32) for x in moments(params, cfg.vae, frames))
    log_var = jnp.clip(log_var, -20, 10)
    latents = (mean + jnp.exp(0.5 * log_var) * noise).astype(frames.dtype)
    error = decode(params, cfg.vae, latents).astype(jnp.float32) - frames.astype(jnp.float32)
    l1 = jnp.mean(jnp.abs(error))
    edge = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_var) - 1 - log_var)
    total = l1 + t.edge_weight * edge + t.kl_weight * kl
    return total, {"loss": total, "l1": l1, "kl": kl, "mse": jnp.mean(error**2)}


# A step.


class State(struct.PyTreeNode):
    """step: int32, steps done. The rest is float32, whole on every device.

    All parameters are one vector, `flat` of their tree: two hundred small arrays would be as many
    small kernels a step, and most of the program to compile.
    """

    step: jax.Array
    params: jax.Array
    optimizer: Any
    average: jax.Array


def flat(params: params_lib.Tree) -> jax.Array:
    """A tree of `vae.spec` as one vector, in the order of the paths: JAX reorders dicts."""
    return jnp.concatenate([x.reshape(-1) for _, x in _ordered(params)])


def tree(vector: jax.Array, cfg: config_lib.VAE) -> params_lib.Tree:
    """The inverse of `flat`."""
    leaves, start = {}, 0
    for path, s in _ordered(vae.spec(cfg)):
        size = math.prod(s.shape)
        leaves[path] = vector[start : start + size].reshape(s.shape)
        start += size
    return params_lib.unflatten(leaves)


def _ordered(tree: params_lib.Tree) -> list[tuple[params_lib.Path, Any]]:
    return sorted(params_lib.flatten(tree).items(), key=lambda item: item[0])


def optimizer(cfg: config_lib.TrainVAE) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, cfg.warmup_steps, cfg.steps)
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(rate, weight_decay=cfg.weight_decay),
    )


def init(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> State:
    """The state before the first step."""

    # Drawn on the host: XLA compiles a generator a shape, and there are a hundred shapes.
    def draw(path: params_lib.Path, s: params_lib.ParamSpec) -> np.ndarray:
        if s.init is params_lib.ones or s.init is params_lib.zeros:
            return np.full(s.shape, float(s.init is params_lib.ones), np.float32)
        rng = np.random.default_rng([cfg.train_vae.seed, zlib.crc32("/".join(path).encode())])
        return rng.standard_normal(s.shape, np.float32) * np.float32(
            math.prod(s.shape[:-1]) ** -0.5
        )

    leaves = _ordered(vae.spec(cfg.vae))
    params = np.concatenate([draw(path, s).reshape(-1) for path, s in leaves])
    state = place(State(np.int32(0), params, None, params), mesh)
    return state.replace(optimizer=jax.jit(optimizer(cfg.train_vae).init)(state.params))


def make_step(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Callable:
    """One step as a compiled function (state, frames, windows) -> (state, metrics).

    `frames` and `windows` are all videos, uint8 [frame, height, width, 3], and the frames that
    clips may begin at, int32 [window]; whole on every device (`place`). The state is
    donated. Metrics are float32 means over the batch: `loss`'s, "psnr" in dB and "grad_norm".
    """
    gradients = make_gradients(cfg, mesh)
    update = optimizer(cfg.train_vae).update

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, frames: jax.Array, windows: jax.Array):
        grads, metrics = gradients(state.params, state.step, frames, windows)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            changes, new = update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        # At first the average would be that of the initial weights.
        age = state.step.astype(jnp.float32)
        decay = jnp.minimum(cfg.train_vae.ema_decay, (1 + age) / (10 + age))
        average = state.average + (1 - decay) * (params - state.average)
        metrics["psnr"] = 10 * jnp.log10(4 / metrics.pop("mse"))
        metrics["grad_norm"] = jnp.linalg.norm(grads)
        return State(state.step + 1, params, new, average), metrics

    return step


def make_gradients(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Callable:
    """(params, step, frames, windows) -> (gradient, `loss`'s metrics) of a step's whole batch.

    Parameters and gradient are vectors, as in `State`.
    """
    t = cfg.train_vae
    rows = t.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    size = cfg.video.latent_size
    latents = (1 + (t.frames - 1) // vae.FRAMES, *size, cfg.vae.z_dim)

    def local(params, step, frames, windows):
        key = jax.random.fold_in(jax.random.key(t.seed), step)
        row = lax.axis_index(ROWS) * rows + jnp.arange(rows)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(row)

        def draw(key):
            window = jax.random.randint(
                jax.random.fold_in(key, _WINDOW), (), 0, windows.shape[0], jnp.int32
            )
            return windows[window], jax.random.normal(jax.random.fold_in(key, _NOISE), latents)

        starts, noise = jax.vmap(draw)(keys)
        clips = _pictures(frames, starts, cfg)

        # To the compiler, each device's own copy: else it would sum every array's gradient alone.
        own = tree(lax.pcast(params, ROWS, to="varying"), cfg.vae)
        grads, metrics = jax.grad(loss, has_aux=True)(own, cfg, clips, noise)
        return lax.pmean(flat(grads), ROWS), lax.pmean(metrics, ROWS)

    return jax.shard_map(local, mesh=mesh, in_specs=_WHOLE, out_specs=_WHOLE)


def _pictures(frames, starts, cfg):
    """Clips that begin at `starts`, in [-1, 1] and compute dtype: what the VAE encodes."""
    length = cfg.train_vae.frames
    clips = jax.vmap(lambda s: lax.dynamic_slice_in_dim(frames, s, length))(starts)
    return (clips.astype(jnp.float32) / 127.5 - 1).astype(cfg.compute_dtype)


def place(x: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree of arrays, whole on every device."""
    return jax.device_put(x, jax.NamedSharding(mesh, _WHOLE))


# What comes out.


def fold(
    params: params_lib.Tree, cfg: config_lib.VAE, mean: np.ndarray, std: np.ndarray
) -> params_lib.Tree:
    """Weights whose latents are (z - mean) / std of what they were, with the same pictures.

    The encoder's last and the decoder's first convolution are pointwise, so this is exact.

    Args:
      params: a whole tree of `vae.spec(cfg)`, float32.
      mean, std: [z_dim].
    """
    z = cfg.z_dim
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    out = {k: np.asarray(v, np.float64) for k, v in params["conv1"].items()}
    into = {k: np.asarray(v, np.float64) for k, v in params["conv2"].items()}
    weight = out["weight"] / np.concatenate([std, np.ones(z)])
    # The posterior narrows with its mean: its log-variance falls by that of the latents.
    bias = np.concatenate([(out["bias"][:z] - mean) / std, out["bias"][z:] - 2 * np.log(std)])
    conv1 = {"weight": weight, "bias": bias}
    conv2 = {
        "weight": into["weight"] * std[:, None],
        "bias": into["bias"] + mean @ into["weight"].reshape(z, z),
    }
    new = jax.tree.map(lambda x: x.astype(np.float32), {"conv1": conv1, "conv2": conv2})
    return {**params, **new}


def make_encode(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Callable:
    """(params, frames, starts) -> mean latents of clips, float32 [batch, latent, h, w, z_dim].

    `starts`: int32 [batch], spread over `ROWS`; the rest is whole on every device.
    """

    def local(params, frames, starts):
        return moments(params, cfg.vae, _pictures(frames, starts, cfg))[0].astype(jnp.float32)

    return _spread(local, mesh)


def make_reconstruct(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Callable:
    """As `make_encode`, but the clips of those latents: uint8 [batch, frame, height, width, 3]."""

    def local(params, frames, starts):
        mean, _ = moments(params, cfg.vae, _pictures(frames, starts, cfg))
        return vae.to_uint8(decode(params, cfg.vae, mean))

    return _spread(local, mesh)


def _spread(local, mesh):
    rows = jax.P(ROWS)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _WHOLE, rows), out_specs=rows))
