"""The commands. XLA reads its flags when JAX first meets a device: they are set here, before.

Each flag stands with the measurement that put it there; flags of the user's XLA_FLAGS win. Flags of
the sampler's programs alone are in `sampling/stream.py`.
"""

import os

_XLA_FLAGS = {
    # The VAE's 3-D convolutions with channels last: decoding 117 -> 101 ms a latent, encoding
    # 33 -> 27 (H200, 704x1280, bfloat16, 2 latents a call, jax 0.11.2, 2026-11-21).
    "xla_gpu_force_conv_nhwc": "true",
}

_given = os.environ.get("XLA_FLAGS", "")
_added = [f"--{name}={value}" for name, value in _XLA_FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([*_added, _given]).strip()
