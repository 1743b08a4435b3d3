"""The command: what it prints, what it makes, and how it fails."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from longlive_jax.checkpoints import safetensors, store
from tests.checkpoints import tiny, torch_file
from tests.checkpoints.test_lora import peft

ROOT = pathlib.Path(__file__).parents[2]


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "launch.convert", *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


CONFIG = ["--config=configs/tiny.py", *tiny.flags("dit"), *tiny.flags("vae"), *tiny.flags("umt5")]


def _tokenizer(file):
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]
    tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2)).save(str(file))
    return file


def test_there_and_back(tmp_path):
    torch_file.save(tmp_path / "dit.pt", {"generator": tiny.weights("dit"), "step": 3})
    torch_file.save(tmp_path / "umt5.pth", tiny.weights("umt5"))
    torch_file.save(tmp_path / "lora.pt", {"generator_lora": peft(), "step": 3})
    vae = tiny.write_safetensors(tmp_path / "vae.safetensors", tiny.weights("vae"))
    ckpt = tmp_path / "ckpt"
    done = run(
        *CONFIG, f"--dit={tmp_path}/dit.pt", f"--umt5={tmp_path}/umt5.pth",
        f"--tokenizer={_tokenizer(tmp_path / 'tokenizer.json')}", f"--output={ckpt}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("dit: 69 tensors, 73,824 parameters, float32, 0.3 MiB, ")
    assert lines[1].startswith("umt5: 32 tensors, 112,064 parameters, float32, 0.4 MiB, ")
    assert lines[2].startswith("tokenizer: ")
    assert len(lines) == 3
    assert done.stderr == ""
    # Another part later, and the transformer again, with a LoRA.
    done = run(
        *CONFIG, f"--vae={vae}", f"--dit={tmp_path}/dit.pt", f"--lora={tmp_path}/lora.pt",
        "--lora_alpha=0", f"--output={ckpt}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(store.parts(ckpt)) == ["dit", "tokenizer", "umt5", "vae"]
    done = run(f"--checkpoint={ckpt}", f"--to_safetensors={tmp_path}/back")
    assert done.returncode == 0, done.stderr
    for part in tiny.SPECS:
        found, _ = safetensors.read(tmp_path / f"back/{part}.safetensors")
        assert sorted(found) == sorted(tiny.weights(part))
        for key, array in tiny.weights(part).items():
            np.testing.assert_array_equal(found[key].read(), array)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dit=none.pt", "--output={}/c"], "error: --dit=none.pt: there is no such file"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--dit=README.md"], "error: --output is missing"),
                (["--output={}/c"], "error: nothing to convert"),
                (["--vae=x", "--lora=y", "--output={}/c"], "error: --lora needs --dit"),
                (["--checkpoint={}/c", "--to_safetensors={}/s"], "is no checkpoint"),
            )
        ),
        (["--dit=tests/checkpoints/fixtures/training.pt", "--output={}/c"], "69 missing"),
    ],
)
def test_errors(tmp_path, args, message):
    config = [] if args[0].startswith("--checkpoint") else CONFIG
    done = run(*config, *(a.format(tmp_path) for a in args))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("*/*"))
