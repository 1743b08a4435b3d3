"""A walk through Doom on one GPU, with a VAE, a text encoder and a transformer trained for it.

    python -m launch.record_doom --output=doom --clips=2000 --seed=0
    python -m launch.train_vae --config=configs/world_doom.py --workdir=vae \\
        --config.data.path=doom --config.train_vae.memory_gib=60
    python -m launch.make_text_encoder --config=configs/world_doom.py --captions=doom/caption \\
        --output=vae/checkpoint
    python -m launch.encode_dataset --config=configs/world_doom.py --config.data.path=doom \\
        --config.data.cached=False --checkpoint=vae/checkpoint --output=latents
    python -m launch.train --config=configs/world_doom.py --checkpoint=vae/checkpoint --workdir=run
    python -m launch.export --config=configs/world_doom.py --checkpoint=run --output=WORLD
    python -m launch.train --config=configs/world_doom.py --config.objective=dmd \\
        --workdir=student --checkpoint=WORLD --config.data.path=doom --config.data.cached=False
    python -m launch.export --config=configs/world_doom.py --config.objective=dmd \\
        --checkpoint=student --output=STUDENT

The sizes are a start and were not measured: nothing has been trained with them yet.
"""

from longlive_jax import config as lib

Z_DIM = 32


def get_config():
    return lib.to_config_dict(
        lib.Config(
            model=lib.Model(
                dim=384, ffn_dim=1536, num_heads=6, num_layers=8, in_dim=Z_DIM, out_dim=Z_DIM,
                text_dim=128, text_len=64, freq_dim=128, chunk_frames=2,
                actions=lib.Actions(
                    kind="module", heads=4, head_dim=32, keyboard_embed=64, layers=4, dropout=0.1
                ),
            ),
            vae=lib.VAE(
                dim=16, dec_dim=16, z_dim=Z_DIM, latent_mean=(0.0,) * Z_DIM,
                latent_std=(1.0,) * Z_DIM,
            ),
            umt5=lib.UMT5(
                vocab_size=512, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2
            ),
            video=lib.Video(height=160, width=256, shift=3.0),
            sample=lib.Sample(
                steps=2, window_frames=16, sink_frames=4, rope_offset=0.0, vae_latents_per_call=2
            ),
            data=lib.Data(path="latents", cached=True, workers=8),
            train=lib.Train(
                steps=12000, batch_size=64, latent_frames=32, text_encoder=True,
                learning_rate=1e-3, warmup_steps=200, beta1=0.9, beta2=0.98, weight_decay=0.01,
                max_grad_norm=1.0, ema_decay=0.999, ema_start=500, remat="qkv", save_every=2000,
                error_recycling=lib.ErrorRecycling(enabled=True, slots=8),
            ),
            train_vae=lib.TrainVAE(steps=12000, kl_weight=3e-4),
            distill=lib.Distill(
                lora=lib.LoRA(enabled=False), steps=2000, batch_size=64, latent_frames=32,
                learning_rate=5e-5, critic_learning_rate=5e-5, beta2=0.98, ema_start=200,
                save_every=500, remat="qkv", action_guidance=1.0,
            ),
        )
    )  # fmt: skip
