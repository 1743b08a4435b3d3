"""The visible past: which chunks a stream still sees, which of them stay, where the next one goes.

A table of slots, each of which holds one chunk; `config.WindowSize` says how many. Nothing in it
moves: a new chunk goes to an empty slot, else to that of the oldest chunk that nothing protects.
Protected are (paper section 4) the sinks and the newest shot's first chunk, and pinned slots.

Each row of a batch has counters of its own, so that streams of different age can share a batch.
Empty slots are filled from the first on, and a chunk that leaves is overwritten, so the valid slots
are always a prefix: attention is given their number, and reads nothing behind it.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax.models import actions as actions_lib

EMPTY = -1


class Window(struct.PyTreeNode):
    """The slot table, and where each stream of the batch stands.

    chunk: int32 [batch, slot], index of the chunk that a slot holds, EMPTY if none.
    position: int32 [batch, slot], temporal position of that chunk's first frame.
    latents: [batch, slot, frame, h, w, channel], that chunk's clean latents.
    pinned: bool [batch, slot], slots that are never overwritten. At least one must not be
      protected in a full table.
    next_chunk: int32 [batch], index of the chunk that comes next.
    shot: int32 [batch], first chunk of the newest shot, EMPTY before the first cut.
    offset: int32 [batch], temporal positions that cuts have skipped so far.
    actions: by path [batch, slot, frame, action, dim], those that each latent of the chunk was made
      under; None without an action path.
    """

    chunk: jax.Array
    position: jax.Array
    latents: jax.Array
    pinned: jax.Array
    next_chunk: jax.Array
    shot: jax.Array
    offset: jax.Array
    actions: Mapping[str, jax.Array] | None = None

    @property
    def valid(self) -> jax.Array:
        """bool [batch, slot], the slots that hold a chunk."""
        return self.chunk != EMPTY

    def next_position(self, cfg: config_lib.Config) -> jax.Array:
        """int32 [batch], temporal position of the next chunk's first frame."""
        return self.next_chunk * cfg.model.chunk_frames + self.offset

    def enter_shot(self, cut: jax.Array, cfg: config_lib.Config) -> "Window":
        """Begins a shot with the next chunk, in rows where `cut` bool [batch] is true.

        At the beginning of a video a cut means nothing.
        """
        cut = cut & (self.next_chunk > 0)
        gap = jnp.where(cut, jnp.int32(cfg.sample.rope_offset), 0)
        shot = jnp.where(cut, self.next_chunk, self.shot)
        return self.replace(offset=self.offset + gap, shot=shot)

    def protected(self, size: config_lib.WindowSize) -> jax.Array:
        """bool [batch, slot], the slots that the next chunk must not overwrite."""
        stays = self.pinned | (self.chunk < size.sinks)
        if size.shots:
            stays |= self.chunk == self.shot[:, None]
        return stays & self.valid

    def next_slot(self, size: config_lib.WindowSize) -> jax.Array:
        """int32 [batch], where the next chunk goes: an empty slot, else the oldest unprotected."""
        last = jnp.iinfo(jnp.int32).max
        age = jnp.where(self.protected(size), last, self.chunk)
        return jnp.argmin(age, axis=1).astype(jnp.int32)

    def commit(
        self,
        slot: jax.Array,
        latents: jax.Array,
        cfg: config_lib.Config,
        actions: Mapping[str, jax.Array] | None = None,
    ) -> "Window":
        """The next chunk, of clean `latents` [batch, frame, h, w, channel], in `slot` [batch]."""
        here = jnp.arange(self.chunk.shape[1])[None, :] == slot[:, None]

        def put(table, fresh):
            wide = here.reshape(*here.shape, *(1,) * (table.ndim - 2))
            return jnp.where(wide, fresh[:, None].astype(table.dtype), table)

        return self.replace(
            chunk=jnp.where(here, self.next_chunk[:, None], self.chunk),
            position=jnp.where(here, self.next_position(cfg)[:, None], self.position),
            latents=put(self.latents, latents),
            actions=jax.tree.map(put, self.actions, actions),
            next_chunk=self.next_chunk + 1,
        )

    def in_order(self) -> "Window":
        """The same window, its slots sorted by age, the oldest first and the empty ones last."""
        order = jnp.argsort(jnp.where(self.valid, self.chunk, jnp.iinfo(jnp.int32).max), axis=1)

        def sort(x):
            return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

        names = ("chunk", "position", "latents", "pinned", "actions")
        return self.replace(**{name: jax.tree.map(sort, getattr(self, name)) for name in names})


def init(
    cfg: config_lib.Config, batch: int, height: int, width: int, frames: int | None = None
) -> Window:
    """The window of streams that have not begun. `height`, `width`: of the latents.

    frames: of a chunk that this device has; None: all.
    """
    slots = cfg.sample.window(cfg.model).slots
    latents = (batch, slots, frames or cfg.model.chunk_frames, height, width, cfg.model.in_dim)
    return Window(
        chunk=jnp.full((batch, slots), EMPTY, jnp.int32),
        position=jnp.zeros((batch, slots), jnp.int32),
        latents=jnp.zeros(latents, cfg.compute_dtype),
        pinned=jnp.zeros((batch, slots), jnp.bool_),
        next_chunk=jnp.zeros((batch,), jnp.int32),
        shot=jnp.full((batch,), EMPTY, jnp.int32),
        offset=jnp.zeros((batch,), jnp.int32),
        actions=_no_actions(cfg, (batch, slots)),
    )


def _no_actions(cfg, lead):
    """Zeros [*lead, frame, action, dim] by path; None without an action path."""
    shapes = actions_lib.shapes(cfg.model.actions, cfg.model.chunk_frames)
    made = {name: jnp.zeros((*lead, *shape), jnp.float32) for name, shape in shapes.items()}
    return made or None
