"""A VAE of the Wan2.2 architecture, 1/190 of its size, trained on the tiny world from scratch.

    python -m launch.make_tiny_world --output=tiny_world --clips=256 --seed=0
    python -m launch.train_vae --config=configs/train_vae_tiny_world.py --workdir=DIR

DIR/checkpoint then is a checkpoint that `launch.encode` and `launch.decode` read.
"""

from longlive_jax import config as lib

Z_DIM = 16


def get_config():
    return lib.to_config_dict(
        lib.Config(
            vae=lib.VAE(
                dim=16,
                dec_dim=16,
                z_dim=Z_DIM,
                latent_mean=(0.0,) * Z_DIM,
                latent_std=(1.0,) * Z_DIM,
            ),
            video=lib.Video(height=128, width=192),
            data=lib.Data(path="tiny_world"),
            train_vae=lib.TrainVAE(steps=5300),
        )
    )
