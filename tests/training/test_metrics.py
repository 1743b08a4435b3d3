"""Lines of metrics: what is in them, and what is cut off."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.training import cost, metrics
from longlive_jax.training.objectives.teacher_forcing import BINS, MODEL, TeacherForcing
from longlive_jax.training.plan import Plan
from longlive_jax.training.step import NetworkMetrics, StepMetrics
from tests.training import tiny_run


@given(st.floats(width=32))
def test_numbers_read_back_as_the_same_float32(value):
    found = metrics.number(np.float32(value))
    if not math.isfinite(value):
        assert found is None
        return
    assert np.float32(json.loads(json.dumps(found))) == np.float32(value)


def report(loss):
    errors, counts = np.arange(BINS, dtype=np.float32), np.full(BINS, 2, np.float32)
    counts[3] = 0
    values = {"errors": jnp.asarray(errors), "counts": jnp.asarray(counts)}
    network = NetworkMetrics(jnp.float32(loss), jnp.float32(0.1), values)
    carried = {"recycling_held": jnp.int32(7)}
    return StepMetrics({MODEL: network}, carried, jnp.asarray([5, 1], jnp.int32))


def test_a_step_is_reported_when_the_next_is_given_to_the_devices(tmp_path):
    cfg, shown = tiny_run.config(mesh__seq=2), []
    objective = TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))
    log = metrics.Metrics(tmp_path, objective, Plan.of(cfg.train), 0, shown.append)
    names = np.zeros((2, 4, 8), np.uint8)
    names[..., :3] = np.frombuffer("né".encode(), np.uint8)
    assert log.add(1, report(0.1), jnp.asarray(names), 0.0, 0.25) is None
    assert not shown and not (tmp_path / "metrics.jsonl").read_text()
    first = log.add(2, report(math.nan), jnp.asarray(names), 0.0, 0.0)
    second = log.flush()
    assert log.flush() is None
    log.close()
    assert tiny_run.lines(tmp_path) == [first, second]
    assert first["loss"] == 0.1 and second["loss"] is None
    assert first["samples"] == ["né"] * 8
    assert first["error_by_level"][:5] == [0.0, 0.5, 1.0, None, 2.0]
    assert (first["bad_steps"], first["bad_in_row"], first["recycling_held"]) == (5, 1, 7)
    assert first["data_wait"] == 0.25 and "mfu" not in first  # nobody knows a CPU's peak
    rate = cost.step_flops(cfg) / first["seconds"] / 2 / 1e12
    np.testing.assert_allclose(first["tflops_per_device"], rate, rtol=1e-2)
    assert "step 1/8  loss 0.1" in shown[0] and "waited" in shown[0]
    assert "NOT FINITE" in shown[1]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_that_goes_on_has_one_line_a_step(tmp_path):
    log = tmp_path / "metrics.jsonl"
    metrics.cut(log, 3)  # nothing there yet
    rows = [json.dumps({"step": i}) + "\n" for i in range(1, 6)]
    log.write_text("".join(rows) + '{"step": 6')
    metrics.cut(log, 5)
    assert log.read_text() == "".join(rows)
    metrics.cut(log, 2)
    assert log.read_text() == "".join(rows[:2])
    names = json.dumps({"step": 3, "samples": ["a\u2028b", "c\u0085d"]}, ensure_ascii=False) + "\n"
    spoilt = [
        b'{"step": 4, "loss": \xff}\n',
        b'{"step": "4"}\n',
        b"[" * 10**5 + b"\n",
        b"\0\r\x0b{}\n",
    ]
    log.write_bytes(
        "".join(rows[:2]).encode() + names.encode() + b"".join(spoilt) + b'{"step": 5}\n'
    )
    metrics.cut(log, 5)
    assert log.read_text().split("\n") == [
        *"".join(rows[:2]).split("\n")[:2],
        names[:-1],
        '{"step": 5}',
        "",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "bad",
    [b"\xff\xfe", b"[]", b"null", b'{"step": "1"}', b'{"step": null}', b"{", b"[" * 100_000,
     b'{"step": 1, "samples": ["caf\xe9"]}', b'{"step": NaN'],
)  # fmt: skip
def test_damaged_lines_of_a_log_are_cut_off(tmp_path, bad):
    log = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": i, "samples": ["a\u2028b"]}, ensure_ascii=False) for i in (1, 2, 3)]
    first, second, third = (line.encode() + b"\n" for line in good)
    log.write_bytes(first + bad + b"\n" + second + third)
    metrics.cut(log, 2)
    assert log.read_bytes() == first + second


def test_a_log_that_is_no_file(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: Is a directory; move it away"):
        metrics.cut(tmp_path / "metrics.jsonl", 2)
