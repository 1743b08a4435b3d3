"""Everything a training run is: parameters, optimiser, average, error rings, step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit, umt5
from longlive_jax.training import error_recycling


class Batch(struct.PyTreeNode):
    """What a trainer reads at a time. A step's arrays have a leading axis of such batches.

    latents: [batch, chunk, frame, h, w, channel], clean and normalised; float32 or bfloat16.
    real: bool [batch, chunk]; chunks that are False are padding and bear no loss.
    context: [batch, chunk, text_len, text_dim], embeddings of each chunk's prompt; None when the
      text encoder is trained too.
    ids, mask: int32 [batch, chunk, text_len], tokens of each chunk's prompt; None otherwise.
    """

    latents: jax.Array
    real: jax.Array
    context: jax.Array | None = None
    ids: jax.Array | None = None
    mask: jax.Array | None = None


class TrainState(struct.PyTreeNode):
    """step: int32, steps done. bad: int32 [2], steps left out because their loss or gradient was
    not finite: in all, and in a row. Trees are float32, sharded by `mesh.RULES`. `errors`: the
    rings of training.error_recycling; None without it.
    """

    step: jax.Array
    params: params_lib.Tree
    optimizer: Any
    average: params_lib.Tree
    errors: error_recycling.Errors | None
    bad: jax.Array


def specs(cfg: config_lib.Config) -> params_lib.Tree:
    """ParamSpecs of what is trained: {"dit": ...}, and "umt5" if the text encoder is trained."""
    trained = {"dit": dit.spec(cfg.model)}
    if cfg.train.text_encoder:
        trained["umt5"] = umt5.spec(cfg.umt5)
    return trained


def optimizer(cfg: config_lib.Train) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; a linear warm-up, then a constant rate.

    With beta1 = 0 Adam's first moment is the gradient itself and is not kept.
    """
    rate = cfg.learning_rate
    if cfg.warmup_steps:
        rate = optax.linear_schedule(rate / cfg.warmup_steps, rate, cfg.warmup_steps - 1)
    if cfg.beta1 == 0:
        scale = optax.scale_by_rms(cfg.beta2, cfg.epsilon, eps_in_sqrt=False, bias_correction=True)
    else:
        scale = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon)
    decay = (optax.add_decayed_weights(cfg.weight_decay),) if cfg.weight_decay else ()
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        scale,
        *decay,
        optax.scale_by_learning_rate(rate),
    )


def chunk_shape(cfg: config_lib.Config) -> tuple[int, int, int, int]:
    """Of one chunk's latents: frame, h, w, channel."""
    scale = config_lib.SPATIAL_COMPRESSION
    return (
        cfg.model.chunk_frames, cfg.video.height // scale, cfg.video.width // scale,
        cfg.model.in_dim,
    )  # fmt: skip


def chunks(cfg: config_lib.Config) -> int:
    """Of a training sample."""
    return cfg.train.latent_frames // cfg.model.chunk_frames


def init(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, params: params_lib.Tree | None = None
) -> TrainState:
    """The state before the first step. `params`: initial weights, sharded; they are donated."""
    if params is None:
        params = params_lib.init(specs(cfg), jax.random.key(cfg.train.seed), jnp.float32, mesh)
    template = jax.tree.map(lambda x: x.sharding, abstract(cfg, mesh).replace(errors=None))
    state = jax.jit(_begin(cfg), out_shardings=template, donate_argnums=0)(params)
    return state.replace(errors=_recycling(error_recycling.init, cfg, mesh))


def _begin(cfg):
    def make(params):
        return TrainState(
            step=jnp.int32(0),
            params=params,
            optimizer=optimizer(cfg.train).init(params),
            average=jax.tree.map(jnp.copy, params),
            errors=None,
            bad=jnp.zeros((2,), jnp.int32),
        )

    return make


def abstract(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without an array: the checkpoint's template."""
    params = params_lib.abstract(specs(cfg), mesh)
    structure = jax.tree.structure(params)
    whole = jax.NamedSharding(mesh, jax.P())

    def like_params(x):
        return jax.tree.structure(x) == structure

    def placed(x):  # a tree of the parameters' structure lies where they do; the rest is small
        if like_params(x):
            return params
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    state = jax.eval_shape(_begin(cfg), params)
    state = jax.tree.map(placed, state, is_leaf=like_params)
    errors = _recycling(error_recycling.abstract, cfg, mesh)
    return state.replace(errors=errors)


def _recycling(make, cfg, mesh):
    recycling = cfg.train.error_recycling
    return make(recycling, chunks(cfg), chunk_shape(cfg), mesh) if recycling.enabled else None
