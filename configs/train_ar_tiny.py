"""A transformer small enough for a laptop's CPU, trained by teacher forcing on the tiny world.

    python -m launch.demo --output=out/demo
    python -m launch.make_tiny_world --output=out/tiny_world --clips=64 --height=64 --width=96
    python -m launch.encode_dataset --config=configs/train_ar_tiny.py --config.data.cached=False \\
        --config.data.path=out/tiny_world --checkpoint=out/demo/checkpoint --output=out/tiny_latents
    python -m launch.train --config=configs/train_ar_tiny.py --checkpoint=out/demo/checkpoint \\
        --workdir=out/train_ar_tiny

Minutes on two cores. The demo's VAE and text encoder are random: this shows a run, not what it
could learn. Without the third command, --config.data.cached=False and
--config.data.path=out/tiny_world encode while training.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.model.text_len = 160  # tokens of the longest captions
    config.data.path = "out/tiny_latents"
    config.data.cached = True
    config.data.eval_path = "out/tiny_world/eval"
    config.data.workers = 0
    config.train.steps = 300
    config.train.batch_size = 2
    config.train.latent_frames = 32
    config.train.learning_rate = 1e-3
    config.train.beta1 = 0.9
    config.train.ema_decay = 0.95
    config.train.ema_start = 50
    config.train.save_every = 100
    config.train.eval_every = 300
    config.train.eval_steps = 8
    config.train.eval_chunks = 2
    return config
