"""Settings of number formats."""

import dataclasses
from typing import Annotated

from longlive_jax.config.mesh import Mesh
from longlive_jax.config.model import Model
from longlive_jax.config.section import OneOf, Section, divides
from longlive_jax.recipes import KV_FORMATS, PAYLOADS, RECIPES


@dataclasses.dataclass(frozen=True)
class Quant(Section):
    """Number formats of less than 16 bits. "bf16": none, all is in the compute dtype."""

    NAME = "quant"

    recipe: Annotated[str, OneOf(RECIPES)] = "bf16"  # of the blocks' linear layers
    kv: Annotated[str, OneOf(KV_FORMATS)] = "bf16"  # of the sampler's cache
    all_to_all: Annotated[str, OneOf(PAYLOADS)] = "bf16"  # of what devices exchange in sampling
    vae: Annotated[str, OneOf(("bf16", "fp8"))] = "bf16"  # of the VAE's decoder in sampling

    def check(self, model: Model, mesh: Mesh) -> None:
        """Refuses sizes that the formats' blocks do not divide."""
        payload = PAYLOADS[self.all_to_all]
        if payload is not None:
            block = payload.multiple
            divides("model.dim / model.num_heads", model.head_dim, "numbers a block", block)
        recipe = RECIPES[self.recipe]
        if recipe is not None and recipe.multiple > 1:
            block = recipe.multiple
            divides("model.dim", model.dim, "numbers a block * mesh.fsdp", block * mesh.fsdp)
            divides("model.ffn_dim", model.ffn_dim, "numbers a block", block)
