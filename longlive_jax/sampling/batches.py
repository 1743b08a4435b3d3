"""Which videos are made together, and from what; all of it checked before anything is computed."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data import photographs
from longlive_jax.data.sidecars import Actions
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz, narrow
from longlive_jax.prompts import pictures
from longlive_jax.prompts.embeddings import shorten
from longlive_jax.prompts.shots import Video


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """Noise from outside, in place of a seed's, float32 [batch, frame, h, w, channel].

    init: [batch, 1, h, w, channel], latents of the videos' first frames, or None.
    """

    noise: np.ndarray
    init: np.ndarray | None
    chunks: int


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Videos of equal length that are denoised together.

    index: of the first of them among all videos; a seed's noise depends on it, not on the batching.
    noise: [batch, frame, h, w, channel], or None: drawn from the seed.
    first_frame: [batch, 1, h, w, channel] for image-to-video, else None.
    prefix: [batch, frame, h, w, channel], latents of a video to continue, or None.
    actions: of each video, all its pictures'; None for a model without an action path.
    references: [batch, reference, frame, h, w, channel], a chunk of each image, or None.
    """

    videos: Sequence[Video]
    height: int  # of the latents
    width: int
    index: int = 0
    noise: np.ndarray | None = None
    first_frame: np.ndarray | None = None
    prefix: np.ndarray | None = None
    actions: Sequence[Actions] | None = None
    references: np.ndarray | None = None

    @property
    def chunks(self) -> int:
        return len(self.videos[0].chunks)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        scale = config_lib.SPATIAL_COMPRESSION
        return self.height * scale, self.width * scale

    @property
    def pictured(self) -> bool:
        """Whether its videos begin with images (all do, or none)."""
        return bool(self.videos[0].image)

    def latent_frames(self, cfg: config_lib.Model) -> int:
        known = 0 if self.prefix is None else self.prefix.shape[1]
        return known + self.chunks * cfg.chunk_frames

    def check_images(self) -> None:
        """Refuses first frames that cannot be read."""
        for image in dict.fromkeys(video.image for video in self.videos if video.image):
            photographs.read(image)

    def with_images(self, cfg: config_lib.Config, params, mesh: jax.sharding.Mesh) -> "Batch":
        """The same, the images of its videos encoded by the VAE's `params` on `mesh`."""
        images = [video.image for video in self.videos if video.image]
        first = pictures.first_frames(cfg, params, mesh, images, self.pixels)
        return dataclasses.replace(self, first_frame=first)

    def continuing(self, prefix: np.ndarray) -> "Batch":
        """The same, each video going on from `prefix` [1, frame, h, w, channel]."""
        return dataclasses.replace(self, prefix=prefix.repeat(len(self.videos), axis=0))

    def referring(self, references: np.ndarray) -> "Batch":
        """The same, each video with these `references` [reference, frame, h, w, channel]."""
        return dataclasses.replace(self, references=np.stack([references] * len(self.videos)))


def frames(latent_frames: int) -> int:
    """Frames of a video of so many latent frames."""
    return 1 + (latent_frames - 1) * config_lib.TEMPORAL_COMPRESSION


def read_noise(path: str | os.PathLike, cfg: config_lib.Model) -> Noise:
    """Noise of an .npz: `noise` [batch, frame, channel, h, w], perhaps `init` [batch, 1, ...].

    Raises:
      InputError: an unreadable file, shapes that do not fit the config, values that are not finite.
    """
    arrays = load_npz(path, ("noise",), ("init",))
    sizes = f"model.in_dim={cfg.in_dim} channels"
    noise = channels_last(arrays["noise"], f"{path}: noise", cfg.in_dim, sizes)
    batch, frames, height, width, _ = noise.shape
    if height % config_lib.PATCH or width % config_lib.PATCH:
        raise InputError(
            f"{path}: noise of {height} x {width} latents: both must be multiples of "
            f"{config_lib.PATCH}, the latents a token covers; crop it"
        )
    if frames % cfg.chunk_frames:
        raise InputError(
            f"{path}: noise of {frames} latent frames: must be a multiple of "
            f"model.chunk_frames={cfg.chunk_frames}; cut or extend it"
        )
    init = None
    if "init" in arrays:
        init = channels_last(arrays["init"], f"{path}: init", cfg.in_dim, sizes)
        want = (batch, 1, *noise.shape[2:])
        if init.shape != want:
            raise InputError(
                f"{path}: init of shape {arrays['init'].shape} does not fit noise of shape "
                f"{arrays['noise'].shape}; they must be equal but for init's single frame"
            )
    return Noise(noise, init, frames // cfg.chunk_frames)


def channels_last(array: np.ndarray, name: str, channels: int, sizes: str) -> np.ndarray:
    """Latents of a file, [batch, frame, channel, h, w] -> float32 [batch, frame, h, w, channel].

    Raises:
      InputError: another shape, no elements, no numbers, or numbers that are infinite in float32.
        `name` and `sizes` are for the message.
    """
    if array.ndim != 5 or array.shape[2] != channels or array.dtype.kind not in "fiu":
        raise InputError(
            f"{name} {array.dtype}{list(array.shape)} must be numbers [batch, frame, channel, h, "
            f"w] with {sizes}; transpose it, or give the config it was made with"
        )
    if not array.size:
        raise InputError(f"{name} of shape {array.shape} is empty; each axis must be at least 1")
    return np.moveaxis(narrow(array, np.float32, name), 2, -1)


def make(
    cfg: config_lib.Config, videos: Sequence[Video], noise: Noise | None = None, size: int = 1
) -> list[Batch]:
    """Batches of at most `size` neighbouring videos that can be denoised together.

    With noise, videos have its length and number, and all that can be are in one batch.

    Raises:
      InputError: numbers that do not fit each other or the mesh; image-to-video without an image.
    """
    height, width = cfg.video.latent_size
    if noise is not None:
        size, (height, width) = len(noise.noise), noise.noise.shape[2:4]
        videos = [shorten(video, noise.chunks) for video in videos]
        if len(videos) == 1:
            videos = videos * size
        if len(videos) != size:
            raise InputError(
                f"prompts of {len(videos)} videos for noise of {size}; give as many, or one"
            )
    _check_images(cfg, videos, noise)
    _check_guidance(cfg, videos)
    batches, start = [], 0
    while start < len(videos):
        stop = start + 1
        while stop < min(start + size, len(videos)) and _alike(cfg, videos[start], videos[stop]):
            stop += 1
        here = slice(start, stop)
        batches.append(
            Batch(
                videos[here], height, width, start,
                noise=None if noise is None else noise.noise[here],
                first_frame=None if noise is None or noise.init is None else noise.init[here],
            )
        )  # fmt: skip
        start = stop
    replicas = cfg.mesh.data * cfg.mesh.fsdp
    for batch in batches:
        if len(batch.videos) % replicas:
            raise InputError(
                f"a batch of {len(batch.videos)} video(s): must be a multiple of mesh data x fsdp "
                f"= {replicas}; change the number of videos of equal length, --batch or the mesh"
            )
    return batches


def _alike(cfg, a: Video, b: Video) -> bool:
    """Whether two videos can be in a batch, each as it would be alone."""
    again = ([(c.recaches(cfg.sample.recache), c.steps) for c in v.chunks] for v in (a, b))
    alike = len(a.chunks) == len(b.chunks) and bool(a.image) == bool(b.image)
    return alike and next(again) == next(again)


def _check_guidance(cfg, videos):
    if cfg.sample.guided:
        return
    for video in videos:
        for chunk in video.chunks:
            if chunk.guidance not in (None, cfg.sample.guidance_scale):
                raise InputError(
                    f"prompts: {video.name} has a shot with guidance {chunk.guidance:g}, and the "
                    "config has none; give --config.sample.guidance_scale=3, say"
                )


def _check_images(cfg, videos, noise):
    init = noise is not None and noise.init is not None
    without = [video.name for video in videos if not video.image]
    if init and len(without) < len(videos):
        raise InputError("a first frame is given twice: init in the noise, and an image; drop one")
    if cfg.video.image_to_video and without and not init:
        raise InputError(
            f"config: video.image_to_video=True, but video {without[0]!r} has no image; give "
            "--image, prompts with images, or init in --noise"
        )
