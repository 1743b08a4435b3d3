"""Settings of training by teacher forcing."""

import dataclasses
from typing import Annotated

from longlive_jax.config.section import (
    Count,
    Decay,
    Index,
    NotNegative,
    OneOf,
    Positive,
    Probability,
    Range,
    Section,
)  # fmt: skip

# What a training block keeps for its gradient, from least memory to least recomputation.
REMAT = ("block", "attention", "output", "ffn", "qkv")
GRADERS = ("", "shapes")
TRAINABLE = ("all", "lora", "actions")
TIMESTEPS = 1000  # entries of the noise table


@dataclasses.dataclass(frozen=True)
class ErrorRecycling(Section):
    """The model's own errors, kept and added to later inputs (SVI, arXiv 2510.09212).

    Errors are kept by noise level, in `buckets` rings of `slots` chunks each.
    """

    NAME = "train.error_recycling"

    enabled: bool = False
    buckets: Annotated[int, Range(1, TIMESTEPS)] = 50
    slots: Count = 16  # chunks that a ring keeps; the rings are sharded over all devices
    positions: bool = False  # a ring for each chunk of the video as well
    start_step: Index = 0
    context_probability: Probability = 0.9  # that the clean past is corrupted
    latent_probability: Probability = 0.9  # that clean latents are corrupted, before noise is added
    noise_probability: Probability = 0.01  # that the noise is corrupted
    clean_probability: Probability = 0.2  # that a batch is left alone, whatever the others say
    clean_update_probability: Probability = 0.1  # that the errors of such a batch are kept
    modulation: Probability = 0.3  # an error is scaled by 1 - modulation to 1 + modulation
    replacement: Annotated[str, OneOf(("random", "oldest", "nearest"))] = "random"  # of a full ring
    skip_first_chunk: bool = False  # its clean copy is not corrupted


@dataclasses.dataclass(frozen=True)
class Train(Section):
    """Autoregressive teacher forcing. The defaults are the paper's; frames are latent frames."""

    NAME = "train"

    seed: Index = 0
    steps: Count = 600
    batch_size: Count = 1  # videos a forward, over the whole mesh
    accumulation: Count = 1  # batches a step
    latent_frames: Count = 96
    teacher_forcing: bool = True  # chunks see clean ones before them; False: noisy ones
    # The clean copy is noised to one of this number of lowest levels; 0: it is exactly clean.
    context_levels: Annotated[int, Range(0, TIMESTEPS)] = 0
    text_encoder: bool = False  # the text encoder is trained too
    # What of the transformer is trained. "lora": adapters as distill.lora has them, on a frozen
    # backbone, and the action path whole; "actions": the action path alone.
    trainable: Annotated[str, OneOf(TRAINABLE)] = "all"
    learning_rate: Positive = 1e-5
    warmup_steps: Index = 0
    beta1: Decay = 0.0
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 10.0
    ema_decay: Decay = 0.99
    ema_start: Index = 100  # steps before the EMA begins
    remat: Annotated[str, OneOf(REMAT)] = "output"  # what a block keeps for its gradient
    error_recycling: ErrorRecycling = ErrorRecycling()
    save_every: Count = 50
    keep_last: Count = 3  # checkpoints
    keep_every: Index = 0  # every such step's checkpoint is kept for good; 0: none
    eval_every: Index = 0  # steps between evaluations; 0: none
    eval_steps: Annotated[int, Range(1, TIMESTEPS)] = 50  # of the solver
    eval_chunks: Count = 4
    # Evaluations are graded as videos of this world, and the best is kept; "": they are not.
    eval_grade: Annotated[str, OneOf(GRADERS)] = ""
    max_bad_steps: Count = 10  # steps in a row whose loss, gradient or result is not finite
    # All processes end when one has kept the others waiting for so long. Above it: what one of them
    # may do alone, as writing an evaluation's videos, and a minute for each try of lost storage.
    hang_seconds: Count = 900
