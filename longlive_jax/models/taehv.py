"""TAEHV, a small decoder of the Wan2.2 VAE's latents, for previews: `taew2_2`.

github.com/madebyollin/taehv: every convolution looks at one frame, and the blocks see the frame
before theirs beside it. Its contract is that of `models.vae`, which calls it where `vae.kind` is
"taehv": latents in, frames out, a few a call; a video's first latent gives one frame, every other
four. `vae.dec_dim` is the width of the last stage (64 of the published weights).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax.models import vae_blocks as blocks
from longlive_jax.params import Tree

_MEMORY = 3  # blocks of a stage that see the frame before
_FIRST = 3  # stages begin at this place of the original's list of layers
INNERMOST = str(_FIRST)  # the block of latents' size
_STEP = _MEMORY + 3  # and end with an upsampling, a growth in time and a convolution
_BOUND = 3.0  # of the latents, softly
_FOLD = 2  # pixels, each way, that are channels


class Stage(NamedTuple):
    """Blocks of one width, then twice the height and width, and `time` times the frames."""

    dim: int
    out_dim: int
    time: int
    place: int  # of its first block


def stages(cfg: config_lib.VAE) -> list[Stage]:
    d = cfg.dec_dim
    sizes = ((4 * d, 2 * d, 1), (2 * d, d, 2), (d, d, 2))
    return [Stage(*size, _FIRST + i * _STEP) for i, size in enumerate(sizes)]


def head(cfg: config_lib.VAE) -> str:
    """The place of the last convolution, after a ReLU."""
    return str(stages(cfg)[-1].place + _STEP + 1)


def spec(cfg: config_lib.VAE) -> Tree:
    """{"decoder"}: paths are the original's keys, convolutions [height, width, in, out]."""
    dim = stages(cfg)[0].dim
    decoder: dict[str, Tree] = {"1": blocks.conv_spec((3, 3), cfg.z_dim, dim)}
    for s in stages(cfg):
        for j in range(_MEMORY):
            convs = {"0": (2 * s.dim, s.dim), "2": (s.dim, s.dim), "4": (s.dim, s.dim)}
            decoder[str(s.place + j)] = {
                "conv": {k: blocks.conv_spec((3, 3), *dims) for k, dims in convs.items()}
            }
        grow, up = (str(s.place + _MEMORY + k) for k in (1, 2))
        decoder[grow] = {"conv": _without_bias((1, 1), s.dim, s.time * s.dim)}
        decoder[up] = _without_bias((3, 3), s.dim, s.out_dim)
    decoder[head(cfg)] = blocks.conv_spec((3, 3), cfg.dec_dim, 3 * _FOLD**2)
    return {"decoder": decoder}


def _without_bias(kernel, in_dim, out_dim) -> Tree:
    return {"weight": blocks.conv_spec(kernel, in_dim, out_dim)["weight"]}


def state_shapes(cfg: config_lib.VAE, height: int, width: int) -> Tree:
    """(frame, height, width, channel) of what each block keeps: the frame before its next one.

    height, width: of the latents.
    """
    shapes = {}
    for s in stages(cfg):
        for j in range(_MEMORY):
            shapes[str(s.place + j)] = (1, height, width, s.dim)
        height, width = 2 * height, 2 * width
    return shapes


def decode(
    params: Tree,
    cfg: config_lib.VAE,
    conv_cache: Tree,
    latents: jax.Array,
    *,
    first: bool,
    axis: str | None,
) -> tuple[Tree, jax.Array]:
    """As `vae.decode`, which has checked all; gives the next `conv_cache` and frames.

    Latents are taken as they are, normalised: `latent_mean` and `latent_std` have no part in it.
    `conv_cache` is zeros where `first`.
    """
    p, new = params["decoder"], dict[str, Any]()
    x = jnp.tanh(latents.astype(jnp.float32) / _BOUND) * _BOUND
    x = jax.nn.relu(_conv(p["1"], x.astype(latents.dtype), axis))
    for s in stages(cfg):
        for j in range(_MEMORY):
            place = str(s.place + j)
            new[place], x = _memory(p[place]["conv"], conv_cache[place], x, axis)
        grow, up = (str(s.place + _MEMORY + k) for k in (1, 2))
        # One tap: before the upsampling, where the original has it after, it does a quarter.
        x = _frames(blocks.conv_2d(p[grow]["conv"]["weight"], x, 1, (0, 0), (0, 0)), s.time)
        x = blocks.upsample_space(p[up], x, axis)
    x = _conv(p[head(cfg)], jax.nn.relu(x), axis)
    frames = 2 * _unfold(x) - 1
    # Of the first latent's four frames the first three are before the video.
    return new, frames[:, -1:] if first else frames


def _conv(params, x, axis):
    padded, pad_w = blocks.width_padding(x, axis, 1, 1)
    y = blocks.conv_2d(params["weight"], padded, 1, (1, 1), pad_w)
    return y + params["bias"].astype(x.dtype).reshape(1, 1, 1, 1, -1)


def _memory(params, before, x, axis):
    """Three convolutions of each frame beside the one before, and past them the frame."""
    past = jnp.concatenate([before, x[:, :-1]], axis=1)
    y = jax.nn.relu(_conv(params["0"], jnp.concatenate([x, past], axis=-1), axis))
    y = jax.nn.relu(_conv(params["2"], y, axis))
    return x[:, -1:], jax.nn.relu(_conv(params["4"], y, axis) + x)


def _frames(x, time):
    """[.., frame, h, w, time * c] -> [.., time * frame, h, w, c]."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, time, c // time)
    return jnp.moveaxis(x, 4, 2).reshape(b, t * time, h, w, c // time)


def _unfold(x):
    """[.., h, w, 12] -> [.., 2 h, 2 w, 3]; channel 4 c + 2 (row parity) + (column parity)."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // _FOLD**2, _FOLD, _FOLD)
    return x.transpose(0, 1, 2, 5, 3, 6, 4).reshape(b, t, h * _FOLD, w * _FOLD, c // _FOLD**2)
