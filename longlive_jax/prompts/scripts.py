"""The script of a stream as a file that `shots.read` reads: the same video, once more."""

from collections.abc import Sequence
from typing import Any

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import Actions
from longlive_jax.prompts import shots

# What a script's latents depend on beside the checkpoint, by the names of the flags.
_SETTINGS = (
    "sample.steps", "sample.solver", "sample.guidance_scale", "sample.negative_prompt",
    "video.height", "video.width", "video.shift", "quant.recipe", "quant.kv", "dtype",
)  # fmt: skip
_OWN = ("steps", "guidance")  # of a shot, in place of the settings


def settings(cfg: config_lib.Config) -> dict[str, Any]:
    """The settings that are compared when a script is played again."""
    values = {}
    for name in _SETTINGS:
        value: Any = cfg
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    for name in ("references", "landmarks"):
        values[f"memory.{name}"] = getattr(cfg.sample.memory, name)
    if cfg.model.actions.kind != "none":
        values["actions.guidance"] = cfg.model.actions.guidance
    return values


def make(
    cfg: config_lib.Config,
    directions: Sequence[Any],
    chunks: int,
    *,
    seed: int,
    begins_with: str | None = None,
    actions: Actions | None = None,
) -> dict[str, Any]:
    """A JSON object of one stream (row 0).

    Args:
      directions: `Session.script`; its steps and guidance, where they are not `cfg`'s, are those of
        the shots.
      chunks: how many the stream has made.
      begins_with: "image" or "clip", which the script does not hold.
      actions: `Session.record`, of a model with an action path.
    """
    given = {} if actions is None else {"actions": sidecars.rows(actions)}
    return {
        "format": shots.SCRIPT,
        "version": 1,
        "seed": seed,
        "begins_with": begins_with,
        "settings": settings(cfg),
        **given,
        "shots": _shots(cfg.sample.scene_cut_prefix, directions, chunks),
    }


def _shots(prefix: str, directions, chunks: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    ends = [d.chunk for d in directions[1:]] + [chunks]
    for direction, end in zip(directions, ends):
        length = end - direction.chunk
        cut, blend = bool(direction.cut[0]), dict[str, Any]()
        prompt = direction.prompts[0]
        if entries:
            prompt = prompt.removeprefix(prefix)
        if direction.weights:
            blend = {"toward": direction.toward[0], "weight": direction.weights[0]}
        own = {} if direction.steps is None else {"steps": direction.steps}
        own |= {"guidance": direction.guidance[0]} if direction.guidance else {}
        plain = entries and entries[-1]["cut"] and "toward" not in entries[-1]
        plain = plain and own == {k: v for k, v in entries[-1].items() if k in _OWN}
        if plain and entries[-1]["prompt"] == prompt and not (cut or direction.recache or blend):
            entries[-1]["chunks"] += length  # the second chunk of a shot: without the prefix
            continue
        entry = {"prompt": prompt, "chunks": length, "cut": cut} | blend | own
        if entries and not cut:
            entry["recache"] = direction.recache
        entries.append(entry)
    return entries
