"""Floating-point operations of the sampler, by formula: what a rate in a report is divided by."""

from longlive_jax import config as config_lib
from longlive_jax.config import PATCH
from longlive_jax.models import actions


def forward_flops(cfg: config_lib.Model, tokens: int, keys: int, layers: int | None = None) -> int:
    """Of one forward of a chunk: `tokens` queries that see `keys` keys in each of `layers` layers.

    Matrix products of the linears, of self-attention and of cross-attention; a multiply and an add
    count as two.
    """
    d = cfg.dim
    linears = 2 * tokens * (4 * d * d + 2 * d * d + 2 * d * cfg.ffn_dim)
    attention = 4 * tokens * keys * d + 4 * tokens * cfg.text_len * d
    return (cfg.num_layers if layers is None else layers) * (linears + attention)


def chunk_flops(cfg: config_lib.Config, height: int, width: int) -> int:
    """Of denoising and committing one chunk of latents [height, width] with a full window."""
    m = cfg.model
    tokens = m.chunk_frames * (height // PATCH) * (width // PATCH)
    keys = tokens * cfg.sample.window(m).chunks
    text = 2 * m.text_len * (m.text_dim * m.dim + m.dim**2 + m.num_layers * 2 * m.dim**2)
    denoise = cfg.sample.steps * forward_flops(m, tokens, keys)
    commit = _clean_pass(m, tokens, keys)
    path = (cfg.sample.steps + 1) * actions.flops(m, tokens)
    return cfg.branches * (denoise + commit + text + path)


def landmark_flops(cfg: config_lib.Config, height: int, width: int) -> int:
    """Of showing one landmark: its clean pass, which sees references and sinks, and its text.

    A chunk shows as many as have changed since the chunk before, `memory.landmarks` at most.
    """
    m, size = cfg.model, cfg.sample.window(cfg.model)
    tokens = m.chunk_frames * (height // PATCH) * (width // PATCH)
    text = 2 * m.text_len * (m.text_dim * m.dim + m.dim**2 + m.num_layers * 2 * m.dim**2)
    shown = _clean_pass(m, tokens, tokens * (1 + size.references + size.sinks))
    return cfg.branches * (shown + text + actions.flops(m, tokens))


def _clean_pass(m, tokens, keys):
    """Of the last layer keys and values alone."""
    return forward_flops(m, tokens, keys, m.num_layers - 1) + 2 * tokens * 2 * m.dim**2
