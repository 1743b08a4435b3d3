"""Imports point one way, and what must be light is light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A package may import those before it, and itself.
ORDER = ["errors", "files", "captions", "formats", "recipes", "config", "data", "grading", "mesh", "topology", "params", "collectives",
         "kernels", "ops", "quant", "models", "nnx", "diffusion", "checkpoints", "prompts",
         "sampling", "pipeline", "training", "scaling", "serving"]  # fmt: skip
FILES = sorted((ROOT / "longlive_jax").rglob("*.py"))


def imported(path):
    """(package, name) of every project import in a file, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first in ("longlive_jax", "launch", "configs", "tests"):
                yield first, (rest[0] if rest else "")


def package(path):
    relative = path.relative_to(ROOT / "longlive_jax")
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = package(path)
    if own == "__init__":
        return
    for first, name in imported(path):
        assert first == "longlive_jax", f"{path.name} imports {first}"
        assert ORDER.index(name) <= ORDER.index(own), f"{own} imports {name}"


def test_every_package_has_a_place():
    found = {package(path) for path in FILES} - {"__init__"}
    assert found <= set(ORDER)


def test_files_stay_small():
    for folder in ("longlive_jax", "launch", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path


def test_benchmarks_import_nothing_of_files_data_or_tokens():
    code = (
        "import sys, launch.bench, launch.benchmarks.stream, launch.benchmarks.vae, "
        "launch.benchmarks.attention; "
        "bad = {'av', 'PIL', 'grain', 'tokenizers', 'ftfy', 'orbax'} & {m.split('.')[0] for m in sys.modules}; "
        "sys.exit(f'imports {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_decodes_an_upload_imports_no_jax():
    """Each upload starts a process of its own."""
    code = (
        "import sys, longlive_jax.serving.decoding, longlive_jax.data.video_reader, "
        "longlive_jax.data.images; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_front_door_opens_when_it_is_used():
    code = (
        "import sys, longlive_jax, longlive_jax.kernels; "
        "bad = {'jax', 'flax', 'orbax'} & {m.split('.')[0] for m in sys.modules}; "
        "assert not bad, bad; "
        "assert {x.__name__ for x in map(longlive_jax.__getattr__, longlive_jax.__all__)} == "
        "set(longlive_jax.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
