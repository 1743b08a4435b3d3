"""Blocks of the Wan2.2 VAE: parameter specs, caches of convolutions and pure apply functions.

Arrays are [batch, frame, height, width, channel]. A convolution over time is causal: it sees the
two frames before its input, its *conv_cache*, which each call takes and returns. The caches of a
block form a tree with the paths of its convolutions' parameters.

`axis` names the mesh axis that shards the width, inside a fully manual `jax.shard_map`; None: the
width is whole.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax import params as params_lib
from longlive_jax.models import vae_fp8
from longlive_jax.ops import attention as attention_lib
from longlive_jax.ops import linear as linear_lib
from longlive_jax.params import ParamSpec, Tree

CACHED_FRAMES = 2  # frames a causal convolution of three taps sees before its input
# Channels, in and out, up to which a GPU, too, convolves frame by frame. Forward and gradients of
# 12 clips of 35 frames of 40 x 56 took 0.65 ms instead of 1.34 with 32 to 16 channels, and 1.12
# instead of 1.18 with 12 (H200, bfloat16).
_FEW_CHANNELS = 32


# Specs, with the names of the original's state dict.


def conv_spec(kernel: tuple[int, ...], in_dim: int, out_dim: int) -> Tree:
    """A convolution: weight [*kernel, in, out] and bias [out]."""
    shape = (*kernel, in_dim, out_dim)
    weight = ParamSpec(
        shape, (None,) * len(shape), params_lib.normal(math.prod(shape[:-1]) ** -0.5)
    )
    return {"weight": weight, "bias": ParamSpec((out_dim,), (None,))}


def norm_spec(dim: int) -> Tree:
    return {"gamma": ParamSpec((dim,), (None,), params_lib.ones)}


def residual_spec(in_dim: int, out_dim: int) -> Tree:
    spec: dict[str, Tree] = {
        "residual": {
            "0": norm_spec(in_dim),
            "2": conv_spec((3, 3, 3), in_dim, out_dim),
            "3": norm_spec(out_dim),
            "6": conv_spec((3, 3, 3), out_dim, out_dim),
        }
    }
    if in_dim != out_dim:
        spec["shortcut"] = conv_spec((1, 1, 1), in_dim, out_dim)
    return spec


def middle_spec(dim: int) -> Tree:
    attention = {
        "norm": norm_spec(dim),
        "to_qkv": conv_spec((1, 1), dim, 3 * dim),
        "proj": conv_spec((1, 1), dim, dim),
    }
    return {"0": residual_spec(dim, dim), "1": attention, "2": residual_spec(dim, dim)}


def head_spec(dim: int, out_dim: int) -> Tree:
    return {"0": norm_spec(dim), "2": conv_spec((3, 3, 3), dim, out_dim)}


def resample_spec(dim: int, time_out_dim: int | None) -> Tree:
    """A change of size in space, and in time where `time_out_dim` is given."""
    spec: dict[str, Tree] = {"resample": {"1": conv_spec((3, 3), dim, dim)}}
    if time_out_dim is not None:
        spec["time_conv"] = conv_spec((3, 1, 1), dim, time_out_dim)
    return spec


def conv_cache_shapes(spec: Tree, height: int, width: int, frames: int = CACHED_FRAMES) -> dict:
    """(frame, height, width, channel) of the cache of each causal convolution in `spec`."""
    return params_lib.unflatten(
        {
            path[:-1]: (frames, height, width, s.shape[3])
            for path, s in params_lib.flatten(spec).items()
            if path[-1] == "weight" and len(s.shape) == 5 and s.shape[0] > 1
        }
    )


# Convolutions.


def pointwise(params: Tree, x: jax.Array) -> jax.Array:
    """A convolution whose kernel has one tap, as a matmul."""
    weight = params["weight"]
    return linear_lib.linear({**params, "weight": weight.reshape(weight.shape[-2:])}, x)


def causal_conv(
    params: Tree, conv_cache: jax.Array, x: jax.Array, axis: str | None, time_stride: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Convolves [conv_cache, x], with no padding in time; "same" zero padding in space.

    Returns:
      The next conv_cache (the last frames of [conv_cache, x]) and the output.
    """
    x = jnp.concatenate([conv_cache, x], axis=1)
    weight, bias = params["weight"].astype(x.dtype), params["bias"].astype(x.dtype)
    side_h, side_w = weight.shape[1] // 2, weight.shape[2] // 2
    padded, pad_w = width_padding(x, axis, side_w, side_w)
    padding = ((side_h, side_h), pad_w)
    whole = functools.partial(_conv_3d, time_stride=time_stride, padding=padding)
    if time_stride > 1:
        y = whole(weight, padded)
    else:
        by_frame = functools.partial(_time_taps, padding=padding)
        on_gpu = by_frame if max(weight.shape[-2:]) <= _FEW_CHANNELS else whole
        y = lax.platform_dependent(
            weight, padded, cpu=functools.partial(by_frame, dtype=jnp.float32), cuda=on_gpu,
            default=whole,
        )  # fmt: skip
    return x[:, -conv_cache.shape[1] :], y + bias.reshape(1, 1, 1, 1, -1)


def _conv_3d(weight, x, time_stride, padding, dtype=None):
    return lax.conv_general_dilated(
        x,
        weight,
        window_strides=(time_stride, 1, 1),
        padding=((0, 0), *padding),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        preferred_element_type=dtype,
    )


def _normed_conv(params, conv_cache, gamma, x, axis):
    """Norm, SiLU and a causal convolution, in FP8 where the weights are: see `vae_fp8`.

    The convolution's cache then has the codes' values, in x's dtype, which holds them exactly.
    """
    if "codes" not in params:
        return causal_conv(params, conv_cache, norm_silu(gamma, x), axis)
    step = vae_fp8.step(gamma)
    codes = vae_fp8.codes(jax.nn.silu(norm(gamma, x)), step)
    new = jnp.concatenate([conv_cache, codes.astype(x.dtype)], axis=1)[:, -conv_cache.shape[1] :]
    codes = jnp.concatenate([conv_cache.astype(vae_fp8.FORMAT), codes], axis=1)
    sums = _conv_codes(params["codes"], codes, x.dtype, axis)
    y = sums.astype(jnp.float32) * (params["scale"] * step).reshape(1, 1, 1, 1, -1)
    return new, (y + params["bias"].astype(jnp.float32).reshape(1, 1, 1, 1, -1)).astype(x.dtype)


def _conv_codes(weight, codes, dtype, axis):
    """The sums of products of codes, float32 on a CPU, else rounded to `dtype`.

    cuDNN takes codes as they are: with no number multiplied onto its output (XLA gives it a scale
    that its tensors of five axes do not fit), which therefore is `dtype` and no wider.
    """
    padded, pad_w = width_padding(codes, axis, 1, 1)
    padding = ((1, 1), pad_w)

    def wide(dtype, conv, weight, x):
        return conv(weight.astype(dtype), x.astype(dtype)).astype(jnp.float32)

    by_frame = functools.partial(_time_taps, padding=padding)
    whole = functools.partial(_conv_3d, time_stride=1, padding=padding)

    def on_gpu(weight, x):
        return whole(weight, x, dtype=dtype).astype(jnp.float32)

    return lax.platform_dependent(
        weight,
        padded,
        cpu=functools.partial(wide, jnp.float32, by_frame),
        cuda=on_gpu,
        default=functools.partial(wide, dtype, whole),
    )


def _time_taps(weight, x, padding, dtype=None):
    """`_conv_3d` as one convolution of each frame, whose outputs for the taps of time are added.

    XLA on a CPU takes 3 to 6 times as long for a convolution over three axes: it copies each value
    for every tap that sees it, 27 times instead of 9. cuDNN has no good kernels for few channels.
    `dtype` is that of the convolution's outputs before they are added; None: x's.
    """
    taps, *kernel, in_dim, out_dim = weight.shape
    together = jnp.moveaxis(weight, 0, -2).reshape(*kernel, in_dim, taps * out_dim)
    y = conv_2d(together, x.astype(dtype or x.dtype), 1, *padding)
    frames = x.shape[1] - taps + 1
    by_tap = [
        y[:, t : t + frames, ..., t * out_dim : (t + 1) * out_dim].astype(jnp.float32)
        for t in range(taps)
    ]  # added in float32 and rounded once
    return sum(by_tap[1:], by_tap[0]).astype(x.dtype)


def conv_2d(weight, x, stride, pad_h, pad_w):
    """A convolution of each frame: frames are batch."""
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        weight.astype(x.dtype),
        window_strides=(stride, stride),
        padding=(pad_h, pad_w),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def width_padding(x, axis, left, right):
    """Columns of the neighbours on both sides, and the zero padding left for the convolution."""
    if axis is None or left + right == 0:
        return x, (left, right)
    n = lax.axis_size(axis)
    parts = [x]
    # A device without a sender receives zeros, which is the padding at the edge of the frame.
    if left:
        parts.insert(0, lax.ppermute(x[..., -left:, :], axis, [(i, i + 1) for i in range(n - 1)]))
    if right:
        parts.append(lax.ppermute(x[..., :right, :], axis, [(i + 1, i) for i in range(n - 1)]))
    return jnp.concatenate(parts, axis=-2), (0, 0)


# Blocks.


def norm(gamma: jax.Array, x: jax.Array) -> jax.Array:
    """x / |x| * sqrt(channels) * gamma over the channels, in float32 and returned so."""
    y = x.astype(jnp.float32)
    squares = jnp.sum(y * y, axis=-1, keepdims=True)
    y = y * (lax.rsqrt(jnp.maximum(squares, 1e-24)) * x.shape[-1] ** 0.5)
    return y * gamma.astype(jnp.float32).reshape(1, 1, 1, 1, -1)


def norm_silu(gamma: jax.Array, x: jax.Array) -> jax.Array:
    """Norm and SiLU, rounded once to x's dtype."""
    return jax.nn.silu(norm(gamma, x)).astype(x.dtype)


def residual(
    params: Tree, conv_cache: Tree, x: jax.Array, axis: str | None
) -> tuple[Tree, jax.Array]:
    """Twice norm, SiLU and 3x3x3 convolution, plus x or its projection."""
    p, c = params["residual"], conv_cache["residual"]
    first, y = _normed_conv(p["2"], c["2"], p["0"]["gamma"], x, axis)
    second, y = _normed_conv(p["6"], c["6"], p["3"]["gamma"], y, axis)
    if "shortcut" in params:
        x = pointwise(params["shortcut"], x)
    return {"residual": {"2": first, "6": second}}, x + y


def attention(params: Tree, x: jax.Array, axis: str | None) -> jax.Array:
    """x plus attention with one head, among the latents of a frame."""
    batch, frames, height, width, dim = x.shape
    qkv = pointwise(params["to_qkv"], norm(params["norm"]["gamma"], x).astype(x.dtype))
    qkv = qkv.reshape(batch * frames, height * width, 1, 3 * dim)
    q, kv = qkv[..., :dim], qkv[..., dim:]
    if axis is not None:  # every latent of the frame, in any order
        kv = lax.all_gather(kv, axis, axis=1, tiled=True)
    y = attention_lib.attention(q, kv[..., :dim], kv[..., dim:])
    return x + pointwise(params["proj"], y.reshape(x.shape))


def middle(
    params: Tree, conv_cache: Tree, x: jax.Array, axis: str | None
) -> tuple[Tree, jax.Array]:
    before, x = residual(params["0"], conv_cache["0"], x, axis)
    x = attention(params["1"], x, axis)
    after, x = residual(params["2"], conv_cache["2"], x, axis)
    return {"0": before, "2": after}, x


def head(params: Tree, conv_cache: Tree, x: jax.Array, axis: str | None) -> tuple[Tree, jax.Array]:
    new, x = causal_conv(params["2"], conv_cache["2"], norm_silu(params["0"]["gamma"], x), axis)
    return {"2": new}, x


# Changes of size. In time they start at the second latent: the first one covers a single frame.


def downsample(
    params: Tree, conv_cache: Tree, x: jax.Array, *, first: bool, axis: str | None
) -> tuple[Tree, jax.Array]:
    """Halves height and width, then the frames where the block has a `time_conv`."""
    conv = params["resample"]["1"]
    padded, pad_w = width_padding(x, axis, 0, 1)
    x = conv_2d(conv["weight"], padded, 2, (0, 1), pad_w)
    x = x + conv["bias"].astype(x.dtype).reshape(1, 1, 1, 1, -1)
    if "time_conv" not in params:
        return {}, x
    if first:  # the frame passes unchanged, and the next call's window begins with it
        return {"time_conv": x}, x
    new, x = causal_conv(params["time_conv"], conv_cache["time_conv"], x, axis, time_stride=2)
    return {"time_conv": new}, x


def upsample(
    params: Tree, conv_cache: Tree, x: jax.Array, *, first: bool, axis: str | None
) -> tuple[Tree, jax.Array]:
    """Doubles the frames where the block has a `time_conv`, then height and width."""
    new = {}
    if "time_conv" in params:
        if first:  # this frame never enters the convolution, whose sequence begins after it
            new = conv_cache
        else:
            new, x = causal_conv(params["time_conv"], conv_cache["time_conv"], x, axis)
            new = {"time_conv": new}
            halves = x.reshape(*x.shape[:-1], 2, -1)  # channels: the even frame's, the odd frame's
            x = jnp.moveaxis(halves, 4, 2).reshape(x.shape[0], -1, *x.shape[2:4], halves.shape[-1])
    return new, upsample_space(params["resample"]["1"], x, axis)


def upsample_space(params, x, axis):
    """Nearest x2 in height and width and a 3x3 convolution, as one 2x2 convolution.

    The three taps of an output row fall on two input rows only: rows i-1, i for output 2i and rows
    i, i+1 for output 2i+1, where the taps that meet are summed. Columns alike. So one 2x2 kernel
    with four groups of output channels, one a parity, does it with 16 taps instead of 36.
    """
    w = params["weight"].astype(jnp.float32)
    w = _fold_taps(_fold_taps(w, 0), 2)  # [row parity, 2, column parity, 2, in, out]
    in_dim, out_dim = w.shape[-2:]
    w = w.transpose(1, 3, 4, 0, 2, 5).reshape(2, 2, in_dim, 4 * out_dim)
    batch, frames, height, width, _ = x.shape
    padded, pad_w = width_padding(x, axis, 1, 1)
    y = conv_2d(w, padded, 1, (1, 1), pad_w)  # one row and one column more than x
    y = y.reshape(batch, frames, height + 1, width + 1, 2, 2, out_dim)
    rows = []
    for i in range(2):
        columns = [y[:, :, i : i + height, j : j + width, i, j] for j in range(2)]
        rows.append(jnp.stack(columns, axis=4))
    y = jnp.stack(rows, axis=3).reshape(batch, frames, 2 * height, 2 * width, out_dim)
    return y + params["bias"].astype(x.dtype).reshape(1, 1, 1, 1, -1) if "bias" in params else y


def _fold_taps(w, axis):
    """Three taps at `axis` -> [.., parity, 2, ..]: the sums that an even and an odd output need."""
    a, b, c = (lax.index_in_dim(w, i, axis, keepdims=False) for i in range(3))
    even, odd = jnp.stack([a, b + c], axis), jnp.stack([a + b, c], axis)
    return jnp.stack([even, odd], axis)


def average_down(x: jax.Array, time: int) -> jax.Array:
    """The shortcut past a downsample: 2x2 means; the frames of a group of `time` become channels.

    Output channel time * c + t is channel c of frame t. A lone first frame is the last of its
    group, after zeros.
    """
    batch, frames, height, width, dim = x.shape
    cells = x.reshape(batch, frames, height // 2, 2, width // 2, 2, dim).astype(jnp.float32)
    x = jnp.mean(cells, axis=(3, 5)).astype(x.dtype)
    if frames % time:
        x = jnp.pad(x, ((0, 0), (time - frames % time, 0), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, time, height // 2, width // 2, dim)
    return jnp.moveaxis(x, 2, 5).reshape(batch, -1, height // 2, width // 2, dim * time)


def duplicate_up(x: jax.Array, out_dim: int, time: int, *, first: bool) -> jax.Array:
    """The shortcut past an upsample: every value is repeated `time` x 2 x 2 times.

    Where channels halve, the even ones fill the upper rows and the odd ones the lower. The first
    frame of a video stays one frame.
    """
    batch, frames, height, width, dim = x.shape
    time = 1 if first else time
    rows = dim // out_dim  # 1: both rows alike, 2: a channel for each
    x = x.reshape(batch, frames, 1, height, width, 1, out_dim, rows)
    x = jnp.moveaxis(x, 7, 4)  # [batch, frame, 1, height, row, width, 1, channel]
    x = jnp.broadcast_to(x, (batch, frames, time, height, 2, width, 2, out_dim))
    return x.reshape(batch, frames * time, 2 * height, 2 * width, out_dim)
