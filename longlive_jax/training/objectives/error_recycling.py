"""Error recycling (SVI, arXiv 2510.09212): the model's own errors, added to what it learns from.

A sampler builds on its own imperfect chunks, a teacher-forced trainer on perfect ones. So each
batch leaves the errors of its predictions behind, and later batches are disturbed by them, towards
a target that stays clean. Errors are kept by noise level (and, with `positions`, by chunk of the
video) in rings of bounded size.

The rings are part of the train state and the same on every mesh, for the errors of a batch go into
them in the batch's order, wherever they were made: there is no warm-up that gathers them. Each
device holds a slice of every error, so that the memory is spread evenly however full the rings are
and only what is drawn or stored travels, in all-to-alls.

Keys are folded by (sample, chunk, use), never by device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import mesh as mesh_lib
from longlive_jax.config import TIMESTEPS, ErrorRecycling

# Uses of a chunk's key; those below 16 are `randomness`'.
_GATES, _ENTRIES, _REPLACE = range(16, 19)
# What is drawn once for a batch comes from the key of this chunk, which no video has, of its first
# sample.
_WHOLE_BATCH = 2**31 - 1
# The mesh axes that may slice an error, and the axis of [batch, chunk, element] that each shards
# outside of the rings. Batch is sharded over data first, then fsdp, so fsdp is undone first.
_MESH_AXES = (("seq", 1), ("fsdp", 0), ("data", 0))
_VIDEO = mesh_lib.spec(("batch", "chunk", None, None, None, None))


@struct.dataclass
class Ring:
    """Errors of one kind. `position` is 1 unless there is a ring for each chunk of the video.

    entries: bfloat16 [position, bucket, entry, element]; element is [frame, h, w, channel], flat.
    added: int32 [position, bucket], how many errors were ever added; the ring keeps the first
      min(added, entries) of its entries filled.
    """

    entries: jax.Array
    added: jax.Array

    @property
    def filled(self) -> jax.Array:
        """int32 [position, bucket]; entries from 0 on are filled."""
        return jnp.minimum(self.added, self.entries.shape[2])


@struct.dataclass
class Errors:
    """latent: errors of the predicted clean latents; noise: of the predicted noise."""

    latent: Ring
    noise: Ring


@struct.dataclass
class Chunks:
    """Which chunks of a run a batch consists of: what draws and rings depend on.

    key: the step's. rows: int32 [batch], numbers of the samples within the step.
    timestep_index: int32 [batch, chunk], entries of the noise table, 0 to 999.
    """

    key: jax.Array
    rows: jax.Array
    timestep_index: jax.Array


@struct.dataclass
class Injected:
    """A disturbed batch.

    noise, clean: float32 [batch, chunk, frame, h, w, channel], what the noisy input is mixed from;
      the target is this noise minus the clean latents as they were.
    past: the same shape, what the chunks after see of this one.
    kept: bool, whether the errors that come of it are to be stored.
    counts: int32 scalars for the log, chunks that an error was really added to.
    """

    noise: jax.Array
    clean: jax.Array
    past: jax.Array
    kept: jax.Array
    counts: dict[str, jax.Array]


def abstract(
    cfg: ErrorRecycling, chunks: int, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> Errors:
    """`jax.ShapeDtypeStruct`s with shardings, for checkpoints. The shapes are of no mesh's making.

    Args:
      chunks: of a video; shape: [frame, h, w, channel] of a chunk's latents.
    """
    cells = (chunks if cfg.positions else 1, cfg.buckets)
    elements = math.prod(shape)

    def array(shape, dtype, spec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    ring = Ring(
        entries=array((*cells, cfg.slots, elements), jnp.bfloat16, _entries_spec(mesh, elements)),
        added=array(cells, jnp.int32, jax.P()),
    )
    return Errors(latent=ring, noise=ring)


def inject(
    cfg: ErrorRecycling,
    errors: Errors,
    chunks: Chunks,
    step: jax.Array,
    *,
    clean: jax.Array,
    noise: jax.Array,
    past: jax.Array,
) -> Injected:
    """Adds errors of earlier batches to a batch, before its forward pass.

    Whether noise, latents and past are disturbed, and whether the batch is left alone, is drawn
    once for all its samples; which error, and its scale, for each chunk. Noise and latents take
    errors of their own timestep; the past, which has none, takes any. Where there is none yet,
    nothing is added.

    Args:
      chunks: `store` of the same batch takes the same.
      step: int32, steps done.
      clean, noise: float32 [batch, chunk, frame, h, w, channel], sharded over batch and chunk.
      past: the same shape: `clean`, noised a little where the trainer does so.
    """
    key, rows = chunks.key, _whole(errors, chunks.rows)
    timestep_index = _whole(errors, chunks.timestep_index)
    position, bucket = _cells(cfg, timestep_index)
    gates = _uniform(key, rows[:1], jnp.array([_WHOLE_BATCH]), _GATES, (5,))[0, 0]
    draws = _uniform(key, rows, jnp.arange(bucket.shape[1]), _ENTRIES, (3, 2))
    ready = step >= cfg.start_step
    alone = ready & (gates[0] < cfg.clean_probability)

    def disturb(x, ring, allowed, probability, number):
        gate, draw = gates[2 + number], draws[:, :, number]
        filled = jnp.where(allowed, ring.filled[position], 0)
        of_bucket, entry, found = _pick(filled, draw[..., 0])
        found &= ready & ~alone & (gate < probability)
        scale = 1 + cfg.modulation * (2 * draw[..., 1] - 1)
        weight = _like_video(errors, jnp.where(found, scale, 0.0))
        error = _fetch(ring, (position, of_bucket, entry), x.shape).astype(jnp.float32)
        return x + weight * error, jnp.sum(found, dtype=jnp.int32)

    by_bucket = (*bucket.shape, cfg.buckets)
    own = jax.lax.broadcasted_iota(jnp.int32, by_bucket, 2) == bucket[..., None]
    late = jax.lax.broadcasted_iota(jnp.int32, by_bucket, 1) >= int(cfg.skip_first_chunk)
    noise, of_noise = disturb(noise, errors.noise, own, cfg.noise_probability, 0)
    clean, of_clean = disturb(clean, errors.latent, own, cfg.latent_probability, 1)
    past, of_past = disturb(past, errors.latent, late, cfg.context_probability, 2)
    return Injected(
        noise=noise,
        clean=clean,
        past=past,
        kept=~alone | (gates[1] < cfg.clean_update_probability),
        counts={
            "recycling_noise_errors_injected": of_noise,
            "recycling_latent_errors_injected": of_clean,
            "recycling_context_errors_injected": of_past,
        },
    )


def store(
    cfg: ErrorRecycling,
    errors: Errors,
    chunks: Chunks,
    kept: jax.Array,
    *,
    latent_error: jax.Array,
    noise_error: jax.Array,
) -> Errors:
    """Keeps the errors of a batch, after its forward pass, in the order of the batch.

    A full ring gives up an entry at random, its oldest, or the one nearest to the new one. An error
    that is not finite is left out, or it would come back for hundreds of steps.

    Args:
      chunks: as `inject` took them.
      kept: bool, `Injected.kept`; or [batch, chunk], to leave out chunks of padding as well.
      latent_error: [batch, chunk, frame, h, w, channel], predicted minus clean latents.
      noise_error: the same shape and sharding, (predicted minus true velocity) (1 - sigma).
    """
    rows, timestep_index = _whole(errors, chunks.rows), _whole(errors, chunks.timestep_index)
    position, bucket = _cells(cfg, timestep_index)
    draws = _uniform(chunks.key, rows, jnp.arange(bucket.shape[1]), _REPLACE, (2,))
    latent_error, noise_error = (x.astype(jnp.bfloat16) for x in (latent_error, noise_error))
    finite = jnp.isfinite(latent_error) & jnp.isfinite(noise_error)
    kept = _whole(errors, kept) & _whole(errors, jnp.all(finite, axis=(2, 3, 4, 5)))

    def add(ring, items, draw):
        places = (position, bucket, _below(draw, cfg.slots), kept)
        return _add(ring, items, places, cfg.replacement)

    return Errors(
        latent=add(errors.latent, latent_error, draws[..., 0]),
        noise=add(errors.noise, noise_error, draws[..., 1]),
    )


def metrics(errors: Errors) -> dict[str, jax.Array]:
    """int32 scalars for the log, of the rings as they are."""
    return {
        "recycling_latent_errors_held": jnp.sum(errors.latent.filled),
        "recycling_latent_errors_added": jnp.sum(errors.latent.added),
        "recycling_noise_errors_held": jnp.sum(errors.noise.filled),
        "recycling_noise_errors_added": jnp.sum(errors.noise.added),
    }


# ---------------------------------------------------------------------------------------------
# Draws: small, and the same on every device.


def _cells(cfg, timestep_index):
    """Ring of each chunk: position and bucket, int32 [batch, chunk]."""
    position = jax.lax.broadcasted_iota(jnp.int32, timestep_index.shape, 1)
    return position * int(cfg.positions), timestep_index * cfg.buckets // TIMESTEPS


def _uniform(key, rows, chunks, use, shape):
    """float32 [batch, chunk, *shape] in [0, 1)."""

    def one(row, chunk):
        here = jax.random.fold_in(jax.random.fold_in(key, row), chunk)
        return jax.random.uniform(jax.random.fold_in(here, use), shape)

    return jax.vmap(lambda row: jax.vmap(lambda chunk: one(row, chunk))(chunks))(rows)


def _below(draw, count):
    """A draw in [0, 1) as an int32 in [0, count); 0 if there is none."""
    number = jnp.floor(draw * jnp.float32(count)).astype(jnp.int32)
    return jnp.clip(number, 0, jnp.maximum(count - 1, 0))  # the product may round up to count


def _pick(filled, draw):
    """An entry of a row of rings, each entry as likely as the others.

    Args:
      filled: int32 [batch, chunk, bucket], entries to choose from.
      draw: float32 [batch, chunk], in [0, 1).

    Returns:
      bucket and entry, int32 [batch, chunk]; bool, whether there is such an entry.
    """
    ends = jnp.cumsum(filled, axis=2)
    number = _below(draw, ends[..., -1])
    bucket = jnp.sum(ends <= number[..., None], axis=2, dtype=jnp.int32)
    bucket = jnp.minimum(bucket, filled.shape[2] - 1)
    before = jnp.take_along_axis(ends - filled, bucket[..., None], axis=2)[..., 0]
    return bucket, number - before, ends[..., -1] > 0


# ---------------------------------------------------------------------------------------------
# Entries: large, and sliced over the devices.


def _element_axes(mesh, elements):
    """The mesh axes that slice an error: all, but for those whose size does not divide it."""
    axes, ways = (), 1
    for name, _ in _MESH_AXES:
        if elements % (ways * mesh.shape[name]) == 0:
            axes, ways = (*axes, name), ways * mesh.shape[name]
    return axes


def _entries_spec(mesh, elements):
    return jax.P(None, None, None, _element_axes(mesh, elements))


def _mesh(ring):
    return jax.typeof(ring.entries).sharding.mesh


def _whole(errors, x):
    """`x`, small, on every device."""
    return jax.reshard(x, jax.NamedSharding(_mesh(errors.latent), jax.P()))


def _like_video(errors, x):
    """`x`, [batch, chunk] on every device, sharded and shaped to be multiplied with latents."""
    sharding = jax.NamedSharding(_mesh(errors.latent), jax.P(*_VIDEO[:2]))
    return jax.reshard(x, sharding)[..., None, None, None, None]


def _fetch(ring, index, shape):
    """Entries, bfloat16, in the shape and sharding of the latents of a batch.

    Args:
      index: position, bucket and entry, int32 [batch, chunk] each, on every device.
    """
    mesh, elements = _mesh(ring), ring.entries.shape[3]
    axes = _element_axes(mesh, elements)

    def local(entries, index):
        items = _to_chunks(entries[index], axes)
        return items.reshape(*items.shape[:2], *shape[2:])

    # Nothing here is differentiated, so varying-axes types have nothing to check.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_entries_spec(mesh, elements), jax.P()),
        out_specs=_VIDEO,
        check_vma=False,
    )(ring.entries, index)


def _add(ring, items, places, replacement):
    """The ring with `items`, [batch, chunk, frame, h, w, channel], added one after the other.

    Args:
      places: position, bucket, the entry to give up at random, and whether to add it at all;
        [batch, chunk] each, on every device.
    """
    mesh, elements = _mesh(ring), ring.entries.shape[3]
    axes, spec = _element_axes(mesh, elements), _entries_spec(mesh, elements)

    def local(entries, added, items, places):
        items = items.reshape(*items.shape[:2], elements)
        items = _to_elements(items, axes)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (items, *places))

        def put(ring, new):
            item, *place = new
            return _put(ring, item, place, replacement, axes), None

        return jax.lax.scan(put, (entries, added), flat)[0]

    entries, added = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, jax.P(), _VIDEO, jax.P()),
        out_specs=(spec, jax.P()),
        check_vma=False,
    )(ring.entries, ring.added, items, places)
    return Ring(entries=entries, added=added)


def _put(ring, item, place, replacement, axes):
    """One error's slice, [element], into this device's slice of its ring: entries and `added`."""
    (entries, added), (position, bucket, draw, kept) = ring, place
    size, count = entries.shape[2], added[position, bucket]
    if replacement == "random":
        victim = draw
    elif replacement == "oldest":
        victim = count % size
    else:
        # An entry at a time: never a float32 copy of a whole ring.
        distance = jax.lax.map(
            lambda entry: jnp.sum(jnp.square(entry.astype(jnp.float32) - item.astype(jnp.float32))),
            entries[position, bucket],
        )
        victim = jnp.argmin(jax.lax.psum(distance, axes)).astype(jnp.int32)
    at = (position, bucket, jnp.where(count < size, count, victim), jnp.int32(0))
    item = item[None, None, None]
    before = jax.lax.dynamic_slice(entries, at, item.shape)
    entries = jax.lax.dynamic_update_slice(entries, jnp.where(kept, item, before), at)
    return entries, added.at[position, bucket].add(kept.astype(jnp.int32))


def _to_elements(items, axes):
    """From this device's items, whole, to every item, sliced; [batch, chunk, element]."""
    for name, axis in _MESH_AXES:
        if name in axes:
            items = jax.lax.all_to_all(items, name, split_axis=2, concat_axis=axis, tiled=True)
        else:
            items = jax.lax.all_gather(items, name, axis=axis, tiled=True)
    return items


def _to_chunks(items, axes):
    """The inverse of `_to_elements`."""
    for name, axis in reversed(_MESH_AXES):
        if name in axes:
            items = jax.lax.all_to_all(items, name, split_axis=axis, concat_axis=2, tiled=True)
        else:
            size = items.shape[axis] // jax.lax.axis_size(name)
            start = jax.lax.axis_index(name) * size
            items = jax.lax.dynamic_slice_in_dim(items, start, size, axis)
    return items
