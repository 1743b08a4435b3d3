"""Parts of a checkpoint, on the devices and in the dtype that a command wants them."""

import os

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import store
from longlive_jax.errors import InputError
from longlive_jax.models import dit, tokenizer, umt5, vae

_MODELS = {"dit": dit, "vae": vae, "umt5": umt5}


# What the two directions of the VAE need: a checkpoint may hold a decoder alone.
ENCODER, DECODER = ("encoder", "conv1"), ("decoder", "conv2")


def load(
    checkpoint: str | None, part: str, cfg: config_lib.Config, mesh: jax.sharding.Mesh, only=()
):
    """Parameters of "dit", "vae" or "umt5" in compute dtype, sharded for sampling.

    `only`: top-level subtrees to read; default all.
    """
    if not checkpoint:
        raise InputError("--checkpoint is missing; make one with python -m launch.convert")
    section = getattr(cfg, {"dit": "model"}.get(part, part))
    spec = _MODELS[part].spec(section)
    spec = {name: tree for name, tree in spec.items() if not only or name in only}
    # The text encoder runs whole on every device; it is there for a moment only.
    rules = {} if part == "umt5" else mesh_lib.SAMPLING_RULES
    return store.load(checkpoint, part, spec, mesh, cfg.compute_dtype, rules, config=section)


def text_encoder(checkpoint: str | None, cfg: config_lib.Config, mesh: jax.sharding.Mesh):
    """A function from texts to embeddings [text, text_len, text_dim] in compute dtype.

    The encoder's weights are loaded at its first call and freed after it: they would take as much
    memory as the transformer's.
    """
    if cfg.umt5.dim != cfg.model.text_dim:
        raise InputError(
            f"config: umt5.dim={cfg.umt5.dim} must equal model.text_dim={cfg.model.text_dim}, since "
            "the transformer reads the text encoder's output"
        )

    def encode(texts: list[str], allow_empty: bool = False) -> np.ndarray:
        backend = tokenizer.Tokenizer.from_file(os.path.join(checkpoint or "", tokenizer.FILE))
        ids, mask = backend(texts, cfg.model.text_len, allow_empty=allow_empty)
        params = load(checkpoint, "umt5", cfg, mesh)
        return umt5.encode_prompts(
            params, cfg.umt5, ids, mask, cfg.model.text_len, cfg.compute_dtype
        )

    return encode


def vae_mesh(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, device: int | None
) -> jax.sharding.Mesh:
    """The sampler's mesh, or a mesh of `device` alone (`--vae_device`)."""
    if device is None:
        return mesh
    devices = jax.devices()
    if not 0 <= device < len(devices):
        raise InputError(f"--vae_device={device}: there are devices 0 to {len(devices) - 1}")
    return mesh_lib.make_mesh(config_lib.Mesh(), devices[device : device + 1])
