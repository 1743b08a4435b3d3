"""Photographs and video files into latents: what a video begins with, or goes on from."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data.images import read_image, to_float
from longlive_jax.data.video import VideoFile, frame_indices
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz
from longlive_jax.models.vae_spec import check_mesh
from longlive_jax.sampling import decode
from longlive_jax.sampling.batches import Batch


def check_images(batches: Sequence[Batch]) -> None:
    """Refuses first frames that cannot be read."""
    images = {one.image: batch.pixels for batch in batches for one in batch.scripts if one.image}
    for path, pixels in images.items():
        read_image(path, *pixels)


def with_images(cfg: config_lib.Config, params, mesh: jax.sharding.Mesh, batch: Batch) -> Batch:
    """The batch with the images of its scripts encoded as first frames."""
    images = [read_image(script.image, *batch.pixels) for script in batch.scripts]
    frames = to_float(np.stack(images)[:, None])
    first = decode.encode(cfg, params, mesh, lambda start, stop: frames[:, start:stop], 1)
    return dataclasses.replace(batch, first_frame=first)


class Clip:
    """A video file at 24 frames a second and height x width pixels, decoded as it is encoded.

    Args:
      last: only so many of its last frames; None: all.

    Raises:
      InputError: a file that cannot be read, or fewer frames than `last`.
    """

    def __init__(self, path: str | os.PathLike, height: int, width: int, last: int | None = None):
        self.path = path
        self._file = VideoFile(path, height, width)
        info = self._file.info
        indices = frame_indices(info.frames, info.fps, fps=config_lib.FRAMES_PER_SECOND)
        self.length = len(indices)  # of the whole file
        if last is not None and last > len(indices):
            self._file.close()
            raise InputError(
                f"{path}: {last} frames are wanted, it has {len(indices)} at "
                f"{config_lib.FRAMES_PER_SECOND} frames a second; ask for fewer"
            )
        indices = indices if last is None else indices[-last:]
        self.count = len(indices)
        self._frames = self._file.pick(indices)
        self._width = width

    def check_encodes(self, mesh: jax.sharding.Mesh) -> None:
        """Refuses a number of frames that latents do not cover, or a width `mesh` cannot split."""
        _check_frames(self.path, self.count)
        check_mesh(mesh, _replicas(mesh), self._width // config_lib.SPATIAL_COMPRESSION)

    def check_continues(self, chunk_frames: int) -> None:
        """Refuses a number of frames that is not whole chunks."""
        step = config_lib.TEMPORAL_COMPRESSION
        chunk = chunk_frames * step
        if self.count % chunk == chunk - step + 1:
            return
        fits = [n for n in range(chunk - step + 1, self.length + 1, chunk)]
        way_out = f"give --continue_frames={fits[-1]}, its last" if fits else "give a longer video"
        raise InputError(
            f"{self.path}: {self.count} frames of {self.length} at "
            f"{config_lib.FRAMES_PER_SECOND} frames a second cannot be continued: a chunk is "
            f"{chunk_frames} latent frames, so it must be {chunk} k - {step - 1} frames; {way_out}"
        )

    def encode(self, cfg: config_lib.Config, params, mesh: jax.sharding.Mesh) -> np.ndarray:
        """Its latents [1, 1 + (count - 1) / 4, h, w, channel]. Once only: frames are not kept.

        Raises:
          InputError: the file is damaged, or ends early.
        """

        def read(start, stop):
            frames = to_float(np.stack([next(self._frames) for _ in range(start, stop)]))
            return np.broadcast_to(frames, (_replicas(mesh), *frames.shape))

        with self._file:
            return decode.encode(cfg, params, mesh, read, self.count)[:1]


class ArrayClip:
    """Clips in an .npz, `video` [batch, 3, frame, height, width] in [-1, 1].

    Raises:
      InputError: an unreadable file, another shape, or values that are not finite.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        video = load_npz(path, required=("video",))["video"]
        scale = config_lib.SPATIAL_COMPRESSION
        whole = video.ndim == 5 and not video.shape[3] % scale and not video.shape[4] % scale
        if not whole or video.shape[1] != 3 or not video.size or video.dtype.kind != "f":
            raise InputError(
                f"{path}: video {video.dtype}{list(video.shape)} must be floating point [batch, 3, "
                f"frame, height, width], height and width multiples of {scale}"
            )
        self._frames = np.moveaxis(video, 1, -1)

    def check_encodes(self, mesh: jax.sharding.Mesh) -> None:
        """Refuses a number of frames that latents do not cover, or sizes `mesh` cannot split."""
        batch, count, _, width, _ = self._frames.shape
        _check_frames(self.path, count)
        check_mesh(mesh, batch, width // config_lib.SPATIAL_COMPRESSION)

    def encode(self, cfg: config_lib.Config, params, mesh: jax.sharding.Mesh) -> np.ndarray:
        """Latents [batch, 1 + (count - 1) / 4, h, w, channel]."""

        def read(start, stop):
            return self._frames[:, start:stop].astype(np.float32)

        return decode.encode(cfg, params, mesh, read, self._frames.shape[1])


def _check_frames(path, count):
    step = config_lib.TEMPORAL_COMPRESSION
    if rest := (count - 1) % step:
        near = [n for n in (count - rest, count - rest + step) if n > 0]
        raise InputError(
            f"{path}: {count} frames (of a file: at {config_lib.FRAMES_PER_SECOND} a second) must "
            f"be 1 + a multiple of {step}, since a latent covers {step} frames and the first one "
            f"1; cut or pad the clip, nearest: {near}"
        )


def _replicas(mesh):
    return mesh.shape["data"] * mesh.shape["fsdp"]
