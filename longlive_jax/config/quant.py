"""Settings of number formats."""

import dataclasses
from typing import Annotated

from longlive_jax.config.mesh import Mesh
from longlive_jax.config.model import Model
from longlive_jax.config.section import OneOf, Section, divides
from longlive_jax.config.video import Video

KV_FORMATS = ("bf16", "fp8", "nvfp4")  # what `quant.kv` knows
PAYLOADS = ("bf16", "nvfp4")  # what `quant.all_to_all` knows
# Those of `quant.recipe`, and whether they say how gradients are computed.
RECIPES = {
    "bf16": True, "fp8": False, "fp8_train": True, "nvfp4_ar": True, "nvfp4_dmd": True,
    "nvfp4_te": True, "nvfp4_w4a4": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quant(Section):
    """Number formats of less than 16 bits. "bf16": none, all is in the dtype of compute."""

    NAME = "quant"

    recipe: Annotated[str, OneOf(RECIPES)] = "bf16"  # of the blocks' linear layers
    kv: Annotated[str, OneOf(KV_FORMATS)] = "bf16"  # of the sampler's cache
    all_to_all: Annotated[str, OneOf(PAYLOADS)] = "bf16"  # of what devices exchange in sampling

    def check(self, model: Model, video: Video, mesh: Mesh) -> None:
        """Refuses sizes that the formats' blocks do not divide."""
        if self.kv == "fp8":
            divides(
                f"model.chunk_frames x patches of {video.height} x {video.width} pixels",
                model.chunk_frames * video.patches,
                "tokens that quant.kv='fp8' stores together",
                16,
            )
        if "nvfp4" in (self.kv, self.all_to_all):
            divides("model.dim / model.num_heads", model.head_dim, "numbers a block", 16)
        if self.recipe.startswith("nvfp4"):
            divides("model.dim", model.dim, "numbers a block * mesh.fsdp", 16 * mesh.fsdp)
            divides("model.ffn_dim", model.ffn_dim, "numbers a block", 16)
