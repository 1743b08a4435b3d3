"""docs/scale.md as text, from formulas and from what the compiler said."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from configs import train_ar_5b
from launch.scale_programs import PROGRAMS, STEP, Record
from longlive_jax import config as config_lib
from longlive_jax.scaling import memory, plans
from longlive_jax.scaling.chips import CHIPS
from longlive_jax.scaling.plans import Plan

# Of docs/performance.md, "Training": 96 latents, seq=4 on four H200, remat=output.
H200_STEP_SECONDS = 7.30
H200_MEMORY = 71.8e9  # bytes a card


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh below `data` that a chip is planned with, for these numbers of devices.

    compiled: the step's programs that temporaries are taken from, by key, the first that is there;
      none: they are measured.
    """

    chip: str
    fsdp: int
    seq: int
    remat: str
    compiled: tuple[str, ...]
    sizes: tuple[int, ...] = plans.SIZES


_V5P, _V6E = f"{STEP}@v5p:2x2x4", f"{STEP}@v6e:8x8"
NEEDED = _V5P  # without this there is no document
LAYOUTS = (
    Layout("H200", fsdp=2, seq=4, remat="output", compiled=()),
    Layout("v5p", fsdp=2, seq=4, remat="block", compiled=(_V5P,)),
    Layout("v6e", fsdp=2, seq=4, remat="block", compiled=(_V6E, _V5P), sizes=(8,)),
    Layout("v6e", fsdp=16, seq=4, remat="block", compiled=(_V6E, _V5P), sizes=(64, 512, 4096)),
)


def text(records: Mapping[str, Record]) -> str:
    """The document. records: of `scale_programs.PROGRAMS`, by key; of v5p's step at least."""
    share = measured_share()
    template = pathlib.Path(__file__).with_name("scale_template.md").read_text()
    return template.format(
        chips=_joined(_chips()),
        compiled=_joined(_compiled(records)),
        memory=_joined(_memory(records)),
        time=_joined(_time(share)),
        storage_table=_joined(_storage(records)),
        share=f"{share:.2f}",
        h200_step=f"{H200_STEP_SECONDS:.2f}",
        h200_memory=f"{H200_MEMORY / 1e9:g}",
        storage=f"{plans.STORAGE_RATE / 1e9:g}",
        tried=plans.TRIED_BATCH,
        save_every=config_lib.Train().save_every,
        weights=f"{memory.saved(config_lib.Config()) / 3 / 2 / 1e9:.1f}",
    )


def layout_plans(layout: Layout) -> Iterator[Plan]:
    """The plans of one chip, by size."""
    base = config_lib.from_config_dict(train_ar_5b.get_config())
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, remat=layout.remat))
    for devices in layout.sizes:
        yield plans.plan(base, CHIPS[layout.chip], devices, layout.fsdp, layout.seq)


def four_h200() -> Plan:
    """What was measured: one video on four cards of a host, without error recycling."""
    base = config_lib.Config(train=config_lib.Train(remat="output"))
    return plans.plan(base, CHIPS["H200"], 4, fsdp=1, seq=4)


def measured_share() -> float:
    """Of the least time of a step, in the time that four H200 took."""
    return four_h200().times().floor / H200_STEP_SECONDS


def temporaries(plan: Plan, layout: Layout, records: Mapping[str, Record]) -> tuple[float, str]:
    """Bytes of a device beside the step's arguments, and the document's letter for where from."""
    if not layout.compiled:
        return H200_MEMORY - sum(memory.arguments(four_h200().cfg).values()), "c"
    record = next(records[key] for key in layout.compiled if key in records)
    _, fsdp, seq = record.mesh
    assert (seq, record.remat) == (layout.seq, layout.remat), layout
    if (record.chip, fsdp) == (layout.chip, layout.fsdp):
        return record.temporaries, "a"
    one, other = (memory.gradient(plan.cfg, shards) for shards in (layout.fsdp * seq, fsdp * seq))
    return record.temporaries + one - other, "b"


def breaks_first(plan: Plan, beside: float) -> tuple[float, str]:
    """The limit that a plan is nearest to, or furthest beyond: (its share of the limit, a line).

    beside: bytes of temporaries.
    """
    times, train = plan.times(), plan.cfg.train
    most = memory.sample(plan.cfg)[1] * train.batch_size / times.floor / plan.hosts
    used = sum(memory.arguments(plan.cfg).values()) + beside
    videos = f"batch of {train.batch_size:,}, tried: {plans.TRIED_BATCH}"
    return max(
        (used / plan.chip.memory, "memory of a device"),
        ((times.inner + times.outer) / times.compute, "links, against computation"),
        (train.batch_size / plans.TRIED_BATCH, videos),
        (plan.save_seconds() / (train.save_every * times.floor), "saving, against its interval"),
        (most / plans.STORAGE_RATE, "reading of samples, a host"),
    )


# --------------------------------------------------------------------------------------------------
# Tables.


def _joined(rows: Iterable[str]) -> str:
    return "\n".join(rows)


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g}"


def _seconds(count: float) -> str:
    return f"{count:.2f}" if count < 100 else f"{count:,.0f}"


def _rates(least: float, most: float) -> str:
    """Of two figures in MB/s."""
    digits = 0 if least >= 100 else 1
    return f"{least:,.{digits}f} to {most:,.{digits}f}"


def _mesh(mesh: config_lib.Mesh) -> str:
    return f"{mesh.data} x {mesh.fsdp} x {mesh.seq}"


def _chips() -> Iterator[str]:
    yield from _table(
        "chip", "bf16 TFLOP/s", "memory, GiB", "its TB/s", "inside a domain, GB/s sent",
        "devices of a domain", "between domains, GB/s sent", "a host has", "sources",
    )  # fmt: skip
    for chip in CHIPS.values():
        sources = ", ".join(f"[{i + 1}]({url})" for i, url in enumerate(chip.sources))
        yield _row(
            chip.name, f"{chip.peak / 1e12:g}", f"{chip.memory / 2**30:.4g}",
            f"{chip.bandwidth / 1e12:.3g}", f"{chip.inner.name} {chip.inner.rate / 1e9:g}",
            f"{chip.domain:,}", f"{chip.outer.name} {chip.outer.rate / 1e9:g}", chip.host, sources,
        )  # fmt: skip


def _compiled(records: Mapping[str, Record]) -> Iterator[str]:
    yield from _table(
        "program", "slice", "data x fsdp x seq", "batch", "arguments, GiB", "temporaries, GiB",
        "of a chip's", "a chip sends, GiB", "compiled in, s", "jax, libtpu, date",
    )  # fmt: skip
    for key, program in PROGRAMS.items():
        name = "training step" if program.name == STEP else f"`{program.name}`"
        remat = f", remat={program.remat}" if program.remat else ""
        begun = f"{name}{remat}", program.topology, _mesh(program.mesh), program.batch
        if key not in records:
            yield _row(*begun, "not compiled yet", *["-"] * 5)
            continue
        one = records[key]
        used = one.arguments + one.temporaries
        yield _row(
            *begun, _gib(one.arguments), _gib(one.temporaries),
            f"{used / CHIPS[one.chip].memory:.0%}" + (", refused" if one.refused else ""),
            _gib(sum(sent for _, sent in one.collectives.values())),
            f"{one.seconds:,.0f} ({one.cpu_seconds:.0f})", f"{one.jax}, {one.libtpu}, {one.date}",
        )  # fmt: skip


def _memory(records) -> Iterator[str]:
    yield from _table(
        "devices", "data x fsdp x seq", "batch", "remat", "arguments, GiB (computed)",
        "temporaries, GiB", "of a device's",
    )  # fmt: skip
    for layout in LAYOUTS:
        for plan in layout_plans(layout):
            beside, how = temporaries(plan, layout, records)
            used = sum(memory.arguments(plan.cfg).values())
            yield _row(
                _devices(plan), _mesh(plan.cfg.mesh), f"{plan.cfg.train.batch_size:,}",
                layout.remat, _gib(used), f"{_gib(beside)} ({how})",
                f"{(used + beside) / plan.chip.memory:.0%}",
            )  # fmt: skip


def _devices(plan):
    return f"{plan.devices:,} {plan.chip.name}"


def _time(share: float) -> Iterator[str]:
    yield from _table(
        "devices", "GiB inside a domain", "GiB between", "compute, s", "memory, s", "inside, s",
        "between, s", "floor, s", "nothing hidden, s", "floor / share, s",
    )  # fmt: skip
    for layout in LAYOUTS:
        for plan in layout_plans(layout):
            times, sent = plan.times(), plan.sent()
            yield _row(
                _devices(plan), f"{_gib(sent.inner)}, {plan.chip.inner.name}",
                f"{_gib(sent.outer)}, {plan.chip.outer.name}" if sent.outer else "-",
                *map(_seconds, times), f"{_seconds(times.floor)}, {times.bound}",
                _seconds(times.unhidden), _seconds(times.floor / share),
            )  # fmt: skip


def _storage(records) -> Iterator[str]:
    yield from _table(
        "devices", "hosts", "to save, s", "to restore, s", "read in all, TB", "clips/s",
        "MB/s in all", "MB/s a host", "breaks first",
    )  # fmt: skip
    for layout in LAYOUTS:
        for plan in layout_plans(layout):
            beside, _ = temporaries(plan, layout, records)
            clips = plan.cfg.train.batch_size / plan.times().floor
            least, most = (clips * size / 1e6 for size in memory.sample(plan.cfg))
            ratio, limit = breaks_first(plan, beside)
            yield _row(
                _devices(plan), f"{plan.hosts:,}", _seconds(plan.save_seconds()),
                _seconds(plan.restore_seconds()), f"{plan.hosts * plan.restored() / 1e12:.3g}",
                f"{clips:.3g}", _rates(least, most),
                _rates(least / plan.hosts, most / plan.hosts), f"{limit}: {ratio:.2f}",
            )  # fmt: skip
