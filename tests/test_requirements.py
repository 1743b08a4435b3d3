"""requirements.lock: all that requirements.txt asks for, within its ranges, each with hashes."""

import pathlib
import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]


def ranges(name):
    """The requirements of a file and of those that it includes."""
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from ranges(line[3:])
        elif line:
            yield Requirement(line)


def locked():
    """(name, version, hashes) of each entry of the lock."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pinned, *hashes = line.split()
            name, _, version = pinned.partition("==")
            yield name, version, hashes


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_what_is_asked_for_is_locked_within_its_range(name):
    versions = {canonicalize_name(name): version for name, version, _ in locked()}
    wrong = [
        f"{one} is {versions.get(canonicalize_name(one.name))} in requirements.lock; `make lock`"
        for one in ranges(name)
        if versions.get(canonicalize_name(one.name), "0") not in one.specifier
    ]
    assert not wrong


def test_every_entry_is_one_version_with_hashes():
    found = list(locked())
    assert len(found) > 30 and len({name for name, *_ in found}) == len(found)
    for name, version, hashes in found:
        assert re.fullmatch(r"\d[\w.+!-]*", version), (name, version)
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), name


def test_the_lock_names_no_place_to_download_from():
    assert not re.search(
        r"//|--(extra-)?index|--find-links", (ROOT / "requirements.lock").read_text()
    )


@pytest.mark.parametrize(
    "version, system, words",
    [
        ("3, 12", "x86_64", "--require-hashes -r requirements.lock"),
        ("3, 13", "x86_64", "-r requirements-dev.txt"),
        ("3, 12", "aarch64", "-r requirements-dev.txt"),
    ],
)
def test_setup_takes_the_lock_where_it_is_for_this_machine(tmp_path, version, system, words):
    """`make setup` with an interpreter that says that it is this one, and writes down its words."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/bash
if [[ $1 == -c ]]; then
  exec python3 -c "import platform, sys
sys.version_info, sys.platform, platform.machine = ({version}, 0), 'linux', lambda: '{system}'
$2"
fi
echo "$@" > {tmp_path}/words
"""
    )
    python.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".python-version").write_text((ROOT / ".python-version").read_text())
    subprocess.run(["make", "setup"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "words").read_text().strip().endswith(words)
