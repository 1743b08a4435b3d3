"""The command: what it prints, what it makes, and how it fails."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import tokenizers

from longlive_jax.checkpoints import safetensors, store
from tests.checkpoints import tiny, torch_file
from tests.checkpoints.test_lora import peft
from tests.launch import commands

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


def _fake_hub(folder):
    hub = types.ModuleType("huggingface_hub")
    hub.model_info = lambda repo, revision: types.SimpleNamespace(sha=f"{revision[-1]}" * 40)
    hub.hf_hub_download = lambda repo, name, revision: str(folder / name)
    sys.modules["huggingface_hub"] = hub


def test_the_checkpoint_says_which_commit_it_is_of(tmp_path):
    torch_file.save(tmp_path / "dit.pt", tiny.weights("dit"))
    _tokenizer(tmp_path / "tokenizer.json")
    hub, ckpt = functools.partial(_fake_hub, tmp_path), tmp_path / "ckpt"
    torch_file.save(tmp_path / "lora.pt", {"generator_lora": peft()})
    commands.run(
        "convert", *CONFIG, "--dit=hf://a/b@v1/dit.pt", f"--lora={tmp_path}/lora.pt",
        "--tokenizer=hf://c/d@v2/tokenizer.json", f"--output={ckpt}", patch=hub,
    )  # fmt: skip
    parts = json.loads((ckpt / "metadata.json").read_text())["parts"]
    assert parts["dit"]["sources"] == [f"hf://a/b@{'1' * 40}/dit.pt", "lora.pt"]
    assert parts["tokenizer"]["sources"] == [f"hf://c/d@{'2' * 40}/tokenizer.json"]
    commands.run(
        "convert", *CONFIG, f"--checkpoint={ckpt}", "--recipe=fp8", f"--output={tmp_path}/fp8"
    )
    copied = json.loads((tmp_path / "fp8/metadata.json").read_text())["parts"]
    assert {k: v["sources"] for k, v in copied.items()} == {
        k: v["sources"] for k, v in parts.items()
    }


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
