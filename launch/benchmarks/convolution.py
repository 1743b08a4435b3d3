"""The VAE decoder's 3 x 3 x 3 convolutions, one of each stage, in bfloat16 and in FP8.

    python -m launch.bench convolution --config=configs/sample_5b.py

FP8: E4M3 codes with one scale an array, float32 sums; making the codes of the input is not timed.
Where XLA cannot compile that (jax 0.11.2 on an H200: cuDNN refuses XLA's graph) the report says so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax.formats import quantize_fp8
from longlive_jax.models import vae, vae_spec

TAPS = 3


def run(cfg: config_lib.Config) -> dict:
    figures = {}
    for channels, frames, height, width in stages(cfg):
        # A causal convolution is given the two frames before its input.
        shape = (1, frames + TAPS - 1, height, width, channels)
        keys = jax.random.split(jax.random.key(channels * height))
        x = jax.nn.silu(jax.random.normal(keys[0], shape, cfg.compute_dtype))
        taps = (TAPS, TAPS, TAPS, channels, channels)
        w = jax.random.normal(keys[1], taps, cfg.compute_dtype)
        w = w * (TAPS**3 * channels) ** -0.5
        operations = 2 * TAPS**3 * channels**2 * frames * height * width
        name = f"{channels}x{frames}x{height}x{width}"
        plain = _timed(figures, f"{name}_bf16", _plain(x, w), operations)
        try:
            result = _timed(figures, f"{name}_fp8", _fp8(x, w), operations)
        except jax.errors.JaxRuntimeError as error:
            figures[f"{name}_fp8_refused"] = str(error)[:200]
            continue
        difference = np.linalg.norm(result - plain) / np.linalg.norm(plain)
        figures[f"{name}_fp8_error"] = round(float(difference), 5)
    figures |= measure.device_figures()
    measure.show(figures)
    return figures


def stages(cfg: config_lib.Config) -> list[tuple[int, int, int, int]]:
    """Channels, frames, height and width of each stage of a call of the decoder."""
    frames, height, width = cfg.sample.vae_latents_per_call, cfg.video.height, cfg.video.width
    height, width = height // vae.PIXELS, width // vae.PIXELS
    sizes = []
    for stage in vae_spec.decoder_stages(cfg.vae):
        sizes.append((stage.out_dim, frames, height, width))
        frames, height, width = frames * stage.time, 2 * height, 2 * width
    return sizes


def _timed(figures, name, call, operations):
    """The call's result; its time and rate go to `figures`."""
    result = np.asarray(call(), np.float32)
    seconds = measure.mean_seconds(call, flags.FLAGS.chunks)
    figures[f"{name}_us"] = round(seconds * 1e6, 1)
    figures[f"{name}_tflops"] = round(operations / seconds / 1e12, 1)
    return result


def _plain(x, w):
    return functools.partial(jax.jit(functools.partial(_convolve, dtype=x.dtype)), x, w)


def _fp8(x, w):
    x, w = (jax.jit(quantize_fp8)(y) for y in (x, w))

    @jax.jit
    def call(x, w, scale):
        y = _convolve(x, w, jnp.float32)
        return (y * scale).astype(jnp.bfloat16)

    scale = (x.scale * w.scale).reshape(1, 1, 1, 1, 1)
    return functools.partial(call, x.values, w.values, scale)


def _convolve(x, w, dtype):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1, 1),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        preferred_element_type=dtype,
    )
