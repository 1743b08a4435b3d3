"""Distillation to 4 steps at a size for a laptop's CPU: minutes, to see a run and not a result.

    python -m launch.demo --output=out/demo
    python -m launch.train --config=configs/distill_tiny.py --checkpoint=out/demo/checkpoint \\
        --workdir=out/distill_tiny --config.data.path=PROMPTS
    python -m launch.convert --config=configs/distill_tiny.py --checkpoint=out/demo/checkpoint \\
        --lora=out/distill_tiny --output=out/distilled

PROMPTS is in any form that launch.sample reads. The demo's own weights are random.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.objective = "dmd"
    config.sample.steps = 4
    config.distill.update(
        steps=60, batch_size=2, latent_frames=32, learning_rate=1e-4, critic_learning_rate=1e-4,
        save_every=20, ema_start=20,
    )  # fmt: skip
    config.distill.lora.update(rank=8, alpha=8.0)
    return config
