"""Our own sidecars, to be written at another rate."""

import dataclasses
import pathlib

from longlive_jax.data.sidecars import canonical
from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.data.sidecars.importers import recording
from longlive_jax.data.sidecars.importers.recording import Options, Recording


def find(place: pathlib.Path) -> list[Recording]:
    """The files NAME.actions.npz and NAME.actions.jsonl, each with NAME.mp4."""
    found = recording.files(place, (".npz", ".jsonl"), lambda path: _stem(path) != path.stem)
    return [
        Recording(path, recording.video_of(path.with_name(f"{_stem(path)}.mp4"))) for path in found
    ]


def read(path: pathlib.Path, options: Options) -> Actions:
    """Raises InputError: as `canonical.read`."""
    actions = canonical.read(path)
    return dataclasses.replace(actions, view=options.view or actions.view)


def _stem(path: pathlib.Path) -> str:
    return path.stem.removesuffix(".actions")
