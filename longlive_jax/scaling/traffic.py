"""What a device sends in a step of teacher forcing, as a function of config and mesh.

The same figures as `collectives.traffic` has of the traced program, which tests hold to the byte,
for meshes of any size. Left out, there as here: what JAX adds where small arrays are reduced or
laid out anew outside of `shard_map` (norms of gradients, masks, indices).
"""

import collections
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from longlive_jax import collectives
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.collectives import Kind, Traffic
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from longlive_jax.scaling.chips import Chip
from longlive_jax.training import batch as batch_lib
from longlive_jax.training.objectives.teacher_forcing import BINS

_SHARDED = mesh_lib.RULES["embed"]  # the axes that parameters are gathered over
_MASTER = 4  # bytes of a float32: parameters, gradients


class Message(NamedTuple):
    """A collective that runs so often. size: bytes of a device's input, each time."""

    kind: Kind
    times: int
    size: int


class Sent(NamedTuple):
    """Bytes that a device sends in a step, by kind of link."""

    inner: float
    outer: float


def step(cfg: config_lib.Config) -> dict[Kind, Traffic]:
    """Of one step, as `collectives.traffic` counts it.

    Raises:
      InputError: a setting whose traffic has no formula here.
    """
    total: dict[Kind, Traffic] = collections.defaultdict(lambda: Traffic(0, 0))
    for kind, times, size in messages(cfg):
        sent = times * round(size * collectives.sent(kind.name, _group(cfg, kind)))
        before = total[kind]
        total[kind] = Traffic(before.times + times, before.sent + sent)
    return dict(total)


def messages(cfg: config_lib.Config) -> Iterator[Message]:
    """The collectives of one step, but for those among one device. Errors as `step`."""
    _check(cfg)
    for message in itertools.chain(_weights(cfg), _heads(cfg), _sums(cfg), _recycling(cfg)):
        if _group(cfg, message.kind) > 1:
            yield message._replace(times=cfg.train.accumulation * message.times)


def by_link(cfg: config_lib.Config, chip: Chip) -> Sent:
    """Bytes of a step over the links inside a domain, and between domains.

    Devices fill the mesh with `seq` innermost. A sum over devices of several domains is made in
    each domain first, so that each device sends its share of that to the other domains; an
    all-to-all sends as much to each device, wherever it is.

    Raises:
      InputError: a domain does not hold fsdp x seq devices; or as `step`.
    """
    replicas = _replicas_inside(cfg.mesh, chip)
    domains = cfg.mesh.data // replicas
    inner = outer = 0.0
    for kind, times, size in messages(cfg):
        group = _group(cfg, kind)
        far = domains if mesh_lib.AXES[0] in kind.axes else 1
        near = group // far
        if kind.name == "psum":
            inner += times * size * 2 * (near - 1) / near
            outer += times * size * 2 * (far - 1) / far / near
        elif far == 1:
            inner += times * size * collectives.sent(kind.name, group)
        else:
            assert kind.name == "all_to_all", kind
            inner += times * size * (near - 1) / group
            outer += times * size * (group - near) / group
    return Sent(inner, outer)


def _replicas_inside(mesh, chip) -> int:
    """How many of `mesh.data` lie in one domain."""
    shard = mesh.fsdp * mesh.seq
    domain = min(chip.domain, mesh.size)
    if domain % shard or mesh.size % domain:
        raise InputError(
            f"mesh data={mesh.data} x fsdp={mesh.fsdp} x seq={mesh.seq}: {chip.inner.name} joins "
            f"{chip.domain} {chip.name}, which fsdp x seq = {shard} does not divide; lower it"
        )
    return domain // shard


def _check(cfg):
    train = cfg.train
    for name, value, counted in (
        ("quant.recipe", cfg.quant.recipe, "bf16"),
        ("train.trainable", train.trainable, "all"),
        ("train.text_encoder", train.text_encoder, False),
        ("actions.kind", cfg.model.actions.kind, config_lib.Actions().kind),
        ("train.error_recycling.replacement", train.error_recycling.replacement, "random"),
    ):
        if value != counted:
            raise InputError(f"config: {name}={value!r} has no formula of traffic; {counted!r} has")


def _group(cfg, kind) -> int:
    return math.prod(getattr(cfg.mesh, axis) for axis in kind.axes)


def _weights(cfg) -> Iterator[Message]:
    """Gathered in the compute dtype, in a block for the forward and again for the backward; their
    gradients scattered in float32.
    """
    shards = math.prod(getattr(cfg.mesh, axis) for axis in _SHARDED)
    gathered, scattered = (Kind(name, _SHARDED) for name in ("all_gather", "reduce_scatter"))
    for path, layers, spec in leaves(cfg):
        if "embed" not in spec.axes:
            continue
        size = math.prod(spec.shape)
        forwards = 2 if path[0] == "blocks" else 1
        sent = size * cfg.compute_dtype.itemsize // shards
        yield Message(gathered, forwards * layers, sent)
        yield Message(scattered, layers, size * _MASTER)


def _heads(cfg) -> Iterator[Message]:
    """q, k, v to heads and the output to tokens: in the forward, again in the backward, and back
    with the gradients.
    """
    tokens = local_tokens(cfg)
    size = tokens * cfg.model.dim * cfg.compute_dtype.itemsize
    yield Message(Kind("all_to_all", ("seq",)), 3 * 4 * cfg.model.num_layers, size)


def _sums(cfg) -> Iterator[Message]:
    """Gradients summed over the devices that have equal parameters, after the step's last layer;
    the loss and its metrics.
    """
    shards = math.prod(getattr(cfg.mesh, axis) for axis in _SHARDED)
    for _, layers, spec in leaves(cfg):
        sharded = "embed" in spec.axes and shards > 1
        size = layers * math.prod(spec.shape) // (shards if sharded else 1)
        yield Message(_psum(cfg, exclude=_SHARDED if sharded else ()), 1, size * _MASTER)
    for size in (1, BINS, BINS):
        yield Message(_psum(cfg), 1, size * _MASTER)


def _psum(cfg, exclude=()):
    return Kind(
        "psum", tuple(a for a in mesh_lib.AXES if a not in exclude and getattr(cfg.mesh, a) > 1)
    )


def _recycling(cfg) -> Iterator[Message]:
    """Errors drawn for noise, latents and past, those kept of latents and noise: slices of all the
    batch's chunks on every device against whole ones of its own.
    """
    if not cfg.train.error_recycling.enabled:
        return
    elements = math.prod(batch_lib.chunk_shape(cfg))
    if elements % cfg.mesh.size:
        raise InputError(
            f"config: mesh of {cfg.mesh.size} devices does not divide the {elements} numbers of a "
            "chunk, and error recycling's traffic then has no formula; change the mesh"
        )
    chunks = cfg.train.batch_size * batch_lib.chunks(cfg)
    size = chunks * elements // cfg.mesh.size * 2  # bfloat16
    for axis in mesh_lib.AXES:
        yield Message(Kind("all_to_all", (axis,)), 5, size)


def local_tokens(cfg: config_lib.Config) -> int:
    """Tokens of one device in a forward, of all copies."""
    copies = 2 if cfg.train.teacher_forcing else 1
    m, mesh, train = cfg.model, cfg.mesh, cfg.train
    videos = train.batch_size // (mesh.data * mesh.fsdp)
    chunks = batch_lib.chunks(cfg) // mesh.seq
    return videos * chunks * copies * m.chunk_frames * cfg.video.patches


def leaves(cfg: config_lib.Config) -> Iterator[tuple[params_lib.Path, int, params_lib.ParamSpec]]:
    """(path, layers, spec of one layer) of every parameter; outside of blocks there is one."""
    for path, spec in params_lib.flatten(dit.spec(cfg.model)).items():
        if path[0] == "blocks":
            yield path, spec.shape[0], params_lib.ParamSpec(spec.shape[1:], spec.axes[1:])
        else:
            yield path, 1, spec
