"""The Wan2.2 VAE as a state machine: video <-> latents, a few latents a call, without end.

`decode(params, cfg, state, latents, first=...) -> (state, frames)`, and `encode` the other way. The
state has one shape from start to end and begins as zeros; the only other thing a call must know is
whether it is the first of its video, because the first latent covers one frame and every later one
four. Calls of any length give the frames of the whole clip, so two compiled programs (first,
steady) stream a video without end.

Arrays are [batch, frame, height, width, channel]. Frames are RGB in [-1, 1], latents are normalised
to zero mean and unit variance. The input's dtype is the compute dtype; norms, softmax
and latent statistics are float32. Parameters are cast where they are used: keep them in the compute
dtype to save the casts.

Pictures are 16 x 16 times larger than latents. Inside, the encoder works on 2x2 pixels folded into
channels and halves the size three times; the decoder goes back.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.models import taehv, vae_spec
from longlive_jax.models import vae_blocks as blocks
from longlive_jax.models.vae_spec import (
    FOLD,
    FRAMES,
    PIXELS,
    DecodeState,
    EncodeState,
    init_decode_state,
    init_encode_state,
    spec,
)
from longlive_jax.params import Tree

__all__ = [
    "DecodeState",
    "EncodeState",
    "decode",
    "decode_on_mesh",
    "decode_video",
    "encode",
    "encode_on_mesh",
    "encode_video",
    "init_decode_state",
    "init_encode_state",
    "pieces",
    "spec",
    "to_uint8",
]

# Decoding.


def decode(
    params: Tree,
    cfg: config_lib.VAE,
    state: DecodeState,
    latents: jax.Array,
    *,
    first: bool,
    axis: str | None = None,
) -> tuple[DecodeState, jax.Array]:
    """The next frames of a video.

    Args:
      params: tree with at least "conv2" and "decoder" of `spec`.
      state: of the previous call, or of `init_decode_state`, in the latents' dtype.
      latents: normalised [batch, latent, h, w, z_dim]; their dtype is the compute dtype.
      first: the call has a video's first latent, and no other. The content of `state` is ignored.
      axis: mesh axis that shards the width, inside a fully manual `jax.shard_map`.

    Returns:
      The state, and frames [batch, 1 if first else 4 * latent, 16 h, 16 w, 3] in the latents'
      dtype; values may lie outside [-1, 1], `to_uint8` clamps.

    Raises:
      InputError: arrays that do not fit each other, `cfg` or `first`.
    """
    _check_array("latents", latents, cfg.z_dim)
    if first and latents.shape[1] != 1:
        raise InputError(
            f"decode: {latents.shape[1]} latents in a video's first call, which takes exactly 1; "
            "decode the first latent on its own and the others after it, or call decode_video"
        )
    _check_calls("decode", "latents", latents.shape[1])
    inner, innermost, needed = _KINDS[cfg.kind]
    _check_state(state.conv_cache[innermost], latents, latents.shape[2:4], "latents")
    _check_params(params, "decode", *needed)
    c = _restart(state.conv_cache, latents, axis) if first else state.conv_cache
    new, frames = inner(params, cfg, c, latents, first=first, axis=_sharded(axis))
    return DecodeState(new), frames


def _decode(params, cfg, c, latents, *, first, axis):
    std, mean = _constant(cfg.latent_std), _constant(cfg.latent_mean)
    x = (latents.astype(jnp.float32) * std + mean).astype(latents.dtype)
    x = blocks.pointwise(params["conv2"], x)
    p = params["decoder"]
    new: dict[str, Any] = {"upsamples": {}}
    new["conv1"], x = blocks.causal_conv(p["conv1"], c["conv1"], x, axis)
    new["middle"], x = blocks.middle(p["middle"], c["middle"], x, axis)
    for i, stage in enumerate(vae_spec.decoder_stages(cfg)):
        stage_p, stage_c = p["upsamples"][str(i)], c["upsamples"][str(i)]
        caches, x = _up_stage(
            stage, stage_p["upsamples"], stage_c["upsamples"], x, first=first, axis=axis
        )
        new["upsamples"][str(i)] = {"upsamples": caches}
    new["head"], x = blocks.head(p["head"], c["head"], x, axis)
    return new, _unfold(x)


# By `vae.kind`: from one conv_cache to the next and frames; the one of the latents' size, which the
# checks look at; what of the parameters is needed.
_KINDS = {
    "wan": (_decode, "conv1", ("conv2", "decoder")),
    "taehv": (taehv.decode, taehv.INNERMOST, ("decoder",)),
}


def _up_stage(stage, params, conv_cache, x, *, first, axis):
    new, shortcut = {}, x
    for j in ("0", "1", "2"):
        new[j], x = blocks.residual(params[j], conv_cache[j], x, axis)
    if stage.resized:
        caches, x = blocks.upsample(params["3"], conv_cache.get("3", {}), x, first=first, axis=axis)
        if caches:
            new["3"] = caches
        x = x + blocks.duplicate_up(shortcut, stage.out_dim, stage.time, first=first)
    return new, x


@functools.partial(jax.jit, static_argnames=("cfg", "latents_per_call", "axis"))
def decode_video(
    params: Tree,
    cfg: config_lib.VAE,
    latents: jax.Array,
    latents_per_call: int = 8,
    axis: str | None = None,
) -> jax.Array:
    """All frames of a whole clip: [batch, n, h, w, z_dim] -> [batch, 1 + 4 (n - 1), 16 h, 16 w, 3].

    Decodes `latents_per_call` latents at a time, which bounds the memory. Errors as `decode`.
    """
    _check_array("latents", latents, cfg.z_dim)
    _check_calls("decode_video", "latents", latents.shape[1])
    state = init_decode_state(cfg, latents.shape[0], *latents.shape[2:4], dtype=latents.dtype)
    step = functools.partial(decode, params, cfg, axis=axis)
    return _whole_clip(step, state, latents, latents_per_call, 1)


# Encoding.


def encode(
    params: Tree,
    cfg: config_lib.VAE,
    state: EncodeState,
    frames: jax.Array,
    *,
    first: bool,
    axis: str | None = None,
) -> tuple[EncodeState, jax.Array]:
    """The next latents of a video: their means, normalised.

    Args:
      params: tree with at least "encoder" and "conv1" of `spec`.
      state: of the previous call, or of `init_encode_state`, in the frames' dtype.
      frames: in [-1, 1], [batch, frame, height, width, 3]: one frame if `first`, else a multiple of
        four; height and width multiples of 16. Their dtype is the compute dtype.
      first: this frame begins a video. The content of `state` is ignored.
      axis: mesh axis that shards the width, inside a fully manual `jax.shard_map`.

    Returns:
      The state, and latents [batch, 1 if first else frame / 4, height / 16, width / 16, z_dim] in
      the frames' dtype.

    Raises:
      InputError: arrays that do not fit each other, `cfg` or `first`.
    """
    _check_array("frames", frames, 3)
    size = _latent_size(frames)
    count = frames.shape[1]
    if (count != 1) if first else (count % FRAMES or not count):
        raise InputError(
            f"encode: {count} frames with first={first}; a video's first call takes exactly 1 "
            f"frame and every later one a multiple of {FRAMES}"
        )
    pixels = (size[0] * PIXELS // FOLD, size[1] * PIXELS // FOLD)
    _check_state(state.conv_cache["conv1"], frames, pixels, "frames folded 2x2")
    _check_params(params, "encode", "encoder", "conv1")
    c = _restart(state.conv_cache, frames, axis) if first else state.conv_cache
    axis = _sharded(axis)
    p = params["encoder"]
    new: dict[str, Any] = {"downsamples": {}}
    new["conv1"], x = blocks.causal_conv(p["conv1"], c["conv1"], _fold(frames), axis)
    for i, stage in enumerate(vae_spec.encoder_stages(cfg)):
        stage_p, stage_c = p["downsamples"][str(i)], c["downsamples"][str(i)]
        caches, x = _down_stage(
            stage, stage_p["downsamples"], stage_c["downsamples"], x, first=first, axis=axis
        )
        new["downsamples"][str(i)] = {"downsamples": caches}
    new["middle"], x = blocks.middle(p["middle"], c["middle"], x, axis)
    new["head"], x = blocks.head(p["head"], c["head"], x, axis)
    # The other half of the channels is the posterior's log-variance, which nothing uses.
    means = {name: array[..., : cfg.z_dim] for name, array in params["conv1"].items()}
    x = blocks.pointwise(means, x).astype(jnp.float32)
    x = (x - _constant(cfg.latent_mean)) / _constant(cfg.latent_std)
    return EncodeState(new), x.astype(frames.dtype)


def _down_stage(stage, params, conv_cache, x, *, first, axis):
    new, shortcut = {}, x
    for j in ("0", "1"):
        new[j], x = blocks.residual(params[j], conv_cache[j], x, axis)
    if stage.resized:
        caches, x = blocks.downsample(
            params["2"], conv_cache.get("2", {}), x, first=first, axis=axis
        )
        if caches:
            new["2"] = caches
        shortcut = blocks.average_down(shortcut, stage.time)
    return new, x + shortcut


@functools.partial(jax.jit, static_argnames=("cfg", "latents_per_call", "axis"))
def encode_video(
    params: Tree,
    cfg: config_lib.VAE,
    frames: jax.Array,
    latents_per_call: int = 8,
    axis: str | None = None,
) -> jax.Array:
    """All latents, [batch, 1 + k, height / 16, width / 16, z_dim], of a clip of 1 + 4 k frames.

    Encodes the frames of `latents_per_call` latents at a time, which bounds the memory.

    Raises:
      InputError: a number of frames that is not 1 + 4 k; otherwise as `encode`.
    """
    _check_array("frames", frames, 3)
    count = frames.shape[1]
    if count % FRAMES != 1:
        near = [n for n in ((count - 1) // FRAMES * FRAMES + 1 + i for i in (0, FRAMES)) if n > 0]
        raise InputError(
            f"encode_video: {count} frames, must be 1 + a multiple of {FRAMES}, since a latent "
            f"covers {FRAMES} frames and the first one 1; cut or pad the clip, nearest: {near}"
        )
    state = init_encode_state(cfg, frames.shape[0], *_latent_size(frames), frames.dtype)
    step = functools.partial(encode, params, cfg, axis=axis)
    return _whole_clip(step, state, frames, latents_per_call, FRAMES)


def pieces(latents: int, per_call: int) -> Iterator[slice]:
    """The latents of each call: the first alone, then groups of `per_call`.

    A video's first latent must be alone; a chunk's is, so that its frames are ready sooner.
    """
    yield slice(0, 1)
    for start in range(1, latents, per_call):
        yield slice(start, min(start + per_call, latents))


def _whole_clip(step, state, x, latents_per_call, frames_per_latent):
    """The first frame of `x` on its own, a scan over equal groups, then the remainder."""
    if latents_per_call < 1:
        raise InputError(f"latents_per_call={latents_per_call} must be at least 1")
    state, y = step(state, x[:, :1], first=True)
    outputs, x = [y], x[:, 1:]
    size = latents_per_call * frames_per_latent
    groups = x.shape[1] // size
    if groups:
        split = x[:, : groups * size].reshape(x.shape[0], groups, size, *x.shape[2:])
        state, y = lax.scan(
            lambda s, group: step(s, group, first=False), state, jnp.moveaxis(split, 1, 0)
        )
        outputs.append(jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *y.shape[3:]))
    if x.shape[1] > groups * size:
        outputs.append(step(state, x[:, groups * size :], first=False)[1])
    return jnp.concatenate(outputs, axis=1)


# On a mesh.


def decode_on_mesh(mesh: jax.sharding.Mesh, cfg: config_lib.VAE, first: bool):
    """`decode` as a compiled function (params, state, latents) -> (state, frames) over `mesh`.

    Parameters are whole on every device, batches are spread over "data" and "fsdp", widths over
    "seq". The state is donated. The function raises InputError as `decode` does, and when the mesh
    does not divide the batch or the latent width.
    """
    return _on_mesh(decode, mesh, cfg, first, 1)


def encode_on_mesh(mesh: jax.sharding.Mesh, cfg: config_lib.VAE, first: bool):
    """`encode` as a compiled function (params, state, frames) -> (state, latents) over `mesh`.

    As `decode_on_mesh`.
    """
    return _on_mesh(encode, mesh, cfg, first, PIXELS)


def _on_mesh(step, mesh, cfg, first, columns_per_latent):
    where = mesh_lib.spec(vae_spec.SHARDED)

    def local(params, state, x):
        return step(params, cfg, state, x, first=first, axis=mesh_lib.SEQ)

    # Without differentiation there is nothing for varying-axes types to check.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), where, where), out_specs=where, check_vma=False
    )

    # A first call reads nothing of the state; kept as an argument, its memory is reused.
    @functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
    def call(params, state, x):
        vae_spec.check_mesh(mesh, x.shape[0], x.shape[3] // columns_per_latent)
        return mapped(params, state, x)

    return call


def to_uint8(frames: jax.Array) -> jax.Array:
    """Frames in [-1, 1], clamped and rounded to uint8 0..255."""
    return jnp.round((jnp.clip(frames.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)


# Small parts.


def _fold(frames):
    """[.., 2 h, 2 w, 3] -> [.., h, w, 12]; channel 4 c + 2 (column parity) + (row parity)."""
    b, t, h, w, c = frames.shape
    x = frames.reshape(b, t, h // FOLD, FOLD, w // FOLD, FOLD, c)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(b, t, h // FOLD, w // FOLD, c * FOLD**2)


def _unfold(x):
    """The inverse of `_fold`."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // FOLD**2, FOLD, FOLD)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(b, t, h * FOLD, w * FOLD, c // FOLD**2)


def _constant(values):
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 1, -1)


def _restart(conv_cache, x, axis):
    """Zeros; in a shard_map, typed as varying over devices, as `x` is: a scan can carry them."""
    zero = jnp.zeros((), x.dtype)
    if axis is not None:
        zero = jnp.where(False, x[0, 0, 0, 0, 0], zero)
    return jax.tree.map(lambda c: jnp.broadcast_to(zero, c.shape), conv_cache)


def _sharded(axis):
    """An axis of size one shards nothing."""
    return None if axis is None or lax.axis_size(axis) == 1 else axis


def _latent_size(frames):
    height, width = frames.shape[2:4]
    if height % PIXELS or width % PIXELS or not height or not width:
        raise InputError(
            f"frames of {height} x {width} pixels (a device's share, on a mesh): both must be "
            f"multiples of {PIXELS}; crop or resize them"
        )
    return height // PIXELS, width // PIXELS


def _check_array(name, x, channels):
    if x.ndim != 5 or x.shape[-1] != channels:
        raise InputError(
            f"{name} of shape {x.shape}: must be [batch, frame, height, width, {channels}]; "
            "transpose channels to the end"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"{name} of dtype {x.dtype}: must be floating; scale and cast them first")


def _check_calls(where, name, count):
    if count < 1:
        raise InputError(f"{where}: {count} {name}, must be at least 1; skip the call")


def _check_state(conv_cache, x, size, name):
    want = (x.shape[0], *size)
    have = (conv_cache.shape[0], *conv_cache.shape[2:4])
    if want != have or conv_cache.dtype != x.dtype:
        raise InputError(
            f"{name} of [batch, height, width] {want} and dtype {x.dtype} do not fit the state, "
            f"made for {have} and {conv_cache.dtype}; make a new state with the init function"
        )


def _check_params(params, where, *names):
    missing = [name for name in names if name not in params]
    if missing:
        raise InputError(
            f"{where}: parameters {missing} missing, the tree has {sorted(params)}; load a "
            f"checkpoint that has {list(names)}"
        )
