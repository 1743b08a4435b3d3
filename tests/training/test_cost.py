"""Model FLOPs against the figures that the peer was measured with."""

import dataclasses

import pytest

from configs import sample_5b
from longlive_jax import config as lib
from longlive_jax.training import cost


@pytest.mark.parametrize("latents, peta", [(96, 13.068), (384, 146.985)])
def test_a_step_of_the_published_model(latents, peta):
    cfg = lib.from_config_dict(sample_5b.get_config())
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, latent_frames=latents))
    assert round(cost.step_flops(cfg) / 1e15, 3) == peta
    double = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    assert cost.step_flops(double) == 2 * cost.step_flops(cfg)
