"""All settings of a run, and the checks that span sections."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from longlive_jax.config.data import Data
from longlive_jax.config.distill import Distill
from longlive_jax.config.mesh import Mesh
from longlive_jax.config.model import Model
from longlive_jax.config.quant import Quant
from longlive_jax.config.sample import Sample
from longlive_jax.config.section import OneOf, Section, divides, refuse
from longlive_jax.config.text_encoder import UMT5
from longlive_jax.config.train import Train
from longlive_jax.config.train_vae import TrainVAE
from longlive_jax.config.vae import VAE
from longlive_jax.config.video import Video


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All settings. `dtype` is the compute dtype; parameters are kept in their own."""

    NAME = ""

    model: Model = Model()
    vae: VAE = VAE()
    umt5: UMT5 = UMT5()
    mesh: Mesh = Mesh()
    video: Video = Video()
    sample: Sample = Sample()
    quant: Quant = Quant()
    data: Data = Data()
    train: Train = Train()
    train_vae: TrainVAE = TrainVAE()
    distill: Distill = Distill()
    objective: Annotated[str, OneOf(("teacher_forcing", "dmd", "consistency"))] = "teacher_forcing"
    dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "bfloat16"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def branches(self) -> int:
        """Rows of a stream in a forward: one, and one for each guidance."""
        return 1 + self.sample.guided + self.model.actions.guided

    def __post_init__(self):
        super().__post_init__()
        model, mesh = self.model, self.mesh
        self.sample.check(model)
        self.quant.check(model, mesh)
        if self.quant.vae != "bf16" and self.vae.kind != "wan":
            refuse(
                f"quant.vae={self.quant.vae!r}",
                f"is for vae.kind='wan', not {self.vae.kind!r}; set quant.vae='bf16'",
            )
        divides("model.num_heads", model.num_heads, "mesh.seq", mesh.seq)
        divides("model.chunk_frames", model.chunk_frames, "mesh.seq", mesh.seq)
        divides("model.dim", model.dim, "mesh.fsdp * mesh.seq", mesh.fsdp * mesh.seq)
        if model.actions.kind == "module":
            divides("actions.heads", model.actions.heads, "mesh.seq", mesh.seq)
            width, by = model.actions.width, mesh.fsdp * mesh.seq
            divides("actions.heads * actions.head_dim", width, "mesh.fsdp * mesh.seq", by)
