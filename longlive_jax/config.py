"""Frozen dataclasses that hold every setting, built from an ml_collections ConfigDict.

A ConfigDict stops here: the rest of the package sees only these dataclasses, which are hashable
and can be static arguments of `jax.jit`. All validation of settings lives in this file.
"""

import dataclasses
import math
import types
import typing

import jax.numpy as jnp
import ml_collections

from longlive_jax.errors import InputError

SPATIAL_COMPRESSION = 16  # pixels a latent covers, each way
TEMPORAL_COMPRESSION = 4  # frames a latent covers, after the first, which covers one
FRAMES_PER_SECOND = 24
PATCH = 2  # latents a token covers, each way


@dataclasses.dataclass(frozen=True)
class Model:
    """The video transformer. Defaults: Wan2.2-TI2V-5B, 4,999,787,712 parameters."""

    dim: int = 3072
    ffn_dim: int = 14336
    num_heads: int = 24
    num_layers: int = 30
    in_dim: int = 48
    out_dim: int = 48
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    chunk_frames: int = 8  # latent frames denoised together

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class VAE:
    """The Wan2.2 VAE. `dim` and `dec_dim` are the base widths; LightVAE halves or quarters them."""

    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    latent_mean: tuple[float, ...] = (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
        0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109,
        0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899,
        -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    )  # fmt: skip
    latent_std: tuple[float, ...] = (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344,
        0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804,
        0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
        0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UMT5:
    """The text encoder. Defaults: UMT5-XXL, 5,680,910,336 parameters."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    seq: int = 1

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.seq


@dataclasses.dataclass(frozen=True)
class Sample:
    """How a video is streamed. Frames here are latent frames unless they say pixels."""

    height: int = 704  # pixels
    width: int = 1280  # pixels
    steps: int = 4
    shift: float = 5.0  # of the flow schedule's noise levels
    guidance_scale: float = 1.0  # 1.0: no classifier-free guidance, one forward a step
    negative_prompt: str = ""
    window_frames: int = 32  # visible: sinks, recent chunks and the chunk being denoised
    sink_frames: int = 8  # first frames of the video that are always visible
    multi_shot_sink: bool = True  # the newest shot's first chunk is always visible too
    rope_offset: float = 8.0  # temporal positions skipped at a cut
    scene_cut_prefix: str = "The scene transitions. "  # put before a new shot's first prompt
    image_to_video: bool = False
    recache: bool = False  # on a prompt change inside a shot, run the visible past again
    chunks: int = 16  # length of a plain-text prompt's video, in chunks
    vae_latents_per_call: int = 2  # latents decoded at once: speed against memory


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything. `dtype` is the dtype of compute; parameters are kept in their own."""

    model: Model = Model()
    vae: VAE = VAE()
    umt5: UMT5 = UMT5()
    mesh: Mesh = Mesh()
    sample: Sample = Sample()
    dtype: str = "bfloat16"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def __post_init__(self):
        validate(self)


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The locked ConfigDict that a file in `configs/` returns and command lines override."""
    return ml_collections.ConfigDict(_as_dict(config)).lock()


def from_config_dict(config_dict: ml_collections.ConfigDict) -> Config:
    """Builds and validates a Config.

    Raises:
      InputError: an unknown key, a value of the wrong type, or a combination that cannot work.
    """
    return _build(Config, config_dict.to_dict(), "config")


def validate(config: Config) -> None:
    """Refuses, with the numbers, every combination of settings that cannot work."""
    m, s, v, u, mesh = config.model, config.sample, config.vae, config.umt5, config.mesh
    for section in (m, v, u, mesh):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if field.type is int and value < 1:
                _refuse(f"{field.name}={value} in {type(section).__name__}", "must be at least 1")
    if config.dtype not in ("float32", "bfloat16"):
        _refuse(f"dtype={config.dtype!r}", "must be 'float32' or 'bfloat16'")
    _divides("model.dim", m.dim, "model.num_heads", m.num_heads)
    if m.head_dim % 2 or m.head_dim < 6:
        _refuse(
            f"model.dim / model.num_heads = {m.head_dim}",
            "must be even and at least 6: rotary positions split it in pairs over three axes",
        )
    if m.freq_dim % 2:
        _refuse(f"model.freq_dim={m.freq_dim}", "must be even: half cosines, half sines")
    if m.in_dim != m.out_dim:
        _refuse(
            f"model.in_dim={m.in_dim}, model.out_dim={m.out_dim}",
            "must be equal: the model predicts the velocity of its own input",
        )
    for name in ("latent_mean", "latent_std"):
        if len(getattr(v, name)) != v.z_dim:
            _refuse(
                f"vae.{name} of {len(getattr(v, name))} values",
                f"needs one value a latent channel, vae.z_dim={v.z_dim}",
            )
    if not all(value > 0 and math.isfinite(value) for value in v.latent_std):
        _refuse(f"vae.latent_std={v.latent_std}", "must be positive")
    _divides("umt5.dim_attn", u.dim_attn, "umt5.num_heads", u.num_heads)
    if u.num_buckets < 4 or u.num_buckets % 2:
        _refuse(f"umt5.num_buckets={u.num_buckets}", "must be even and at least 4")
    for name in ("height", "width"):
        _divides(f"sample.{name}", getattr(s, name), "pixels a token", SPATIAL_COMPRESSION * PATCH)
    for name in ("steps", "chunks", "vae_latents_per_call", "height", "width"):
        if getattr(s, name) < 1:
            _refuse(f"sample.{name}={getattr(s, name)}", "must be at least 1")
    if not (s.shift > 0 and math.isfinite(s.shift)):
        _refuse(f"sample.shift={s.shift}", "must be positive; the published models use 5.0")
    if not math.isfinite(s.guidance_scale):
        _refuse(f"sample.guidance_scale={s.guidance_scale}", "must be finite; 1.0 turns it off")
    if not (float(s.rope_offset).is_integer() and s.rope_offset >= 0):
        _refuse(
            f"sample.rope_offset={s.rope_offset}",
            "must be a whole number of latent frames, 0 or more: positions are integers, "
            "which keeps them exact in a video of any length",
        )
    _divides("sample.window_frames", s.window_frames, "model.chunk_frames", m.chunk_frames)
    if s.sink_frames:
        _divides("sample.sink_frames", s.sink_frames, "model.chunk_frames", m.chunk_frames)
    sinks = s.sink_frames // m.chunk_frames + (1 if s.multi_shot_sink and s.sink_frames else 0)
    least = (sinks + 2) * m.chunk_frames
    if s.sink_frames < 0 or s.window_frames < least:
        _refuse(
            f"sample.window_frames={s.window_frames} with sample.sink_frames={s.sink_frames}"
            f" and sample.multi_shot_sink={s.multi_shot_sink}",
            f"must be at least {least}: {sinks} sink chunk(s), one recent chunk and the one being "
            f"denoised, of {m.chunk_frames} frames each",
        )
    _divides("model.num_heads", m.num_heads, "mesh.seq", mesh.seq)
    _divides("model.chunk_frames", m.chunk_frames, "mesh.seq", mesh.seq)
    _divides("model.dim", m.dim, "mesh.fsdp * mesh.seq", mesh.fsdp * mesh.seq)


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        near = [n for n in (value // by * by, (value // by + 1) * by) if n > 0]
        _refuse(f"{name}={value}", f"must be a multiple of {by_name}={by}; nearest: {near}")


def _refuse(what: str, why: str) -> typing.NoReturn:
    raise InputError(f"config: {what} {why}")


def _as_dict(value):
    return {
        f.name: _as_dict(v) if dataclasses.is_dataclass(v) else v
        for f in dataclasses.fields(value)
        for v in (getattr(value, f.name),)
    }


def _build(cls, values: dict, where: str):
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    return cls(**{k: _convert(fields[k], v, f"{where}.{k}") for k, v in values.items()})


def _convert(kind, value, where: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if isinstance(kind, types.GenericAlias):  # tuple[float, ...]
        return tuple(_convert(typing.get_args(kind)[0], v, where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}={value!r} must be of type {kind.__name__}")
    return value
