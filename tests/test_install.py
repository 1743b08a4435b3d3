"""`pip install .` gives the library, from any folder."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_the_installed_package_opens_its_front_door_anywhere(tmp_path):
    source = tmp_path / "source"  # setuptools builds inside the tree that it is given
    shutil.copytree(ROOT / "longlive_jax", source / "longlive_jax")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += [
        "--disable-pip-version-check",
        "--no-build-isolation",
        f"--target={tmp_path}",
        str(source),
    ]
    subprocess.run(pip, check=True, timeout=300)
    served = tmp_path / "longlive_jax/serving"
    assert (served / "openapi.json").is_file() and (served / "page/index.html").is_file()
    code = (
        "import longlive_jax, sys; "
        f"assert longlive_jax.__file__.startswith({str(tmp_path)!r}), longlive_jax.__file__; "
        "print(longlive_jax.Pipeline.__name__, longlive_jax.Config().video.height)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["Pipeline", "704"], done.stderr
