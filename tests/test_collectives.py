"""What devices send, counted in jaxprs."""

import jax
import jax.numpy as jnp
import pytest

from longlive_jax import collectives
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.collectives import Kind, Traffic

MESH = config_lib.Mesh(data=2, seq=4)
WHOLE = 8 * 3 * 4  # bytes of what each device has


def found(local, shape=(8, 3)):
    mesh = mesh_lib.make_mesh(MESH)
    run = jax.shard_map(local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    where = jax.NamedSharding(mesh, jax.P())
    traced = jax.jit(run).trace(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where))
    return collectives.traffic(traced.jaxpr, mesh.shape), list(
        collectives.lines(traced.jaxpr, mesh)
    )


@pytest.mark.parametrize(
    "local, kind, sent",
    [
        (lambda x: jax.lax.psum(x, "seq"), Kind("psum", ("seq",)), 2 * 3 / 4),
        (lambda x: jax.lax.psum(x, ("data", "seq")), Kind("psum", ("data", "seq")), 2 * 7 / 8),
        (
            lambda x: jax.lax.all_gather(x, "data", tiled=True)[:8],
            Kind("all_gather", ("data",)),
            1,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "seq", 0, 0, tiled=True),
            Kind("all_to_all", ("seq",)),
            3 / 4,
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "seq", tiled=True).sum() + x,
            Kind("reduce_scatter", ("seq",)),
            3 / 4,
        ),
        (
            lambda x: jax.lax.ppermute(x, "seq", [(0, 1), (1, 2)]),
            Kind("ppermute", ("seq",)),
            1,
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Kind) else None,
)
def test_of_each_kind(local, kind, sent):
    traffic, (line,) = found(local)
    assert traffic == {kind: Traffic(1, round(WHOLE * sent))}
    assert line.split()[:2] == [kind.name, "over"]


def test_loops_count_as_often_as_they_run():
    def body(x, _):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "seq"), None), x, length=3)

    traffic, _ = found(lambda x: jax.lax.scan(body, x, length=5)[0])
    assert traffic == {Kind("psum", ("seq",)): Traffic(15, 15 * WHOLE * 3 // 2)}


def test_of_branches_the_one_that_sends_most():
    def local(x):
        one = lambda x: jax.lax.psum(x, "seq")  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, one, lambda x: one(one(x)), x)

    assert found(local)[0] == {Kind("psum", ("seq",)): Traffic(2, 3 * WHOLE)}


def test_groups_of_one_send_nothing():
    assert found(lambda x: jax.lax.psum(x, "fsdp"))[0] == {}
