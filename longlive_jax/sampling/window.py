"""The visible past: which chunks a stream still sees, which of them stay, where the next one goes.

A table of slots, each of which holds one chunk; `config.WindowSize` says how many. Nothing in it
moves: a new chunk goes to an empty slot, else to that of the oldest chunk that nothing protects.
Protected are (paper section 4) the sinks and the newest shot's first chunk, and pinned slots.

Two kinds of slots are filled by other things than the next chunk (`sampling.memory` does it):

  references   images, in the first slots, pinned before the first chunk. Their chunk numbers are
               below EMPTY, the last one's is -2. Their positions are below 0, as if the video were
               the next shot of a film of stills.
  landmarks    chunks that have left the window, in the last `WindowSize.landmarks` slots. A chunk
               has left only when all slots before these are full. Each is at its own position.

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

EMPTY = -1  # numbers below are of references


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
        entered = self.replace(offset=self.offset + gap, shot=shot)
        memory = cfg.sample.memory
        if memory.references and not memory.references_past_cuts:
            leaves = cut[:, None] & (self.chunk < EMPTY)
            entered = entered.replace(pinned=self.pinned & ~leaves)
        return entered

    def protected(self, size: config_lib.WindowSize) -> jax.Array:
        """bool [batch, slot], the slots that the next chunk must not overwrite."""
        sink = self.chunk < size.sinks
        if size.references:
            sink &= self.chunk > EMPTY
        stays = self.pinned | sink
        if size.shots:
            stays |= self.chunk == self.shot[:, None]
        return stays & self.valid

    def next_slot(self, size: config_lib.WindowSize) -> jax.Array:
        """int32 [batch], where the next chunk goes: an empty slot, else the oldest unprotected.

        Never one of the landmarks' slots.
        """
        last = jnp.iinfo(jnp.int32).max
        age = jnp.where(self.protected(size), last, self.chunk)
        if size.references:  # those that are pinned no longer are older than an empty slot's number
            age = jnp.where(self.valid, age, jnp.iinfo(jnp.int32).min)
        if size.landmarks:
            age = age[:, : size.past_slots]
        return jnp.argmin(age, axis=1).astype(jnp.int32)

    def commit(
        self,
        slot: jax.Array,
        latents: jax.Array,
        cfg: config_lib.Config,
        actions: Mapping[str, jax.Array] | None = None,
    ) -> "Window":
        """The next chunk, of clean `latents` [batch, frame, h, w, channel], in `slot` [batch]."""
        here, put = _into(slot, self.chunk.shape[1])
        return self.replace(
            chunk=jnp.where(here, self.next_chunk[:, None], self.chunk),
            position=jnp.where(here, self.next_position(cfg)[:, None], self.position),
            latents=put(self.latents, latents),
            actions=jax.tree.map(put, self.actions, actions),
            next_chunk=self.next_chunk + 1,
        )

    def put(
        self,
        slot: jax.Array,
        chunk: jax.Array,
        position: jax.Array,
        latents: jax.Array,
        actions: Mapping[str, jax.Array] | None,
    ) -> "Window":
        """Chunk `chunk` at `position` in `slot`, all int32 [batch]; others as `commit`."""
        here, put = _into(slot, self.chunk.shape[1])
        return self.replace(
            chunk=jnp.where(here, chunk[:, None], self.chunk),
            position=jnp.where(here, position[:, None], self.position),
            latents=put(self.latents, latents),
            actions=jax.tree.map(put, self.actions, actions),
        )

    def with_references(self, count: int) -> "Window":
        """With references in the first `count` slots, of a stream that has not begun."""
        number = jnp.arange(self.chunk.shape[1], dtype=jnp.int32)[None, :] - count
        ours = number < 0
        return self.replace(
            chunk=jnp.where(ours, number + EMPTY, self.chunk), pinned=self.pinned | ours
        )

    def keep_landmarks(self, count: jax.Array, size: config_lib.WindowSize) -> "Window":
        """With the first `count` int32 [batch] of the landmarks' slots visible at most."""
        number = jnp.arange(self.chunk.shape[1])[None, :] - size.past_slots
        return self.replace(chunk=jnp.where(number >= count[:, None], EMPTY, self.chunk))

    def lasting(self, size: config_lib.WindowSize) -> jax.Array:
        """bool [batch, slot], references and sinks, as far as they are in the first slots."""
        stays = self.valid & (self.chunk < size.sinks)
        return jnp.cumprod(stays.astype(jnp.int32), axis=1).astype(bool)

    def in_order(self) -> "Window":
        """The same window, its slots sorted by age, the oldest first and the empty ones last.

        There must be no landmarks in it.
        """
        order = jnp.argsort(jnp.where(self.valid, self.chunk, jnp.iinfo(jnp.int32).max), axis=1)

        def sort(x):
            return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

        names = ("chunk", "position", "latents", "pinned", "actions")
        return self.replace(**{name: jax.tree.map(sort, getattr(self, name)) for name in names})


def _into(slot, slots):
    """bool [batch, slot], where `slot` is, and a function that puts a chunk's array there."""
    here = jnp.arange(slots)[None, :] == slot[:, None]

    def put(table, fresh):
        wide = here.reshape(*here.shape, *(1,) * (table.ndim - 2))
        return jnp.where(wide, fresh[:, None].astype(table.dtype), table)

    return here, put


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
