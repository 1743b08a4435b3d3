"""The scripts that start a trainer on many hosts, with a trainer and schedulers of our own.

What needs a real cluster is not tested here: that SLURM, GKE and gcloud do as the scripts expect.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml  # ml_collections brings it

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SSH, TPU = LAUNCH / "ssh/train.sh", LAUNCH / "tpu/train.sh"
SLURM, GKE = LAUNCH / "slurm/train.sbatch", LAUNCH / "gke/train.yaml"
# A path with a space must reach the trainer whole.
FLAGS = ["--config=configs/train_ar_5b.py", "--workdir=/shared/a run", "--config.mesh.seq=4"]
TRAINER = ["-m", "launch.train", *FLAGS]

# Stands in for Python. It writes down its arguments, then ends with the code that FAKE_CODE_<id>
# names, or waits until it is told to save.
PYTHON = r"""#!/bin/bash
id=0
for word; do [[ $word == --process_id=* ]] && id=${word#*=}; done
printf '%s\n' "$@" > "$RECORD/arguments_$id"
trap 'echo saved | tee "$RECORD/saved_$id"; exit 0' TERM
echo "process $id prints"
touch "$RECORD/ready_$id"
code=FAKE_CODE_$id
[[ -n "${!code:-}" ]] && { sleep 0.2; exit "${!code}"; }
while true; do sleep 0.05; done
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A folder first in PATH, where `add(name, script)` puts commands; the trainer records here."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, script):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)

    add("fake_python", PYTHON)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(folder / "fake_python"))
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return add


def run(*command, code=0, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def started(tmp_path, process=0):
    return (tmp_path / f"arguments_{process}").read_text().splitlines()


def wait_for(*paths):
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of {paths}"
        time.sleep(0.02)


def interrupt(command, *ready):
    """Starts it, presses Ctrl-C once `ready` are there, returns its exit code."""
    process = subprocess.Popen([str(w) for w in command], start_new_session=True)
    try:
        wait_for(*ready)
        os.killpg(process.pid, signal.SIGINT)
        return process.wait(timeout=30)
    finally:
        process.kill()


@pytest.mark.parametrize("script", [SSH, TPU, SLURM], ids=lambda p: p.parent.name)
def test_is_a_script(script):
    run("bash", "-n", script)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        run("shellcheck", "--shell=bash", script)


@pytest.mark.parametrize("script", [SSH, TPU, SLURM, GKE], ids=lambda p: p.parent.name)
def test_no_temporary_file_can_be_foreseen(script):
    """A name in /tmp that is known before is a link that somebody else has put there."""
    code = [line.partition("#")[0] for line in script.read_text().splitlines()]
    assert not [line for line in code if "/tmp" in line or "mktemp -u" in line]


@pytest.mark.parametrize("script", [SSH, TPU])
@pytest.mark.parametrize("arguments", [[], ["--nme=x"], ["--hosts=/nowhere", "--name=x"]], ids=str)
def test_a_wrong_command_line_is_refused(script, arguments):
    done = run("bash", script, *arguments, code=2)
    assert done.stderr.startswith("error: ") and "--dry_run" in done.stderr


# ---------------------------------------------------------------------------------------------
# ssh.

# Runs "on the host" whatever follows the options and the host's name.
FAKE_SSH = """#!/bin/bash
while [[ $1 == -o ]]; do shift 2; done
[[ $1 == *lost* ]] && exit 255
exec bash -c "$2"
"""


@pytest.fixture
def ssh(fakes, tmp_path):
    fakes("ssh", FAKE_SSH)
    hosts = tmp_path / "hosts"
    hosts.write_text("# two hosts\nme@first  # coordinates\n\nsecond\n")
    return ["bash", SSH, f"--hosts={hosts}", f"--logs={tmp_path}/logs", "--port=99", "--", *FLAGS]


def cluster(process):
    return ["--coordinator=first:99", "--num_processes=2", f"--process_id={process}"]


def test_ssh_dry_run_prints_what_it_would_start(ssh, tmp_path):
    ssh.insert(2, "--dry_run")
    printed = run(*ssh).stdout
    assert not list(tmp_path.glob("arguments_*")) and not (tmp_path / "logs").exists()
    for process, host in enumerate(["me@first", "second"]):
        assert f"ServerAliveInterval=30 {host}" in printed
        expected = shlex.split(os.environ["PYTHON"]) + TRAINER + cluster(process)
        assert expected in [shlex.split(line)[: len(expected)] for line in lines_of(printed)]


def lines_of(printed):
    return [line for line in printed.splitlines() if "launch.train" in line]


def test_ssh_starts_all_and_ends_well(ssh, tmp_path):
    done = run(*ssh, FAKE_CODE_0="0", FAKE_CODE_1="0")
    for process in range(2):
        assert started(tmp_path, process) == TRAINER + cluster(process)
        log = (tmp_path / f"logs/process_{process}.log").read_text()
        assert f"process {process} prints" in log
    assert "process 0 prints" in done.stdout and "process 1 prints" not in done.stdout


@pytest.mark.parametrize("bad, code", [(0, 2), (1, 1)])
def test_ssh_stops_all_when_one_fails(ssh, tmp_path, bad, code):
    done = run(*ssh, code=code, **{f"FAKE_CODE_{bad}": str(code)})
    assert f"process {bad}" in done.stderr and f"code {code}" in done.stderr
    assert (tmp_path / f"saved_{1 - bad}").exists() and not (tmp_path / f"saved_{bad}").exists()


def test_ssh_keeps_its_pipes_in_a_folder_of_its_own(ssh, fakes, tmp_path):
    real, temporary = shutil.which("mkfifo"), tmp_path / "tmp"
    temporary.mkdir()
    fakes("mkfifo", f'#!/bin/bash\n{real} "$@" && ls -lR "$TMPDIR" > "$RECORD/pipes"\n')
    run(*ssh, FAKE_CODE_0="0", FAKE_CODE_1="0", TMPDIR=str(temporary))
    kinds = [line[:10] for line in (tmp_path / "pipes").read_text().splitlines()]
    assert kinds.count("drwx------") == 1 and kinds.count("prw-------") == 2
    assert not list(temporary.iterdir())


def test_ssh_names_a_host_that_cannot_be_reached(ssh, tmp_path):
    (tmp_path / "hosts").write_text("first\nlost\n")
    assert "process 1 (lost)" in run(*ssh, code=255).stderr


def test_ssh_ctrl_c_saves_everywhere(ssh, tmp_path):
    ready = [tmp_path / f"ready_{process}" for process in range(2)]
    assert interrupt(ssh, *ready) == 130
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_ssh_stops_all_when_it_is_killed_itself(ssh, tmp_path):
    process = subprocess.Popen([str(word) for word in ssh])
    wait_for(*(tmp_path / f"ready_{i}" for i in range(2)))
    process.kill()
    process.wait()
    wait_for(*(tmp_path / f"saved_{i}" for i in range(2)))


# ---------------------------------------------------------------------------------------------
# Cloud TPU.

FAKE_GCLOUD = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD/gcloud"
cd "$RECORD"
exec bash -c "${@: -1:1}" x
"""


@pytest.fixture
def tpu(fakes, tmp_path, monkeypatch):
    fakes("gcloud", FAKE_GCLOUD.replace("${@: -1:1}", '$(sed s/^--command=// <<< "${@: -1:1}")'))
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    return ["bash", TPU, "--name=test", "--zone=here", f"--directory={tmp_path}", "--", *FLAGS]


def test_tpu_starts_the_trainer_on_all_workers(tpu, tmp_path):
    run(*tpu, FAKE_CODE_0="0")
    assert started(tmp_path) == TRAINER
    words = (tmp_path / "gcloud").read_text().splitlines()
    assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", tpu[2].removeprefix("--name=")]
    assert words[5:7] == ["--zone=here", "--worker=all"]
    run(*tpu, code=2, FAKE_CODE_0="2")


def test_tpu_dry_run_prints_what_it_would_start(tpu, tmp_path):
    tpu.insert(2, "--dry_run")
    printed = run(*tpu).stdout
    assert not (tmp_path / "gcloud").exists()
    run("bash", "-c", printed, FAKE_CODE_0="0")  # it is the very command
    assert started(tmp_path) == TRAINER


def test_tpu_ctrl_c_saves(tpu, tmp_path):
    assert interrupt(tpu, tmp_path / "ready_0") == 130
    assert (tmp_path / "saved_0").exists()


def test_tpu_says_which_process_it_is_where_nobody_else_can_write(tpu, tmp_path):
    folder, found = tmp_path / "a home/.cache/longlive_jax", []
    for _ in range(2):
        run(*tpu, FAKE_CODE_0="0")
        (file,) = folder.iterdir()  # the one before is of a process that has ended
        assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
        assert file.name[32] == "." and int(file.name[:32], 16)
        found.append(file.name)
    assert len(set(found)) == 2


def test_tpu_leaves_the_files_of_runs_that_go_on(tpu, tmp_path):
    folder = tmp_path / "a home/.cache/longlive_jax"
    folder.mkdir(parents=True)
    ours = folder / f"{'0' * 32}.{os.uname().nodename}.pid"
    ours.write_text(f"{os.getpid()}\n")
    run(*tpu, FAKE_CODE_0="0")
    assert ours.exists() and len(list(folder.iterdir())) == 2


# ---------------------------------------------------------------------------------------------
# SLURM.


@pytest.fixture
def slurm(fakes, tmp_path, monkeypatch):
    """Runs the job's script as SLURM would, `left` seconds before its end."""
    fakes("srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
    fakes("squeue", '#!/bin/bash\ndate -d "+$LEFT seconds" +%Y-%m-%dT%H:%M:%S\n')
    fakes("scontrol", '#!/bin/bash\necho "$@" > "$RECORD/scontrol"\n')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(LAUNCH.parent))

    def job(left, code):
        run("bash", SLURM, *FLAGS, code=code, LEFT=str(left), FAKE_CODE_0=str(code))
        assert started(tmp_path) == TRAINER
        requeued = tmp_path / "scontrol"
        return requeued.read_text().strip() if requeued.exists() else None

    return job


@pytest.mark.parametrize(
    "left, code, requeued",
    [(7200, 0, None), (60, 0, "requeue 7"), (60, 1, None), (60, 2, None), (7200, 1, None)],
)
def test_slurm_puts_back_what_was_told_to_stop(slurm, left, code, requeued):
    assert slurm(left, code) == requeued


def test_slurm_dry_run_prints_what_it_would_start(fakes, tmp_path):
    words = shlex.split(run("bash", SLURM, *FLAGS, DRY_RUN="1").stdout)
    assert words[0] == "srun" and "--gpu-bind=none" in words and "--kill-on-bad-exit=1" in words
    assert words[-len(TRAINER) - 1 :] == [os.environ["PYTHON"], *TRAINER]
    assert not (tmp_path / "arguments_0").exists()


def test_slurm_refuses_to_run_outside_of_a_job(fakes):
    assert "sbatch" in run("bash", SLURM, *FLAGS, code=2).stderr


def test_slurm_tells_the_tasks_before_the_time_is_up():
    options = [line.split()[1] for line in SLURM.read_text().splitlines() if line[:8] == "#SBATCH "]
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= set(options)
    tasks = [o.split("=")[1] for o in options if o.startswith(("--gpus-per-n", "--ntasks-per-n"))]
    assert len(tasks) == 2 and tasks[0] == tasks[1]  # JAX gives each task one GPU
    assert not any(option.startswith("--gpus-per-task") for option in options)


# ---------------------------------------------------------------------------------------------
# GKE.


@pytest.fixture
def job(fakes, monkeypatch):
    jobset = yaml.safe_load(GKE.read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    return jobset, replicated, replicated["template"]["spec"]


def container(job):
    (container,) = job[2]["template"]["spec"]["containers"]
    return container


def pod(job):
    """The command of a pod, and what its environment has of the file."""
    spec = container(job)
    environment = {entry["name"]: entry["value"] for entry in spec["env"]}
    return spec["command"] + FLAGS, environment | {"PYTHON": os.environ["PYTHON"]}


def test_gke_file_agrees_with_itself(job):
    jobset, replicated, spec = job
    assert (jobset["kind"], spec["completionMode"]) == ("JobSet", "Indexed")
    _, environment = pod(job)
    machines = spec["parallelism"]
    assert spec["completions"] == machines == int(environment["PROCESSES"])
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    port = container(job)["ports"][0]["containerPort"]
    assert f"--coordinator={first}:{port}" in container(job)["command"][2]
    flags = dict(flag.split("=", 1) for flag in container(job)["args"])
    axes = [int(flags[f"--config.mesh.{name}"]) for name in ("data", "fsdp", "seq")]
    gpus = machines * container(job)["resources"]["limits"]["nvidia.com/gpu"]
    assert axes[0] * axes[1] * axes[2] == gpus
    assert int(flags["--config.train.batch_size"]) % (axes[0] * axes[1]) == 0
    pod_spec = spec["template"]["spec"]
    assert pod_spec["terminationGracePeriodSeconds"] >= 120
    volumes = {volume["name"] for volume in pod_spec["volumes"]}
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == volumes


@pytest.mark.parametrize("code", [0, 1, 2])
def test_gke_pod_starts_the_trainer_and_ends_with_its_code(job, tmp_path, code):
    command, environment = pod(job)
    run(*command, code=code, FAKE_CODE_3=str(code), **environment)
    cluster = ["--coordinator=longlive-host-0-0.longlive:12355", "--num_processes=8"]
    assert started(tmp_path, 3) == [*TRAINER, *cluster, "--process_id=3"]


def test_gke_dry_run_prints_what_it_would_start(job, tmp_path):
    command, environment = pod(job)
    words = shlex.split(run(*command, **environment | {"DRY_RUN": "1"}).stdout)
    assert words[0] == environment["PYTHON"] and words[1 : 1 + len(TRAINER)] == TRAINER
    assert words[-1] == "--process_id=3" and not (tmp_path / "arguments_3").exists()


def test_gke_pod_that_is_told_to_leave_saves_and_asks_to_be_started_again(job, tmp_path):
    command, environment = pod(job)
    process = subprocess.Popen(command, env=os.environ | environment)
    wait_for(tmp_path / "ready_3")
    process.terminate()
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved_3").exists()
