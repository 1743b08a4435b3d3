"""The folder of a training run, and the weights to read from it.

WORKDIR/run.json          settings, and the checkpoint that the run takes its other parts from
WORKDIR/checkpoints/50/   an Orbax checkpoint of the whole training state after step 50
"""

import functools
import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.files import remote, versioned
from longlive_jax.files.orbax import COMMITTED, check_read, ocp
from longlive_jax.files.remote import AnyPath

FORMAT, VERSION = "longlive_jax training run", 2
RUN, STATES = "run.json", "checkpoints"
# The weights of a network, in its state: their moving average, and those after the last step.
WEIGHTS = {"average": "ema", "latest": "params"}
# In version 1 the state had the arrays of its only network beside the others, by other names.
FLAT_NETWORK = "model"
_SCHEMA = {
    "settings": {str: object}, "checkpoint": (str, None), "network?": (str, None),
    "base?": (str, None),
}  # fmt: skip


class Run(NamedTuple):
    """The content of run.json.

    settings: by the names of the flags.
    checkpoint: of the parts that are not trained, or None.
    network: the one that a sampler takes from the states, or None.
    base: the checkpoint, or run, with the transformer that the network is adapters of, or an action
      path; None: the network is whole.
    """

    settings: Mapping[str, Any]
    checkpoint: str | None
    network: str | None
    base: str | None = None


def is_run(directory: str | os.PathLike) -> bool:
    """Whether this is, or was, the folder of a training run."""
    return remote.is_file(os.path.join(directory, RUN))


def read(directory: str | os.PathLike) -> Run:
    """The content of run.json.

    Raises:
      InputError: it is damaged, or of another version.
    """
    file = remote.join(directory, RUN)
    run = versioned.read(
        file, FORMAT, VERSION, "give another --workdir", older=(1,), schema=_SCHEMA
    )
    network = FLAT_NETWORK if run["version"] == 1 else run.get("network")
    return Run(run["settings"], run["checkpoint"], network, run.get("base"))


def write(directory: str | os.PathLike, run: Run) -> None:
    """Writes run.json in one step."""
    versioned.write(remote.join(directory, RUN), FORMAT, VERSION, run._asdict())


def parts(directory: str | os.PathLike) -> str:
    """The checkpoint of the parts that the run does not train.

    Raises:
      InputError: the run has none.
    """
    checkpoint = read(directory).checkpoint
    if checkpoint is None:
        raise InputError(
            f"{directory}: its run was given no --checkpoint, so nobody knows its VAE and text "
            "encoder; give it one: run its command of launch.train again with --checkpoint=CKPT"
        )
    return checkpoint


def whole(root: AnyPath) -> list[int]:
    """The steps of the whole states of a run, in ascending order."""
    if remote.is_remote(root):  # where one has its name before it is whole
        names = [path.parent.name for path in (root / STATES).glob(f"*/{COMMITTED}")]
    else:
        names = [path.name for path in (root / STATES).glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


class State:
    """A network in the newest complete state of a run on disk; by default the one to sample from.

    Attributes:
      step: number of the state's last step.
      trained: the network's parts.
      averaged: whether it has a moving average.

    Raises:
      InputError: there is no state, or it is damaged.
    """

    def __init__(self, directory: str | os.PathLike, network: str | None = None):
        self._root = remote.path(remote.absolute(directory))
        self._network = network or read(directory).network
        if self._network is None:
            raise InputError(
                f"{self._root}: its run trains nothing that is sampled from; give the checkpoint "
                "that it wrote"
            )
        steps = whole(self._root)
        if not steps:
            raise InputError(
                f"{self._root}: its training run has saved nothing yet; wait for step "
                "train.save_every"
            )
        self.step = max(steps)
        self._path = self._root / STATES / str(self.step)
        try:
            state = ocp.metadata(str(self._path)).metadata
            # The place of each tree of weights in the state; a network may have no EMA.
            self._keys = {"ema": ("average",), "params": ("params",)}
            if not is_flat(self._path):
                state = state["networks"][self._network]
                self._keys = {tree: ("networks", self._network, tree) for tree in self._keys}
            self._keys = {k: v for k, v in self._keys.items() if state.get(v[-1])}
            leaves = params_lib.flatten(next(state[v[-1]] for v in self._keys.values()))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # the library raises bare Exception
            raise damaged(self._path, error) from error
        self._shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        self.averaged = "ema" in self._keys
        self.trained = tuple(sorted({path[0] for path in self._shapes}))

    def shapes(self, part: str) -> dict[params_lib.Path, tuple[int, ...]]:
        """Of a part's arrays, by their paths within it."""
        return {path[1:]: shape for path, shape in self._shapes.items() if path[0] == part}

    def check(self, part: str, spec: params_lib.Tree, section: Any, *, some: bool = False) -> None:
        """Refuses a spec, or a section of the config, that the stored arrays do not fit.

        some: the spec may lack arrays that are stored.
        """
        wanted = {path: s.shape for path, s in params_lib.flatten({part: spec}).items()}
        wrong = [
            f"{'/'.join(p)} is {wanted.get(p)} by the config, {self._shapes.get(p)} in the run"
            for p in sorted({*wanted, *(p for p in self._shapes if p[0] == part and not some)})
            if wanted.get(p) != self._shapes.get(p)
        ]
        # Settings that no shape shows.
        heads = read(self._root).settings.get("model.num_heads")
        if part == "dit" and heads != section.num_heads:
            wrong += [f"model.num_heads is {section.num_heads} by the config, {heads} in the run"]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InputError(
                f"{self._root}: its {part} has other sizes than the config: "
                f"{'; '.join(wrong[:5])}{more}; give the config of its training"
            )

    def load(
        self,
        part: str,
        spec: params_lib.Tree,
        mesh: jax.sharding.Mesh,
        dtype: Any,
        rules: Mapping,
        weights: str,
    ) -> params_lib.Tree:
        """`spec`'s tree of arrays, placed as `rules` say; `weights`: one of WEIGHTS.

        Raises:
          InputError: the weights are damaged, or the run has none of this kind.
        """
        if WEIGHTS[weights] not in self._keys:
            raise InputError(
                f"{self._root}: {self._network} has no moving average; give --weights=latest"
            )
        keys = (*self._keys[WEIGHTS[weights]], part)
        tree = params_lib.abstract(spec, mesh, dtype, dict(rules))
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                wanted = functools.reduce(lambda inner, key: {key: inner}, reversed(keys), tree)
                loaded = functools.reduce(operator.getitem, keys, ocp.load(str(self._path), wanted))
            check_read(loaded)
            return loaded
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # the library raises bare Exception
            raise damaged(self._path, error) from error


def is_flat(path: AnyPath) -> bool:
    """Whether a state was written before a run could have several networks."""
    return "networks" not in ocp.metadata(str(path)).metadata


def damaged(path: AnyPath, error: Exception) -> Exception:
    """The error for a state that cannot be read: an InputError, or that its storage is lost."""
    if (lost := remote.lost(path, error)) is not None:
        return lost
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return InputError(
        f"{path}: is damaged ({reason}); remove it, and the one before it, if there is one, counts"
    )
