"""docs/scale.md: what it says is what the command writes, and its parts agree with each other."""

import dataclasses
import pathlib

import pytest

from launch import scale_page, scale_programs
from longlive_jax import topology
from longlive_jax.errors import InputError
from longlive_jax.scaling import memory, roofline, traffic
from longlive_jax.scaling.chips import CHIPS
from longlive_jax.training import cost
from tests.launch.commands import run

ROOT = pathlib.Path(__file__).parents[2]
KEPT = scale_programs.read(ROOT / "docs/scale.json")


def test_the_document_is_what_the_command_writes():
    assert (ROOT / "docs/scale.md").read_text() == scale_page.text(KEPT)


@pytest.mark.parametrize("key", [key for key, record in KEPT.items() if record.name == "step"])
def test_the_formulas_hold_of_the_5b_as_it_was_compiled(key):
    record, cfg = KEPT[key], scale_programs.PROGRAMS[key].cfg
    sent = {f"{k.name} over {'+'.join(k.axes)}": list(v) for k, v in traffic.step(cfg).items()}
    assert sent == record.collectives
    held = sum(memory.arguments(cfg).values())
    # Chips round small arrays up to whole tiles.
    assert held <= record.arguments <= 1.02 * held


def test_the_programs_of_the_document_are_those_of_the_list():
    assert list(KEPT) == [key for key in scale_programs.PROGRAMS if key in KEPT]
    for key in KEPT:
        program = scale_programs.PROGRAMS[key]
        mesh = program.mesh
        assert KEPT[key].mesh == [mesh.data, mesh.fsdp, mesh.seq]
        assert (KEPT[key].batch, KEPT[key].remat) == (program.batch, program.remat)


def test_measured_figures_stand_in_the_performance_document():
    text = (ROOT / "docs/performance.md").read_text()
    assert "| 96 (16 s) | output | 7.301-7.304 | **447** | 71.8 |" in text
    assert (scale_page.H200_STEP_SECONDS, scale_page.H200_MEMORY) == (7.30, 71.8e9)
    # The model's FLOPs are those of the figure; the floor counts what is done again too.
    plan = scale_page.four_h200()
    model = cost.step_flops(plan.cfg) / 4
    assert model / scale_page.H200_STEP_SECONDS == pytest.approx(447e12, rel=0.01)
    assert model < roofline.flops(plan.cfg, plan.chip) < 1.4 * model
    assert model / 989e12 < plan.times().floor < scale_page.H200_STEP_SECONDS


def test_chips_are_those_of_the_log_and_of_the_topologies():
    kinds = {"H200": "NVIDIA H200", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v5e": "TPU v5 lite"}
    for name, chip in CHIPS.items():
        assert chip.peak == cost.PEAK_TFLOPS[kinds[name]] * 1e12
        assert chip.inner.rate > chip.outer.rate and chip.domain % chip.host == 0 and chip.sources


def test_what_breaks_first():
    layout = scale_page.LAYOUTS[0]
    small, *_, large = scale_page.layout_plans(layout)
    assert scale_page.breaks_first(large, 0) == (64, "batch of 1,024, tried: 16")
    assert scale_page.breaks_first(small, 0.95 * small.chip.memory)[1] == "memory of a device"
    slow = dataclasses.replace(small.chip, inner=dataclasses.replace(small.chip.inner, rate=1e6))
    assert scale_page.breaks_first(dataclasses.replace(small, chip=slow), 0)[1].startswith("links")


def test_more_devices_hold_and_send_what_a_row_does():
    for layout in scale_page.LAYOUTS:
        first, *others = scale_page.layout_plans(layout)
        for plan in others:
            assert plan.times().compute == pytest.approx(first.times().compute)
            assert memory.saved(plan.cfg) == memory.saved(first.cfg)
            assert plan.times().floor >= first.times().floor


def test_the_command(tmp_path):
    done = run("scale", f"--output={tmp_path}/x.md")
    assert (tmp_path / "x.md").read_text() == (ROOT / "docs/scale.md").read_text()
    assert done.stdout.startswith("written: ")


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="--compile=step@v9:2x2: must be all, or some of step@"):
        scale_programs.chosen("step@v9:2x2")
    (tmp_path / "x.json").write_text('{"format": "longlive_jax.scale", "version": 1}')
    with pytest.raises(InputError, match=r"has no 'programs'\); make it again"):
        scale_programs.read(tmp_path / "x.json")
    done = run("scale", f"--kept={tmp_path}/none.json", f"--output={tmp_path}/x.md", check=False)
    assert done.code == 2 and "give --compile=step@" in done.stderr


def test_a_compiler_that_refuses_says_what_was_asked_for():
    message = (
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 40.00G of "
        "31.25G hbm. Exceeded hbm capacity by 8.75G.\n\nTotal hbm usage >= 40.50G:\n"
        "    reserved        512.00M\n    program          35.00G\n    arguments         5.00G\n"
    )
    assert scale_programs.asked(message) == (5 * 2**30, 35 * 2**30)


def test_records_come_back(tmp_path):
    scale_programs.write(tmp_path / "x.json", KEPT)
    assert scale_programs.read(tmp_path / "x.json") == KEPT
    assert all(topology.re.fullmatch(r"\w+:\d+x\d+(x\d+)?", r.topology) for r in KEPT.values())
