"""Floating-point operations of a distillation step, by formula."""

from longlive_jax import config as config_lib
from longlive_jax.training.cost import video_flops
from longlive_jax.training.objective import Cost


def cost(cfg: config_lib.Config, student: bool) -> Cost:
    """Of a step; `student`: it trains the student too.

    Each network's loss has a rollout of its own: of N steps 1 to N are run, (N + 1) / 2 in the mean
    (all with distill.context="final"), and the clean pass. The critic's loss is one forward and its
    gradient, the student's a forward with a clean copy, its gradient, and the scores: the critic's,
    the teacher's and, with guidance, the teacher's without prompt, and without actions. A gradient
    is one forward's work for the activations, and with whole networks another for the weights.
    Nothing that is recomputed counts, nor adapters.
    """
    d, m = cfg.distill, cfg.model
    chunks = d.latent_frames // m.chunk_frames
    one, two = (video_flops(cfg, chunks, copies) for copies in (1, 2))
    steps = cfg.sample.steps if d.context == "final" else (cfg.sample.steps + 1) / 2
    rollout = (steps + 1) * one
    trained = 2 if d.lora.enabled else 3
    flops = rollout + trained * one
    if student:
        scores = 2 + (1 if d.guidance else 0) + (1 if d.action_guidance else 0)
        flops += rollout + trained * two + scores * one
    videos = d.batch_size * d.accumulation
    tokens = d.latent_frames * cfg.video.patches * videos
    return Cost(tokens, int(flops * videos))
