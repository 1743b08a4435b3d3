"""Photographs and video files into latents: what a video begins with, or goes on from."""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.data.images import read_image, to_float
from longlive_jax.data.video_reader import VideoFile
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.files.arrays import load_npz, narrow
from longlive_jax.models import vae
from longlive_jax.models.vae_spec import SHARDED, check_mesh


def encode(
    cfg: config_lib.Config,
    params,
    mesh: jax.sharding.Mesh,
    read: Callable[[int, int], np.ndarray],
    count: int,
) -> np.ndarray:
    """Encodes a clip of 1 + 4 k frames, a few at a time.

    Args:
      read: read(start, stop) gives frames [batch, frame, height, width, 3] in [-1, 1].
      count: how many frames there are.

    Returns:
      Normalised latents, float32 [batch, 1 + k, height / 16, width / 16, channel].

    Raises:
      NotFiniteError: latents are not finite.
    """
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    place = mesh_lib.sharding(mesh, SHARDED)
    state, latents = None, []
    for piece in vae.pieces(1 + (count - 1) // vae.FRAMES, cfg.sample.vae_latents_per_call):
        first = piece.start == 0
        start = 0 if first else vae.FRAMES * piece.start - 3
        frames = read(start, vae.FRAMES * piece.stop - 3)
        frames = jax.device_put(frames.astype(cfg.compute_dtype), place)
        if first:
            size = (frames.shape[2] // vae.PIXELS, frames.shape[3] // vae.PIXELS)
            state = vae.init_encode_state(cfg.vae, frames.shape[0], *size, frames.dtype, mesh)
        state, out = _encode_program(cfg.vae, mesh, first)(params, state, frames)
        latents.append(np.asarray(out, np.float32))
        if not np.isfinite(latents[-1]).all():
            bad = params_lib.not_finite(params)
            cause = f"its weights are not: {bad[0]}" if bad else "look at the pictures given"
            raise NotFiniteError(
                f"VAE: latents {piece.start} to {piece.stop - 1} of the pictures are not finite; "
                f"{cause}"
            )
    return np.concatenate(latents, axis=1)


_encode_program = functools.cache(lambda cfg, mesh, first: vae.encode_on_mesh(mesh, cfg, first))


def first_frames(
    cfg: config_lib.Config,
    params,
    mesh: jax.sharding.Mesh,
    paths: Sequence[str | os.PathLike],
    pixels: tuple[int, int],
) -> np.ndarray:
    """Latents of images that videos begin with, float32 [batch, 1, h, w, channel].

    pixels: height and width that they are brought to.

    Raises:
      InputError: an image that cannot be read.
    """
    fit = cfg.sample.image_fit
    frames = to_float(np.stack([read_image(path, *pixels, fit) for path in paths])[:, None])
    return encode(cfg, params, mesh, lambda start, stop: frames[:, start:stop], 1)


def references(
    cfg: config_lib.Config,
    params,
    mesh: jax.sharding.Mesh,
    paths: Sequence[str | os.PathLike],
    pixels: tuple[int, int],
) -> np.ndarray:
    """Latents of reference images, float32 [reference, frame, h, w, channel].

    Each is a chunk, as the window has them: the latents of a video that begins with the image and
    stays so.

    pixels: height and width that they are brought to.

    Raises:
      InputError: an image that cannot be read.
    """
    fit, count = cfg.sample.image_fit, 1 + (cfg.model.chunk_frames - 1) * vae.FRAMES
    made = []
    for path in paths:
        image = to_float(read_image(path, *pixels, fit))

        def read(start, stop, image=image):
            return np.broadcast_to(image, (_replicas(mesh), stop - start, *image.shape))

        made.append(encode(cfg, params, mesh, read, count)[0])
    return np.stack(made)


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
        indices = self._file.info.indices(fps=config_lib.FRAMES_PER_SECOND)
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
            return encode(cfg, params, mesh, read, self.count)[:1]


class ArrayClip:
    """Clips in an .npz, `video` [batch, 3, frame, height, width] in [-1, 1].

    Raises:
      InputError: an unreadable file, another shape, or values that are not finite.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        video = load_npz(path, ("video",), ())["video"]
        scale = config_lib.SPATIAL_COMPRESSION
        whole = video.ndim == 5 and not video.shape[3] % scale and not video.shape[4] % scale
        if not whole or video.shape[1] != 3 or not video.size or video.dtype.kind != "f":
            raise InputError(
                f"{path}: video {video.dtype}{list(video.shape)} must be floating point [batch, 3, "
                f"frame, height, width], height and width multiples of {scale}"
            )
        self._frames = np.moveaxis(narrow(video, np.float32, f"{path}: video"), 1, -1)

    def check_encodes(self, mesh: jax.sharding.Mesh) -> None:
        """Refuses a number of frames that latents do not cover, or sizes `mesh` cannot split."""
        batch, count, _, width, _ = self._frames.shape
        _check_frames(self.path, count)
        check_mesh(mesh, batch, width // config_lib.SPATIAL_COMPRESSION)

    def encode(self, cfg: config_lib.Config, params, mesh: jax.sharding.Mesh) -> np.ndarray:
        """Latents [batch, 1 + (count - 1) / 4, h, w, channel]."""

        def read(start, stop):
            return self._frames[:, start:stop]

        return encode(cfg, params, mesh, read, self._frames.shape[1])


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
