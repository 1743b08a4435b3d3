"""A transformer, VAE and text encoder small enough for a laptop's CPU; same architecture as 5B.

python -m launch.sample --config=configs/tiny.py --checkpoint=CKPT --prompts=FILE --output=out.mp4
"""

from longlive_jax import config as lib


def get_config():
    return lib.to_config_dict(
        lib.Config(
            model=lib.Model(
                dim=64, ffn_dim=128, num_heads=8, num_layers=2, in_dim=4, out_dim=4,
                text_dim=32, text_len=32, freq_dim=32,
            ),
            vae=lib.VAE(dim=8, dec_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
            umt5=lib.UMT5(
                vocab_size=512, dim=32, dim_attn=32, dim_ffn=64, num_heads=4, num_layers=2
            ),
            video=lib.Video(height=64, width=96),
            sample=lib.Sample(chunks=4),
            dtype="float32",
        )
    )  # fmt: skip
