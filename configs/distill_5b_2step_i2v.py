"""As configs/distill_5b_2step.py, for videos that begin with a given picture.

    python -m launch.train --config=configs/distill_5b_2step_i2v.py --workdir=DIR --checkpoint=AR \\
        --config.data.path=LATENTS

LATENTS is what launch.encode_dataset wrote: rollouts begin with its videos' first frames. Each
chunk is graded at a noise level of its own, and the first frame bears no loss.
"""

from configs import distill_5b_2step


def get_config():
    config = distill_5b_2step.get_config()
    config.video.image_to_video = True
    config.data.cached = True
    return config
