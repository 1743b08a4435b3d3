"""Settings of distillation to few steps."""

import dataclasses
from typing import Annotated

from longlive_jax.config.lora import LoRA
from longlive_jax.config.section import (
    Count,
    Decay,
    Index,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Section,
    refuse,
)
from longlive_jax.config.train import REMAT, TIMESTEPS
from longlive_jax.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class Distill(Section):
    """Distribution matching distillation (arXiv 2405.14867) on the student's own rollouts.

    The defaults are LongLive-2.0's; frames are latent frames. The student takes `sample.steps`
    steps of `sample.solver`, with the sampler's window, and computes by `quant.recipe`.
    """

    NAME = "distill"

    seed: Index = 0
    steps: Count = 5000
    batch_size: Count = 1  # videos a rollout, over the whole mesh
    accumulation: Count = 1  # rollouts a step
    latent_frames: Count = 32  # of a rollout
    # Rollouts of a step have a random length from this to latent_frames; 0: all have that.
    least_frames: Index = 0
    # Of student and critic; and of teacher forcing with train.trainable='lora'. An action path is
    # trained whole beside the adapters.
    lora: LoRA = LoRA()
    student_every: Count = 5  # the critic is trained every step, the student every so many
    # The step whose result is graded: one for all chunks of a rollout, or one a chunk.
    exit: Annotated[str, OneOf(("shared", "chunk"))] = "shared"
    # What later chunks of a rollout see: the graded latents, or those of the last step.
    context: Annotated[str, OneOf(("exit", "final"))] = "exit"
    # Whether a chunk's gradient goes into the clean keys and values of the chunks before it.
    gradient: Annotated[str, OneOf(("stop", "through"))] = "stop"
    # "ar": all networks begin as the autoregressive model. "base_then_transplant" (the original's):
    # as the base, and the student's adapters are put on the autoregressive model afterwards.
    init: Annotated[str, OneOf(("ar", "base_then_transplant"))] = "ar"
    # The teacher is r_c + guidance (r_c - r_u): with the field's formula a scale of 1 + guidance.
    guidance: Annotated[float, Range(0, 1000)] = 3.0
    # And action_guidance (r_c - r_a) more, r_a under actions of zero; 0: no forward for it.
    action_guidance: Annotated[float, Range(0, 1000)] = 0.0
    least_timestep: Annotated[float, Range(1, TIMESTEPS - 1)] = 20.0  # of the two scores
    most_timestep: Annotated[float, Range(1, TIMESTEPS - 1)] = 980.0
    consistency_levels: Annotated[int, Range(2, TIMESTEPS)] = 50  # of objective="consistency"
    teacher_recipe: Annotated[str, OneOf(RECIPES)] = "bf16"
    critic_recipe: Annotated[str, OneOf(RECIPES)] = "bf16"
    learning_rate: Positive = 1e-5
    critic_learning_rate: Positive = 2e-6
    beta1: Decay = 0.0
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 10.0
    ema_decay: Decay = 0.99
    ema_start: Index = 200  # steps before the student's EMA begins
    remat: Annotated[str, OneOf(REMAT)] = "attention"  # what a block keeps for its gradient
    save_every: Count = 100
    keep_last: Count = 2
    keep_every: Index = 0
    eval_every: Index = 0  # steps between evaluations; 0: none
    eval_chunks: Count = 4
    max_bad_steps: Count = 10
    hang_seconds: Count = 900  # as train.hang_seconds

    def __post_init__(self):
        super().__post_init__()
        if self.least_timestep > self.most_timestep:
            refuse(
                f"distill.least_timestep={self.least_timestep}",
                f"must be at most distill.most_timestep={self.most_timestep}",
            )
        if self.least_frames > self.latent_frames:
            refuse(
                f"distill.least_frames={self.least_frames}",
                f"must be at most distill.latent_frames={self.latent_frames}; 0: no random length",
            )
