"""Parts of a checkpoint, on the devices and in the dtype that a command wants them.

A training run's folder is a checkpoint too: of what it trains, and of the parts of the checkpoint
that it was given.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import quantized, store, workdir
from longlive_jax.errors import InputError
from longlive_jax.models import dit, tokenizer, umt5, vae
from longlive_jax.sampling import stream
from longlive_jax.sampling.script import Text

MODELS = {"dit": dit, "vae": vae, "umt5": umt5}

# What the two directions of the VAE need: a checkpoint may hold a decoder alone.
ENCODER, DECODER = ("encoder", "conv1"), ("decoder", "conv2")


def check(checkpoint: str | None, part: str, cfg: config_lib.Config, only: Sequence[str] = ()):
    """Refuses, without reading an array, what `load` of the same arguments would refuse."""
    section, tree = spec(part, cfg, only)
    trained = _trained(checkpoint, part)
    if trained is not None:
        trained.check(part, tree, section)
    else:
        store.Stored(directory(checkpoint), part).check(tree, section)


def load(
    checkpoint: str | None,
    part: str,
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    only: Sequence[str] = (),
    *,
    weights: str = "average",
    dtype=None,
    rules: dict | None = None,
):
    """Parameters of "dit", "vae" or "umt5", by default in compute dtype, sharded for sampling.

    `only`: top-level subtrees to read; default all. `weights`: which of a training run's, of
    `workdir.WEIGHTS`.
    """
    section, tree = spec(part, cfg, only)
    dtype = cfg.compute_dtype if dtype is None else dtype
    if rules is None:
        # The text encoder runs whole on every device; it is there for a moment only.
        rules = {} if part == "umt5" else mesh_lib.SAMPLING_RULES
    trained = _trained(checkpoint, part)
    if trained is not None:
        return trained.load(part, tree, mesh, dtype, rules, weights)
    where = directory(checkpoint)
    return store.load(where, part, tree, mesh, dtype, rules, config=section)


def check_transformer(checkpoint: str | None, cfg: config_lib.Config):
    """Refuses, without reading an array, what `load_transformer` would refuse."""
    recipe = _stored_recipe(checkpoint)
    if recipe is None:
        check(checkpoint, "dit", cfg)
    else:
        section, tree = spec("dit", cfg)
        own = recipe_lib.get(cfg.quant.recipe)
        store.Stored(directory(checkpoint), "dit").check(tree, section, own)


def load_transformer(
    checkpoint: str | None,
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    weights: str = "average",
):
    """What `stream.Sampler(cfg, mesh)` takes: with quant.recipe, quantised weights.

    They come from a checkpoint that the recipe quantised, or are quantised here.

    Raises:
      InputError: a checkpoint that does not fit, or whose weights cannot be quantised.
    """
    if _stored_recipe(checkpoint) is None:
        params = load(checkpoint, "dit", cfg, mesh, weights=weights)
    else:
        section, tree = spec("dit", cfg)
        params = store.load(
            directory(checkpoint), "dit", tree, mesh, cfg.compute_dtype, mesh_lib.SAMPLING_RULES,
            config=section, recipe=recipe_lib.get(cfg.quant.recipe),
        )  # fmt: skip
    params = stream.Sampler(cfg, mesh).prepare(params)
    return quantized.check(params, f"--checkpoint={checkpoint}")


def parts(checkpoint: str) -> tuple[str, ...]:
    """The parts that a checkpoint, or a training run with the checkpoint it was given, has."""
    if not workdir.is_run(checkpoint):
        return store.parts(checkpoint)
    others = store.parts(directory(checkpoint)) if workdir.read(checkpoint).checkpoint else ()
    return tuple(dict.fromkeys((*workdir.State(checkpoint).trained, *others)))


def embed(
    checkpoint: str | None,
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    prompts: Sequence[str],
    guided: bool,
    weights: str = "average",
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
    params = load(checkpoint, "umt5", cfg, mesh, weights=weights)
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
    return tokenizer.Tokenizer.from_file(os.path.join(directory(checkpoint), tokenizer.FILE))


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


def directory(checkpoint: str | None) -> str:
    """The checkpoint that holds what a training run does not train; any other as it is."""
    if not checkpoint:
        raise InputError("--checkpoint is missing; make one with python -m launch.convert")
    return workdir.parts(checkpoint) if workdir.is_run(checkpoint) else checkpoint


def _trained(checkpoint, part):
    """The state of a training run that has this part, or None."""
    if not checkpoint or not workdir.is_run(checkpoint):
        return None
    state = workdir.State(checkpoint)
    return state if part in state.trained else None


def _stored_recipe(checkpoint):
    """The recipe that quantised the transformer of a checkpoint; None: it is not quantised."""
    if _trained(checkpoint, "dit") is not None:
        return None
    return store.Stored(directory(checkpoint), "dit").recipe


def spec(part: str, cfg: config_lib.Config, only: Sequence[str] = ()):
    """A part's section of the config, and its parameter specs."""
    section = getattr(cfg, {"dit": "model"}.get(part, part))
    whole = MODELS[part].spec(section)
    return section, {name: tree for name, tree in whole.items() if not only or name in only}
