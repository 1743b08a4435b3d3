"""Our checkpoint of weights: a directory of small Orbax checkpoints, one a layer, and two indices.

    CKPT/metadata.json     the parts there are, what they were made from and for
    CKPT/dit/index.json    shape and dtype of each array, and which group has which rows of it
    CKPT/dit/blocks_07/    a group: an Orbax checkpoint of one layer's rows of the stacked arrays
    CKPT/dit/rest/         what has no layer
    CKPT/tokenizer.json

Neither writer nor reader ever holds a stacked array on the host. A group may hold any rows of any
array: one that holds all of them is a stacked checkpoint, and loads just the same. `metadata.json`
is replaced in one step when a part is whole, so that a directory is never half-written.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import directory as directory_lib
from longlive_jax.checkpoints import layout, quantized
from longlive_jax.checkpoints import parts as parts_lib
from longlive_jax.errors import InputError
from longlive_jax.models import tokenizer as tokenizer_lib
from longlive_jax.quant import weights as weights_lib
from longlive_jax.recipes import Recipe

_GROUP_BYTES = 256 << 20  # a group is in memory about three times while it is written


class Piece(NamedTuple):
    """Rows `start` and on of one of our arrays; a layer is one row of a stacked array."""

    path: params_lib.Path
    start: int
    array: np.ndarray


class Summary(NamedTuple):
    """What was saved. `dtypes`: names, the most frequent first."""

    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


def save(
    directory: str | os.PathLike,
    part: str,
    pieces: Iterable[Piece],
    spec: params_lib.Tree,
    *,
    section: Any,
    sources: Iterable[str] = (),
    recipe: Recipe | None = None,
) -> Summary:
    """Adds a part to a checkpoint, or replaces it; creates the checkpoint if there is none.

    Args:
      part: "dit", "vae" or "umt5".
      pieces: all rows of all of `spec`'s arrays, in any order; taken one at a time. With a recipe
        those of linear layers' weights are quantised, by `checkpoints.quantized.pieces`.
      section: the dataclass of the config that `spec` was made of, kept for messages.
      sources: names of the files the weights came from, kept for the reader.
      recipe: that quantised the weights; None: they are not.

    Until the last piece is on disk, the directory holds what it held before.

    Raises:
      InputError: the directory is something else, or somebody else is writing to it.
    """

    def write(folder: pathlib.Path) -> dict:
        index = _write_groups(folder, pieces, quantized.spec(spec, recipe))
        directory_lib.write_json(folder / "index.json", index)
        info = {
            "sources": [os.path.basename(s) for s in sources],
            **_summary(index, params_lib.count(spec))._asdict(),
            "config": {parts_lib.PARTS[part].section: dataclasses.asdict(section)},
        }
        return info if recipe is None else info | {"recipe": recipe.name}

    info = _add(directory, part, write)
    return Summary(*(info[name] for name in Summary._fields))


def copy(stored: "Stored", directory: str | os.PathLike) -> None:
    """Adds a part of another checkpoint to one, or replaces it, as it is.

    Raises:
      InputError: as `save`.
    """

    def write(folder: pathlib.Path) -> dict:
        shutil.copytree(stored.path, folder, dirs_exist_ok=True)
        return stored.info

    _add(directory, stored.part.name, write)


def _add(
    directory: str | os.PathLike, part: str, write: Callable[[pathlib.Path], dict]
) -> dict[str, Any]:
    """Adds a part that `write` writes to an empty folder; returns what it says of it."""
    root = pathlib.Path(os.path.abspath(directory))
    with directory_lib.writing(root):
        metadata = directory_lib.read_metadata(root, new=True)
        # What a process left that was killed.
        partial = root / f".{part}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        directory_lib.remove_others(root, part, metadata["parts"].get(part, {}).get("directory"))
        partial.mkdir()
        try:
            info = write(partial)
            names = (part if i == 0 else f"{part}_{i}" for i in range(1 << 20))
            final = next(root / n for n in names if not (root / n).exists())
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        metadata["parts"][part] = info | {"directory": final.name}
        directory_lib.write_json(root / "metadata.json", metadata)
        directory_lib.remove_others(root, part, final.name)
    return info


def save_tokenizer(directory: str | os.PathLike, file: str) -> None:
    """Copies a tokenizer.json into a checkpoint.

    Raises:
      InputError: as `save`; or not UMT5's tokenizer.
    """
    tokenizer_lib.Tokenizer.from_file(file)
    root = pathlib.Path(os.path.abspath(directory))
    with directory_lib.writing(root):
        metadata = directory_lib.read_metadata(root, new=True)
        partial = root / f".{tokenizer_lib.FILE}.partial"
        shutil.copyfile(file, partial)
        os.replace(partial, root / tokenizer_lib.FILE)
        metadata["parts"]["tokenizer"] = {"sources": [os.path.basename(file)]}
        directory_lib.write_json(root / "metadata.json", metadata)


def tree_pieces(tree: params_lib.Tree, spec: params_lib.Tree) -> Iterator[Piece]:
    """A tree's arrays as pieces, in the order of `layout.weights`; one layer on the host at a time.

    The arrays must be addressable by this process: NumPy's, or a mesh's of one process.
    """
    leaves = params_lib.flatten(tree)
    for w in layout.weights(spec):
        leaf = leaves[w.path]
        rows = leaf if w.layer is None else leaf[w.layer : w.layer + 1]
        yield Piece(w.path, w.layer or 0, np.asarray(jax.device_get(rows)))


def load(
    directory: str | os.PathLike,
    part: str,
    spec: params_lib.Tree,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    rules: Mapping = mesh_lib.RULES,
    config: Any = None,
    recipe: Recipe | None = None,
) -> params_lib.Tree:
    """Reads a part's arrays, layer by layer, straight to where they are to be.

    Args:
      part: "dit", "vae" or "umt5".
      spec: what to read. Top-level subtrees may be left out, to read a VAE's decoder alone.
      mesh: place arrays as `params.shardings(spec, mesh, rules)`; None: on the first device.
      dtype: of the result; None: as stored. Arrays of quantised weights have their own.
      config: the section of the config that `spec` was made of; if given, what shapes cannot tell
        (num_heads) is compared too.
      recipe: that the part's weights must be quantised by; None: they must not be.

    Returns:
      `spec`'s tree of jax.Arrays, with a recipe that of `quant.weights.quantize_params`. While it
      is read, devices hold one layer more than that, or the codes of one stacked weight twice.

    Raises:
      InputError: the checkpoint, or the part, is not there, or is damaged, or has other sizes, or
        another recipe.
    """
    stored = Stored(directory, part)
    stored.check(spec, config, recipe)
    specs = weights_lib.quantize_specs(spec, recipe, dtype or jnp.bfloat16)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = jax.tree.map(lambda _: here, specs, is_leaf=params_lib.is_spec)
    else:
        place = params_lib.shardings(specs, mesh, dict(rules))
    placement = params_lib.flatten(weights_lib.as_dicts(place))
    wanted = params_lib.flatten(quantized.spec(spec, recipe))
    dtypes = {p: jnp.dtype(s.dtype or dtype or stored.dtypes()[p]) for p, s in wanted.items()}
    result: dict[params_lib.Path, jax.Array] = {}
    for group, rows in stored.groups.items():
        abstract = {
            p: jax.ShapeDtypeStruct((n, *wanted[p].shape[1:]), dtypes[p], sharding=placement[p])
            for p, (_, n) in rows.items()
            if p in wanted
        }
        if not abstract:
            continue
        for path, array in stored.read(group, abstract).items():
            shape = wanted[path].shape
            if array.shape == shape:
                result[path] = array
                continue
            if path not in result:
                result[path] = jnp.zeros(shape, dtypes[path], device=placement[path])
            result[path] = _place(result[path], array, np.int32(rows[path][0]))
    return quantized.from_stored(params_lib.unflatten(result), specs, place)


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, axis=0)


def parts(directory: str | os.PathLike) -> tuple[str, ...]:
    """The parts that a checkpoint has: of "dit", "vae", "umt5" and "tokenizer".

    Raises:
      InputError: no checkpoint there, or a damaged one.
    """
    return tuple(directory_lib.read_metadata(pathlib.Path(os.path.abspath(directory)))["parts"])


class Stored:
    """A part of a checkpoint on disk, its indices read.

    Attributes:
      recipe: that its weights are quantised by; None: they are not.

    Raises:
      InputError: no checkpoint there, or without this part, or damaged.
    """

    def __init__(self, directory: str | os.PathLike, part: str):
        root = pathlib.Path(os.path.abspath(directory))
        metadata = directory_lib.read_metadata(root)
        if part not in metadata["parts"]:
            has = ", ".join(sorted(metadata["parts"])) or "nothing"
            raise InputError(
                f"{root}: holds no {part} (it holds {has}); add it with "
                f"`python -m launch.convert --{part}=FILE --output={directory}`"
            )
        self.part = parts_lib.PARTS[part]
        self.info = metadata["parts"][part]
        self.recipe = recipe_lib.get(self.info.get("recipe", "bf16"))
        self.path = root / self.info["directory"]
        try:
            index = json.loads((self.path / "index.json").read_text())
            self._leaves = {_path(k): v for k, v in index["leaves"].items()}
            self.groups: dict[str, dict[params_lib.Path, tuple[int, int]]] = {
                g: {_path(k): tuple(v) for k, v in rows.items()}
                for g, rows in index["groups"].items()
            }
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.path}: index.json is damaged; convert the {part} again"
            ) from error

    def spec(self) -> params_lib.Tree:
        """Of the arrays on disk, and which are stacked; other axes have no names."""
        return params_lib.unflatten(
            {
                p: params_lib.ParamSpec(
                    tuple(v["shape"]),
                    ("layer" if v["stacked"] else None,) + (None,) * (len(v["shape"]) - 1),
                )
                for p, v in self._leaves.items()
            }
        )

    def dtypes(self) -> dict[params_lib.Path, np.dtype]:
        return {p: jnp.dtype(v["dtype"]) for p, v in self._leaves.items()}

    def check(
        self, spec: params_lib.Tree, config: Any = None, recipe: Recipe | None = None
    ) -> None:
        """Refuses a spec, a section of the config or a recipe that stored arrays do not fit."""
        name, where = self.part.name, self.path.parent
        if recipe != self.recipe:
            raise self._other_recipe(recipe)
        wanted = params_lib.flatten(quantized.spec(spec, recipe))
        stored = {p: tuple(v["shape"]) for p, v in self._leaves.items()}
        absent = sorted({p[0] for p in wanted} - {p[0] for p in stored})
        if absent:
            made_from = ", ".join(self.info["sources"]) or "a file"
            raise InputError(
                f"{where}: its {name} has no {', '.join(absent)}, as {made_from} had none; convert "
                f"a file that has: `python -m launch.convert --{name}=FILE --output={where}`"
            )
        wrong = [
            f"{'/'.join(p)} is {s.shape} by the config, {stored.get(p)} in the checkpoint"
            for p, s in wanted.items()
            if stored.get(p) != s.shape
        ]
        wrong += [
            f"{'/'.join(p)} {shape} is not in the config"
            for p, shape in stored.items()
            if p[0] in spec and p not in wanted
        ]
        made = self.info["config"][self.part.section]
        sizes = self.part.sizes(layout.torch_shapes(spec))
        differing = {k: made[k] for k, v in sizes.items() if made.get(k, v) != v}
        heads = getattr(config, "num_heads", None)
        if heads is not None and heads != made.get("num_heads", heads):
            wrong += [f"num_heads is {heads} by the config, {made['num_heads']} in the checkpoint"]
        if wrong and "num_heads" in made and (heads is None or heads != made["num_heads"]):
            differing["num_heads"] = made["num_heads"]
        if wrong:
            flags = " ".join(f"--config.{self.part.section}.{k}={v}" for k, v in differing.items())
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InputError(
                f"{where}: its {name} has other sizes than the config: "
                f"{'; '.join(wrong[:5])}{more}. It fits with {flags or 'another config'}"
            )

    def _other_recipe(self, recipe: Recipe | None) -> InputError:
        where, name = self.path.parent, self.part.name
        if self.recipe is None:
            return InputError(
                f"{where}: its {name} is not quantised, recipe {recipe.name!r} is asked for; make "
                f"one that is: `python -m launch.convert --checkpoint={where} "
                f"--recipe={recipe.name} --output=DIR`"
            )
        own, other = (r.name if r else "bf16" for r in (self.recipe, recipe))
        return InputError(
            f"{where}: its {name} is quantised by recipe {own!r}, and {other!r} is asked for; to "
            f"sample from it set --config.quant.recipe={own}, for anything else give a checkpoint "
            "that is not quantised"
        )

    def read(
        self, group: str, abstract: Mapping[params_lib.Path, Any]
    ) -> dict[params_lib.Path, Any]:
        """A group's arrays of these paths, as the ShapeDtypeStructs say."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                tree = ocp.load(self.path / group, params_lib.unflatten(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise InputError(
                f"{self.path / group}: is damaged ({reason}); convert the {self.part.name} again"
            ) from error
        return params_lib.flatten(tree)

    def extents(self) -> Iterator[tuple[params_lib.Path, int, int]]:
        """Path, first row and number of rows of each of `pieces`."""
        for rows in self.groups.values():
            yield from ((path, start, n) for path, (start, n) in rows.items())

    def pieces(self) -> Iterator[Piece]:
        """All of it on the host, group by group, in the order it was saved."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        dtypes = self.dtypes()
        for group, rows in self.groups.items():
            abstract = {
                p: jax.ShapeDtypeStruct(
                    (n, *self._leaves[p]["shape"][1:]), dtypes[p], sharding=here
                )
                for p, (_, n) in rows.items()
            }
            arrays = self.read(group, abstract)
            for path, (start, _) in rows.items():
                yield Piece(path, start, np.asarray(arrays.pop(path)))


def _write_groups(directory: pathlib.Path, pieces: Iterable[Piece], spec: params_lib.Tree) -> dict:
    """Writes pieces as they come, a group each time there is enough of them."""
    leaves = params_lib.flatten(spec)
    dtypes: dict[params_lib.Path, np.dtype] = {}
    groups: dict[str, dict[str, list[int]]] = {}
    rows_left = {p: s.shape[0] for p, s in leaves.items()}
    held: list[Piece] = []
    held_name = ""

    def flush() -> None:
        if not held:
            return
        name, i = held_name, 1
        while name in groups:
            name, i = f"{held_name}_{i}", i + 1
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly compress
        with context:
            ocp.save(directory / name, params_lib.unflatten({p.path: p.array for p in held}))
        groups[name] = {"/".join(p.path): [p.start, len(p.array)] for p in held}
        held.clear()

    for piece in pieces:
        path, s = piece.path, leaves[piece.path]
        assert piece.array.shape[1:] == s.shape[1:], (path, piece.array.shape, s.shape)
        assert dtypes.setdefault(path, piece.array.dtype) == piece.array.dtype, path
        one_layer = layout.is_stacked(s) and len(piece.array) == 1
        name = f"{path[0]}_{piece.start:02d}" if one_layer else "rest"
        size = sum(p.array.nbytes for p in held) + piece.array.nbytes
        if name != held_name or size > _GROUP_BYTES or any(p.path == path for p in held):
            flush()
        held_name = name
        held.append(piece)
        rows_left[path] -= len(piece.array)
        del piece
    flush()
    assert not any(rows_left.values()), {p: n for p, n in rows_left.items() if n}
    return {
        "leaves": {
            "/".join(p): {
                "shape": s.shape,
                "dtype": dtypes[p].name,
                "stacked": layout.is_stacked(s),
            }
            for p, s in leaves.items()
        },
        "groups": groups,
    }


def _summary(index: dict, parameters: int) -> Summary:
    by_dtype: dict[str, int] = {}
    for leaf in index["leaves"].values():
        by_dtype[leaf["dtype"]] = by_dtype.get(leaf["dtype"], 0) + math.prod(leaf["shape"])
    size = sum(n * jnp.dtype(d).itemsize for d, n in by_dtype.items())
    dtypes = tuple(sorted(by_dtype, key=by_dtype.get, reverse=True))
    return Summary(parameters, size, dtypes)


def _path(key: str) -> params_lib.Path:
    return tuple(key.split("/"))
