"""Balanced sequence parallelism against the naive one, and the ways to encode on the mesh.

    python -m launch.bench balance --config=configs/sample_5b.py --config.mesh.seq=4

Balanced (what we train with): a device has some chunks, the clean and the noisy copy of each.
Naive: all clean chunks, then all noisy ones, cut into equal pieces; half the devices have no token
that bears loss, and each needs latents that another one also needs, so that every device encodes
the whole video. It exists only here. Both exchange heads for tokens around the same attention.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit, vae
from longlive_jax.ops import teacher_forcing as attention
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import feed


class Inputs(NamedTuple):
    """A step's latents [batch, chunk, frame, h, w, channel], and what they come with.

    clean, noisy: of the naive layout 2 n chunks, clean then noisy, in both; it reads `clean`.
    timesteps, positions: [batch, chunk, frame]. text: [batch, chunk, text_len, text_dim].
    """

    clean: jax.Array
    noisy: jax.Array
    target: jax.Array
    timesteps: jax.Array
    positions: jax.Array
    text: jax.Array


def run(cfg: config_lib.Config) -> dict:
    config_lib.validate_training(cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = measure.random_params(dit.spec(cfg.model), mesh, jnp.float32, rules=mesh_lib.RULES)
    figures, times = {}, {}
    for name, loss in (("balanced", _balanced), ("naive", _naive)):
        inputs = _inputs(cfg, mesh, copies=1 if name == "balanced" else 2)
        gradient = _gradient(cfg, mesh, loss).lower(params, inputs).compile()
        call = functools.partial(gradient, params, inputs)
        figures[f"{name}_loss"] = float(call()[0])
        times[name] = measure.percentile(measure.seconds(call, max(2, flags.FLAGS.chunks // 4)), 50)
    params = None
    encoding = {name: _encode_seconds(cfg, mesh, name) for name in ("width", "halo", "whole")}
    balanced = times["balanced"] + min(encoding["width"], encoding["halo"])
    naive = times["naive"] + encoding["whole"]
    figures |= {f"{name}_gradient_s": round(t, 4) for name, t in times.items()}
    figures |= {f"encode_{name}_s": round(t, 4) for name, t in encoding.items()}
    figures |= {
        "balanced_over_naive": round(naive / balanced, 3),
        "balanced_over_naive_without_encoding": round(times["naive"] / times["balanced"], 3),
        "latent_frames": cfg.train.latent_frames,
        "remat": cfg.train.remat,
        "mesh": list(mesh.shape.values()),
    }
    figures |= measure.device_figures()
    measure.show(figures)
    return figures


# Losses of a device's share of the inputs.


def _balanced(cfg, params, x: Inputs, **on):
    velocity = dit.teacher_forcing(
        params, cfg.model, x.clean, x.noisy, x.timesteps, x.positions, text=x.text, **on
    )
    return jnp.sum((velocity.astype(jnp.float32) - x.target) ** 2)


def _naive(cfg, params, x: Inputs, **on):
    @dit.over_chunks
    def attend(*qkv):
        both = (jnp.swapaxes(y.reshape(len(y), 2, -1, *y.shape[2:]), 1, 2) for y in qkv)
        out = jnp.swapaxes(attention.teacher_forcing(*both), 1, 2)
        return out.reshape(qkv[0].shape)

    plain, *others = dit.BRANCHES
    branch = dataclasses.replace(plain, attention=plain.attention._replace(block_causal=attend))
    velocity = dit.block_causal(
        params, cfg.model, x.clean, x.timesteps, x.positions, text=x.text,
        branches=(branch, *others), **on,
    )  # fmt: skip
    error = jnp.mean((velocity.astype(jnp.float32) - x.target) ** 2, axis=(-3, -2, -1))
    return jnp.sum(jnp.where(x.timesteps > 0, error, 0)) * velocity[0, 0, 0].size


def _gradient(cfg, mesh, loss):
    """(params, inputs) -> loss and gradient, as the trainer computes them."""
    specs = dit.spec(cfg.model)
    sharding = dit.Sharding.training()
    precision = dit.Precision(dtype=cfg.compute_dtype)

    def local(params, inputs):
        def of(params):
            on = dict(sharding=sharding, precision=precision, remat=cfg.train.remat)
            return loss(cfg, params, inputs, **on)

        value, gradient = jax.value_and_grad(of)(params)
        return sharding.sum(value), sharding.sum_gradients(gradient, specs)

    place = params_lib.partition_specs(specs)
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(place, mesh_lib.spec(("batch", "chunk"))),
            out_specs=(jax.P(), place),
            check_vma=False,
        )
    )


def _inputs(cfg, mesh, copies):
    """The same video in either layout."""
    shape = (cfg.train.batch_size, batch_lib.chunks(cfg), *batch_lib.chunk_shape(cfg))
    where = jax.NamedSharding(mesh, mesh_lib.spec(("batch", "chunk")))

    @functools.partial(jax.jit, out_shardings=where)
    def make():
        clean, noise = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
        text_shape = (*shape[:2], cfg.model.text_len, cfg.model.text_dim)
        text = jax.random.normal(jax.random.key(2), text_shape, cfg.compute_dtype)
        positions = jnp.arange(shape[1] * shape[2], dtype=jnp.int32).reshape(1, *shape[1:3])
        positions = jnp.broadcast_to(positions, shape[:3])
        timesteps = jnp.full(shape[:3], 500.0)
        target = noise - clean
        x, y = (z.astype(cfg.compute_dtype) for z in (clean, (clean + noise) / 2))
        if copies == 1:
            return Inputs(x, y, target, timesteps, positions, text)

        def twice(a, b):
            return jnp.concatenate([a, b], axis=1)

        x, target = twice(x, y), twice(jnp.zeros_like(target), target)
        timesteps = twice(jnp.zeros_like(timesteps), timesteps)
        return Inputs(x, x, target, timesteps, twice(positions, positions), twice(text, text))

    return make()


def _encode_seconds(cfg, mesh, way):
    """Seconds to encode a step's videos: "width" and "halo" as data.encode; "whole": on each."""
    data = dataclasses.replace(cfg.data, encode="width" if way == "whole" else way)
    cfg = dataclasses.replace(cfg, data=data)
    if way == "whole":
        cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, seq=1))
        mesh = mesh_lib.make_mesh(cfg.mesh, mesh.devices.flat[: cfg.mesh.size].tolist())
    params = measure.random_params(
        {name: vae.spec(cfg.vae)[name] for name in ("encoder", "conv1")}, mesh, cfg.compute_dtype,
        rules={},
    )  # fmt: skip
    pictures = feed.picture_abstract(cfg, batch_lib.abstract(cfg, mesh))
    made = jax.jit(lambda: jnp.zeros(pictures.shape, jnp.uint8), out_shardings=pictures.sharding)()
    encode = feed.make_encode(cfg, mesh).lower(params, made).compile()
    call = functools.partial(encode, params, made)
    measure.seconds(call, 1)
    return measure.percentile(measure.seconds(call, 3), 50)
