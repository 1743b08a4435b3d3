"""Photographs and video files into latents: what a video begins with, or goes on from."""

import os
from collections.abc import Sequence

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data.images import read_image, to_float
from longlive_jax.data.video import VideoFile, frame_indices
from longlive_jax.errors import InputError
from longlive_jax.sampling import decode


def encode_images(
    cfg: config_lib.Config,
    params,
    mesh: jax.sharding.Mesh,
    paths: Sequence[str | os.PathLike],
    height: int,
    width: int,
) -> np.ndarray:
    """Latents [image, 1, h, w, channel] of photographs, stretched to height x width pixels.

    Raises:
      InputError: an image that cannot be read.
    """
    frames = np.stack([to_float(read_image(path, height, width)[None]) for path in paths])
    return decode.encode(cfg, params, mesh, lambda start, stop: frames[:, start:stop], 1)


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

    def check_encodes(self) -> None:
        """Refuses a number of frames that latents do not cover exactly."""
        step = config_lib.TEMPORAL_COMPRESSION
        if rest := (self.count - 1) % step:
            near = [self.count - rest, self.count - rest + step]
            raise InputError(
                f"{self.path}: {self.count} frames at {config_lib.FRAMES_PER_SECOND} frames a "
                f"second: must be 1 + a multiple of {step}, since a latent covers {step} frames "
                f"and the first one 1; cut or pad the clip, nearest: {near}"
            )

    def check_continues(self, chunk_frames: int) -> None:
        """Refuses a number of frames that is not whole chunks."""
        step = config_lib.TEMPORAL_COMPRESSION
        chunk = chunk_frames * step
        if self.count % chunk == chunk - step + 1:
            return
        fits = [n for n in range(chunk - step + 1, self.length + 1, chunk)]
        way_out = (
            f"give --continue_frames={fits[-1]}, its last" if fits else "give a longer video"
        )
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
            return to_float(np.stack([next(self._frames) for _ in range(start, stop)]))[None]

        with self._file:
            return decode.encode(cfg, params, mesh, read, self.count)
