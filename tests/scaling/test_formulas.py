"""Formulas of what a step holds and sends, against programs traced and compiled."""

import dataclasses

import pytest

from configs import train_ar_5b
from longlive_jax import collectives
from longlive_jax import config as lib
from longlive_jax.errors import InputError
from longlive_jax.scaling import memory, traffic
from longlive_jax.scaling.chips import CHIPS
from tests import hlo
from tests.scaling.parts import RECYCLING, config, traced

NAMES = {
    "all-gather": "all_gather",
    "all-reduce": "psum",
    "all-to-all": "all_to_all",
    "reduce-scatter": "reduce_scatter",
}


def by_name(cfg):
    found = dict.fromkeys(NAMES.values(), 0)
    for kind, (_, sent) in traffic.step(cfg).items():
        found[kind.name] += sent
    return found


@pytest.mark.parametrize(
    "mesh, train",
    [
        (lib.Mesh(seq=4), {"remat": "block"}),
        (lib.Mesh(fsdp=2, seq=4), {"remat": "attention"}),
        (lib.Mesh(data=2, fsdp=2, seq=2), {"remat": "output"}),
        (lib.Mesh(data=2, seq=2), {"accumulation": 2, "remat": "qkv"}),
        (lib.Mesh(data=8), {"remat": "ffn"}),
        (lib.Mesh(data=2, fsdp=4), {"teacher_forcing": False, "error_recycling": lib.ErrorRecycling()}),
        (lib.Mesh(), {}),
    ],
    ids=str,
)  # fmt: skip
def test_traffic_is_that_of_the_traced_step_to_the_byte(mesh, train):
    cfg = config(mesh, **train)
    assert traffic.step(cfg) == collectives.traffic(traced(cfg).jaxpr, _sizes(mesh))


def test_of_the_whole_model_too():
    cfg = lib.from_config_dict(train_ar_5b.get_config())
    mesh = lib.Mesh(data=2, fsdp=2, seq=2)
    train = dataclasses.replace(cfg.train, batch_size=4, remat="block")
    cfg = dataclasses.replace(cfg, mesh=mesh, train=train)
    assert traffic.step(cfg) == collectives.traffic(traced(cfg).jaxpr, _sizes(mesh))


@pytest.mark.parametrize(
    "mesh, recycling",
    [
        pytest.param(lib.Mesh(data=2, fsdp=2, seq=2), RECYCLING, id="8 devices"),
        pytest.param(
            lib.Mesh(fsdp=4), lib.ErrorRecycling(), id="4 devices", marks=pytest.mark.slow
        ),
    ],
)
def test_memory_and_traffic_are_those_of_the_compiled_step(mesh, recycling):
    cfg = config(mesh, latent_frames=16, error_recycling=recycling)
    cfg = dataclasses.replace(cfg, dtype="float32")
    compiled = traced(cfg).lower().compile()
    # A few counters come on top.
    given = compiled.memory_analysis().argument_size_in_bytes
    assert 0 <= given - sum(memory.arguments(cfg).values()) <= 200
    sent, expected = hlo.sent(compiled.as_text()), by_name(cfg)
    # XLA:CPU sends bfloat16 as float32; errors are, whatever the compute dtype.
    expected["all_to_all"] += expected["all_to_all"] - by_name(without_recycling(cfg))["all_to_all"]
    for name, count in expected.items():
        found = sum(v for k, v in sent.items() if NAMES[k] == name)
        # XLA sums norms and lays out masks and indices anew.
        assert count <= found <= 1.01 * count + 1024, name


def without_recycling(cfg):
    train = dataclasses.replace(cfg.train, error_recycling=lib.ErrorRecycling())
    return dataclasses.replace(cfg, train=train)


def _sizes(mesh):
    return {"data": mesh.data, "fsdp": mesh.fsdp, "seq": mesh.seq}


def test_links_by_domain():
    chip = dataclasses.replace(CHIPS["H200"], domain=4)
    cfg = config(lib.Mesh(data=4, seq=2), error_recycling=lib.ErrorRecycling())
    inside, total = traffic.by_link(cfg, chip), traffic.by_link(cfg, CHIPS["H200"])
    assert total.outer == 0
    assert total.inner == pytest.approx(sum(sent for _, sent in traffic.step(cfg).values()))
    # Two domains of two replicas: an all-reduce of x over them all sends 3/2 x; in a domain x, and
    # x/2 of it to the other.
    over_data = sum(
        times * size for kind, times, size in traffic.messages(cfg) if kind.axes == ("data",)
    )
    rest = sum(times * size for kind, times, size in traffic.messages(cfg)
               if kind.name == "psum" and kind.axes != ("data",))  # fmt: skip
    assert inside.outer == pytest.approx(over_data / 2 + rest / 4)
    assert total.inner - inside.inner == pytest.approx(inside.outer)


def test_an_all_to_all_sends_as_much_to_each_device():
    chip = dataclasses.replace(CHIPS["H200"], domain=2)
    cfg = config(lib.Mesh(data=8))
    sent, all_of_it = traffic.by_link(cfg, chip), traffic.step(cfg)
    without = traffic.by_link(without_recycling(cfg), chip)
    (exchanged,) = (sent for kind, (_, sent) in all_of_it.items() if kind.name == "all_to_all")
    assert sent.outer - without.outer == pytest.approx(exchanged * 6 / 7)
    assert sent.inner - without.inner == pytest.approx(exchanged / 7)


def test_what_has_no_formula_is_refused():
    cfg = config(lib.Mesh(data=2))
    quantised = dataclasses.replace(cfg, quant=lib.Quant(recipe="fp8_train"))
    with pytest.raises(InputError, match=r"quant\.recipe='fp8_train'"):
        traffic.step(quantised)
    with pytest.raises(InputError, match="does not divide"):
        traffic.step(config(lib.Mesh(data=3)))
    with pytest.raises(InputError, match="fsdp x seq = 16"):
        traffic.by_link(config(lib.Mesh(fsdp=4, seq=4)), CHIPS["H200"])


def test_bytes_on_disk():
    cfg = config(lib.Mesh(data=2, fsdp=2, seq=2))
    arguments = memory.arguments(cfg)
    whole = memory.saved(cfg)
    kept = sum(v for k, v in arguments.items() if k != "batch")
    assert whole / 4 < kept < whole
    # A host with a whole replica reads it all but for errors of other hosts' devices.
    assert memory.restored(cfg, 4) == whole - arguments["error recycling"] * 4
    assert memory.restored(cfg, 2) < 0.6 * whole
    least, most = memory.sample(cfg)
    latents = 4 * 8 * 4 * 4 * 8 * 2
    assert (least, most) == (latents + 16 * 32 * 2, latents + 4 * 16 * 32 * 2)
