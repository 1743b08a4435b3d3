"""The kinds of network that weights are converted for, and the settings that give their shapes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit, umt5, vae

_HEAD_DIM = 128  # of every Wan transformer; no shape depends on it

Shapes = Mapping[str, tuple[int, ...]]  # by the original's keys


@dataclasses.dataclass(frozen=True)
class Part:
    """A kind of network: its section of the config, its specs, and sizes by tensors' shapes."""

    name: str
    section: str
    spec: Callable[[Any], params_lib.Tree]
    sizes: Callable[[Shapes], dict[str, Any]]

    def config(self, config: config_lib.Config) -> Any:
        return getattr(config, self.section)

    def overrides(self, found: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """The changes that give `config`, a section, the sizes `found`; may be empty."""
        if self.name == "dit" and found.get("dim", config.dim) != config.dim:
            found = {**found, "num_heads": max(1, found["dim"] // _HEAD_DIM)}
        return {k: v for k, v in found.items() if v != getattr(config, k)}


def _dit_sizes(shapes: Shapes) -> dict[str, int]:
    head = _dim(shapes, "head.head.weight", 0)
    return _known(
        dim=_dim(shapes, "patch_embedding.weight", 0),
        ffn_dim=_dim(shapes, "blocks.0.ffn.0.weight", 0),
        num_layers=_layers(shapes),
        in_dim=_dim(shapes, "patch_embedding.weight", 1),
        out_dim=head // 4 if head else None,
        text_dim=_dim(shapes, "text_embedding.0.weight", 1),
        freq_dim=_dim(shapes, "time_embedding.0.weight", 1),
    )


def _vae_sizes(shapes: Shapes) -> dict[str, Any]:
    if last := _dim(shapes, "decoder.22.weight", 1):
        return _known(kind="taehv", dec_dim=last, z_dim=_dim(shapes, "decoder.1.weight", 1))
    return _known(
        kind="wan",
        dim=_dim(shapes, "encoder.conv1.weight", 0),
        dec_dim=_dim(shapes, "decoder.head.0.gamma", 0),
        z_dim=_dim(shapes, "conv2.weight", 0),
    )


def _umt5_sizes(shapes: Shapes) -> dict[str, int]:
    return _known(
        vocab_size=_dim(shapes, "token_embedding.weight", 0),
        dim=_dim(shapes, "token_embedding.weight", 1),
        dim_attn=_dim(shapes, "blocks.0.attn.q.weight", 0),
        dim_ffn=_dim(shapes, "blocks.0.ffn.fc1.weight", 0),
        num_heads=_dim(shapes, "blocks.0.pos_embedding.embedding.weight", 1),
        num_buckets=_dim(shapes, "blocks.0.pos_embedding.embedding.weight", 0),
        num_layers=_layers(shapes),
    )


def _dim(shapes: Shapes, key: str, axis: int) -> int | None:
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) else None


def _layers(shapes: Shapes) -> int | None:
    layers = {k.split(".")[1] for k in shapes if k.startswith("blocks.")}
    return len(layers) or None


def _known(**sizes: int | str | None) -> dict[str, Any]:
    return {k: v for k, v in sizes.items() if v}


PARTS = {
    p.name: p
    for p in (
        Part("dit", "model", dit.spec, _dit_sizes),
        Part("vae", "vae", vae.spec, _vae_sizes),
        Part("umt5", "umt5", umt5.spec, _umt5_sizes),
    )
}
