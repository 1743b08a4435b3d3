"""A small VAE of the Wan2.2 architecture: its loss, and what becomes of its weights.

The videos lie decoded in the device's memory and clips are drawn there, so that no step waits for a
file. A clip goes through the encoder and the decoder as a stream does: its first frame alone, then
the others together. `videos` reads the videos.

Draws are keyed by (seed, step, row), never by device.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import vae
from longlive_jax.training.objective import Moment, Network, Objective
from longlive_jax.training.objectives.videos import Videos
from longlive_jax.training.optimizer import adamw

ROWS = ("data", "fsdp")  # mesh axes that clips are spread over
NETWORK = "autoencoder"
ALIGNMENT = 128  # numbers: 256 bytes in bfloat16
_WHOLE = jax.P()
# Settings that a run may be continued with other values of.
_FREE = ("train_vae.memory_gib", "train_vae.save_every", "train_vae.log_every")
_WINDOW, _NOISE, _TOP, _LEFT, _CUT = range(5)  # uses of a clip's key


# The model.


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
    state = vae.init_decode_state(cfg, latents.shape[0], *latents.shape[2:4], dtype=latents.dtype)
    call = functools.partial(vae.decode, params, cfg, axis=mesh_lib.SEQ)
    return _clip(call, state, latents)


def _clip(call, state, x):
    state, first = call(state, x[:, :1], first=True)
    return jnp.concatenate([first, call(state, x[:, 1:], first=False)[1]], axis=1)


# The objective.


class Autoencoder(Objective):
    """One network, whose parameters are one vector, whole on every device: `flat` of their tree.

    Two hundred small arrays would be as many small kernels a step, and most of the program to
    compile. A batch is empty, for clips are drawn from the frozen arrays: "frames", uint8 [frame,
    height, width, 3], and "windows" and "cuts", int32 [window], the frames that clips may begin at,
    those of one file and those across two.
    """

    shown = ("l1", "kl", "psnr")

    def __init__(self, cfg: config_lib.Config, mesh: jax.sharding.Mesh, videos: Videos):
        train = cfg.train_vae
        self.cfg, self.mesh = cfg, mesh
        self.seed, self.batch_size = train.seed, train.batch_size
        specs = {"vector": params_lib.ParamSpec((_length(cfg.vae),), (None,))}
        self.networks = {NETWORK: Network(specs, optimizer(train), self._ema_decay)}
        self._arrays = {
            "frames": videos.frames,
            "windows": videos.windows(train.frames, 1),
            "cuts": videos.cuts(train.frames),
        }
        if train.cut_share and not len(self._arrays["cuts"]):
            raise InputError(
                f"train_vae.cut_share={train.cut_share}: no two videos after each other that clips "
                f"of train_vae.frames={train.frames} could span; set train_vae.cut_share=0"
            )
        whole = jax.NamedSharding(mesh, _WHOLE)
        self.frozen = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
            for name, x in self._arrays.items()
        }

    def frozen_arrays(self) -> dict[str, jax.Array]:
        return place(self._arrays, self.mesh)

    def init_params(self) -> dict[str, params_lib.Tree]:
        """Weights of a new run, by network."""
        return {NETWORK: {"vector": place(flat(init(self.cfg)), self.mesh)}}

    def _ema_decay(self, step):
        # At first the EMA would be mostly the initial weights.
        age = step.astype(jnp.float32) - 1
        return jnp.minimum(self.cfg.train_vae.ema_decay, (1 + age) / (10 + age))

    def before(self, network: str, moment: Moment) -> jax.Array:
        """Numbers of the clips within the step, spread over the mesh."""
        return jax.reshard(moment.rows, jax.NamedSharding(self.mesh, jax.P(ROWS)))

    def loss(
        self, network: str, params: Mapping, frozen: Mapping, inputs: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        cfg, train = self.cfg, self.cfg.train_vae
        size = _crop(cfg)
        latents = (
            1 + (train.frames - 1) // vae.FRAMES, *(n // vae.PIXELS for n in size), cfg.vae.z_dim
        )  # fmt: skip

        def draw(row):
            own = jax.random.fold_in(key, row)

            def below(use, limit):
                return jax.random.randint(jax.random.fold_in(own, use), (), 0, limit, jnp.int32)

            kinds = [frozen["windows"]] + [frozen["cuts"]] * (train.cut_share > 0)
            window, *cut = [windows[below(_WINDOW, windows.shape[0])] for windows in kinds]
            if cut:
                spans = jax.random.bernoulli(jax.random.fold_in(own, _CUT), train.cut_share)
                window = jnp.where(spans, cut[0], window)
            corner = [
                below(use, whole - n + 1)
                for use, whole, n in zip((_TOP, _LEFT), frozen["frames"].shape[1:3], size)
            ]
            noise = jax.random.normal(jax.random.fold_in(own, _NOISE), latents)
            return jnp.stack([window, *corner]), noise

        starts, noise = jax.vmap(draw)(inputs)
        clips = _pictures(frozen["frames"], starts, cfg, size)
        metrics = losses(tree(params[network]["vector"], cfg.vae), cfg, clips, noise)
        share = len(inputs) / self.batch_size  # of the step's clips
        metrics = {name: share * value for name, value in metrics.items()}
        return metrics.pop("loss"), metrics

    def fields(self, network: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(metrics)
        mse = fields.pop("mse") * 127.5**2  # pixels here are -1..1
        return fields | {"psnr": psnr(mse)}


def losses(
    params: params_lib.Tree, cfg: config_lib.Config, frames: jax.Array, noise: jax.Array
) -> dict[str, jax.Array]:
    """L1 of pixels, L1 of their differences to their neighbours, divergence from a unit Gaussian.

    Args:
      frames: [batch, frame, height, width, 3] in compute dtype.
      noise: float32 [batch, latent, h, w, z_dim], unit Gaussian: the posterior is sampled with it.

    Returns:
      {"loss", "l1", "kl", "mse"}, all float32 means over the batch.
    """
    train = cfg.train_vae
    mean, log_var = (x.astype(jnp.float32) for x in moments(params, cfg.vae, frames))
    log_var = jnp.clip(log_var, -20, 10)
    latents = (mean + jnp.exp(0.5 * log_var) * noise).astype(frames.dtype)
    error = decode(params, cfg.vae, latents).astype(jnp.float32) - frames.astype(jnp.float32)
    l1 = jnp.mean(jnp.abs(error))
    edge = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_var) - 1 - log_var)
    total = l1 + train.edge_weight * edge + train.kl_weight * kl
    return {"loss": total, "l1": l1, "kl": kl, "mse": jnp.mean(error**2)}


def optimizer(cfg: config_lib.TrainVAE) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, cfg.warmup_steps, cfg.steps)
    return adamw(
        rate, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
    )  # fmt: skip


def settings(cfg: config_lib.Config, videos: Videos) -> dict[str, Any]:
    """What a run cannot be continued with another value of, by the names of the flags."""
    sections = {name: dataclasses.asdict(getattr(cfg, name)) for name in ("vae", "train_vae")}
    values = {f"{s}.{k}": value for s, section in sections.items() for k, value in section.items()}
    values |= {"videos.files": len(videos.paths), "videos.shape": videos.frames.shape}
    values |= {"vector": _length(cfg.vae)}  # runs of before ALIGNMENT have another
    return {name: v for name, v in values.items() if name not in _FREE} | {"dtype": cfg.dtype}


# Parameters.


def flat(params: params_lib.Tree) -> jax.Array:
    """A tree of `vae.spec` as one vector, in the order of the paths: JAX reorders dicts.

    Each array begins at a multiple of ALIGNMENT, after zeros: matrix products read their weights
    where they lie in the vector, and cuBLAS refuses addresses that are no multiple of 16 bytes.
    """
    return jnp.concatenate([jnp.pad(x.reshape(-1), (0, _gap(x.size))) for _, x in _ordered(params)])


def tree(vector: jax.Array, cfg: config_lib.VAE) -> params_lib.Tree:
    """The inverse of `flat`."""
    leaves, start = {}, 0
    for path, s in _ordered(vae.spec(cfg)):
        size = math.prod(s.shape)
        leaves[path] = vector[start : start + size].reshape(s.shape)
        start += size + _gap(size)
    return params_lib.unflatten(leaves)


def _length(cfg: config_lib.VAE) -> int:
    sizes = [math.prod(s.shape) for _, s in _ordered(vae.spec(cfg))]
    return sum(size + _gap(size) for size in sizes)


def _gap(size: int) -> int:
    return -size % ALIGNMENT


def _ordered(tree: params_lib.Tree) -> list[tuple[params_lib.Path, Any]]:
    return sorted(params_lib.flatten(tree).items(), key=lambda item: item[0])


def init(cfg: config_lib.Config) -> params_lib.Tree:
    """Initial weights, float32 on the host."""

    # Drawn on the host: XLA compiles a generator a shape, and there are a hundred shapes.
    def draw(path: params_lib.Path, s: params_lib.ParamSpec) -> np.ndarray:
        if s.init is params_lib.ones or s.init is params_lib.zeros:
            return np.full(s.shape, float(s.init is params_lib.ones), np.float32)
        rng = np.random.default_rng([cfg.train_vae.seed, zlib.crc32("/".join(path).encode())])
        return rng.standard_normal(s.shape, np.float32) * np.float32(
            math.prod(s.shape[:-1]) ** -0.5
        )

    leaves = params_lib.flatten(vae.spec(cfg.vae))
    return params_lib.unflatten({path: draw(path, s) for path, s in leaves.items()})


def _pictures(frames, starts, cfg, size):
    """Clips in [-1, 1] and compute dtype: what the VAE encodes.

    starts: int32 [clip, 3], of each the first frame, row and column. size: rows and columns.
    """
    window = (cfg.train_vae.frames, *size, 3)
    clips = jax.vmap(lambda s: lax.dynamic_slice(frames, (*s, 0), window))(starts)
    return (clips.astype(jnp.float32) / 127.5 - 1).astype(cfg.compute_dtype)


def _crop(cfg) -> tuple[int, int]:
    """Height and width of the pixels that a clip of training has."""
    train = cfg.train_vae
    return train.crop_height or cfg.video.height, train.crop_width or cfg.video.width


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


def statistics(
    params: params_lib.Tree, cfg: config_lib.Config, mesh: jax.sharding.Mesh, videos: Videos
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each latent channel over all videos, float64 [z_dim]."""

    def encode(params, clips):
        return moments(params, cfg.vae, clips)[0].astype(jnp.float32)

    total = square = np.zeros(cfg.vae.z_dim)
    count = 0
    for _, latents in _batches(encode, params, cfg, mesh, videos):
        values = latents.reshape(-1, cfg.vae.z_dim).astype(np.float64)
        total, square = total + values.sum(0), square + (values**2).sum(0)
        count += len(values)
    mean = total / count
    return mean, np.sqrt(square / count - mean**2)


def reconstructions(
    params: params_lib.Tree, cfg: config_lib.Config, mesh: jax.sharding.Mesh, videos: Videos
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of clips, one after the other in each file, and of what the VAE makes of them.

    Yields:
      Two uint8 [batch, frame, height, width, 3].
    """

    def reconstruct(params, clips):
        return vae.to_uint8(decode(params, cfg.vae, moments(params, cfg.vae, clips)[0]))

    offsets = np.arange(cfg.train_vae.frames)
    for starts, pictures in _batches(reconstruct, params, cfg, mesh, videos):
        yield videos.frames[starts[:, None] + offsets], pictures


def _batches(local, params, cfg, mesh, videos):
    """(first frames, local(params, clips)) of clips that cover the files, a batch at a time."""
    rows = jax.P(ROWS)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(_WHOLE, _WHOLE, rows), out_specs=rows)
    def program(params, frames, starts):
        whole = jnp.pad(starts[:, None], ((0, 0), (0, 2)))
        size = cfg.video.height, cfg.video.width
        return local(params, _pictures(frames, whole, cfg, size))

    params, frames = place(params, mesh), place(videos.frames, mesh)
    starts = videos.windows(cfg.train_vae.frames, cfg.train_vae.frames)
    size = cfg.train_vae.batch_size
    for i in range(0, len(starts), size):
        some = starts[i : i + size]
        padded = np.resize(some, size)  # repeats: one program for all batches
        batch = jax.device_put(padded, jax.NamedSharding(mesh, rows))
        yield some, np.asarray(program(params, frames, batch))[: len(some)]


def psnr(squared_error: float) -> float:
    """dB of a mean squared error of pixels 0..255."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-12))
