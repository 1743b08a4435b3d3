"""The best checkpoint of a run by the grade of its evaluations; its folder is a checkpoint too."""

import math

import jax

from longlive_jax import params as params_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.files import remote, versioned
from longlive_jax.files.orbax import ocp
from longlive_jax.files.remote import AnyPath

FOLDER, GRADE = "best", "grade"
FORMAT, VERSION = "longlive_jax best checkpoint", 1


class Best:
    """`<root>/best`: the moving average of the step with the highest grade so far.

    `launch.sample --checkpoint=<root>/best` and `launch.export` take it as they take a run. Its
    weights get their name when they are whole, and carry step and grade; best.json repeats these.
    Every process calls every method.

    Args:
      root: the run's folder, with its run.json.
      network: which of the run's networks is sampled from.

    Raises:
      InputError: what an earlier process kept is damaged.
    """

    def __init__(self, root: AnyPath, network: str):
        self._root, self._network = root / FOLDER, network
        self.step, self.grade = 0, -math.inf
        for step in workdir.whole(self._root):
            path = self._root / workdir.STATES / str(step)
            try:
                kept = ocp.metadata(str(path)).custom_metadata or {}
                grade = float(kept[GRADE])  # pyright: ignore[reportArgumentType, reportCallIssue]
            except Exception as error:  # the library raises bare Exception
                raise workdir.damaged(path, error) from error
            if grade > self.grade:
                self.step, self.grade = int(path.name), grade
        self._remove_others()  # that a killed process had no time for

    def offer(self, step: int, grade: float, ema: params_lib.Tree) -> bool:
        """Keeps these whole weights, if they are the best; the first of equals stays."""
        if not grade > self.grade:
            return False
        path = self._root / workdir.STATES / str(step)
        try:
            state = {"networks": {self._network: {"ema": ema}}}
            ocp.save(str(path), state, overwrite=True, custom_metadata={GRADE: grade})
        except Exception as error:
            if (lost := remote.lost(path, error)) is not None:
                raise lost from error
            if not isinstance(error, OSError):
                raise
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error}); the best before it, if "
                "any, is whole; free some space, and the same command goes on"
            ) from error
        self.step, self.grade = step, grade
        if jax.process_index() == 0:
            run = workdir.read(self._root.parent)._replace(base=None)  # these weights are whole
            workdir.write(self._root, run)
            content = {"step": step, GRADE: grade}
            versioned.write(self._root / "best.json", FORMAT, VERSION, content)
        self._remove_others()
        return True

    def _remove_others(self) -> None:
        if jax.process_index() != 0:
            return
        for path in list((self._root / workdir.STATES).glob("*")):
            if path.name.isdecimal() and int(path.name) != self.step:
                remote.remove(path)
