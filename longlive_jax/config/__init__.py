"""All settings, as frozen dataclasses: one section a file, each of which checks itself.

They are built from an ml_collections ConfigDict, which no other room sees: the dataclasses are
hashable and can be static arguments of `jax.jit`.
"""

from longlive_jax.config.actions import Actions
from longlive_jax.config.config import Config
from longlive_jax.config.data import Data
from longlive_jax.config.distill import Distill
from longlive_jax.config.io import (
    MOVED,
    from_config_dict,
    load_config,
    located,
    renamed,
    to_config_dict,
    with_overrides,
)
from longlive_jax.config.lora import LoRA
from longlive_jax.config.memory import Memory
from longlive_jax.config.mesh import Mesh
from longlive_jax.config.model import PATCH, Model
from longlive_jax.config.quant import Quant
from longlive_jax.config.sample import Sample, WindowSize
from longlive_jax.config.section import values
from longlive_jax.config.text_encoder import UMT5
from longlive_jax.config.train import REMAT, TIMESTEPS, ErrorRecycling, Train
from longlive_jax.config.train_vae import TrainVAE
from longlive_jax.config.training import (
    validate_distillation,
    validate_training,
    validate_vae_training,
)
from longlive_jax.config.vae import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VAE
from longlive_jax.config.video import FRAMES_PER_SECOND, Video

__all__ = [
    "FRAMES_PER_SECOND", "MOVED", "PATCH", "REMAT", "SPATIAL_COMPRESSION", "TEMPORAL_COMPRESSION",
    "TIMESTEPS", "UMT5", "VAE", "Actions", "Config", "Data", "Distill", "ErrorRecycling", "LoRA",
    "Memory", "Mesh", "Model", "Quant", "Sample", "Train", "TrainVAE", "Video", "WindowSize",
    "from_config_dict", "load_config", "located", "renamed", "to_config_dict",
    "validate_distillation", "validate_training", "validate_vae_training", "values",
    "with_overrides",
]  # fmt: skip
