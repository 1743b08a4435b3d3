"""The sampler's attention: one chunk's queries over the window's keys."""

import functools

import jax
import jax.numpy as jnp
from absl import flags

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax.ops.attention import attention


def run(cfg: config_lib.Config) -> dict:
    m = cfg.model
    tokens = m.chunk_frames * cfg.video.patches
    window = cfg.sample.window(m).chunks
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, tokens, m.num_heads, m.head_dim)
    q = jax.random.normal(keys[0], shape, cfg.compute_dtype)
    k, v = (
        jax.random.normal(key, (1, window * tokens, *shape[2:]), cfg.compute_dtype)
        for key in keys[1:]
    )
    figures = {
        "queries": tokens,
        "keys": window * tokens,
        "heads": m.num_heads,
        "head_dim": m.head_dim,
    }
    compiled = jax.jit(attention)
    for filled in range(1, window + 1):
        kv_len = jnp.asarray([filled * tokens], jnp.int32)
        call = functools.partial(compiled, q, k, v, kv_len)
        measure.seconds(call, 3)
        mean = measure.mean_seconds(call, max(10, flags.FLAGS.chunks))
        rate = 4 * tokens * filled * tokens * m.dim / mean / 1e12
        figures[f"ms_at_{filled}_chunks"] = round(mean * 1e3, 3)
        figures[f"tflops_at_{filled}_chunks"] = round(rate, 1)
    figures |= measure.device_figures()
    measure.show(figures)
    return figures
