"""LongLive-2.0's autoregressive stage: teacher forcing with error recycling (arXiv 2605.18739).

    python -m launch.train --config=configs/train_ar_5b.py --workdir=DIR --checkpoint=CKPT \\
        --config.data.path=VIDEOS

CKPT holds Wan2.2-TI2V-5B, its VAE and its text encoder; VIDEOS has video/ and caption/. Four
devices, one video of 96 latent frames (381 frames) a step; 600 steps. More devices, more videos:
--config.mesh.data=16 --config.train.batch_size=16. For 384 latent frames:
--config.train.latent_frames=384 --config.train.accumulation=4 --config.data.max_chunks_per_shot=4.
"""

from longlive_jax import config as lib


def get_config():
    return lib.to_config_dict(
        lib.Config(
            mesh=lib.Mesh(seq=4),
            # Of evaluations; this stage's model is not yet distilled to few steps.
            sample=lib.Sample(guidance_scale=3.0),
            train=lib.Train(error_recycling=lib.ErrorRecycling(enabled=True)),
        )
    )
