"""manifest.json of cached training data: its files, shapes and settings; see `data.records`."""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

from longlive_jax.errors import InputError
from longlive_jax.files import versioned

FORMAT, VERSION = "longlive_jax records", 1
MANIFEST, PROGRESS = "manifest.json", "progress.jsonl"
AGAIN = "copy the folder again, or encode to a new one with python -m launch.encode_dataset"
_KEYS = ("samples", "dtype", "latent_shape", "least_chunks", "failures", "prompts", "settings")
SHARD = {"file": str, "count": int, "bytes": int}
_SCHEMA = {
    "latents": [SHARD], "text": [SHARD], "samples": int, "dtype": str, "latent_shape": [int],
    "least_chunks": float, "failures": int, "prompts": [str], "settings": {str: object},
    "checksum?": str,  # folders of before it was written have none
}  # fmt: skip


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
        or of another version.
    """
    folder = pathlib.Path(folder)
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
    if wrong := _contradiction(manifest):
        raise InputError(f"{file}: is damaged ({wrong}); {AGAIN}")
    for name in ("latents", "text"):
        manifest[name] = [Shard(**{k: shard[k] for k in SHARD}) for shard in manifest[name]]
    return {name: manifest[name] for name in ("latents", "text", *_KEYS)}


def _contradiction(manifest: Mapping[str, Any]) -> str:
    """What in a manifest cannot be true; "" if nothing."""
    checksum = manifest.get("checksum")
    if checksum is not None and (found := _checksum(manifest)) != checksum:
        return f"it has the checksum {found}, it was written with {checksum}"
    shape, prompts = manifest["latent_shape"], manifest["prompts"]
    if len(shape) != 4 or min(shape) < 1:
        return f"latents of shape {shape[:5]}"
    if len(set(prompts)) < len(prompts):
        return "a prompt twice"
    wanted = {"latents": manifest["samples"], "text": len(prompts)}
    for name, number in wanted.items():
        counts = [shard["count"] for shard in manifest[name]]
        if min(counts, default=0) < 0 or (sum(counts) != number and (counts or name == "latents")):
            return f"{sum(counts)} records in its files of {name}, by another field {number}"
    return "" if manifest["samples"] > 0 else "it has no samples"


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {name: manifest[name] for name in ("latents", "text", *_KEYS)}
    text = json.dumps(content, default=dataclasses.asdict, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def write_manifest(folder: str | os.PathLike, **values) -> None:
    """Writes a folder's manifest.json in one step; `values`: shards by name, and JSON values.

    Raises:
      OSError: ENOSPC, naming the file.
    """
    content = {**values, "checksum": _checksum(values)}
    versioned.write(pathlib.Path(folder) / MANIFEST, FORMAT, VERSION, content)
