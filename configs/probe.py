"""Settings that `launch.probe` begins with: float32, and sizes that any chunk divides.

python -m launch.probe actions --config.model.dim=48 --config.model.chunk_frames=3 ...
"""

import math

from longlive_jax import config as lib


def get_config():
    window = math.lcm(*range(1, 17))  # in a stream self-attention sees so much; no probe fills it
    return lib.to_config_dict(
        lib.Config(
            model=lib.Model(num_heads=1, actions=lib.Actions(kind="module", window=0)),
            sample=lib.Sample(window_frames=window, sink_frames=0, multi_shot_sink=False),
            dtype="float32",
        )
    )
