"""The figures of docs/performance.md, with a tenth of slack, on as many H200s as a row needs.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -s -m gpu tests/gpu/test_speed_gpu.py

Each row is a command of its own, of one to two minutes; the compilation cache is the user's.
"""

import json
import os
import subprocess
import sys

import jax
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
SLACK = 1.1

FP8 = "--config.quant.recipe=fp8 --config.quant.kv=fp8"
TWO_STEPS = "--config.sample.steps=2"
TWO_CARDS = "--config.mesh.seq=2"
FOUR_CARDS = "--config.mesh.seq=4"
ROWS = {  # arguments: what was measured, pictures a second or milliseconds
    "stream": {"denoise_fps": 31.5},
    f"stream {TWO_STEPS}": {"denoise_fps": 51.6, "delivered_fps": 22.0},
    f"stream {FP8}": {"denoise_fps": 45.0},
    "stream --config.quant.kv=nvfp4": {"denoise_fps": 30.6},
    "stream --config.quant.recipe=nvfp4_w4a4": {"denoise_fps": 28.1},
    f"stream {TWO_CARDS}": {"denoise_fps": 55.7, "delivered_fps": 30.5},
    f"stream {TWO_CARDS} {TWO_STEPS}": {"denoise_fps": 92.5, "delivered_fps": 39.0},
    f"stream {FOUR_CARDS}": {"denoise_fps": 101.7, "delivered_fps": 56.4},
    f"stream {FOUR_CARDS} {TWO_STEPS}": {"denoise_fps": 167.9, "delivered_fps": 72.3},
    "vae": {"decode_ms_per_latent": 101, "encode_ms_per_latent": 27},
    f"vae {TWO_CARDS}": {"decode_ms_per_latent": 57.9, "encode_ms_per_latent": 17},
    f"vae {FOUR_CARDS}": {"decode_ms_per_latent": 31.2, "encode_ms_per_latent": 10.2},
}


@pytest.mark.parametrize("arguments", ROWS)
def test_speed(arguments):
    if "H200" not in jax.local_devices()[0].device_kind:
        pytest.skip(f"figures are of an H200, this is a {jax.local_devices()[0].device_kind}")
    cards = 4 if FOUR_CARDS in arguments else 2 if TWO_CARDS in arguments else 1
    if jax.local_device_count() < cards:
        pytest.skip(f"needs {cards} GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")[:cards]
    bench = [sys.executable, "-m", "launch.bench", *arguments.split()]
    done = subprocess.run(
        [*bench, "--config=configs/sample_5b.py", "--chunks=20"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(arguments, figures)
    for name, measured in ROWS[arguments].items():
        if name.endswith("_fps"):
            assert figures[name] >= measured / SLACK, (name, figures[name])
        else:
            assert figures[name] <= measured * SLACK, (name, figures[name])
    if arguments.startswith("stream"):
        assert figures["finite"]
        assert figures["chunk_p99_over_p50"] <= 1.05
        assert abs(figures["chunk_slope"]) <= 0.01
