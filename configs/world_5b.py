"""LongLive-2.0-5B with a keyboard and a mouse: the action path trained on a frozen backbone.

    python -m launch.train --config=configs/world_5b.py --workdir=DIR --checkpoint=CKPT \\
        --config.data.path=VIDEOS
    python -m launch.export --config=configs/world_5b.py --checkpoint=DIR --output=WORLD
    python -m launch.train --config=configs/world_5b.py --config.objective=dmd --workdir=RUN \\
        --checkpoint=WORLD --config.data.path=VIDEOS --config.sample.guidance_scale=1.0
    python -m launch.convert --config=configs/world_5b.py --checkpoint=WORLD --lora=RUN \\
        --output=STUDENT

CKPT holds the autoregressive model of configs/train_ar_5b.py, its VAE and its text encoder; VIDEOS
has video/ with a sidecar beside each mp4, and caption/ (docs/worlds.md). Chunks are two latents, a
third of a second, so that a key is seen soon. --config.train.trainable=lora trains adapters beside
the action path, =all everything. The last two commands make a student of 2 steps.
"""

from longlive_jax import config as lib


def get_config():
    return lib.to_config_dict(
        lib.Config(
            model=lib.Model(chunk_frames=2, actions=lib.Actions(kind="module", dropout=0.1)),
            sample=lib.Sample(steps=2, guidance_scale=3.0, window_frames=16, sink_frames=4),
            train=lib.Train(trainable="actions", latent_frames=32, learning_rate=1e-4),
            # Little: who does nothing stands still, which is an action too.
            distill=lib.Distill(latent_frames=32, action_guidance=1.0),
        )
    )
