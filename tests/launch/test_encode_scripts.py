"""The files that start launch.encode_dataset on clusters."""

import os
import pathlib
import shlex
import subprocess

import yaml  # ml_collections brings it

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SLURM, GKE = LAUNCH / "slurm/encode_dataset.sbatch", LAUNCH / "gke/encode_dataset.yaml"
FLAGS = ["--config=configs/tiny.py", "--output=/a folder/out"]
ENCODER = ["-m", "launch.encode_dataset", *FLAGS]


def slurm(**variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.run(
        ["bash", SLURM, *FLAGS], env=env | variables, capture_output=True, text=True, timeout=60
    )


def test_slurm_starts_the_encoder_and_ends_with_its_code(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\nexit 7\n')
    python.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(LAUNCH.parent)}
    done = slurm(PYTHON=str(python), **job)
    assert done.returncode == 7
    assert done.stdout.splitlines() == [str(LAUNCH.parent), *ENCODER]
    elsewhere = slurm(PYTHON=str(python), **job | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert elsewhere.returncode == 2 and "has no launch/" in elsewhere.stderr


def test_slurm_without_a_job():
    done = slurm(DRY_RUN="1", PYTHON="py")
    assert shlex.split(done.stdout) == ["py", *ENCODER]
    done = slurm()
    assert done.returncode == 2 and "sbatch" in done.stderr


def test_gke_file_agrees_with_itself():
    job = yaml.safe_load(GKE.read_text())
    assert job["kind"] == "Job" and job["spec"]["parallelism"] == job["spec"]["completions"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "launch.encode_dataset"]
    assert {flag.partition("=")[0] for flag in container["args"]} == {
        "--config", "--config.data.cached", "--config.data.path", "--checkpoint", "--output",
    }  # fmt: skip
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (code, _) = job["spec"]["podFailurePolicy"]["rules"]
    assert code["onExitCodes"]["containerName"] == container["name"]
