"""Settings of low-rank adapters."""

import dataclasses

from longlive_jax.config.model import Model
from longlive_jax.config.section import Count, Positive, Section, refuse
from longlive_jax.recipes import LINEARS

ALL = "all"


@dataclasses.dataclass(frozen=True)
class LoRA(Section):
    """Adapters W + (alpha / rank) A B of the blocks' linear layers (arXiv 2106.09685).

    Fused q, k, v have three adapters and fused k, v two, as the original's separate layers have.
    """

    NAME = "distill.lora"

    enabled: bool = True  # False: whole networks are trained
    rank: Count = 128
    alpha: Positive = 128.0
    # "all", or names of `recipes.LINEARS` with commas between: "self_attn.qkv,self_attn.o".
    targets: str = ALL

    def __post_init__(self):
        super().__post_init__()
        known = ", ".join(LINEARS)
        for name in self.paths:
            if name not in LINEARS:
                refuse(
                    f"{self.NAME}.targets={self.targets!r}",
                    f"names {name!r}; it must be {ALL!r}, or some of {known}",
                )
        if len(set(self.paths)) != len(self.paths):
            refuse(f"{self.NAME}.targets={self.targets!r}", "has a name twice; remove one")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths within a block of the layers that have adapters."""
        if self.targets == ALL:
            return tuple(LINEARS)
        return tuple(name.strip() for name in self.targets.split(","))

    @property
    def scale(self) -> float:
        """What the adapters' products are multiplied by."""
        return self.alpha / self.rank

    def check(self, model: Model) -> None:
        """Refuses a rank that no product of this model's adapters can have."""
        if self.rank > model.dim:
            refuse(
                f"{self.NAME}.rank={self.rank}",
                f"must be at most model.dim={model.dim}, the smaller side of every adapted weight",
            )
