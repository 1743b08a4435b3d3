"""What is imported is declared, and what is declared is in requirements.lock, with hashes."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

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


def extras():
    """What the package asks for as an option."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(one) for many in project["optional-dependencies"].values() for one in many]


def locked():
    """(name, version, hashes) of each entry of the lock."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pinned, *hashes = line.split()
            name, _, version = pinned.partition("==")
            yield name, version, hashes


def imported(*folders):
    """Modules by their first names, and a file of each that imports it."""
    found = {}
    for file in (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0]: file for name in names}
    ours = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    return {
        name: file for name, file in found.items() if name not in sys.stdlib_module_names | ours
    }


# jaxlib is jax's own; huggingface_hub is for hf:// alone, and its absence is told.
@pytest.mark.parametrize(
    "file, folders, others",
    [
        ("requirements.txt", ["longlive_jax"], {"jaxlib", "huggingface_hub"}),
        ("requirements-dev.txt", ["launch", "configs", "examples"], set()),
    ],
)
def test_what_is_imported_is_declared(file, folders, others):
    declared = {canonicalize_name(one.name) for one in [*ranges(file), *extras()]}
    packages = importlib.metadata.packages_distributions()
    wrong = {
        name: str(where)
        for name, where in imported(*folders).items()
        if name not in others
        and not declared & {canonicalize_name(package) for package in packages.get(name, [name])}
    }
    assert not wrong


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
