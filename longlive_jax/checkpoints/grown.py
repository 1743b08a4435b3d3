"""A transformer that a run keeps as it was, with what the run trains on it.

RUN/run.json                "base": the checkpoint, or the run, that the transformer is of
RUN/checkpoints/50/ ...     of the network: "lora", adapters, and "dit", an action path alone
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout, peft, workdir
from longlive_jax.errors import InputError
from longlive_jax.models import actions, dit, lora

DIT, LORA = "dit", peft.PART


@dataclasses.dataclass(frozen=True)
class Grown:
    """What a run trains on the transformer of `base`."""

    run: str
    state: workdir.State
    base: str
    adapters: config_lib.LoRA

    def check(self, cfg: config_lib.Config) -> None:
        """Refuses a config that the run's arrays do not fit."""
        for part, spec in self._specs(cfg).items():
            self.state.check(part, spec, cfg.model)

    def put_on(
        self, base: params_lib.Tree, cfg: config_lib.Config, mesh: jax.sharding.Mesh,
        rules: dict, weights: str,
    ) -> params_lib.Tree:  # fmt: skip
        """The transformer with the run's action path and its adapters merged, as `base` lies.

        base: of `dit.spec`. rules: how it is sharded. weights: a key of `workdir.WEIGHTS`.
        """
        dtype = jax.tree.leaves(base)[0].dtype
        found = {
            part: self.state.load(
                part, spec, mesh, jnp.float32 if part == LORA else dtype, rules, weights
            )
            for part, spec in self._specs(cfg).items()
        }
        if LORA in found:
            merge = functools.partial(lora.merge, scale=self.adapters.scale)
            base = jax.jit(merge)(base, found[LORA])
        return actions.join(base, found.get(DIT, {}))

    def _specs(self, cfg) -> dict[str, Any]:
        spec = dit.spec(cfg.model)
        wanted = {LORA: lora.specs(spec, self.adapters), DIT: actions.split(spec, cfg.model)[1]}
        return {part: wanted[part] for part in wanted if part in self.state.trained}


def of_run(run: str | os.PathLike, state: workdir.State) -> Grown | None:
    """What this run trains on a transformer that it keeps; None: it trains a whole one.

    Raises:
      InputError: the run was made before such a run said which transformer it keeps.
    """
    content = workdir.read(run)
    if content.base is None:
        if LORA not in state.trained:
            return None
        raise InputError(
            f"{run}: its run trains adapters and does not say of which transformer; make a "
            f"checkpoint with launch.convert --checkpoint=CKPT --lora={run} --output=DIR"
        )
    prefix = f"{config_lib.LoRA.NAME}."
    own = {k.removeprefix(prefix): v for k, v in content.settings.items() if k.startswith(prefix)}
    adapters = config_lib.LoRA(**own) if LORA in state.trained else config_lib.LoRA()
    return Grown(os.fspath(run), state, content.base, adapters)


def path_of(
    run: str | os.PathLike, state: workdir.State, weights: str
) -> dict[params_lib.Path, Any]:
    """The arrays of the action path that a run trains, float32 on the host, by path; {}: none."""
    shapes = state.shapes(DIT)
    if workdir.read(run).base is None or not shapes:
        return {}
    specs = {p: params_lib.ParamSpec(s, (None,) * len(s)) for p, s in shapes.items()}
    mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])
    tree = state.load(DIT, params_lib.unflatten(specs), mesh, np.float32, {}, weights)
    return jax.device_get(params_lib.flatten(tree))


def replaced(
    pieces: Iterable[layout.Piece], path: Mapping[params_lib.Path, np.ndarray]
) -> Iterator[layout.Piece]:
    """A stored transformer's pieces, with the arrays of `path_of` in place of their own."""
    for piece in pieces:
        whole = path.get(piece.path)
        if whole is None:
            yield piece
        else:
            rows = whole[piece.start : piece.start + len(piece.array)]
            yield piece._replace(array=rows.astype(piece.array.dtype))
