"""The stages of the Wan2.2 VAE, their parameters and their states.

`vae.py` runs them and is the module to import.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.models import taehv
from longlive_jax.models import vae_blocks as blocks
from longlive_jax.params import Tree

FOLD = 2  # pixels, each way, that become channels
PIXELS = config_lib.SPATIAL_COMPRESSION  # pixels a latent covers, each way
FRAMES = config_lib.TEMPORAL_COMPRESSION  # frames a latent covers, after the first
SHARDED = ("batch", None, None, "width", None)  # logical axes of latents, frames and caches


@flax.struct.dataclass
class DecodeState:
    """The decoder's state: for each causal convolution, the frames before its next input.

    `conv_cache` has the paths of the decoder's convolutions; its arrays are [batch, 2, height,
    width, channel]. `init_decode_state` makes it.
    """

    conv_cache: Tree


@flax.struct.dataclass
class EncodeState:
    """The encoder's state; as `DecodeState`, but strided convolutions keep one frame."""

    conv_cache: Tree


class Stage(NamedTuple):
    """Residual blocks of one size, then a change of size with a shortcut past the whole stage."""

    in_dim: int
    out_dim: int
    resized: bool  # height and width change at the stage's end
    time: int  # factor by which the number of frames changes at the stage's end


def encoder_stages(cfg: config_lib.VAE) -> list[Stage]:
    d = cfg.dim
    return [
        Stage(d, d, True, 1),
        Stage(d, 2 * d, True, 2),
        Stage(2 * d, 4 * d, True, 2),
        Stage(4 * d, 4 * d, False, 1),
    ]


def decoder_stages(cfg: config_lib.VAE) -> list[Stage]:
    d = cfg.dec_dim
    return [
        Stage(4 * d, 4 * d, True, 2),
        Stage(4 * d, 4 * d, True, 2),
        Stage(4 * d, 2 * d, True, 1),
        Stage(2 * d, d, False, 1),
    ]


def spec(cfg: config_lib.VAE) -> Tree:
    """Parameters: {"encoder", "conv1"} are what `encode` needs, {"conv2", "decoder"} `decode`.

    Paths are the original's state-dict keys split at the dots. Convolutions are [time, height,
    width, in, out] or [height, width, in, out], gammas [channel]. A "taehv" has a decoder alone.
    """
    if cfg.kind == "taehv":
        return taehv.spec(cfg)
    pixel = 3 * FOLD**2

    def stage(s: Stage, depth: int, time_out_dim: int) -> Tree:
        tree = {
            str(j): blocks.residual_spec(s.out_dim if j else s.in_dim, s.out_dim)
            for j in range(depth)
        }
        if s.resized:
            time_conv = time_out_dim if s.time == 2 else None
            tree[str(depth)] = blocks.resample_spec(s.out_dim, time_conv)
        return tree

    down, up = encoder_stages(cfg), decoder_stages(cfg)
    encoder = {
        "conv1": blocks.conv_spec((3, 3, 3), pixel, cfg.dim),
        "downsamples": {
            str(i): {"downsamples": stage(s, 2, s.out_dim)} for i, s in enumerate(down)
        },
        "middle": blocks.middle_spec(down[-1].out_dim),
        "head": blocks.head_spec(down[-1].out_dim, 2 * cfg.z_dim),
    }
    decoder = {
        "conv1": blocks.conv_spec((3, 3, 3), cfg.z_dim, up[0].in_dim),
        "middle": blocks.middle_spec(up[0].in_dim),
        "upsamples": {str(i): {"upsamples": stage(s, 3, 2 * s.out_dim)} for i, s in enumerate(up)},
        "head": blocks.head_spec(up[-1].out_dim, pixel),
    }
    return {
        "encoder": encoder,
        "conv1": blocks.conv_spec((1, 1, 1), 2 * cfg.z_dim, 2 * cfg.z_dim),
        "conv2": blocks.conv_spec((1, 1, 1), cfg.z_dim, cfg.z_dim),
        "decoder": decoder,
    }


# States.


def init_decode_state(
    cfg: config_lib.VAE,
    batch: int,
    latent_height: int,
    latent_width: int,
    dtype,
    mesh: jax.sharding.Mesh | None = None,
) -> DecodeState:
    """The zero state of a decoder of latents [batch, _, latent_height, latent_width, z_dim].

    `mesh`: spread it, the batch over "data" and "fsdp" and the width over "seq".

    Raises:
      InputError: the mesh does not divide the batch or the latent width.
    """
    tree = spec(cfg)["decoder"]
    h, w = latent_height, latent_width
    if cfg.kind == "taehv":
        return DecodeState(_zeros(taehv.state_shapes(cfg, h, w), batch, w, dtype, mesh))
    shapes: dict[str, Any] = {
        "conv1": blocks.conv_cache_shapes({"conv1": tree["conv1"]}, h, w)["conv1"],
        "middle": blocks.conv_cache_shapes(tree["middle"], h, w),
        "upsamples": {},
    }
    for i, stage in enumerate(decoder_stages(cfg)):
        shapes["upsamples"][str(i)] = blocks.conv_cache_shapes(tree["upsamples"][str(i)], h, w)
        if stage.resized:
            h, w = 2 * h, 2 * w
    shapes["head"] = blocks.conv_cache_shapes(tree["head"], h, w)
    return DecodeState(_zeros(shapes, batch, latent_width, dtype, mesh))


def init_encode_state(
    cfg: config_lib.VAE,
    batch: int,
    latent_height: int,
    latent_width: int,
    dtype,
    mesh: jax.sharding.Mesh | None = None,
) -> EncodeState:
    """The zero state of an encoder of frames [batch, _, 16 latent_height, 16 latent_width, 3].

    `mesh` and errors: as `init_decode_state`.
    """
    tree = spec(cfg)["encoder"]
    h, w = latent_height * PIXELS // FOLD, latent_width * PIXELS // FOLD
    shapes: dict[str, Any] = {"downsamples": {}}
    shapes["conv1"] = blocks.conv_cache_shapes({"conv1": tree["conv1"]}, h, w)["conv1"]
    for i, stage in enumerate(encoder_stages(cfg)):
        stage_tree = tree["downsamples"][str(i)]["downsamples"]
        caches = blocks.conv_cache_shapes({j: stage_tree[j] for j in ("0", "1")}, h, w)
        if stage.resized:
            h, w = h // 2, w // 2
            # Consecutive windows of a convolution of stride 2 and three taps share one frame.
            caches |= blocks.conv_cache_shapes({"2": stage_tree["2"]}, h, w, frames=1)
        shapes["downsamples"][str(i)] = {"downsamples": caches}
    shapes["middle"] = blocks.conv_cache_shapes(tree["middle"], h, w)
    shapes["head"] = blocks.conv_cache_shapes(tree["head"], h, w)
    return EncodeState(_zeros(shapes, batch, latent_width, dtype, mesh))


def _zeros(shapes, batch, latent_width, dtype, mesh):
    sharding = None
    if mesh is not None:
        check_mesh(mesh, batch, latent_width)
        sharding = mesh_lib.sharding(mesh, SHARDED)

    def zeros(shape):
        return jnp.zeros((batch, *shape), dtype, device=sharding)

    return jax.tree.map(zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


def check_mesh(mesh, batch, latent_width):
    """Refuses sizes that `mesh` does not divide."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % replicas:
        raise InputError(
            f"VAE: batch {batch} must be a multiple of mesh data x fsdp = {replicas}; change the "
            "batch or the mesh"
        )
    if latent_width % mesh.shape["seq"]:
        raise InputError(
            f"VAE: latent width {latent_width} ({latent_width * PIXELS} pixels) must be a multiple "
            f"of mesh seq={mesh.shape['seq']}, which shards it; change the width or mesh.seq"
        )
