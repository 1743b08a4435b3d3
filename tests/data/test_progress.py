"""progress.jsonl of a dataset that is being written, by one process or several."""

import collections
import itertools
import json
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.data.manifest import PROGRESS
from longlive_jax.data.progress import Progress
from longlive_jax.errors import InputError


def head(**values):
    return {"settings": {"train.seed": 0, "vae.latent_mean": (0.0, 1.0)} | values, "clips": 3}


SHARD = {"file": "latents-00000.arrayrecord", "count": 1, "bytes": 1}
TEXT = {"kind": "text", "shard": SHARD | {"file": "text-00000.arrayrecord"}}
LATENTS = {"kind": "latents", "shard": SHARD, "prompts": ["a"], "chunks": [1], "read": [["a", []]]}


def test_progress_goes_on(tmp_path):
    with Progress(tmp_path / "p", head()) as progress:
        progress.add(LATENTS | {"prompts": ("a", "b")})
    with (tmp_path / "p" / PROGRESS).open("ab") as file:
        file.write(b'{"kind": "late')  # its writer was killed
    for _ in range(2):
        with Progress(tmp_path / "p", head() | {"clips": 5}) as progress:
            assert progress.head["clips"] == 3
            assert progress.lines[0] == LATENTS | {"prompts": ["a", "b"]}
            progress.add(TEXT)
    assert [line["kind"] for line in progress.lines] == ["latents", "text", "text"]
    assert [p.name for p in (tmp_path / "p").iterdir()] == [PROGRESS]


@pytest.mark.parametrize(
    "line",
    ["[]", "null", "{}", '{"kind": 1}', '{"kind": "x"}', '{"kind": "text"}', "[" * 100_000]
    + [json.dumps(LATENTS | change) for change in (
        {"shard": {}}, {"read": [["a"]]}, {"read": [["a", True]]}, {"read": [["a", [["b"]]]]},
        {"read": [[[], "a"]]}, {"read": "ab"}, {"chunks": [None]}, {"prompts": {"a": 1}},
        {"shard": SHARD | {"file": "latents-x"}}, {"by": 1}, {"seconds": "1"},
    )],
)  # fmt: skip
def test_progress_with_a_line_of_another_kind(tmp_path, line):
    Progress(tmp_path, head()).close()
    with (tmp_path / PROGRESS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="is damaged"):
        Progress(tmp_path, head())
    (tmp_path / PROGRESS).write_text(line + "\n")
    with pytest.raises(InputError, match="is damaged"):
        Progress(tmp_path, head())


def test_progress_that_has_just_begun(tmp_path):
    (tmp_path / PROGRESS).write_bytes(b'{"settings": {"tr')
    with Progress(tmp_path, head()) as progress:
        assert progress.lines == []
    assert Progress(tmp_path, head()).head["clips"] == 3


@pytest.mark.parametrize(
    "other, message",
    [
        ({"train.seed": 1}, r"begun with train.seed=0, now it is 1"),
        ({"--epochs": 2}, r"begun with --epochs=None, now it is 2"),
        ({"vae.latent_mean": (0.0, 2.0)}, r"vae.latent_mean=\[0.0, 1.0\], now"),
    ],
)
def test_progress_with_other_settings(tmp_path, other, message):
    Progress(tmp_path, head()).close()
    with pytest.raises(InputError, match=message):
        Progress(tmp_path, head(**other))


def numbered(number):
    return LATENTS | {"shard": SHARD | {"file": f"latents-{number:05d}.arrayrecord"}}


def test_two_processes_work_far_from_each_other(tmp_path):
    one, two = (Progress(tmp_path, head()) for _ in range(2))
    first, second = one.work("latents", 6), two.work("latents", 6)
    assert (next(first), next(second)) == (0, 3)
    one.add(numbered(0))
    two.add(numbered(3))
    assert (next(first), next(second)) == (1, 4)
    first.close()  # as if it were killed at its work
    done = []
    for number in itertools.chain([4], second):
        two.add(numbered(number))
        done.append(number)
    assert done == [4, 5, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == [PROGRESS]
    one.refresh()
    assert one.lines == two.lines == [numbered(n) for n in range(6)]


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
@settings(max_examples=30, deadline=None)
def test_processes_that_come_and_go_write_each_file_once(count, moves):
    """Moves: a process goes on, or dies with its file unfinished and comes back."""
    with tempfile.TemporaryDirectory() as folder:
        written, at_work = collections.Counter(), {}
        progresses = [Progress(folder, head()) for _ in range(4)]

        def finish(who):
            if who in at_work:
                number = at_work[who][1]
                progresses[who].add(numbered(number))
                written[number] += 1

        for who, dies in moves:
            if dies:
                if who in at_work:
                    at_work.pop(who)[0].close()
                continue
            finish(who)
            work = at_work[who][0] if who in at_work else progresses[who].work("latents", count)
            # Never to its end: it would wait for the others.
            free = count - sum(written.values()) - len(at_work) + (who in at_work)
            if free > 0:
                at_work[who] = (work, next(work))
            elif who in at_work:
                at_work.pop(who)[0].close()
        for who in list(at_work):
            finish(who)
            at_work.pop(who)[0].close()
        for number in progresses[0].work("latents", count):
            progresses[0].add(numbered(number))
            written[number] += 1
        assert written == dict.fromkeys(range(count), 1)


def test_the_manifest_is_written_once(tmp_path):
    one, two = (Progress(tmp_path, head()) for _ in range(2))
    made = []

    def make():
        made.append(1)
        return {name: [] if name in ("latents", "text", "prompts") else {} for name in
                ("latents", "text", "samples", "dtype", "latent_shape", "least_chunks", "failures",
                 "prompts", "settings")}  # fmt: skip

    one.finish(make)
    two.refresh()  # of a file that is gone, which it has open
    two.finish(make)
    assert made == [1] and [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    late = Progress(tmp_path, head())  # looked for the manifest before it was there
    assert late.finished and not one.finished
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_progress_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "video").mkdir()
    with pytest.raises(InputError, match=r"holds 'video' and no cached training data"):
        Progress(tmp_path, head())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: .*give a folder"):
        Progress(tmp_path / "file", head())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / PROGRESS).write_text("{\n{\n")
    with pytest.raises(InputError, match=r"progress.jsonl: is damaged"):
        Progress(tmp_path / "damaged", head())
