"""What a stream carries for the action path, and what the transformer is given of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.models import actions as lib
from longlive_jax.sampling import latent_cache
from longlive_jax.sampling.latent_cache import LatentCache, LatentPast

Vectors = Mapping[str, jax.Array]  # by path, "keyboard" and, if there is one, "mouse"


class ActionState(struct.PyTreeNode):
    """The last actions, and the caches of branches that attend over time.

    before: float32 [batch, action, dim] by path.
    caches: by branch; none for a path that has no attention.
    latent: int32 [batch, latent], numbers of the latents that the caches hold.
    frames: of a chunk.
    """

    before: Vectors
    caches: Mapping[str, LatentCache]
    latent: jax.Array
    frames: int = struct.field(pytree_node=False)

    def pasts(self, chunk: jax.Array) -> dict[str, LatentPast]:
        """The caches as chunk `chunk`, int32 [batch], sees them, by branch."""
        first = chunk * self.frames
        return {
            name: LatentPast(cache, self.latent, first, self.frames)
            for name, cache in self.caches.items()
        }

    def empty(self) -> "ActionState":
        """Without the caches' latents."""
        return self.replace(latent=jnp.full_like(self.latent, latent_cache.EMPTY))

    def commit(
        self, after: Mapping[str, Any], chunk: jax.Array, where: jax.Array | None = None
    ) -> "ActionState":
        """The state after the clean pass of chunk `chunk`, int32 [batch].

        after: caches by branch, as the clean pass left them. where: bool [batch], rows that have
          that chunk; None: all.
        """
        latent = latent_cache.advance(self.latent, chunk * self.frames, self.frames)
        caches = {name: after[name].cache for name in self.caches}
        if where is not None:
            latent = jnp.where(where[:, None], latent, self.latent)
            keep = jax.tree.map(lambda new, old: _rows(where, new, old), caches, dict(self.caches))
            caches = keep
        return self.replace(caches=caches, latent=latent)


def _rows(where, new, old):
    """`new` in rows, the third axis, where `where` is true."""
    return jnp.where(where.reshape(1, 1, -1, *(1,) * (new.ndim - 3)), new, old)


def init(
    cfg: config_lib.Config, branches: int, batch: int, positions: int, heads: int | None = None
) -> ActionState | None:
    """Of streams that have not begun; None without an action path.

    positions: tokens of a latent. heads: of the action path that this device has; None: all.
    """
    model, actions = cfg.model, cfg.model.actions
    if actions.kind == "none":
        return None
    past = actions.past(model.chunk_frames, cfg.sample.window_frames)
    caches = {}
    for branch, _ in lib.branches(actions):
        if branch.attention is not None:
            at = (positions,) if branch.name == lib.MOUSE else ()
            head = (heads or actions.heads, actions.head_dim)
            shape = (branch.layers, branches, batch, past, *at, *head)
            empty = (jnp.zeros(shape, cfg.compute_dtype) for _ in range(2))
            caches[branch.name] = LatentCache(*empty)
    latent = jnp.full((batch, past if caches else 0), latent_cache.EMPTY, jnp.int32)
    return ActionState(lib.start(actions, batch), caches, latent, model.chunk_frames)


def specs(cfg: config_lib.Config) -> ActionState | None:
    """A PartitionSpec for each array of an ActionState."""
    like = jax.eval_shape(lambda: init(cfg, 1, 1, 1))
    if like is None:
        return None
    caches = {
        name: jax.tree.map(lambda x: _spec(*_CACHE[: x.ndim - 2], "heads", None), cache)
        for name, cache in like.caches.items()
    }
    before = {name: _spec("batch", None, None) for name in like.before}
    return like.replace(before=before, caches=caches, latent=_spec("batch", None))


def input_specs(cfg: config_lib.Config) -> Any:
    """A PartitionSpec for each array of `ChunkInput.actions`; None without an action path."""
    return {name: _spec("batch", None, None) for name in lib.dims(cfg.model.actions)} or None


def window_specs(cfg: config_lib.Config) -> Any:
    """A PartitionSpec for each array of `Window.actions`; None without an action path."""
    return {name: _spec(*("batch", *(None,) * 4)) for name in lib.dims(cfg.model.actions)} or None


_CACHE = (None, None, "batch", None, None)


def _spec(*axes: str | None) -> Any:
    return mesh_lib.spec(axes, mesh_lib.SAMPLING_RULES)


def check(given: Vectors | None, cfg: config_lib.Actions, batch: int, frames: int) -> None:
    """Refuses a chunk's actions that the model does not take, at the time of tracing.

    Raises:
      InputError: actions for a model without the path, none for one with it, or other shapes.
    """
    wanted = {name: (batch, 4 * frames, dim) for name, dim in lib.dims(cfg).items()}
    found = {name: x.shape for name, x in (given or {}).items()}
    if found == wanted:
        return
    if not wanted:
        raise InputError(
            f"actions: given for a model without an action path (actions.kind={cfg.kind!r}); "
            "leave them out, or take a config and a checkpoint that has one"
        )
    raise InputError(
        f"actions: {found or 'none'} given; the model's action path takes "
        f"{', '.join(f'{name} {shape}' for name, shape in wanted.items())}, four vectors a latent"
    )


def enter(
    before: Vectors, given: Vectors, begins: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Each path's actions by latent, [batch, frame, action, dim], and the next `before`."""
    made = {name: lib.advance(before[name], x, begins) for name, x in given.items()}
    return {k: v[0] for k, v in made.items()}, {k: v[1] for k, v in made.items()}


def inserted(
    cfg: config_lib.Actions, windows: Vectors, chunk: jax.Array, frames: jax.Array, size: int
) -> dict[str, lib.Given]:
    """Conditioning of one chunk's branches, for this device's frames.

    Args:
      windows: of the whole chunk, by `enter`.
      chunk: int32 [batch], its number. frames: int32 [frame], those that this device has.
      size: frames of a chunk.
    """
    own = {name: jnp.take(x, frames, axis=1)[:, None] for name, x in windows.items()}
    latents = chunk[:, None, None] * size + frames[None, None]
    return lib.conditioning(cfg, own, latents)
