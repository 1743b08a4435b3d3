"""Cached training data: latents and the prompts' embeddings, in files that are read at random.

    DIR/latents-00000.arrayrecord   samples: latents with their name, prompts and valid chunks
    DIR/actions-00000.arrayrecord   samples' actions, if the config has an action path: float32 rows
                                    of `data.action_rows`, one a picture
    DIR/text-00000.arrayrecord      the embedding of each distinct prompt, without its padding
    DIR/failures.jsonl              files that could not be read, and why
    DIR/progress.jsonl              while unfinished: settings, and a line for each complete file
    DIR/manifest.json               files, shapes and settings of the folder; written last

`launch.encode_dataset` writes such a folder. A record is a head of twelve bytes, a line of JSON,
and the bytes of one array, little-endian; a CRC-32 in the head covers all that follows.
"""

import contextlib
import itertools
import json
import os
import pathlib
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.config.actions import PADS
from longlive_jax.data import action_rows, sidecars
from longlive_jax.data.copies import Copies
from longlive_jax.data.manifest import (
    AGAIN,
    KEYS,
    MANIFEST,
    PAD,
    RATE,
    Expected,
    Shard,
    key_names,
    read_manifest,
    settings,
)
from longlive_jax.data.source import Sample
from longlive_jax.errors import InputError
from longlive_jax.files import remote, versioned
from longlive_jax.files import schema as schema_lib
from longlive_jax.files.atomic import atomic_path, no_space
from longlive_jax.files.names import is_plain
from longlive_jax.files.remote import RemotePath

FAILURES = "failures.jsonl"
# The most that a killed run repeats. At full size a file has half a gigabyte.
CLIPS_PER_FILE, PROMPTS_PER_FILE = 16, 256

_ARRAY = {"shape": [int], "dtype": str}
# Files of which a record is read when a dataset is opened. One of latents can have 32 MB.
_EXAMINED = {"latents": 16, "actions": 16, "text": 256}
# Files whose size and number of records are looked at then: all, unless there are very many. Of the
# others a read sees that they are damaged.
_SIZED = 2048
# What is wrong with fields and array of record `index`; "" if nothing is.
Check = Callable[[int, dict[str, Any], np.ndarray], str]

_HEAD = struct.Struct("<4sII")  # magic, CRC-32 of the rest, bytes of the JSON
_MAGIC = b"LLR1"
_ALIGN = 64  # bytes: where an array begins in its record
# One record a group, so that it is read without its neighbours. Latents hardly compress.
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"


def pack(fields: Mapping[str, Any], array: np.ndarray) -> bytes:
    """A record of `fields`, JSON values, and an array of any shape and dtype."""
    assert sys.byteorder == "little"
    text = json.dumps({**fields, "shape": array.shape, "dtype": array.dtype.name}).encode()
    text += b" " * (-(_HEAD.size + len(text)) % _ALIGN)
    body = text + array.tobytes()
    return _HEAD.pack(_MAGIC, zlib.crc32(body), len(text)) + body


def unpack(record: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """The inverse of `pack`. The array is read-only; fields have its shape and dtype too.

    Raises:
      ValueError: the record is incomplete, or of another format.
    """
    if len(record) < _HEAD.size:
        raise ValueError(f"{len(record)} bytes are too few")
    magic, crc, length = _HEAD.unpack_from(record)
    if magic != _MAGIC:
        raise ValueError(f"it begins with {magic!r} and not {_MAGIC!r}")
    body = memoryview(record)[_HEAD.size :]
    if zlib.crc32(body) != crc:
        raise ValueError("its checksum is wrong")
    fields = versioned.parse(bytes(body[:length]))
    if wrong := schema_lib.mismatch(fields, _ARRAY):
        raise ValueError(wrong)
    dtype = jnp.dtype(fields["dtype"])
    if not jnp.issubdtype(dtype, np.number):
        raise ValueError(f"it holds {fields['dtype'][:40]!r}")
    array = np.frombuffer(body[length:], dtype)
    return fields, array.reshape(fields["shape"])


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> Shard:
    """Writes a file of records, whole or not at all.

    Raises:
      InputError: nothing can be written at `path`.
      OSError: ENOSPC, naming `path`.
    """
    path, count = remote.path(path), 0
    with atomic_path(path) as partial:
        try:
            writer = array_record_module.ArrayRecordWriter(os.fsencode(partial), _WRITE)
            try:
                for record in records:
                    writer.write(record)
                    count += 1
            finally:
                writer.close()
        except RuntimeError as error:
            if "No space left" in str(error):
                raise no_space(path) from error
            raise
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        size = partial.stat().st_size
    return Shard(path.name, count, size)


class Shards:
    """Files of records, as one sequence. A file is open only while one of its records is read.

    Raises:
      InputError: a file is missing; or one of `_SIZED` has another size than when it was written.
    """

    def __init__(self, folder: str | os.PathLike, shards: Sequence[Shard]):
        self._folder, self._shards = remote.path(folder), tuple(shards)
        self._ends = list(itertools.accumulate(shard.count for shard in shards))
        for shard in shards:
            if not is_plain(shard.file):
                raise InputError(f"{self._folder / shard.file}: is no file of the folder; {AGAIN}")
        self._copies = None
        if isinstance(self._folder, RemotePath):
            self._copies = Copies(self._folder, self._shards)
            return
        there = set(os.listdir(self._folder)) if shards else set()  # one question for all files
        for shard in shards:
            if shard.file not in there:
                raise InputError(f"{self._folder / shard.file}: is gone; {AGAIN}")
        for number in _some(len(shards), _SIZED):
            shard = shards[number]
            path = self._folder / shard.file
            if (size := path.stat().st_size) != shard.bytes:
                raise InputError(
                    f"{path}: {size} bytes, {shard.bytes} were written: it is truncated or "
                    f"damaged; {AGAIN}"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _path(self, shard: Shard) -> pathlib.Path:
        """The file of a shard on this machine."""
        if self._copies is not None:
            return self._copies.get(shard)
        return pathlib.Path(self._folder) / shard.file

    def examine(self, check: Check, most: int, *, last: bool = False) -> None:
        """Compares files' numbers of records with the manifest's, and looks at some records:
        the first, and the `last` if that is wanted, of `most` files. On object storage it looks at
        the first file alone: each is copied whole.

        Raises:
          InputError: a number differs, or a record is damaged.
        """
        files = len(self._shards)
        looked = set(_some(files, most))
        for number in _some(files, _SIZED):
            shard, end = self._shards[number], self._ends[number]
            if self._copies is not None and number:
                return
            path = self._path(shard)
            try:
                with _opened(path) as reader:
                    found = reader.num_records()
            except (RuntimeError, ValueError) as error:
                raise InputError(f"{path}: is damaged ({error}); {AGAIN}") from error
            if found != shard.count:
                raise InputError(
                    f"{path}: has {found} records, by the manifest {shard.count}; {AGAIN}"
                )
            if found and number in looked:
                for index in sorted({end - found, end - 1 if last else end - found}):
                    self.read(index, check)

    def read(
        self, index: int, check: Check = lambda index, fields, array: ""
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Fields and array of record `index`.

        Raises:
          InputError: it is damaged; the message names the file and the record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        path, row = self._path(shard), index - (self._ends[number] - shard.count)
        try:
            with _opened(path) as reader:
                (record,) = reader.read([row])
            fields, array = unpack(record)
            if wrong := check(index, fields, array):
                raise ValueError(wrong)
            return fields, array
        except (RuntimeError, ValueError, TypeError, SyntaxError) as error:
            raise InputError(
                f"{path}: record {row} of {shard.count} is damaged ({error}); {AGAIN}"
            ) from error


def _some(files: int, most: int) -> list[int]:
    """`most` of the numbers of so many files, evenly, with the first and the last; or all."""
    return np.linspace(0, files - 1, min(files, most)).astype(int).tolist()


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    reader = array_record_module.ArrayRecordReader(os.fsencode(path), _READ)
    try:
        yield reader
    finally:
        reader.close()


class Records:
    """A Source of the latents and prompt embeddings that `launch.encode_dataset` wrote.

    Raises:
      InputError: the folder is unfinished, damaged, or does not fit the config; its manifest says
        what its records do not.
    """

    def __init__(self, path: str | os.PathLike, cfg: config_lib.Config):
        manifest = read_manifest(path)
        _check(path, manifest, cfg)
        self._latent_frames = cfg.train.latent_frames
        self._chunks = cfg.train.latent_frames // cfg.model.chunk_frames
        self._text_shape = cfg.model.text_len, cfg.model.text_dim
        self._expected = Expected(manifest)
        self._samples = Shards(path, manifest["latents"])
        self._samples.examine(self._wrong_sample, _EXAMINED["latents"])
        self._cfg = cfg.model.actions
        self._actions = None
        if self._cfg.kind != "none":
            _check_actions(path, manifest, self._cfg)
            self._keys, self._pad = key_names(settings(manifest)), settings(manifest)[PAD]
            self._actions = Shards(path, manifest["actions"])
            self._actions.examine(self._expected.actions, _EXAMINED["actions"])
        self._text = None if cfg.train.text_encoder else Shards(path, manifest["text"])
        if self._text is not None:
            self._text.examine(self._expected.text, _EXAMINED["text"], last=True)

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, key: int) -> Sample:
        """Record `index`, cut to the config's `train.latent_frames`; nothing in it is random.

        Returns:
          A Sample with latents and, unless the text encoder is trained, text; both in their stored
          dtype, float32 or bfloat16. With actions, if the config has an action path.

        Raises:
          InputError: a record is damaged, or not as the manifest says; the message names the file
            and the record.
        """
        del key
        fields, latents = self._samples.read(index, self._wrong_sample)
        prompts = tuple(fields["prompts"][: self._chunks])
        return Sample(
            name=fields["name"],
            prompts=prompts,
            chunks=min(fields["chunks"], self._chunks),
            latents=latents[: self._latent_frames],
            text=None if self._text is None else self._embeddings(self._text, prompts),
            actions=None if self._actions is None else self._rows(index, fields["name"]),
        )

    def _rows(self, index: int, name: str) -> np.ndarray:
        """The actions of record `index`, as the config's model reads them."""
        assert self._actions is not None
        fields, rows = self._actions.read(index, self._expected.actions)
        if fields["name"] != name:
            raise InputError(
                f"data: the actions of record {index} are those of {fields['name']!r:.80}, its "
                f"latents are of {name!r:.80}; {AGAIN}"
            )
        own = action_rows.of(action_rows.actions(rows, self._keys, self._pad, name), self._cfg)
        return own[: 1 + config_lib.TEMPORAL_COMPRESSION * (self._latent_frames - 1)]

    def _wrong_sample(self, index: int, fields: dict, latents: np.ndarray) -> str:
        del index
        return self._expected.sample(fields, latents)

    def _embeddings(self, texts: Shards, prompts: Sequence[str]) -> np.ndarray:
        rows = {
            prompt: texts.read(self._expected.prompts[prompt], self._expected.text)[1]
            for prompt in set(prompts)
        }
        text = np.zeros((len(prompts), *self._text_shape), rows[prompts[0]].dtype)
        for padded, prompt in zip(text, prompts):
            padded[: len(rows[prompt])] = rows[prompt]
        return text


def _check(path, manifest, cfg):
    stored = settings(manifest)
    wanted = {
        "model.chunk_frames": cfg.model.chunk_frames,
        "model.in_dim": cfg.model.in_dim,
        "video.height": cfg.video.height,
        "video.width": cfg.video.width,
    }
    if not cfg.train.text_encoder:
        if not manifest["text"]:
            raise InputError(
                f"{path}: holds no embeddings of its prompts, it was encoded with "
                "train.text_encoder=True; train with that, or encode to a new folder without"
            )
        wanted |= {"model.text_len": cfg.model.text_len, "model.text_dim": cfg.model.text_dim}
    for name, value in wanted.items():
        if name not in stored:
            raise InputError(f"{path}: {MANIFEST} is damaged (no setting {name}); {AGAIN}")
        if stored[name] != value:
            raise InputError(
                f"{path}: was encoded with {name}={stored[name]}, the config says {value}; give "
                f"--config.{name}={stored[name]}, or encode to a new folder"
            )
    frames = manifest["latent_shape"][0]
    if cfg.train.latent_frames > frames:
        raise InputError(
            f"{path}: holds {frames} latent frames a sample, the config's "
            f"train.latent_frames={cfg.train.latent_frames} is more; lower it, or encode to a new "
            "folder"
        )
    chunks = cfg.train.latent_frames // cfg.model.chunk_frames
    least = cfg.data.min_chunks if cfg.data.allow_padding else chunks
    if manifest["least_chunks"] < least:
        raise InputError(
            f"{path}: holds padded samples of {manifest['least_chunks']} valid chunk(s), the "
            f"config's least is {least}; give --config.data.allow_padding=True "
            f"--config.data.min_chunks={manifest['least_chunks']}, or encode to a new folder"
        )


def _check_actions(path, manifest, cfg: config_lib.Actions):
    """Refuses a dataset without actions for this action path: of no keys, of others, or slower."""
    names, stored = sidecars.model_keys(cfg), settings(manifest)
    if not manifest["actions"]:
        raise InputError(
            f"{path}: holds no actions, and the model has an action path (actions.kind="
            f"{cfg.kind!r}); encode videos with sidecars to a new folder with this config, or set "
            "actions.kind='none'"
        )
    had = key_names(stored)
    if had != names:
        raise InputError(
            f"{path}: its actions are of the {len(had)} keys {','.join(had)}, the model's are the "
            f"{len(names)} of {','.join(names)}; give --config.actions.keyboard_dim={len(had)} "
            f"--config.actions.keyboard_keys={','.join(had)}, or encode to a new folder"
        )
    if stored.get(RATE) != FRAMES_PER_SECOND or stored.get(PAD) not in PADS:
        raise InputError(
            f"{path}: its actions have {stored.get(RATE)} rows a second and {PAD}="
            f"{stored.get(PAD)}, samples have {FRAMES_PER_SECOND} pictures; encode to a new folder"
        )


def action_settings(cfg: config_lib.Actions) -> dict[str, Any]:
    """What the actions of a dataset depend on; empty without an action path."""
    if cfg.kind == "none":
        return {}
    return {KEYS: ",".join(sidecars.model_keys(cfg)), PAD: cfg.pad, RATE: FRAMES_PER_SECOND}
