"""LongLive-2.0-5B distilled to 2 steps, from the 4-step student's adapters.

    python -m launch.train --config=configs/distill_5b_2step.py --workdir=DIR --checkpoint=AR \\
        --start=FOUR_STEP_DIR --config.data.path=PROMPTS
    python -m launch.convert --config=configs/distill_5b_2step.py --checkpoint=AR --lora=DIR \\
        --output=CKPT

FOUR_STEP_DIR is the run of configs/distill_5b_4step.py, or a LoRA file. Without --start the student
begins as AR. The levels are those of a sampler of two steps: t = 999 and 833.
"""

from configs import distill_5b_4step


def get_config():
    config = distill_5b_4step.get_config()
    config.sample.steps = 2
    return config
