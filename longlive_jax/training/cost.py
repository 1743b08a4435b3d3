"""Floating-point operations of a training step, by formula: what a reported rate divides."""

from longlive_jax import config as config_lib
from longlive_jax.config import PATCH, REMAT
from longlive_jax.models import actions
from longlive_jax.training import batch as batch_lib

# Dense bfloat16 peak of a device, TFLOP/s, by the vendors' data sheets.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}


def video_tokens(cfg: config_lib.Config) -> int:
    """Of one training sample, each of its two copies."""
    _, height, width, _ = batch_lib.chunk_shape(cfg)
    return cfg.train.latent_frames * (height // PATCH) * (width // PATCH)


def forward_flops(cfg: config_lib.Config) -> int:
    """Of the transformer's blocks on one training sample; see `video_flops`."""
    copies = 2 if cfg.train.teacher_forcing else 1
    return video_flops(cfg, batch_lib.chunks(cfg), copies)


def video_flops(cfg: config_lib.Config, chunks: int, copies: int) -> int:
    """Of one forward of the transformer's blocks on a video of so many chunks.

    Matrix products of the linears, of self-attention over the chunk pairs that attend (N^2 + N of
    them with a clean and a noisy copy of N chunks, (N^2 + N) / 2 with one) and of cross-attention;
    a multiply and an add count as two.
    """
    m, n, d = cfg.model, chunks, cfg.model.dim
    chunk = m.chunk_frames * cfg.video.patches
    tokens = copies * n * chunk
    linears = 2 * tokens * (6 * d * d + 2 * d * m.ffn_dim)
    text = 2 * n * m.text_len * 2 * d * d  # keys and values, once a chunk
    pairs = copies * (n * n + n) // 2 * chunk**2
    attention = 4 * d * (pairs + tokens * m.text_len)
    return m.num_layers * (linears + text + attention) + actions.flops(m, tokens)


def step_flops(cfg: config_lib.Config) -> int:
    """Model FLOPs of a step: three forwards of each video; no recomputation counted.

    On a frozen backbone two: what is trained there is small.
    """
    forwards = 3 if cfg.train.trainable == "all" else 2
    return forwards * forward_flops(cfg) * cfg.train.batch_size * cfg.train.accumulation


def recomputed_flops(cfg: config_lib.Config) -> int:
    """Of matrix products and attention that a step's backward does again, by train.remat."""
    m, tokens, n = cfg.model, video_tokens(cfg), batch_lib.chunks(cfg)
    kept = REMAT.index(cfg.train.remat)
    copies = 2 if cfg.train.teacher_forcing else 1
    d = m.dim
    linears = {"output": 2 * d * d + d * m.ffn_dim, "ffn": d * m.ffn_dim, "qkv": 3 * d * d}
    again = sum(flops for name, flops in linears.items() if kept < REMAT.index(name)) + d * d
    again = 2 * copies * tokens * again + 4 * d * copies * tokens * m.text_len
    again += 2 * n * m.text_len * 2 * d * d
    if kept < REMAT.index("attention"):
        again += 4 * d * (copies * (n * n + n) // 2 * (tokens // n) ** 2)
    return m.num_layers * again * cfg.train.batch_size * cfg.train.accumulation
