"""The folder of a benchmark's videos: which are whole, and of what seed and config each is."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.files import folders, versioned
from longlive_jax.prompts import layouts, shots
from longlive_jax.sampling.batches import Batch

SETTINGS, MANIFEST = "settings.json", "manifest.jsonl"
FORMAT, VERSION = "longlive_jax benchmark videos", 1


class Folder:
    """Videos of a layout in `output`; a command that was stopped goes on where it was.

    settings.json has what all of them were made with; manifest.jsonl a line for each whole file:
    its name, prompt, sample, seed and number (the noise follows from these two), and its bytes.

    Args:
      settings: of the command, beside the config.
    """

    def __init__(
        self,
        output: str,
        items: Sequence[layouts.Item],
        cfg: config_lib.Config,
        settings: Mapping[str, Any],
    ):
        self._root, self._items, self._seed = pathlib.Path(output), items, settings["seed"]
        self._settings = {**settings, "config": config_lib.to_config_dict(cfg).to_dict()}
        self._whole: dict[str, int] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder, or goes on in it; no other process does meanwhile.

        Raises:
          InputError: it holds something else, or videos of other settings.
        """
        file = self._root / SETTINGS
        folders.make(self._root, "--output", "benchmark videos", lambda found: file.is_file())
        with folders.locked(self._root, f"--output={self._root}: another process writes to it"):
            if file.is_file():
                had = versioned.read(file, FORMAT, VERSION, "give another --output")
                had = {name: had.get(name) for name in self._settings}
                where = f"--output={self._root}"
                folders.check_settings(where, _flat(had), _flat(self._settings))
            else:
                versioned.write(file, FORMAT, VERSION, self._settings)
            self._whole = self._read()
            yield

    def videos(self, cfg: config_lib.Config) -> list[shots.Video]:
        """The videos of all items, each of one shot."""
        chunks = cfg.sample.chunks
        return [
            shots.Video(item.file, (shots.Chunk(item.prompt, False),) * chunks)
            for item in self._items
        ]

    def paths(self, batch: Batch) -> list[str]:
        """The files of a batch of `videos`."""
        return [str(self._root / item.file) for item in self._of(batch)]

    def is_whole(self, batch: Batch) -> bool:
        """Whether all files of a batch are recorded, and there."""
        return all(
            self._whole.get(item.file, -1) == _size(self._root / item.file)
            for item in self._of(batch)
        )

    def record(self, batch: Batch) -> None:
        """Adds the files of a batch, which are whole, to the manifest."""
        with (self._root / MANIFEST).open("a", encoding="utf-8") as manifest:
            for i, item in enumerate(self._of(batch)):
                line = {
                    "file": item.file, "prompt": item.prompt, "sample": item.sample,
                    "seed": self._seed, "number": batch.index + i, "config": SETTINGS,
                    "bytes": _size(self._root / item.file),
                }  # fmt: skip
                manifest.write(json.dumps(line, ensure_ascii=False) + "\n")
            manifest.flush()
            os.fsync(manifest.fileno())

    def _of(self, batch):
        return self._items[batch.index : batch.index + len(batch.videos)]

    def _read(self) -> dict[str, int]:
        """Bytes of the recorded files. Half a line, of a killed process, is cut off."""
        file = self._root / MANIFEST
        if not file.is_file():
            return {}
        text = file.read_bytes()
        end = text.rfind(b"\n") + 1
        if end != len(text):
            os.truncate(file, end)
        try:
            lines = [versioned.parse(line) for line in text[:end].splitlines()]
            return {line["file"]: int(line["bytes"]) for line in lines}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"{file}: is damaged ({error}); remove it, and all files are made again"
            ) from error


def _flat(settings: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Settings by "section.key"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{at}{name}.")
        else:
            flat[at + name] = value
    return flat


def _size(path: pathlib.Path) -> int:
    """Bytes of a file; -2 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -2
