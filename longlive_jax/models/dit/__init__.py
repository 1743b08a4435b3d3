"""The causal video transformer of LongLive-2.0 (Wan2.2-TI2V-5B, chunk by chunk), as pure functions.

Hidden states are [batch, chunk, (copy,) frame, patch, dim]: a chunk's tokens, with its frames kept
apart so that values of a frame (timestep, temporal position) broadcast. Four uses:

  teacher_forcing   training: a clean and a noisy copy of every chunk side by side (copy axis)
  block_causal      training without a clean past
  denoise           sampling: velocity of one chunk; reads the KV cache
  commit            sampling: the clean pass; writes the chunk's keys and values into the cache

A block is a tuple of branches (`models.branch`); `branches_of` gives a config's.
"""

from longlive_jax.config import PATCH
from longlive_jax.models.branch import Attention, Branch, Hidden, Layer, insert
from longlive_jax.models.dit.block import BRANCHES, SELF_ATTENTION, over_chunks
from longlive_jax.models.dit.spec import branches_of, layers, sampling_spec, spec
from longlive_jax.models.dit.stream import (
    Caches,
    Text,
    commit,
    denoise,
    hidden_states,
    text_keys_values,
)
from longlive_jax.models.dit.train import PastView, block_causal, teacher_forcing
from longlive_jax.models.precision import Precision
from longlive_jax.models.sharding import Sharding

__all__ = [
    "BRANCHES", "PATCH", "SELF_ATTENTION", "Attention", "Branch", "Caches", "Hidden", "Layer",
    "PastView", "Precision", "Sharding", "Text", "block_causal", "branches_of", "commit", "denoise",
    "hidden_states", "insert", "layers", "over_chunks", "sampling_spec", "spec",
    "teacher_forcing", "text_keys_values",
]  # fmt: skip
