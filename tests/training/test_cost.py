"""Model FLOPs against the figures that the peer was measured with."""

import dataclasses

import pytest

from configs import sample_5b
from longlive_jax import config as lib
from longlive_jax.training import cost, distill_cost


@pytest.mark.parametrize("latents, peta", [(96, 13.068), (384, 146.985)])
def test_a_step_of_the_published_model(latents, peta):
    cfg = lib.from_config_dict(sample_5b.get_config())
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, latent_frames=latents))
    assert round(cost.step_flops(cfg) / 1e15, 3) == peta
    double = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    assert cost.step_flops(double) == 2 * cost.step_flops(cfg)


def test_a_step_of_distillation():
    """5B, 32 latents, 4 steps: of a rollout 3.5 passes in the mean; nothing recomputed counts."""
    cfg = lib.from_config_dict(sample_5b.get_config())
    one, two = (cost.video_flops(cfg, 4, copies) for copies in (1, 2))
    assert one == pytest.approx(435e12, rel=0.01) and two == pytest.approx(2 * one, rel=0.01)

    def flops(student, **distill):
        own = dataclasses.replace(cfg, distill=lib.Distill(**distill))
        return distill_cost.cost(own, student).flops

    critic, both = flops(False), flops(True)
    assert critic == pytest.approx(3.5 * one + 2 * one)
    assert both - critic == pytest.approx(3.5 * one + 2 * two + 3 * one)
    assert flops(False, context="final") == pytest.approx(5 * one + 2 * one)
    assert both - flops(True, guidance=0.0) == pytest.approx(one)
    whole = flops(True, lora=lib.LoRA(enabled=False)) - both
    assert whole == pytest.approx(one + two)
    assert flops(True, batch_size=2, accumulation=3) == pytest.approx(6 * both)
    tokens = distill_cost.cost(dataclasses.replace(cfg, distill=lib.Distill()), True).tokens
    assert tokens == 32 * 880
