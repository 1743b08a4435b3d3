"""manifest.json of cached training data, and whether it tells the truth about the records.

A dataset is checked when it is opened, not in the middle of training: what the manifest says
against itself, against the sizes of all files, and against a few of their records.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError

SCHEMA = {
    "samples": int, "dtype": str, "latent_shape": [int], "least_chunks": float, "failures": int,
    "prompts": [str], "settings": {str: object},
    "latents": [{"file": str, "count": int, "bytes": int}],
    "text": [{"file": str, "count": int, "bytes": int}],
    "prompts_digest?": str,  # folders of before it was written have none
}  # fmt: skip
AGAIN = "copy the folder again, or encode to a new one with python -m launch.encode_dataset"
DTYPES = ("bfloat16", "float32")
# Files of which a record is read when a dataset is opened. One of latents can have 32 MB.
_READ = {"latents": 16, "text": 256}

Manifest = Mapping[str, Any]


class Files(Protocol):
    """Files of records, as `records.Shards` has them."""

    @property
    def counts(self) -> Sequence[int]:
        """Records of each file, by the manifest."""
        ...

    def found(self, number: int) -> int:
        """Records of a file, by its own index."""
        ...

    def read(self, index: int) -> tuple[dict[str, Any], np.ndarray]: ...


def digest(prompts: Sequence[str]) -> str:
    """Of prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def check(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Refuses a manifest that contradicts itself or the settings that it was made with.

    Raises:
      InputError: names the folder, what is said twice and differs, and the way out.
    """
    for lie in _lies(manifest):
        raise InputError(f"{pathlib.Path(folder) / 'manifest.json'}: is damaged: {lie}; {AGAIN}")


def _lies(manifest: Manifest) -> Iterator[str]:
    counts = {kind: [shard.count for shard in manifest[kind]] for kind in _READ}
    files = [shard.file for kind in _READ for shard in manifest[kind]]
    if odd := [name for name in files if pathlib.PurePath(name).name != name]:
        yield f"{odd[0][:80]!r} is not the name of a file in the folder"
    if len(set(files)) < len(files):
        yield f"{len(files) - len(set(files))} of its files are named twice"
    if min([0, *counts["latents"], *counts["text"]]) < 0:
        yield "a file has less than no records"
    if sum(counts["latents"]) != manifest["samples"]:
        yield f"it says samples={manifest['samples']}, its files have {sum(counts['latents'])}"
    if not manifest["samples"]:
        yield "it holds no samples"
    prompts = manifest["prompts"]
    if len(set(prompts)) < len(prompts):
        yield f"{len(prompts) - len(set(prompts))} of its prompts are there twice"
    if not prompts:
        yield "it has no prompts"
    if manifest["text"] and sum(counts["text"]) != len(prompts):
        yield f"it has {len(prompts)} prompts, its files of text have {sum(counts['text'])}"
    if manifest.get("prompts_digest", digest(prompts)) != digest(prompts):
        yield "its prompts are not those, or not in the order, that were encoded (prompts_digest)"
    if manifest["dtype"] not in DTYPES:
        yield f"it says dtype={manifest['dtype']!r:.40}, which is none of {', '.join(DTYPES)}"
        return
    stored = settings(manifest)
    names = ("train.latent_frames", "video.height", "video.width", "model.in_dim")
    made: list[Any] = [stored.get(name) for name in (*names, "model.chunk_frames")]
    if not all(type(value) is int and value > 0 for value in made):
        yield f"its settings of {', '.join(names)} and model.chunk_frames are not all numbers"
        return
    scale = config_lib.SPATIAL_COMPRESSION
    shape = [made[0], made[1] // scale, made[2] // scale, made[3]]
    if manifest["latent_shape"] != shape:
        yield f"it says latent_shape={manifest['latent_shape'][:5]}, by its settings it is {shape}"
    if not 1 <= manifest["least_chunks"] <= made[0] // made[4]:
        yield f"it says least_chunks={manifest['least_chunks']} of {made[0] // made[4]}"
    size = math.prod(shape) * jnp.dtype(manifest["dtype"]).itemsize
    for shard in manifest["latents"]:
        if shard.bytes < shard.count * size:
            yield (
                f"{shard.file} has {shard.bytes} bytes, {shard.count} samples of {shape} "
                f"{manifest['dtype']} are {shard.count * size}"
            )


def settings(manifest: Manifest) -> dict[str, Any]:
    """What a dataset was encoded with, by today's names of settings."""
    return {config_lib.renamed(k): v for k, v in manifest["settings"].items()}


def check_records(
    folder: str | os.PathLike, manifest: Manifest, samples: Files, texts: Files | None
) -> None:
    """Compares the number of records of every file, and records of some, with the manifest.

    Raises:
      InputError: names the first that differs; or a record is damaged.
    """
    known = set(manifest["prompts"])
    for kind, files in {"latents": samples, "text": texts}.items():
        if files is None:
            continue
        start, counts = 0, list(files.counts)
        read = set(np.linspace(0, len(counts) - 1, min(len(counts), _READ[kind])).astype(int))
        for number, count in enumerate(counts):
            name = f"{folder}: {manifest[kind][number].file}"
            if (found := files.found(number)) != count:
                raise InputError(f"{name} has {found} records, by the manifest {count}; {AGAIN}")
            if count and number in read:
                if kind == "latents":
                    fields, latents = files.read(start)
                    check_sample(f"{name}, record 0", manifest, fields, latents)
                    if unknown := set(fields["prompts"]) - known:
                        raise InputError(
                            f"{name}, record 0: has the prompt {min(unknown)!r:.80}, which the "
                            f"manifest lacks; {AGAIN}"
                        )
                else:
                    for row in {0, count - 1}:
                        where = f"{name}, record {row}"
                        check_text(where, manifest, start + row, *files.read(start + row))
            start += count


def check_sample(where: str, manifest: Manifest, fields: Mapping, latents: np.ndarray) -> None:
    """Refuses a record of latents that is not as the manifest says; `where`: begins the message."""
    chunks = manifest["latent_shape"][0] // settings(manifest)["model.chunk_frames"]
    least = manifest["least_chunks"]
    _check_array(where, manifest, latents, manifest["latent_shape"])
    name, prompts, valid = (fields.get(key, ()) for key in ("name", "prompts", "chunks"))
    known = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not isinstance(name, str) or not known or type(valid) is not int:
        raise InputError(f"{where}: has no name, prompts or chunks; {AGAIN}")
    if len(prompts) != chunks or not least <= valid <= chunks:
        raise InputError(
            f"{where}: has {len(prompts)} prompts and {valid} valid chunks, by the manifest "
            f"{chunks} and {least} to {chunks}; {AGAIN}"
        )


def check_text(
    where: str, manifest: Manifest, index: int, fields: Mapping, text: np.ndarray
) -> None:
    """As `check_sample`, of the record of the manifest's prompt `index`."""
    prompt, stored = manifest["prompts"][index], settings(manifest)
    if fields.get("prompt") != prompt:
        raise InputError(
            f"{where}: is of the prompt {fields.get('prompt')!r:.80}, by the manifest of "
            f"{prompt!r:.80}; {AGAIN}"
        )
    length, width = stored["model.text_len"], stored["model.text_dim"]
    rows = len(text) if text.ndim else 0
    _check_array(where, manifest, text, [rows, width])
    if rows > length:
        raise InputError(f"{where}: has {rows} tokens, model.text_len is {length}; {AGAIN}")


def _check_array(where, manifest, array, shape):
    if list(array.shape) != shape or array.dtype != manifest["dtype"]:
        raise InputError(
            f"{where}: is {list(array.shape)} {array.dtype}, by the manifest {shape} "
            f"{manifest['dtype']}; {AGAIN}"
        )
