"""A world of 1.3 billion weights at 480x832, with a keyboard and a mouse: Wan2.1-1.3B's widths.

    python -m launch.train --config=configs/world_1_3b.py --workdir=DIR --config.data.path=VIDEOS \\
        --checkpoint=CKPT

CKPT holds a VAE and a text encoder, and perhaps a transformer of these sizes; VIDEOS as in
configs/world_5b.py, whose other commands serve as well. All weights are trained.
"""

from configs import world_5b


def get_config():
    config = world_5b.get_config()
    config.model.update(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    config.video.update(height=480, width=832)
    config.train.update(trainable="all", learning_rate=1e-5)
    return config
