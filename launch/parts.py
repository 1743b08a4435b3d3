"""Parts of a checkpoint, on the devices and in the dtype that a command wants them."""

import os
from collections.abc import Sequence

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import store
from longlive_jax.errors import InputError
from longlive_jax.models import dit, tokenizer, umt5, vae
from longlive_jax.sampling.script import Text

_MODELS = {"dit": dit, "vae": vae, "umt5": umt5}

# What the two directions of the VAE need: a checkpoint may hold a decoder alone.
ENCODER, DECODER = ("encoder", "conv1"), ("decoder", "conv2")


def check(checkpoint: str | None, part: str, cfg: config_lib.Config, only: Sequence[str] = ()):
    """Refuses, without reading an array, what `load` of the same arguments would refuse."""
    section, spec = _spec(part, cfg, only)
    store.Stored(_directory(checkpoint), part).check(spec, section)


def load(
    checkpoint: str | None,
    part: str,
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    only: Sequence[str] = (),
):
    """Parameters of "dit", "vae" or "umt5" in compute dtype, sharded for sampling.

    `only`: top-level subtrees to read; default all.
    """
    section, spec = _spec(part, cfg, only)
    # The text encoder runs whole on every device; it is there for a moment only.
    rules = {} if part == "umt5" else mesh_lib.SAMPLING_RULES
    where = _directory(checkpoint)
    return store.load(where, part, spec, mesh, cfg.compute_dtype, rules, config=section)


def embed(
    checkpoint: str | None,
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    prompts: Sequence[str],
    guided: bool,
) -> Text:
    """Embeddings of prompts and, if `guided`, of the config's negative prompt, in compute dtype.

    The encoder's weights are there during the call only: they would take as much memory as the
    transformer's.
    """
    read = read_tokenizer(checkpoint, cfg)
    ids, mask = read(prompts, cfg.model.text_len)
    if guided:
        negative = read([cfg.sample.negative_prompt], cfg.model.text_len, allow_empty=True)
        ids, mask = np.concatenate([ids, negative[0]]), np.concatenate([mask, negative[1]])
    params = load(checkpoint, "umt5", cfg, mesh)
    rows = umt5.encode_prompts(params, cfg.umt5, ids, mask, cfg.model.text_len, cfg.compute_dtype)
    return Text(rows[: len(prompts)], rows[-1] if guided else None)


def read_tokenizer(checkpoint: str | None, cfg: config_lib.Config) -> tokenizer.Tokenizer:
    """The checkpoint's tokenizer, once it is sure that its text encoder fits the config."""
    if cfg.umt5.dim != cfg.model.text_dim:
        raise InputError(
            f"config: umt5.dim={cfg.umt5.dim} must equal model.text_dim={cfg.model.text_dim}, "
            "since the transformer reads the text encoder's output"
        )
    check(checkpoint, "umt5", cfg)
    return tokenizer.Tokenizer.from_file(os.path.join(checkpoint, tokenizer.FILE))


def vae_mesh(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, device: int | None
) -> jax.sharding.Mesh:
    """The sampler's mesh, or a mesh of `device` alone (`--vae_device`)."""
    if device is None:
        return mesh
    devices = jax.devices()
    if not 0 <= device < len(devices):
        raise InputError(
            f"--vae_device={device}: must be 0 to {len(devices) - 1}, the devices there are; leave "
            "it out to share the sampler's"
        )
    return mesh_lib.make_mesh(config_lib.Mesh(), devices[device : device + 1])


def _directory(checkpoint):
    if not checkpoint:
        raise InputError("--checkpoint is missing; make one with python -m launch.convert")
    return checkpoint


def _spec(part, cfg, only):
    section = getattr(cfg, {"dit": "model"}.get(part, part))
    spec = _MODELS[part].spec(section)
    return section, {name: tree for name, tree in spec.items() if not only or name in only}
