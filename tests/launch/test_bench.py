"""Benchmarks, at a size at which their figures mean nothing."""

import json

import pytest

from tests.launch import commands


@pytest.mark.slow
def test_quality(tmp_path):
    result = commands.run(
        "bench", "quality", "--config=configs/tiny.py", "--config.model.dim=128", "--chunks=2",
        f"--plot={tmp_path}/quality.png",
    )  # fmt: skip
    errors = json.loads(result.stdout.splitlines()[-1])["errors"]
    assert len(errors) == 8 and (tmp_path / "quality.png").stat().st_size > 1000
    worst = {name: max(error["layers"]) for name, error in errors.items()}
    assert worst["fp8"] < worst["nvfp4_w4a4"] < 0.1
    assert worst["kv fp8"] < worst["kv nvfp4"] < worst["nvfp4_w4a4"]


@pytest.mark.slow
def test_both_layouts_are_the_same_loss():
    result = commands.run(
        "bench", "balance", "--config=configs/train_ar_tiny.py", "--config.mesh.seq=2",
        "--config.dtype=float32", "--chunks=2", devices=2,
    )  # fmt: skip
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["balanced_loss"] == pytest.approx(figures["naive_loss"], rel=1e-5)
    assert figures["balanced_over_naive"] > 0


@pytest.mark.slow
def test_convolutions_of_each_stage():
    result = commands.run("bench", "convolution", "--config=configs/tiny.py", "--chunks=2")
    figures = json.loads(result.stdout.splitlines()[-1])
    errors = [value for name, value in figures.items() if name.endswith("fp8_error")]
    assert len(errors) == 4
    assert all(0.01 < error < 0.06 for error in errors)  # E4M3 has 4 significant bits


@pytest.mark.slow
def test_rows_of_a_batch_against_turns():
    result = commands.run("bench", "rows", *commands.TINY, "--chunks=2")
    figures = json.loads(result.stdout.splitlines()[-1])
    for rows in (2, 4):
        parts = sum(figures[f"{rows}_batched_{part}_s"] for part in ("denoise", "decode", "commit"))
        assert parts == pytest.approx(figures[f"{rows}_batched_s"], rel=0.5)
        ratio = figures[f"{rows}_by_turns_s"] / figures[f"{rows}_batched_s"]
        assert figures[f"{rows}_gain"] == pytest.approx(ratio, rel=0.05)
