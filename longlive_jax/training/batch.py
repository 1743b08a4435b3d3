"""A batch of videos, as the objectives that learn from videos read it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import actions as actions_lib


class Batch(struct.PyTreeNode):
    """Videos as latents, with their prompts. A step's arrays have a leading axis of such batches.

    latents: [batch, chunk, frame, h, w, channel], clean and normalised; float32 or bfloat16.
    valid: bool [batch, chunk]; chunks that are False are padding and bear no loss.
    text: [batch, chunk, text_len, text_dim], embeddings of each chunk's prompt; None when the text
      encoder is trained too.
    ids, mask: int32 [batch, chunk, text_len], tokens of each chunk's prompt; None otherwise.
    actions: by path, "keyboard" and "mouse", float32 [batch, chunk, frame, action, dim], those of
      each latent, by `models.actions.windows`; None without an action path.
    """

    latents: jax.Array
    valid: jax.Array
    text: jax.Array | None = None
    ids: jax.Array | None = None
    mask: jax.Array | None = None
    actions: Mapping[str, jax.Array] | None = None


def abstract(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and shardings of a step's batches."""
    lead = (cfg.train.accumulation, cfg.train.batch_size, chunks(cfg))
    tokens = (*lead, cfg.model.text_len)
    trained = cfg.train.text_encoder
    actions = actions_lib.shapes(cfg.model.actions, cfg.model.chunk_frames)

    def array(shape, dtype) -> Any:
        spec = jax.P(None, *mesh_lib.spec(("batch", "chunk")), *(None,) * (len(shape) - 3))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    return Batch(
        latents=array(lead + chunk_shape(cfg), cfg.compute_dtype),
        valid=array(lead, jnp.bool_),
        text=None if trained else array((*tokens, cfg.model.text_dim), cfg.compute_dtype),
        ids=array(tokens, jnp.int32) if trained else None,
        mask=array(tokens, jnp.int32) if trained else None,
        actions={name: array(lead + shape, jnp.float32) for name, shape in actions.items()} or None,
    )


class Scripts(struct.PyTreeNode):
    """What videos are to show, chunk by chunk. A step's arrays have a leading axis of such batches.

    text: [batch, chunk, text_len, text_dim], embeddings of each chunk's prompt.
    cut: bool [batch, chunk], whether a chunk begins a new shot.
    first_frame: float32 [batch, 1, h, w, channel], the latent that a video begins with; None for
      text-to-video.
    actions: as `Batch.actions`.
    """

    text: jax.Array
    cut: jax.Array
    first_frame: jax.Array | None = None
    actions: Mapping[str, jax.Array] | None = None


def abstract_scripts(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Scripts:
    """Shapes, dtypes and shardings of a distillation step's batches."""
    d, model = cfg.distill, cfg.model
    lead = (d.accumulation, d.batch_size, d.latent_frames // model.chunk_frames)

    def array(shape, dtype, *axes) -> Any:
        spec = jax.P(None, *mesh_lib.spec(axes), *(None,) * (len(shape) - 1 - len(axes)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    frame = (*lead[:2], 1, *cfg.video.latent_size, model.in_dim)
    actions = actions_lib.shapes(model.actions, model.chunk_frames)
    return Scripts(
        text=array((*lead, model.text_len, model.text_dim), cfg.compute_dtype, "batch", "chunk"),
        cut=array(lead, jnp.bool_, "batch", "chunk"),
        first_frame=array(frame, jnp.float32, "batch") if cfg.video.image_to_video else None,
        actions={
            name: array((*lead, *shape), jnp.float32, "batch", "chunk")
            for name, shape in actions.items()
        }
        or None,
    )


def chunks(cfg: config_lib.Config) -> int:
    """Chunks of a training sample."""
    return cfg.train.latent_frames // cfg.model.chunk_frames


def chunk_shape(cfg: config_lib.Config) -> tuple[int, int, int, int]:
    """Of one chunk's latents: frame, h, w, channel."""
    return cfg.model.chunk_frames, *cfg.video.latent_size, cfg.model.in_dim
