"""As train_ar_5b, for image-to-video: the first frame is given, and bears no loss.

    python -m launch.train --config=configs/train_ar_5b_i2v.py --workdir=DIR --checkpoint=CKPT \\
        --config.data.path=VIDEOS
"""

from configs import train_ar_5b


def get_config():
    config = train_ar_5b.get_config()
    config.video.image_to_video = True
    return config
