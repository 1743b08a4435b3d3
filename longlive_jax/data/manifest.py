"""manifest.json of cached training data: its files, shapes and settings; see `data.records`.

A dataset is checked when it is opened, not in the middle of training: what the manifest says twice,
its checksum, and, by `Expected`, what some of the records have in them.
"""

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data import action_rows
from longlive_jax.errors import InputError
from longlive_jax.files import remote, versioned
from longlive_jax.files import schema as schema_lib

FORMAT, VERSION = "longlive_jax records", 1
MANIFEST, PROGRESS = "manifest.json", "progress.jsonl"
AGAIN = "copy the folder again, or encode to a new one with python -m launch.encode_dataset"
_KEYS = ("samples", "dtype", "latent_shape", "least_chunks", "failures", "prompts", "settings")
DTYPES = ("bfloat16", "float32")
_KINDS = ("latents", "text", "actions")  # of files
SHARD = {"file": str, "count": int, "bytes": int}
_SCHEMA = {
    "latents": [SHARD], "text": [SHARD], "samples": int, "dtype": str, "latent_shape": [int],
    "least_chunks": float, "failures": int, "prompts": [str], "settings": {str: object},
    "actions?": [SHARD],
    "checksum?": str,  # folders of before it was written have none
}  # fmt: skip
_SAMPLE, _TEXT = {"name": str, "prompts": [str], "chunks": int}, {"prompt": str}
_ACTIONS = {"name": str}
# Settings that give the shape of latents, and how many of them are a chunk.
_SHAPE = ("train.latent_frames", "video.height", "video.width", "model.in_dim")
_CHUNK = "model.chunk_frames"
# Of the rows of actions: names of the keys with commas between, and which picture a row drives.
KEYS, PAD, RATE = "actions.keyboard_keys", "actions.pad", "the pictures a second"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records."""

    file: str
    count: int
    bytes: int


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of a folder's manifest.json.

    Raises:
      InputError: the manifest is missing (the folder is unfinished, or holds other files), damaged
        or of another version; it contradicts itself, its settings or its checksum.
    """
    folder = remote.path(folder)
    file = folder / MANIFEST
    if not file.is_file():
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; make one: python -m launch.encode_dataset")
        if (folder / PROGRESS).is_file():
            raise InputError(
                f"{folder}: is unfinished, it has no {MANIFEST}; run launch.encode_dataset again "
                "with the same flags: it goes on where it stopped"
            )
        raise InputError(
            f"{folder}: holds no cached training data (no {MANIFEST}); make it with python -m "
            "launch.encode_dataset, or set data.cached=False for a folder of videos"
        )
    manifest = versioned.read(file, FORMAT, VERSION, AGAIN, schema=_SCHEMA)
    for wrong in _contradictions(manifest):
        raise InputError(f"{file}: is damaged ({wrong}); {AGAIN}")
    manifest.setdefault("actions", [])
    for name in _KINDS:
        manifest[name] = [Shard(**{k: shard[k] for k in SHARD}) for shard in manifest[name]]
    return {name: manifest[name] for name in (*_KINDS, *_KEYS)}


def settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataset was encoded with, by today's names of settings."""
    return {config_lib.renamed(name): value for name, value in manifest["settings"].items()}


def _contradictions(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What in a manifest cannot be true; its checksum last, which says least."""
    files = [shard["file"] for kind in _KINDS for shard in manifest.get(kind, ())]
    if len(set(files)) < len(files):
        yield f"{len(files) - len(set(files))} of its files are named twice"
    prompts = manifest["prompts"]
    if len(set(prompts)) < len(prompts):
        yield f"{len(prompts) - len(set(prompts))} of its prompts are there twice"
    wanted = {"latents": ("samples", manifest["samples"]), "text": ("prompts", len(prompts)),
              "actions": ("samples", manifest["samples"])}  # fmt: skip
    for kind, (name, number) in wanted.items():
        counts = [shard["count"] for shard in manifest.get(kind, ())]
        if min(counts, default=0) < 0:
            yield f"a file of {kind} has less than no records"
        # Without a text encoder's embeddings there are no files of text; nor of actions.
        if sum(counts) != number and (counts or kind == "latents"):
            yield f"it has {number} {name}, its files of {kind} have {sum(counts)}"
        if number < 1:
            yield f"it has no {name}"
    yield from _wrong_shape(manifest)
    checksum = manifest.get("checksum")
    if checksum is not None and (found := _checksum(manifest)) != checksum:
        yield f"it has the checksum {found}, it was written with {checksum}"


def _wrong_shape(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What settings, shapes and sizes of files say against each other."""
    if manifest["dtype"] not in DTYPES:
        yield f"its dtype is {manifest['dtype']!r:.40}, which is none of {', '.join(DTYPES)}"
        return
    stored = settings(manifest)
    for name in (*_SHAPE, _CHUNK):
        value = stored.get(name)
        if type(value) is not int or value < 1:
            yield f"its setting {name} is {value!r:.40}, not a number above 0"
            return
    scale = config_lib.SPATIAL_COMPRESSION
    frames, height, width, dim = (stored[name] for name in _SHAPE)
    shape = [frames, height // scale, width // scale, dim]
    if manifest["latent_shape"] != shape:
        yield f"its latent_shape is {manifest['latent_shape'][:5]}, by its settings {shape}"
    if not 1 <= manifest["least_chunks"] <= frames // stored[_CHUNK]:
        yield f"its least_chunks is {manifest['least_chunks']} of {frames // stored[_CHUNK]}"
    if manifest.get("actions") and not _row_width(stored):
        yield f"it has files of actions, and its setting {KEYS} is {stored.get(KEYS)!r:.40}"
    size = math.prod(shape) * jnp.dtype(manifest["dtype"]).itemsize
    for shard in manifest["latents"]:
        if shard["bytes"] < shard["count"] * size:
            yield (
                f"{shard['file']:.80} has {shard['bytes']} bytes, {shard['count']} samples of "
                f"{shape} {manifest['dtype']} are {shard['count'] * size}"
            )


class Expected:
    """What records must be by a manifest, as the checks of `records.Shards`.

    Attributes:
      prompts: index of each prompt's embedding.
    """

    def __init__(self, manifest: Mapping[str, Any]):
        self._settings, self._dtype = settings(manifest), manifest["dtype"]
        self._shape, self._least = manifest["latent_shape"], manifest["least_chunks"]
        self._names = manifest["prompts"]
        self.prompts = {prompt: i for i, prompt in enumerate(self._names)}

    def sample(self, fields: Mapping[str, Any], latents: np.ndarray) -> str:
        """What is wrong with a record of latents; "" if nothing is."""
        if wrong := schema_lib.mismatch(fields, _SAMPLE):
            return wrong
        if wrong := self._array(latents, self._shape):
            return wrong
        prompts, valid = fields["prompts"], fields["chunks"]
        chunks = self._shape[0] // self._settings[_CHUNK]
        if len(prompts) != chunks or not self._least <= valid <= chunks:
            return (
                f"it has {len(prompts)} prompts and {valid} valid chunks, by the manifest {chunks} "
                f"and {self._least} to {chunks}"
            )
        if unknown := set(prompts) - self.prompts.keys():
            return f"it has the prompt {min(unknown)!r:.80}, which the manifest lacks"
        return ""

    def actions(self, index: int, fields: Mapping[str, Any], rows: np.ndarray) -> str:
        """As `sample`, of the record of a sample's actions."""
        del index
        if wrong := schema_lib.mismatch(fields, _ACTIONS):
            return wrong
        pictures = 1 + config_lib.TEMPORAL_COMPRESSION * (self._shape[0] - 1)
        shape = [pictures, _row_width(self._settings)]
        if list(rows.shape) == shape and rows.dtype == np.float32:
            return ""
        return f"it is {list(rows.shape)} {rows.dtype}, by the manifest {shape} float32"

    def text(self, index: int, fields: Mapping[str, Any], text: np.ndarray) -> str:
        """As `sample`, of the record of the manifest's prompt `index`."""
        if wrong := schema_lib.mismatch(fields, _TEXT):
            return wrong
        if (found := fields["prompt"]) != (prompt := self._names[index]):
            return f"it is of the prompt {found!r:.80}, by the manifest of {prompt!r:.80}"
        length, width = (self._settings[f"model.text_{name}"] for name in ("len", "dim"))
        rows = len(text) if text.ndim else 0
        if rows > length:
            return f"it has {rows} tokens, model.text_len is {length}"
        return self._array(text, [rows, width])

    def _array(self, array: np.ndarray, shape: list[int]) -> str:
        if list(array.shape) == shape and array.dtype.name == self._dtype:
            return ""
        return f"it is {list(array.shape)} {array.dtype}, by the manifest {shape} {self._dtype}"


def key_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the actions of a dataset with these settings, in order; empty: it has none."""
    names = settings.get(KEYS)
    return tuple(names.split(",")) if isinstance(names, str) and names else ()


def _row_width(settings) -> int:
    """Numbers of a row of actions; 0: nothing says."""
    names = key_names(settings)
    return len(names) + action_rows.MOUSE if names else 0


def _checksum(manifest: Mapping[str, Any]) -> str:
    # Files of actions came later: without any, it is what it was before.
    kinds = [kind for kind in _KINDS if kind != "actions" or manifest.get(kind)]
    content = {name: manifest[name] for name in (*kinds, *_KEYS)}
    text = json.dumps(content, default=dataclasses.asdict, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def write_manifest(folder: str | os.PathLike, **values) -> None:
    """Writes a folder's manifest.json in one step; `values`: shards by name, and JSON values.

    Raises:
      OSError: ENOSPC, naming the file.
    """
    content = {**values, "checksum": _checksum(values)}
    versioned.write(remote.join(folder, MANIFEST), FORMAT, VERSION, content)
