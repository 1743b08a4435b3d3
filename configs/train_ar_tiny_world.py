"""A transformer of 7 million weights, with its text encoder, on the tiny world: minutes on a GPU.

    python -m launch.make_tiny_world --output=tiny_world --clips=768 --seed=0
    python -m launch.train_vae --config=configs/train_vae_tiny_world.py --workdir=vae
    python -m launch.make_text_encoder --config=configs/train_ar_tiny_world.py \\
        --captions=tiny_world/caption --output=vae/checkpoint
    python -m launch.encode_dataset --config=configs/train_ar_tiny_world.py \\
        --config.data.path=tiny_world --config.data.cached=False \\
        --checkpoint=vae/checkpoint --output=tiny_latents
    python -m launch.train --config=configs/train_ar_tiny_world.py --checkpoint=vae/checkpoint \\
        --workdir=run --config.train.eval_every=2000 --config.train.eval_grade=shapes
    python -m launch.export --config=configs/train_ar_tiny_world.py --checkpoint=run --output=CKPT

With the flags of evaluation, held-out prompts of tiny_world/eval are sampled every 2000 steps and
graded (docs/grading.md); run/best has the best weights by that, and may stand for `run` in the last
command.

The recipe is the paper's (teacher forcing, error recycling), with the rates of a small model.
"""

from configs import train_vae_tiny_world


def get_config():
    config = train_vae_tiny_world.get_config()
    config.model.update(
        dim=256, ffn_dim=1024, num_heads=4, num_layers=6, in_dim=16, out_dim=16, text_dim=128,
        text_len=64, freq_dim=128,
    )  # fmt: skip
    config.umt5.update(
        vocab_size=512, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2
    )
    config.video.shift = 3.0
    config.sample.update(steps=20, rope_offset=0.0, vae_latents_per_call=8)
    config.data.update(path="tiny_latents", cached=True, workers=8, eval_path="tiny_world/eval")
    config.train.update(
        steps=8000, batch_size=64, latent_frames=32, text_encoder=True, learning_rate=1e-3,
        warmup_steps=200, beta1=0.9, beta2=0.98, weight_decay=0.01, max_grad_norm=1.0,
        ema_decay=0.998, ema_start=500, remat="qkv", save_every=2000, eval_steps=20,
        eval_chunks=8,
    )  # fmt: skip
    config.train.error_recycling.update(enabled=True, slots=8)
    return config
