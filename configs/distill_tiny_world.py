"""The tiny world's transformer distilled to 4 steps, on one GPU; whole networks, no adapters.

    python -m launch.train --config=configs/distill_tiny_world.py --checkpoint=CKPT \\
        --workdir=distilled --config.data.path=tiny_world/caption
    python -m launch.export --config=configs/distill_tiny_world.py --checkpoint=distilled \\
        --output=STUDENT

CKPT is what configs/train_ar_tiny_world.py trained; tiny_world is what launch.make_tiny_world made.
Two steps: --config.sample.steps=2. First a student that needs no rollouts, by consistency on the
same latents as the transformer: --config.objective=consistency --config.data.path=tiny_latents
--config.data.cached=True.
"""

from configs import train_ar_tiny_world


def get_config():
    config = train_ar_tiny_world.get_config()
    config.objective = "dmd"
    config.sample.update(steps=4, guidance_scale=1.0)
    config.data.update(cached=False)
    config.train.update(text_encoder=False)
    config.train.error_recycling.enabled = False
    config.distill.lora.enabled = False
    config.distill.update(
        steps=2000, batch_size=64, latent_frames=32, learning_rate=5e-5, critic_learning_rate=5e-5,
        beta2=0.98, ema_start=200, save_every=500, remat="qkv",
    )  # fmt: skip
    return config
