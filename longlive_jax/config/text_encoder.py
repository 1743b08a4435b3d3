"""Settings of the text encoder."""

import dataclasses

from longlive_jax.config.section import Count, Layers, Section, divides, refuse


@dataclasses.dataclass(frozen=True)
class UMT5(Section):
    """The text encoder. Defaults: UMT5-XXL, 5,680,910,336 parameters."""

    NAME = "umt5"

    vocab_size: Count = 256384
    dim: Count = 4096
    dim_attn: Count = 4096
    dim_ffn: Count = 10240
    num_heads: Count = 64
    num_layers: Layers = 24
    num_buckets: Count = 32

    def __post_init__(self):
        super().__post_init__()
        divides("umt5.dim_attn", self.dim_attn, "umt5.num_heads", self.num_heads)
        if self.num_buckets < 4 or self.num_buckets % 2:
            refuse(f"umt5.num_buckets={self.num_buckets}", "must be even and at least 4")
