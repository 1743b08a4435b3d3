"""Settings of the video transformer."""

import dataclasses

from longlive_jax.config.actions import Actions
from longlive_jax.config.section import Count, Layers, Section, divides, refuse

PATCH = 2  # latents a token covers, each way


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """The video transformer. Defaults: Wan2.2-TI2V-5B, 4,999,787,712 parameters."""

    NAME = "model"

    dim: Count = 3072
    ffn_dim: Count = 14336
    num_heads: Count = 24
    num_layers: Layers = 30
    in_dim: Count = 48
    out_dim: Count = 48
    text_dim: Count = 4096
    text_len: Count = 512
    freq_dim: Count = 256
    chunk_frames: Count = 8  # latent frames denoised together
    actions: Actions = Actions()  # "actions" on the command line

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def __post_init__(self):
        super().__post_init__()
        divides("model.dim", self.dim, "model.num_heads", self.num_heads)
        if self.head_dim % 2 or self.head_dim < 6:
            refuse(
                f"model.dim / model.num_heads = {self.head_dim}",
                "must be even and at least 6: rotary positions split it in pairs over three axes",
            )
        if self.freq_dim % 2:
            refuse(f"model.freq_dim={self.freq_dim}", "must be even: half cosines, half sines")
        if self.in_dim != self.out_dim:
            refuse(
                f"model.in_dim={self.in_dim}, model.out_dim={self.out_dim}",
                "must be equal: the model predicts the velocity of its own input",
            )
        self.actions.check(self.chunk_frames, self.num_layers)
