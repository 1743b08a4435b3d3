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
# What a training block keeps for its gradient, from least memory to least recomputation.
REMAT = ("block", "attention", "output", "ffn", "qkv")
KV_FORMATS = ("bf16", "fp8", "nvfp4")  # what `quant.kv` knows
PAYLOADS = ("bf16", "nvfp4")  # what `quant.all_to_all` knows
# Those of `quant.recipe`, and whether they say how gradients are computed.
RECIPES = {
    "bf16": True, "fp8": False, "fp8_train": True, "nvfp4_ar": True, "nvfp4_dmd": True,
    "nvfp4_te": True, "nvfp4_w4a4": False,
}  # fmt: skip


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
class WindowSize:
    """How many chunks are visible at a time; `sampling.window` says which."""

    chunks: int  # in all, with the one being denoised
    sinks: int  # first chunks of the video, which are always visible
    shots: int  # 1: the newest shot's first chunk is always visible too; else 0

    @property
    def slots(self) -> int:
        """Slots of the KV cache: the chunk being denoised needs none."""
        return self.chunks - 1

    @property
    def least(self) -> int:
        """The least `chunks`: all that stay, one recent chunk and the one being denoised."""
        return self.sinks + self.shots + 2


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

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on (Ho and Salimans, arXiv 2207.12598)."""
        return self.guidance_scale != 1.0

    def window(self, model: Model) -> WindowSize:
        """The window in chunks of `model`."""
        sinks = self.sink_frames // model.chunk_frames
        shots = int(self.multi_shot_sink and self.sink_frames > 0)
        return WindowSize(self.window_frames // model.chunk_frames, sinks, shots)


@dataclasses.dataclass(frozen=True)
class Quant:
    """Number formats of less than 16 bits. "bf16": none, all is in the dtype of compute."""

    recipe: str = "bf16"  # of the blocks' linear layers, one of RECIPES
    kv: str = "bf16"  # of the sampler's cache, one of KV_FORMATS
    all_to_all: str = "bf16"  # of what devices exchange in sampling, one of PAYLOADS


@dataclasses.dataclass(frozen=True)
class Data:
    """What a trainer reads. Pictures are brought to sample.height x sample.width."""

    path: str = ""  # folder with video/ and caption/, or one that launch.encode_dataset wrote
    cached: bool = False  # `path` holds latents and text embeddings, ready made
    eval_path: str = ""  # held-out captions, in any form that launch.sample reads
    workers: int = 2  # processes that decode, on each host
    max_chunks_per_shot: int = 0  # then a cut inside a long video, one second skipped; 0: no limit
    single_shot: bool = False  # a sample is one video file, not a row of them
    allow_padding: bool = False  # folders too short for a sample are padded, the rest masked
    min_chunks: int = 1  # least real chunks of a padded sample
    max_bad_share: float = 0.1  # unreadable samples, of those read, before the run stops
    encode: str = "width"  # how the VAE is spread over `seq`: "width", or "halo" (whole chunks)


@dataclasses.dataclass(frozen=True)
class ErrorRecycling:
    """The model's own errors, kept and added to later inputs (SVI, arXiv 2510.09212).

    Errors are kept by noise level, in `buckets` rings of `slots` chunks each.
    """

    enabled: bool = False
    buckets: int = 50
    slots: int = 16  # chunks kept a bucket; the memory is spread over all devices
    positions: bool = False  # a ring for each chunk of the video as well
    start_step: int = 0
    context_probability: float = 0.9  # that clean context is corrupted
    latent_probability: float = 0.9  # that clean latents are, before noise is added
    noise_probability: float = 0.01  # that the noise is
    clean_probability: float = 0.2  # that a batch is left alone, whatever the three above say
    clean_update_probability: float = 0.1  # that the errors of such a batch are kept
    modulation: float = 0.3  # an error is scaled by 1 - modulation to 1 + modulation
    replacement: str = "random"  # of a full ring's entries: "random", "oldest" or "nearest"
    skip_first_chunk: bool = False  # its context stays clean


@dataclasses.dataclass(frozen=True)
class Train:
    """Autoregressive teacher forcing. The defaults are the paper's; frames are latent frames."""

    seed: int = 0
    steps: int = 600
    batch_size: int = 1  # videos at a time, over the whole mesh
    accumulation: int = 1  # such batches a step
    latent_frames: int = 96
    teacher_forcing: bool = True  # chunks see clean ones before them; False: noisy ones
    context_levels: int = 0  # clean context is noised to one of so many lowest levels; 0: clean
    text_encoder: bool = False  # the text encoder is trained too
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    beta1: float = 0.0
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    ema_decay: float = 0.99
    ema_start: int = 100  # steps before the average begins
    remat: str = "output"  # what a block keeps for its gradient, one of REMAT
    error_recycling: ErrorRecycling = ErrorRecycling()
    save_every: int = 50
    keep_last: int = 3  # checkpoints
    keep_every: int = 0  # every such step's checkpoint is kept for good; 0: none
    eval_every: int = 0  # steps between evaluations; 0: none
    eval_steps: int = 50  # of the solver
    eval_chunks: int = 4
    max_bad_steps: int = 10  # steps in a row with a loss or gradient that is not finite


@dataclasses.dataclass(frozen=True)
class TrainVAE:
    """A small VAE from scratch, on the videos of `data.path`. Frames here are pixel frames."""

    seed: int = 0
    steps: int = 8000
    batch_size: int = 16  # clips, over the whole mesh
    frames: int = 17  # of a clip
    learning_rate: float = 1e-3  # at the end of the warm-up; from there a cosine down to 0
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999  # of the weights that are the result
    edge_weight: float = 0.5  # of the error's differences between neighbouring pixels
    kl_weight: float = 1e-3  # of the posterior's divergence from a unit Gaussian
    held_out: int = 4  # folders of videos, the last by name, that are for measuring only
    memory_gib: float = 8.0  # most that all videos, decoded, may take on each device
    save_every: int = 500
    log_every: int = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything. `dtype` is the dtype of compute; parameters are kept in their own."""

    model: Model = Model()
    vae: VAE = VAE()
    umt5: UMT5 = UMT5()
    mesh: Mesh = Mesh()
    sample: Sample = Sample()
    quant: Quant = Quant()
    data: Data = Data()
    train: Train = Train()
    train_vae: TrainVAE = TrainVAE()
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
    size = s.window(m)
    if s.sink_frames < 0 or size.chunks < size.least:
        _refuse(
            f"sample.window_frames={s.window_frames} with sample.sink_frames={s.sink_frames}"
            f" and sample.multi_shot_sink={s.multi_shot_sink}",
            f"must be at least {size.least * m.chunk_frames}: {size.sinks + size.shots} sink "
            f"chunk(s), one recent chunk and the one being denoised, of {m.chunk_frames} frames "
            "each",
        )
    _validate_quant(config)
    _divides("model.num_heads", m.num_heads, "mesh.seq", mesh.seq)
    _divides("model.chunk_frames", m.chunk_frames, "mesh.seq", mesh.seq)
    _divides("model.dim", m.dim, "mesh.fsdp * mesh.seq", mesh.fsdp * mesh.seq)


def _validate_quant(config):
    kv, payload = config.quant.kv, config.quant.all_to_all
    if kv not in KV_FORMATS:
        _refuse(f"quant.kv={kv!r}", f"must be one of {', '.join(KV_FORMATS)}")
    if payload not in PAYLOADS:
        _refuse(f"quant.all_to_all={payload!r}", f"must be one of {', '.join(PAYLOADS)}")
    if kv == "fp8":
        s = config.sample
        patches = s.height * s.width // (SPATIAL_COMPRESSION * PATCH) ** 2
        _divides(
            f"model.chunk_frames x patches of {s.height} x {s.width} pixels",
            config.model.chunk_frames * patches,
            "tokens that quant.kv='fp8' stores together",
            16,
        )
    if "nvfp4" in (kv, payload):
        _divides("model.dim / model.num_heads", config.model.head_dim, "numbers a block", 16)
    recipe, m = config.quant.recipe, config.model
    if recipe not in RECIPES:
        _refuse(f"quant.recipe={recipe!r}", f"must be one of {', '.join(RECIPES)}")
    if recipe.startswith("nvfp4"):
        _divides("model.dim", m.dim, "numbers a block * mesh.fsdp", 16 * config.mesh.fsdp)
        _divides("model.ffn_dim", m.ffn_dim, "numbers a block", 16)


def validate_training(config: Config) -> None:
    """Refuses what a trainer cannot do. Apart from `validate`: a sampler needs none of it.

    Raises:
      InputError: the setting, its value, the limit and the way out.
    """
    m, t, d, mesh = config.model, config.train, config.data, config.mesh
    for name in ("steps", "batch_size", "accumulation", "latent_frames", "save_every", "keep_last",
                 "eval_steps", "eval_chunks", "max_bad_steps"):  # fmt: skip
        if getattr(t, name) < 1:
            _refuse(f"train.{name}={getattr(t, name)}", "must be at least 1")
    for name in ("warmup_steps", "keep_every", "eval_every", "ema_start", "weight_decay"):
        if getattr(t, name) < 0:
            _refuse(f"train.{name}={getattr(t, name)}", "must be 0 or more")
    for name in ("learning_rate", "epsilon", "max_grad_norm"):
        if not (getattr(t, name) > 0 and math.isfinite(getattr(t, name))):
            _refuse(f"train.{name}={getattr(t, name)}", "must be positive")
    for name in ("beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(t, name) < 1:
            _refuse(f"train.{name}={getattr(t, name)}", "must be at least 0 and below 1")
    if not 0 <= t.context_levels <= 1000:
        _refuse(f"train.context_levels={t.context_levels}", "must be 0 to 1000, the noise levels")
    if not RECIPES[config.quant.recipe]:
        _refuse(
            f"quant.recipe={config.quant.recipe!r}",
            "is for sampling; train in one of "
            + ", ".join(name for name, gradients in RECIPES.items() if gradients),
        )
    if t.remat not in REMAT:
        _refuse(f"train.remat={t.remat!r}", f"must be one of {', '.join(REMAT)}")
    _divides("train.latent_frames", t.latent_frames, "model.chunk_frames", m.chunk_frames)
    chunks = t.latent_frames // m.chunk_frames
    _divides("train.latent_frames / model.chunk_frames", chunks, "mesh.seq", mesh.seq)
    _divides("train.batch_size", t.batch_size, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)
    if d.workers < 0:
        _refuse(f"data.workers={d.workers}", "must be 0 (decode in the trainer itself) or more")
    if d.max_chunks_per_shot < 0:
        _refuse(f"data.max_chunks_per_shot={d.max_chunks_per_shot}", "must be 0 (no limit) or more")
    if not 1 <= d.min_chunks <= chunks:
        _refuse(f"data.min_chunks={d.min_chunks}", f"must be 1 to {chunks}, a sample's chunks")
    if not 0 <= d.max_bad_share <= 1:
        _refuse(f"data.max_bad_share={d.max_bad_share}", "must be 0 to 1")
    if d.encode not in ("width", "halo"):
        _refuse(f"data.encode={d.encode!r}", "must be 'width' or 'halo'")
    if d.encode == "width" and not d.cached:
        width = config.sample.width // SPATIAL_COMPRESSION
        if width % mesh.seq:
            _refuse(
                f"sample.width={config.sample.width}, {width} latents,",
                f"must be a multiple of mesh.seq={mesh.seq} latents for data.encode='width'; "
                "set data.encode='halo'",
            )
    _validate_recycling(t.error_recycling)


def validate_vae_training(config: Config) -> None:
    """Refuses what the trainer of a VAE cannot do; as `validate_training`.

    Raises:
      InputError: the setting, its value, the limit and the way out.
    """
    t, v, mesh = config.train_vae, config.vae, config.mesh
    for name in ("steps", "batch_size", "held_out", "save_every", "log_every"):
        if getattr(t, name) < 1:
            _refuse(f"train_vae.{name}={getattr(t, name)}", "must be at least 1")
    for name in ("warmup_steps", "weight_decay", "edge_weight", "kl_weight"):
        if getattr(t, name) < 0:
            _refuse(f"train_vae.{name}={getattr(t, name)}", "must be 0 or more")
    for name in ("learning_rate", "max_grad_norm", "memory_gib"):
        if not (getattr(t, name) > 0 and math.isfinite(getattr(t, name))):
            _refuse(f"train_vae.{name}={getattr(t, name)}", "must be positive")
    if not 0 <= t.ema_decay < 1:
        _refuse(f"train_vae.ema_decay={t.ema_decay}", "must be at least 0 and below 1")
    if t.frames < 1 + TEMPORAL_COMPRESSION or t.frames % TEMPORAL_COMPRESSION != 1:
        _refuse(
            f"train_vae.frames={t.frames}",
            f"must be 5, 9, 13, ...: a latent covers {TEMPORAL_COMPRESSION} frames, the first 1",
        )
    if t.warmup_steps >= t.steps:
        _refuse(
            f"train_vae.warmup_steps={t.warmup_steps}", f"must be below train_vae.steps={t.steps}"
        )
    if any(v.latent_mean) or any(value != 1 for value in v.latent_std):
        _refuse(
            f"vae.latent_mean={v.latent_mean}, vae.latent_std={v.latent_std}",
            "must be zeros and ones: the trainer puts the statistics that it measures into the "
            "weights",
        )
    if mesh.seq != 1:
        _refuse(f"mesh.seq={mesh.seq}", "must be 1: clips are spread whole, over data and fsdp")
    _divides("train_vae.batch_size", t.batch_size, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)


def _validate_recycling(r: ErrorRecycling) -> None:
    for name in ("context", "latent", "noise", "clean", "clean_update"):
        value = getattr(r, f"{name}_probability")
        if not 0 <= value <= 1:
            _refuse(f"train.error_recycling.{name}_probability={value}", "must be 0 to 1")
    if not 0 <= r.modulation <= 1:
        _refuse(f"train.error_recycling.modulation={r.modulation}", "must be 0 to 1")
    if r.slots < 1 or r.start_step < 0:
        _refuse(
            f"train.error_recycling.slots={r.slots}, start_step={r.start_step}",
            "must be at least 1 and at least 0",
        )
    if not 1 <= r.buckets <= 1000:
        _refuse(f"train.error_recycling.buckets={r.buckets}", "must be 1 to 1000, the noise levels")
    if r.replacement not in ("random", "oldest", "nearest"):
        _refuse(
            f"train.error_recycling.replacement={r.replacement!r}",
            "must be 'random', 'oldest' or 'nearest'",
        )


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
