"""LongLive-2.0-5B distilled to 4 steps by distribution matching (arXiv 2605.18739).

    python -m launch.train --config=configs/distill_5b_4step.py --workdir=DIR --checkpoint=AR \\
        --config.data.path=PROMPTS
    python -m launch.convert --config=configs/distill_5b_4step.py --checkpoint=AR --lora=DIR \\
        --output=CKPT

AR is what configs/train_ar_5b.py trained, as a checkpoint (launch.export); PROMPTS are captions
or scripts in any form that launch.sample reads. One device, one rollout of 32 latent frames a step.
More devices, more rollouts: --config.mesh.data=8 --config.distill.batch_size=8; longer rollouts:
--config.mesh.seq=4 --config.distill.latent_frames=96. As the original does, from the base model:
--checkpoint=BASE --config.distill.init=base_then_transplant, and launch.convert --checkpoint=AR.
"""

from longlive_jax import config as lib


def get_config():
    return lib.to_config_dict(
        lib.Config(
            objective="dmd",
            sample=lib.Sample(steps=4),
            # Others found that DMD on this family is best after hundreds of steps: keep some.
            distill=lib.Distill(keep_every=500),
        )
    )
