"""Pictures and clips of clients: by size, kind and pixels, decoded in another process."""

import asyncio
import functools
import os
import pathlib
import secrets
import subprocess
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from longlive_jax.serving import decoding
from longlive_jax.serving.limits import Limits, Refused
from longlive_jax.serving.models import Model

_KEPT_S = 900


class Upload(NamedTuple):
    """What a stream may begin with.

    kind: "image" or "clip". model: whose pictures' size it was brought to. chunks: of a clip.
    frames: the .npy of its frames. since: s.
    """

    kind: str
    model: str
    chunks: int
    frames: pathlib.Path
    since: float


class Uploads:
    """Decoded uploads that no stream has taken yet, by an id of the server's own."""

    def __init__(self, folder: pathlib.Path, limits: Limits):
        self._folder, self._limits = folder, limits
        self._kept: dict[str, Upload] = {}
        self._one = asyncio.Lock()  # one decoder at a time

    async def add(self, body: AsyncIterator[bytes], model: Model) -> tuple[str, Upload]:
        """Reads a body and decodes it. Returns its id, and what it is.

        Raises:
          Refused: too large, of a kind that is not taken, damaged, or too long to decode.
        """
        self._expire()
        if len(self._kept) >= self._limits.uploads:
            raise Refused(429, f"{len(self._kept)} uploads wait to be used; try again later")
        id = secrets.token_urlsafe(9)
        source, target = self._folder / f"{id}.upload", self._folder / f"{id}.frames.npy"
        try:
            await self._receive(body, source)
            async with self._one:
                kind = await self._decode(source, target, model)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            source.unlink(missing_ok=True)
        count = np.load(target, mmap_mode="r", allow_pickle=False).shape[0]
        chunks = (count + 3) // model.pictures if kind == "clip" else 0
        upload = self._kept[id] = Upload(kind, model.name, chunks, target, time.monotonic())
        return id, upload

    def get(self, id: object) -> Upload:
        """Raises Refused: there is none."""
        if not isinstance(id, str) or id not in self._kept:
            raise Refused(404, "no such upload; upload the picture or clip again")
        return self._kept[id]

    def take(self, id: str) -> pathlib.Path:
        """The file of its frames, which is the caller's from here on."""
        return self._kept.pop(id).frames

    def _expire(self):
        for id, upload in list(self._kept.items()):
            if time.monotonic() - upload.since > _KEPT_S:
                del self._kept[id]
                upload.frames.unlink(missing_ok=True)

    async def _receive(self, body, source):
        limit, size = self._limits.upload_bytes, 0
        with source.open("wb") as file:
            async for chunk in body:
                if not size and len(chunk) >= 64 and not decoding.sniff(chunk[:64]):
                    raise Refused(415, "not a JPEG, PNG, WebP, AVIF, MP4, WebM or Matroska file")
                size += len(chunk)
                # Read on for a while: a client that is cut off does not see why.
                if size <= limit:
                    file.write(chunk)
                elif size > 2 * limit:
                    break
        if size > limit:
            raise Refused(413, f"over {limit} bytes, the limit of an upload: scale it down")
        if not size:
            raise Refused(400, "the upload is empty")

    async def _decode(self, source, target, model: Model) -> str:
        root = pathlib.Path(decoding.__file__).parents[2]
        words = decoding.command(
            source, target, model.pipeline.pixels, model.cfg.sample.image_fit, model.pictures,
            self._limits,
        )  # fmt: skip
        env = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(root),
               "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        # Not by the event loop: a process of many threads may be forked by vfork alone.
        run = functools.partial(
            subprocess.run, words, env=env, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=self._limits.decode_s,
        )  # fmt: skip
        try:
            process = await asyncio.to_thread(run)
        except subprocess.TimeoutExpired as error:
            raise Refused(400, f"decoding took over {self._limits.decode_s:g} s") from error
        if process.returncode:
            why = process.stderr.decode(errors="replace").strip().splitlines()
            message = why[-1][:300] if process.returncode == 2 and why else "it cannot be decoded"
            raise Refused(400, f"the upload is refused: {message}")
        return process.stdout.decode().split()[-1]
