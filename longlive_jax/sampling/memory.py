"""Programs that fill the window's slots for references and landmarks, each of constant shape.

    pin     references, before a stream's first chunk: seen by every chunk
    newest  what a landmark is made of: the chunk that was committed last
    show    a landmark in one of its slots
    hide    all but the first landmarks

A chunk is kept as latents, and its keys and values are made when it is shown, by a clean pass that
sees the references and sinks. Keys and values themselves would save that pass, and are as exact as
can be; but at 5B they take 960 times as much memory (0.65 GB against 0.7 MB in bfloat16 for a chunk
of 2 latents at 704x1280), and are of the prompt, the number format and the mesh of their time.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import actions as actions_lib
from longlive_jax.models import dit
from longlive_jax.sampling import stream
from longlive_jax.sampling.kv_cache import Past
from longlive_jax.sampling.stream import ChunkInput, Sampler, StreamState
from longlive_jax.sampling.transformer import ChunkTransformer, local_frames, positions_of

_SELF = dit.SELF_ATTENTION.name


def _spec(*axes: str | None) -> Any:
    return mesh_lib.spec(axes, mesh_lib.SAMPLING_RULES)


BATCH = _spec("batch")  # of an array [batch]


class Kept(struct.PyTreeNode):
    """A past chunk of each row, as `Window` has it: all that its keys and values are made of.

    chunk, position: int32 [batch]. latents: [batch, frame, h, w, channel].
    actions: by path [batch, frame, action, dim]; None without an action path.
    """

    chunk: jax.Array
    position: jax.Array
    latents: jax.Array
    actions: Mapping[str, jax.Array] | None = None


def pin(
    params: params_lib.Tree, state: StreamState, inputs: ChunkInput, references: jax.Array, *,
    cfg: config_lib.Config, sharding: dit.Sharding, precision: dit.Precision,
) -> StreamState:  # fmt: skip
    """The state of a stream that has not begun, with references in its first slots.

    Args:
      inputs: of the first chunk, whose text they are read under.
      references: [batch, reference, frame, h, w, channel], clean latents of a chunk each.
    """
    transformer = ChunkTransformer.of(params, state, inputs, cfg, sharding, precision)
    count, batch = references.shape[1], len(references)
    apart = cfg.model.chunk_frames + int(cfg.sample.rope_offset)  # each is a shot of its own
    still = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), state.window.actions)
    for i in range(count):
        number = i - count  # -1: the last before the video
        chunk, position, slot = (
            jnp.full((batch,), x, jnp.int32) for x in (number - 1, number * apart, i)
        )
        one = Kept(chunk, position, references[:, i], still)
        state = _write(transformer, state, one, slot, state.window.valid)
    return state.replace(window=state.window.with_references(count))


def newest(state: StreamState) -> Kept:
    """The chunk that was committed last."""
    window = state.window
    slot = jnp.argmax(window.chunk == (window.next_chunk - 1)[:, None], axis=1)

    def here(table):
        index = slot.reshape(-1, *(1,) * (table.ndim - 1))
        return jnp.take_along_axis(table, index, axis=1)[:, 0]

    tables = window.chunk, window.position, window.latents, window.actions
    return Kept(*jax.tree.map(here, tables))


def show(
    params: params_lib.Tree, state: StreamState, inputs: ChunkInput, kept: Kept, index: jax.Array,
    count: jax.Array, *, cfg: config_lib.Config, sharding: dit.Sharding, precision: dit.Precision,
) -> StreamState:  # fmt: skip
    """The state with a chunk that has left the window in landmark slot `index`, int32 [].

    Args:
      inputs: of the next chunk, whose text the landmark is read under.
      kept: one for each row; of rows that have none there, anything.
      count: int32 [batch], landmarks that a row has, all being shown: fewer are hidden.
    """
    transformer = ChunkTransformer.of(params, state, inputs, cfg, sharding, precision)
    size = cfg.sample.window(cfg.model)
    slot = jnp.full(kept.chunk.shape, size.past_slots, jnp.int32) + index
    state = _write(transformer, state, kept, slot, state.window.lasting(size))
    return hide(state, count, cfg=cfg)


def hide(state: StreamState, count: jax.Array, *, cfg: config_lib.Config) -> StreamState:
    """The state with the first `count` landmarks, int32 [batch], of those that it has."""
    size = cfg.sample.window(cfg.model)
    return state.replace(window=state.window.keep_landmarks(count, size))


def _write(transformer, state, kept, slot, seen):
    """The state with `kept` in `slot`, by a clean pass that sees the slots of `seen`.

    The caches of the action path are of the chunks before the next one, and stay.
    """
    positions = positions_of(kept.position, kept.latents.shape[1], transformer.sharding)
    past: Any = Past(state.cache, seen)
    actions, given = state.actions, transformer.actions
    if actions is not None and given is not None:
        frames = local_frames(kept.latents.shape[1], transformer.sharding)
        given = given.past(transformer.cfg, kept.actions, kept.chunk, frames)
        transformer = dataclasses.replace(transformer, actions=given)
        past = {_SELF: past, **actions.empty().pasts(kept.chunk)}
    after = transformer.commit(kept.latents, positions, past, slot)
    window = state.window.put(slot, kept.chunk, kept.position, kept.latents, kept.actions)
    return state.replace(cache=after[_SELF].cache, window=window)


class Programs:
    """This module's functions, compiled for a sampler's mesh. States are donated, as there."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        cfg, state = sampler.cfg, stream.state_specs(sampler.cfg)
        self.kept_specs, self._ready = kept_specs(cfg), False
        self.reference_specs = _spec("batch", None, "frame", None, None, None)
        each = (sampler.param_specs, state, sampler.input_specs)
        compile, stepping = sampler.compile, sampler.stepping
        self.pin = compile(pin, (*each, self.reference_specs), state, 1, **stepping)
        self.show = compile(show, (*each, self.kept_specs, jax.P(), BATCH), state, 1, **stepping)
        self.hide = compile(hide, (state, BATCH), state, 0, cfg=cfg)
        self.newest = compile(newest, (state,), self.kept_specs)

    def ready(self, params: params_lib.Tree, state: StreamState, inputs: ChunkInput) -> StreamState:
        """The state of a stream that has not begun, once the programs of landmarks are compiled.

        So that nobody waits for that in the middle of a walk.
        """
        if not self._ready:
            none = self.place(jnp.zeros(state.window.next_chunk.shape, jnp.int32), BATCH)
            state = self.show(params, state, inputs, self.newest(state), jnp.int32(0), none)
            state, self._ready = self.hide(state, none), True
        return state

    def place(self, tree: Any, specs: Any) -> Any:
        """Arrays of the host on the mesh."""
        mesh = self.sampler.mesh
        return jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), tree, specs)


programs = functools.cache(Programs)  # those of a sampler are compiled once


def check_references(cfg: config_lib.Config, count: int) -> None:
    """Refuses more reference images than the window has slots for.

    Raises:
      InputError: names both numbers.
    """
    slots = cfg.sample.memory.references
    if count > slots:
        raise InputError(
            f"references: {count} images for memory.references={slots} slots of the window; give "
            f"--config.memory.references={count}, or fewer images"
        )


def kept_specs(cfg: config_lib.Config) -> Kept:
    """A PartitionSpec for each array of a Kept."""
    return Kept(
        chunk=_spec("batch"),
        position=_spec("batch"),
        latents=_spec("batch", "frame", None, None, None),
        actions={
            name: _spec("batch", None, None, None) for name in actions_lib.dims(cfg.model.actions)
        }
        or None,
    )
