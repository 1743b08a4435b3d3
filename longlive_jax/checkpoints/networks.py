"""Loads networks of a checkpoint, sharded over a mesh.

A training run's folder is a checkpoint too: of the networks that it trains, and of the other parts
of its --checkpoint. A run that trains adapters, or an action path, on a transformer that it keeps
is read as that transformer with them.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import grown as grown_lib
from longlive_jax.checkpoints import store, workdir
from longlive_jax.checkpoints.parts import PARTS
from longlive_jax.errors import InputError
from longlive_jax.files import remote
from longlive_jax.models import tokenizer

# What the two directions of the VAE need: a checkpoint may hold a decoder alone.
ENCODER, DECODER = ("encoder", "conv1"), ("decoder", "conv2")


def check(
    checkpoint: str | None,
    part: str,
    cfg: config_lib.Config,
    only: Sequence[str] = (),
    *,
    quantized: bool = False,
    grown: bool = False,
) -> None:
    """Refuses, without reading an array, what `load` of the same arguments would refuse.

    grown: what `load_or_init` would.
    """
    section, tree = spec(part, cfg, only)
    if over := _grown(checkpoint, part):
        check(over.base, part, cfg, only, grown=True)
        over.check(cfg)
        return
    trained = _trained(checkpoint, part)
    if trained is not None:
        trained.check(part, tree, section)
        return
    stored = store.Stored(directory(checkpoint), part)
    stored.check(tree, section, _recipe(stored, cfg, quantized), grown=grown)


def load(
    checkpoint: str | None,
    part: str,
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    only: Sequence[str] = (),
    *,
    quantized: bool = False,
    weights: str = "average",
    dtype: Any = None,
    rules: dict | None = None,
) -> params_lib.Tree:
    """Parameters of "dit", "vae" or "umt5", by default in compute dtype, sharded for sampling.

    Args:
      only: top-level subtrees to read; default all.
      quantized: the network may be stored quantised by the config's recipe, and is then read so.
      weights: of a training run, a key of `workdir.WEIGHTS`.

    Raises:
      InputError: a checkpoint that does not fit, or that another recipe quantised; weights of a
        training run that are not finite.
    """
    section, tree = spec(part, cfg, only)
    dtype = cfg.compute_dtype if dtype is None else dtype
    if rules is None:
        # The text encoder runs whole on every device, and is in memory only briefly.
        rules = {} if part == "umt5" else mesh_lib.SAMPLING_RULES
    over, trained = _grown(checkpoint, part), _trained(checkpoint, part)
    if trained is not None:
        if over is not None:
            make = functools.partial(load_or_init, over.base, dtype=dtype, rules=rules)
            below, _ = make(part, cfg, mesh, jax.random.key(0))
            loaded = over.put_on(below, cfg, mesh, rules, weights)
        else:
            loaded = trained.load(part, tree, mesh, dtype, rules, weights)
        if bad := params_lib.not_finite(loaded):
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise InputError(
                f"{checkpoint}: {part}/{bad[0]}{more} of its {weights} weights are not finite: the "
                f"run diverged before step {trained.step}; remove its newest states, or give "
                f"--weights={'latest' if weights == 'average' else 'average'}"
            )
        return loaded
    where = directory(checkpoint)
    recipe = _recipe(store.Stored(where, part), cfg, quantized)
    return store.load(where, part, tree, mesh, dtype, rules, config=section, recipe=recipe)


def load_or_init(
    checkpoint: str, part: str, cfg: config_lib.Config, mesh: jax.sharding.Mesh, key: jax.Array, *,
    some: params_lib.Tree | None = None, dtype: Any = jnp.float32, rules: dict = mesh_lib.RULES,
) -> tuple[params_lib.Tree, tuple[str, ...]]:  # fmt: skip
    """Weights to train on from, by default sharded by `mesh.RULES`: as `store.load_or_init`.

    some: specs of the subtrees to read; None: all.
    """
    section, tree = spec(part, cfg)
    if _trained(checkpoint, part) is not None:
        whole = load(checkpoint, part, cfg, mesh, dtype=dtype, rules=rules)
        leaves, wanted = params_lib.flatten(whole), params_lib.flatten(some or tree)
        return params_lib.unflatten({path: leaves[path] for path in wanted}), ()
    return store.load_or_init(
        directory(checkpoint), part, some or tree, key, mesh, dtype=dtype, rules=rules,
        config=section, some=some is not None,
    )  # fmt: skip


def identity(checkpoint: str, part: str) -> str:
    """What tells a stored part from others, wherever it lies."""
    if (trained := _trained(checkpoint, part)) is not None:
        return f"step {trained.step} of {os.path.basename(remote.absolute(checkpoint))}"
    info = store.Stored(directory(checkpoint), part).info
    return str(info.get("index_checksum") or info["directory"])


def parts(checkpoint: str) -> tuple[str, ...]:
    """The parts of a checkpoint, or of a training run together with its --checkpoint."""
    if not workdir.is_run(checkpoint):
        return store.parts(checkpoint)
    run = workdir.read(checkpoint)
    below = (grown_lib.DIT,) if run.base else ()
    others = store.parts(directory(checkpoint)) if run.checkpoint else ()
    return tuple(dict.fromkeys((*below, *workdir.State(checkpoint).trained, *others)))


def read_tokenizer(checkpoint: str | None, cfg: config_lib.Config) -> tokenizer.Tokenizer:
    """The checkpoint's tokenizer, after a check that its text encoder fits the config."""
    if cfg.umt5.dim != cfg.model.text_dim:
        raise InputError(
            f"config: umt5.dim={cfg.umt5.dim} must equal model.text_dim={cfg.model.text_dim}, "
            "since the transformer reads the text encoder's output"
        )
    check(checkpoint, "umt5", cfg)
    return tokenizer.Tokenizer.from_file(os.path.join(directory(checkpoint), tokenizer.FILE))


def stored_config(checkpoint: str) -> dict[str, Any]:
    """Settings of the networks of a checkpoint, by "section.key".

    Raises:
      InputError: the checkpoint is a training run, which lacks some of them, or lacks a network.
    """
    if workdir.is_run(checkpoint):
        raise InputError(
            f"{checkpoint}: a training run does not keep all settings of its networks; give the "
            "config of its training"
        )
    sections = {p.section: store.Stored(checkpoint, p.name).info["config"] for p in PARTS.values()}
    return {f"{s}.{key}": v for s, made in sections.items() for key, v in made.get(s, {}).items()}


def directory(checkpoint: str | None) -> str:
    """The checkpoint of the parts that a training run does not train; a checkpoint as it is."""
    if not checkpoint:
        raise InputError("--checkpoint is missing; make one with python -m launch.convert")
    return workdir.parts(checkpoint) if workdir.is_run(checkpoint) else checkpoint


def folders(checkpoint: str | None) -> list[str]:
    """What a checkpoint is read from; of a training run also the folder of its other parts."""
    if not checkpoint or not workdir.is_run(checkpoint):
        return [checkpoint] if checkpoint else []
    return [checkpoint, *filter(None, [workdir.read(checkpoint).checkpoint])]


def spec(
    part: str, cfg: config_lib.Config, only: Sequence[str] = ()
) -> tuple[Any, params_lib.Tree]:
    """A part's section of the config, and its parameter specs.

    Raises:
      InputError: an encoder is asked for, and the config's VAE has none.
    """
    section = PARTS[part].config(cfg)
    whole = PARTS[part].spec(section)
    if part == "vae" and "encoder" in set(only) - set(whole):
        raise InputError(
            f"vae.kind={section.kind!r}: only decodes, and videos or pictures are to be encoded "
            "here; give --config.vae.kind=wan, its sizes and its checkpoint"
        )
    return section, {name: tree for name, tree in whole.items() if not only or name in only}


def _trained(checkpoint, part):
    """The state of a training run that has this part, or something of it, or None."""
    if not checkpoint or not workdir.is_run(checkpoint):
        return None
    state = workdir.State(checkpoint)
    if part != grown_lib.DIT:
        return state if part in state.trained else None
    return state if {part, grown_lib.LORA} & set(state.trained) else None


def _grown(checkpoint, part):
    """What a run puts on a transformer that it keeps; None: this is no part of such a run."""
    trained = _trained(checkpoint, part) if part == grown_lib.DIT else None
    return trained and grown_lib.of_run(checkpoint, trained)


def _recipe(stored, cfg, quantized):
    """The recipe that a part must be quantised by; None: it must not be quantised."""
    return recipe_lib.get(cfg.quant.recipe) if quantized and stored.recipe is not None else None
