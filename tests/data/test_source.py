import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from jax._src import xla_bridge

from longlive_jax.data import source as source_lib
from longlive_jax.data.source import LEAST_READ, Health, Sample, batches
from longlive_jax.errors import InputError


class Toy:
    """Samples that tell which record and key they come from."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def sample(self, index, key):
        frames = np.full((2, 3, 4, 3), index, np.uint8)
        return Sample(str(index), ("a", "b"), key % 7, frames, failures=((str(key), "why"),))


class InWorker(Toy):
    """As Toy, and proves what a decoding process may rely on."""

    def sample(self, index, key):
        assert not xla_bridge.backends_are_initialized()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return super().sample(index, key)


class Failing(Toy):
    def sample(self, index, key):
        raise InputError("nothing can be read here")


class Dying(Toy):
    def sample(self, index, key):
        os._exit(7)


def take(steps, source, rows, batch, start, seed=3, workers=0):
    """[step][row]: (record, key) of each sample, all of which arrived whole."""
    stream = batches(source, rows, batch, start, seed, workers)
    try:
        return [[check(s) for s in samples] for samples in itertools.islice(stream, steps)]
    finally:
        stream.close()


def check(sample):
    record, key = int(sample.name), int(sample.failures[0][0])
    expected = Toy(1).sample(record, key)
    assert type(sample.frames) is np.ndarray
    np.testing.assert_array_equal(sample.frames, expected.frames)
    assert (sample.prompts, sample.chunks) == (expected.prompts, expected.chunks)
    assert sample.latents is None and sample.text is None
    return record, key


def flatten(steps):
    return list(itertools.chain.from_iterable(steps))


def test_every_record_once_an_epoch():
    flat = flatten(take(15, Toy(10), [0, 1], 2, 0))
    epochs = [[record for record, _ in flat[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"
    assert len({key for _, key in flat}) == 30, "a record that comes again is another sample"


def test_the_seed_decides():
    one, again, other = (take(5, Toy(10), [0, 1], 2, 0, seed) for seed in (3, 3, 4))
    assert one == again and one != other
    assert take(2, Toy(10), [0], 1, 0, seed=-1)  # any integer is a seed


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_a_restart_sees_what_it_would_have_seen(start):
    whole = take(9, Toy(5), range(4), 4, 0)
    assert take(9 - start, Toy(5), range(4), 4, start) == whole[start:]


@pytest.mark.parametrize("hosts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [3, 1]]])
def test_any_hosts_and_rows_see_the_same_samples(hosts):
    """Also hosts that hold the same row, as those of one sequence-parallel group do."""
    whole = take(4, Toy(5), range(4), 4, 2)
    for rows in [*hosts, [3], [1, 1]]:
        expected = [[step[row] for row in rows] for step in whole]
        assert take(4, Toy(5), rows, 4, 2) == expected


def test_the_batch_size_moves_samples_between_steps_only():
    pairs, fours = take(6, Toy(5), range(2), 2, 0), take(3, Toy(5), range(4), 4, 0)
    assert flatten(pairs) == flatten(fours)


@pytest.mark.multiprocess
def test_processes_give_the_same_in_the_same_order():
    here = take(5, Toy(7), [1, 2], 3, 2)
    assert take(5, InWorker(7), [1, 2], 3, 2, workers=2) == here


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_source_arrive(workers):
    with pytest.raises(InputError, match="nothing can be read here"):
        take(1, Failing(7), [0], 1, 0, workers=workers)


@pytest.mark.multiprocess
def test_a_process_that_dies_is_reported():
    with pytest.raises(InputError, match=r"died.*exit code 7.*data\.workers"):
        take(1, Dying(7), [0], 1, 0, workers=1)


@pytest.mark.multiprocess
def test_processes_end_with_their_parent(tmp_path):
    """Even if that ends as a failed command does: at once."""
    program = tmp_path / "parent.py"
    program.write_text(
        f"import os, sys; sys.path[:0] = {sys.path!r}\n"
        "from longlive_jax.data.source import batches\n"
        "from test_source import Pids\n"
        "if __name__ == '__main__':\n"
        "    print(next(batches(Pids(7), [0], 1, 0, 0, 1))[0].name, flush=True)\n"
        "    os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not alive(int(done.stdout))


class Pids(Toy):
    def sample(self, index, key):
        return Sample(str(os.getpid()), (), 1)


def alive(pid, seconds=10):
    for _ in range(seconds * 10):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("rows", [[], [2], [-1]])
def test_rows_must_be_of_the_batch(rows):
    with pytest.raises(ValueError, match="rows"):
        batches(Toy(3), rows, 2, 0, 0, 0)


# Health.


def good(count=1):
    return [Sample("good", ("a",), 1)] * count


def bad(name, reason="damaged"):
    return Sample("good", ("a",), 1, failures=((f"{name}.mp4", reason),))


def test_health_counts_and_reports_each_failure_once(tmp_path):
    report = tmp_path / "new" / "failures.jsonl"
    health = Health(0.5, report)
    for sample in [*good(3), bad("b"), bad("a"), bad("b"), bad("b", "gone, gründlich")]:
        health.add(sample)
    assert (health.read, health.failed) == (7, 4)
    expected = [("b.mp4", "damaged"), ("a.mp4", "damaged"), ("b.mp4", "gone, gründlich")]
    assert health.failures == expected
    lines = report.read_text(encoding="utf-8").splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == expected
    Health(0.5, report).add(bad("c"))  # a restart adds to the file
    assert len(report.read_text().splitlines()) == 4


def test_health_stops_the_run(tmp_path):
    health = Health(0.1, tmp_path / "failures.jsonl")
    for i in range(LEAST_READ - 1):  # too few to tell
        health.add(bad(f"{i:02d}"))
    message = (
        r"20 of 20 samples .*100%.*data\.max_bad_share=0\.1\. The first 5 of 20: "
        r"00\.mp4: damaged; .*04\.mp4: damaged\. .*failures\.jsonl"
    )
    with pytest.raises(InputError, match=message):
        health.add(bad("19"))


def test_health_bears_its_share(tmp_path):
    health = Health(0.1, tmp_path / "failures.jsonl")
    for sample in [*good(18), bad("a"), bad("b"), *good(10), bad("c")]:
        health.add(sample)  # 2 of 20 is not more than a tenth
    with pytest.raises(InputError, match="4 of 32"):
        health.add(bad("d"))
    never = Health(1.0, tmp_path / "failures.jsonl")
    for _ in range(2 * LEAST_READ):
        never.add(bad("a"))


def test_health_needs_a_place_for_its_report(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Health(0.1, tmp_path / "file" / "failures.jsonl")


def test_first_failures_in_a_message():
    listed = source_lib.first([("a", "b"), ("c", "d")])
    assert listed == "The first 2 of 2: a: b; c: d"
