"""Configs in and out: ConfigDicts, the files in `configs/`, and former names of settings."""

import dataclasses
import importlib.util
import os
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from longlive_jax.config import section
from longlive_jax.config.config import Config
from longlive_jax.errors import InputError

# Settings that have moved to another section since they were first written into files.
MOVED = {
    f"sample.{name}": f"video.{name}" for name in ("height", "width", "shift", "image_to_video")
}


# Sections that a command line names without the section that they are in, which is this one.
SHORT = {"actions": "model", "memory": "sample"}


def renamed(name: str) -> str:
    """The present name of a setting, "section.key", which may have been renamed."""
    return MOVED.get(name, name)


def located(name: str) -> str:
    """Where a setting of this name is: "actions.window" is "model.actions.window"."""
    parent = SHORT.get(name.partition(".")[0])
    return f"{parent}.{name}" if parent else renamed(name)


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The locked ConfigDict that a file in `configs/` returns and command lines override."""
    return ml_collections.ConfigDict(_as_dict(config)).lock()


def from_config_dict(config_dict: ml_collections.ConfigDict) -> Config:
    """Builds and validates a Config.

    Raises:
      InputError: an unknown key, a value of the wrong type, or a combination that cannot work.
    """
    return _build(Config, config_dict.to_dict(), "config")


def load_config(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a Python file whose `get_config()` returns a ConfigDict.

    Args:
      overrides: values by "section.key", as the command line's --config.section.key.

    Raises:
      InputError: no such file, one without `get_config`, or as `from_config_dict`.
    """
    spec = importlib.util.spec_from_file_location("longlive_config", path)
    try:
        assert spec is not None and spec.loader is not None, "it does not end with .py"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config_dict = module.get_config()
    except (OSError, ImportError, AttributeError, SyntaxError, AssertionError) as error:
        raise InputError(f"{path}: is no config file ({error}); see configs/tiny.py") from error
    for name, value in (overrides or {}).items():
        _override(config_dict, name, value)
    return from_config_dict(config_dict)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config with other values by "section.key".

    Raises:
      InputError: an unknown key, or as `from_config_dict`.
    """
    config_dict = to_config_dict(config)
    for name, value in overrides.items():
        _override(config_dict, name, value)
    return from_config_dict(config_dict)


def _override(config_dict, name, value):
    *sections, key = located(name).split(".")
    try:
        for part in sections:
            config_dict = config_dict[part]
        with config_dict.ignore_type():
            config_dict[key] = value
    except (KeyError, AttributeError) as error:
        raise InputError(f"config: unknown key {name!r}: {error.args[0]}") from error


def _as_dict(value):
    return {
        f.name: _as_dict(v) if dataclasses.is_dataclass(v) else v
        for f in dataclasses.fields(value)
        for v in (getattr(value, f.name),)
    }


def _build(cls, values: dict, where: str):
    fields = section.hints(cls)
    for key in sorted(set(values) - set(fields)):
        old = f"{where.removeprefix('config.')}.{key}"
        hint = f"; it is now config.{renamed(old)}" if renamed(old) != old else ""
        raise InputError(f"{where}: unknown key {key!r}{hint}; known keys: {', '.join(fields)}")
    return cls(**{k: _convert(fields[k], v, f"{where}.{k}") for k, v in values.items()})


def _convert(kind, value, where: str):
    kind = section.plain(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if typing.get_origin(kind) is tuple:  # tuple[float, ...]
        return tuple(_convert(typing.get_args(kind)[0], v, where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}={value!r} must be of type {kind.__name__}")
    return value
