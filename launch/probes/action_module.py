"""The action module of one block, alone: as in training, and as in a stream."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.errors import InputError
from longlive_jax.models import actions, dit
from longlive_jax.models.branch import Hidden, Layer
from longlive_jax.models.dit.conditioning import Conditioning
from longlive_jax.sampling import latent_cache
from longlive_jax.sampling.latent_cache import LatentCache, LatentPast


class Place(NamedTuple):
    """Where in a video the latents are, and how many there are."""

    latents: int
    first_latent: int = 0
    first_action: int = 0


def place(arrays: Mapping[str, np.ndarray], cfg: config_lib.Model) -> Place:
    """Of arrays as the probe takes them, after checks of their shapes.

    Raises:
      InputError: shapes that do not fit each other or the config.
    """
    x, keyboard = arrays["x"], arrays["keyboard"]
    first_latent, first_action = (int(arrays.get(k, 0)) for k in ("first_latent", "first_action"))
    if x.ndim != 3 or x.shape[2] != cfg.dim:
        raise InputError(
            f"x: shape {x.shape}; it must be [batch, latent * position, {cfg.dim}], the last by "
            "--config.model.dim"
        )
    dims = {"keyboard": cfg.actions.keyboard_dim, "mouse": cfg.actions.mouse_dim}
    for name, dim in dims.items():
        wanted = (len(x), keyboard.shape[1] if keyboard.ndim == 3 else "N", dim)
        if name in arrays and arrays[name].shape != wanted:
            raise InputError(
                f"{name}: shape {arrays[name].shape}; it must be {list(wanted)}, the last by "
                f"--config.actions.{name}_dim={dim}"
            )
    pictures = first_action + keyboard.shape[1]
    whole = 1 - bool(pictures % TEMPORAL_COMPRESSION)  # a first latent of four pictures
    latents = (pictures - 1) // TEMPORAL_COMPRESSION + 1 - first_latent
    if ((pictures - 1) % TEMPORAL_COMPRESSION and not whole) or latents < 1 or x.shape[1] % latents:
        raise InputError(
            f"keyboard: {keyboard.shape[1]} vectors, the last of picture {pictures - 1}, make "
            f"{latents} latents from {first_latent} on, and x has {x.shape[1]} tokens; there must "
            "be 4 (latents - 1) + 1 vectors, or 4 a latent, and as many tokens for each latent"
        )
    for name in ("x_noisy", "cotangent"):
        if name in arrays and arrays[name].shape != x.shape:
            raise InputError(f"{name}: shape {arrays[name].shape} must be x's, {x.shape}")
    return Place(latents, first_latent, first_action)


def function(cfg: config_lib.Model, at: Place, mode: str) -> Callable[..., dict[str, Any]]:
    """(params, x, keyboard, mouse or None, x_noisy or None) -> {"out", perhaps "out_noisy"}.

    params: of one block, "action_model" in it.

    Raises:
      InputError: the latents are not whole chunks.
    """
    frames = at.latents if mode == "full" else cfg.chunk_frames
    if at.latents % frames:
        raise InputError(
            f"x: {at.latents} latents must be a multiple of --config.model.chunk_frames={frames}"
        )
    run = _stream if mode == "stream" else _block_causal

    def call(params, x, keyboard, mouse=None, x_noisy=None):
        windows = functools.partial(
            actions.windows, cfg=cfg.actions, latents=at.latents, first_latent=at.first_latent,
            first_action=at.first_action,
        )  # fmt: skip
        arrays = {"keyboard": keyboard, "mouse": mouse}
        given = {
            name: _chunks(windows(y), frames, at.latents)[:, :, :, 0]
            for name, y in arrays.items() if y is not None
        }  # fmt: skip
        numbers = at.first_latent + jnp.arange(at.latents, dtype=jnp.int32)
        given = actions.conditioning(cfg.actions, given, numbers.reshape(1, -1, frames))
        chunks = [
            None if y is None else _chunks(y, frames, at.latents)
            for y in (x, x_noisy if mode == "stream" else None)
        ]
        return {
            name: y.reshape(x.shape) for name, y in run(cfg, params, given, at, *chunks).items()
        }

    return call


def _chunks(x, frames, latents):
    """[batch, latent * n, ...] -> [batch, chunk, frame, n, ...]."""
    return x.reshape(len(x), latents // frames, frames, x.shape[1] // latents, *x.shape[2:])


def _apply(cfg, params, x, given, attend):
    conditioned = Conditioning(time=x, angle=x, inserted=given)  # neither is read
    layer = Layer(cfg, dit.Sharding(), dit.Precision(), conditioned, attend)
    hidden = Hidden(x)
    for branch in _branches(cfg):
        hidden = branch.apply(params, hidden, layer)
    return hidden.array()


def _branches(cfg):
    return [branch for branch, _ in actions.branches(cfg.actions)]


def _attentions(cfg):
    return {b.name: b.attention for b in _branches(cfg) if b.attention is not None}


def _block_causal(cfg, params, given, at, x, x_noisy):
    del at, x_noisy
    by_name = _attentions(cfg)

    def attend(name, q, k, v):
        return by_name[name].block_causal(q, k, v, dit.Sharding())

    return {"out": _apply(cfg, params, x, given, attend)}


def _stream(cfg, params, given, at, x, x_noisy):
    batch, chunks, frames, positions = x.shape[:4]
    past = max(cfg.actions.past(frames, at.latents), 0)
    by_name = _attentions(cfg)
    shape = (1, 1, batch, past)
    heads = (cfg.actions.heads, cfg.actions.head_dim)
    empty = {
        "mouse": jnp.zeros((*shape, positions, *heads)), "keyboard": jnp.zeros((*shape, *heads)),
    }  # fmt: skip
    caches = {name: LatentCache(empty[name], empty[name]) for name in by_name}
    latent = jnp.full((batch, past), latent_cache.EMPTY, jnp.int32)
    outs, noisy = [], []
    for chunk in range(chunks):
        first = jnp.full((batch,), at.first_latent + chunk * frames, jnp.int32)
        own = jax.tree.map(functools.partial(_one, chunk), given)
        written = dict(caches)

        def attend(name, q, k, v, first=first, written=written, keep=False):
            past = LatentPast(caches[name], latent, first, frames)  # noqa: B023

            def read(q, k, v):
                out = past.attend(0, q, k, v)
                if keep:
                    written[name] = past.write(0, jnp.zeros((batch,), jnp.int32), k, v).cache
                return out

            return by_name[name].streaming(q, k, v, dit.Sharding(), read).reshape(q.shape)

        if x_noisy is not None:
            noisy.append(_apply(cfg, params, _one(chunk, x_noisy), own, attend))
        clean = functools.partial(attend, keep=True)
        outs.append(_apply(cfg, params, _one(chunk, x), own, clean))
        caches, latent = written, latent_cache.advance(latent, first, frames)
    results = {"out": jnp.concatenate(outs, axis=1)}
    return results | ({"out_noisy": jnp.concatenate(noisy, axis=1)} if noisy else {})


def _one(chunk, x):
    return x[:, chunk : chunk + 1]


def from_torch(tensors: Mapping[str, Any], cfg: config_lib.Model, file: str) -> params_lib.Tree:
    """One block's parameters of tensors by the original's keys, of any block.

    Raises:
      InputError: keys or shapes that are not the config's.
    """
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    if len(blocks) != 1:
        found = ", ".join(sorted(blocks)) or "none"
        raise InputError(f"{file}: must hold blocks.N.action_model.* of one block; found: {found}")
    (block,) = blocks
    spec = {}
    for branch in _branches(cfg):
        spec |= branch.spec(cfg)
    leaves = {}
    wanted = set()
    for path, leaf in params_lib.flatten(spec).items():
        weight = layout.Weight(("blocks", *path), int(block), leaf.shape)
        (key,) = weight.keys
        wanted.add(key)
        found = tensors[key].shape if key in tensors else "nothing"
        if found != weight.torch_shape:
            raise InputError(
                f"{file}: {key} must have shape {weight.torch_shape} by the config, found {found}"
            )
        leaves[path] = jnp.asarray(weight.from_torch([tensors[key].read()]).astype(np.float32))
    if other := sorted(set(tensors) - wanted):
        raise InputError(f"{file}: {other[0]} is not in the action module of the config")
    return params_lib.unflatten(leaves)
