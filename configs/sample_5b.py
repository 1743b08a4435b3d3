"""LongLive-2.0-5B streamed at 704x1280, 4 steps (arXiv 2605.18739, table 3; bfloat16).

    python -m launch.sample --config=configs/sample_5b.py --checkpoint=CKPT --prompts=FILE \\
        --output=out.mp4
    python -m launch.bench stream --config=configs/sample_5b.py
"""

from longlive_jax import config as lib


def get_config():
    return lib.to_config_dict(lib.Config())
