"""Settings of training a VAE."""

import dataclasses

from longlive_jax.config.section import (
    Count,
    Decay,
    Index,
    NotNegative,
    Positive,
    Probability,
    Section,
    divides,
    refuse,
)  # fmt: skip
from longlive_jax.config.vae import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION


@dataclasses.dataclass(frozen=True)
class TrainVAE(Section):
    """A small VAE from scratch, on the videos of `data.path`. Frames here are pixel frames."""

    NAME = "train_vae"

    seed: Index = 0
    steps: Count = 8000
    batch_size: Count = 16  # clips, over the whole mesh
    frames: Count = 17  # of a clip
    # Of the clips, those that have the end of a video and the start of the next.
    cut_share: Probability = 0.0
    # Pixels of a window of the frames, anywhere in each clip: less to compute a step; 0: all.
    crop_height: Index = 0
    crop_width: Index = 0
    learning_rate: Positive = 1e-3  # at the end of the warm-up; from there a cosine down to 0
    warmup_steps: Index = 200
    weight_decay: NotNegative = 0.01
    max_grad_norm: Positive = 1.0
    ema_decay: Decay = 0.999  # of the weights that are the result
    edge_weight: NotNegative = 0.5  # of the error's differences between neighbouring pixels
    kl_weight: NotNegative = 1e-3  # of the posterior's divergence from a unit Gaussian
    held_out: Count = 4  # folders of videos, the last by name, for evaluation only
    memory_gib: Positive = 8.0  # most that all videos, decoded, may take on each device
    save_every: Count = 500
    log_every: Count = 50

    def __post_init__(self):
        super().__post_init__()
        n = TEMPORAL_COMPRESSION
        if self.frames < 1 + n or self.frames % n != 1:
            refuse(
                f"train_vae.frames={self.frames}",
                f"must be 5, 9, 13, ...: a latent covers {n} frames, the first 1",
            )
        for name in ("crop_height", "crop_width"):
            divides(
                f"train_vae.{name}", getattr(self, name),
                "the pixels that a latent covers", SPATIAL_COMPRESSION,
            )  # fmt: skip
