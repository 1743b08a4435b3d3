"""Reads our checkpoints onto devices, one group of arrays after another; see the package."""

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import layout, quantized
from longlive_jax.checkpoints import parts as parts_lib
from longlive_jax.checkpoints.layout import Piece
from longlive_jax.checkpoints.store import checksums
from longlive_jax.checkpoints.store import directory as directory_lib
from longlive_jax.checkpoints.store import index as index_lib
from longlive_jax.errors import InputError
from longlive_jax.files import remote, scratch
from longlive_jax.files.orbax import check_read, ocp
from longlive_jax.files.remote import RemotePath
from longlive_jax.quant import weights as weights_lib
from longlive_jax.recipes import Recipe


def load(
    directory: str | os.PathLike,
    name: str,
    spec: params_lib.Tree,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    rules: Mapping = mesh_lib.RULES,
    *,
    config: Any = None,
    recipe: Recipe | None = None,
    some: bool = False,
) -> params_lib.Tree:
    """Reads a network's arrays, layer by layer, straight onto their devices.

    Args:
      name: of the network, such as "dit", "vae" or "umt5".
      spec: of the arrays to read. Top-level subtrees may be left out: a VAE's decoder alone.
      mesh: place arrays as `params.shardings(spec, mesh, rules)`; None: on the first device.
      dtype: of the result; None: as stored. Arrays of quantised weights have their own.
      config: the section of the config that `spec` was made of; if given, settings that no shape
        shows (num_heads) are compared too.
      recipe: that the network's weights must be quantised by; None: they must not be.
      some: subtrees may be left out below the top as well.

    Returns:
      `spec`'s tree of jax.Arrays; with a recipe, as `quant.weights.quantize_params` makes it. While
      it is read, devices also hold one more layer, or a copy of the codes of one stacked weight.

    Raises:
      InputError: the checkpoint or the network is missing or damaged, or has other sizes or another
        recipe.
    """
    stored = Stored(directory, name)
    stored.check(spec, config, recipe, some=some)
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
    needed = {g: rows for g, rows in stored.groups.items() if any(p in wanted for p in rows)}
    with stored.checking(needed) as check:
        for group, rows in needed.items():
            abstract = {
                p: jax.ShapeDtypeStruct((n, *wanted[p].shape[1:]), dtypes[p], sharding=placement[p])
                for p, (_, n) in rows.items()
                if p in wanted
            }
            check(group)
            for path, array in stored.read(group, abstract).items():
                shape = wanted[path].shape
                if array.shape == shape:
                    result[path] = array
                    continue
                if path not in result:
                    result[path] = jnp.zeros(shape, dtypes[path], device=placement[path])
                result[path] = _place(result[path], array, np.int32(rows[path][0]))
    return quantized.from_stored(params_lib.unflatten(result), specs, place)


def load_or_init(
    directory: str | os.PathLike,
    name: str,
    spec: params_lib.Tree,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    *,
    dtype: Any = jnp.float32,
    rules: Mapping = mesh_lib.RULES,
    config: Any = None,
    some: bool = False,
) -> tuple[params_lib.Tree, tuple[str, ...]]:
    """`load`, for a network that has grown since it was stored: it gained a branch, say.

    Args:
      key: of the initial values, which equal those of `params.init({name: spec}, key)`.
      some: as `load`; the checkpoint may have none of them.

    Returns:
      `spec`'s tree, and the paths ("blocks/actions/qkv/weight") of the arrays that the checkpoint
      lacks, which have their initial values.

    Raises:
      InputError: as `load`; a stored array has another shape than in `spec`, or is not in `spec`;
        or the checkpoint has none of them.
    """
    stored, wanted = Stored(directory, name), params_lib.flatten(spec)
    absent = {path: s for path, s in wanted.items() if path not in stored.dtypes()}
    if len(absent) == len(wanted) and not some:
        raise InputError(
            f"{stored.path.parent}: its {name} has none of the {len(wanted)} arrays of the "
            "network; give another checkpoint"
        )
    stored.check(spec, config, grown=True, some=some)
    there = params_lib.unflatten({path: s for path, s in wanted.items() if path not in absent})
    leaves = {}
    if there:
        found = load(directory, name, there, mesh, dtype, rules, config=config, some=some)
        leaves = params_lib.flatten(found)
    if absent:
        specs = {name: params_lib.unflatten(absent)}
        made = params_lib.init(specs, key, dtype, mesh, dict(rules))
        leaves |= params_lib.flatten(made[name])
    tree = params_lib.unflatten({path: leaves[path] for path in wanted})
    return tree, tuple("/".join(path) for path in absent)


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, axis=0)


def parts(directory: str | os.PathLike) -> tuple[str, ...]:
    """The names of a checkpoint's networks, and "tokenizer" if it has one.

    Raises:
      InputError: no checkpoint there, or a damaged one.
    """
    return tuple(directory_lib.read(remote.path(remote.absolute(directory))))


def sources(directory: str | os.PathLike, name: str) -> tuple[str, ...]:
    """What a network or the tokenizer of a checkpoint came from, as of `save`.

    Raises:
      InputError: no checkpoint there, or a damaged one.
    """
    return tuple(directory_lib.read(remote.path(remote.absolute(directory)))[name]["sources"])


class Stored:
    """A network of a checkpoint on disk, its indices read.

    Attributes:
      name: its name in the checkpoint.
      network: its kind, of `parts.PARTS`; None: another one.
      info: its entry in metadata.json.
      recipe: by which its weights are quantised; None: they are not.

    Raises:
      InputError: no checkpoint there, or without this network, or damaged.
    """

    def __init__(self, directory: str | os.PathLike, name: str):
        root = remote.path(remote.absolute(directory))
        has = directory_lib.read(root)
        if name not in has:
            way_out = "give another checkpoint"
            if name in parts_lib.PARTS:
                way_out = (
                    f"add it with `python -m launch.convert --{name}=FILE --output={directory}`"
                )
            names = ", ".join(sorted(has)) or "nothing"
            raise InputError(f"{root}: holds no {name} (it holds {names}); {way_out}")
        self.name, self.info = name, directory_lib.network(root, name, has[name])
        self.network = parts_lib.PARTS.get(self.info.get("network", name))
        self.recipe = recipe_lib.get(self.info.get("recipe", "bf16"))
        self.path = root / self.info["directory"]
        self._way_out = f"copy the checkpoint or convert the {name} again"
        self._index = index_lib.read(self.path, self.info.get("index_checksum"), self._way_out)
        self.groups = self._index.groups
        # Of a checkpoint on object storage, the groups that are being read.
        self._here = scratch.folder() if isinstance(self.path, RemotePath) else self.path
        if isinstance(self.path, RemotePath) and not self._index.checksums:
            raise InputError(
                f"{self.path}: has no checksums, it was written before they were; copy it to a "
                "local disk"
            )

    def spec(self) -> params_lib.Tree:
        """Specs of the arrays on disk; only the layer axes of stacked ones have names."""
        return params_lib.unflatten(
            {
                p: params_lib.ParamSpec(
                    leaf.shape,
                    ("layer" if leaf.stacked else None,) + (None,) * (len(leaf.shape) - 1),
                )
                for p, leaf in self._index.leaves.items()
            }
        )

    def dtypes(self) -> dict[params_lib.Path, np.dtype]:
        return {p: leaf.dtype for p, leaf in self._index.leaves.items()}

    def check(
        self,
        spec: params_lib.Tree,
        config: Any = None,
        recipe: Recipe | None = None,
        *,
        grown: bool = False,
        some: bool = False,
    ) -> None:
        """Refuses a spec, a section of the config or a recipe that stored arrays do not fit.

        grown: `spec` may have arrays that are not stored. some: it may lack some that are.
        """
        name, where = self.name, self.path.parent
        if recipe != self.recipe:
            raise self._other_recipe(recipe)
        wanted = params_lib.flatten(quantized.spec(spec, recipe))
        stored = {p: leaf.shape for p, leaf in self._index.leaves.items()}
        absent = sorted({p[0] for p in wanted} - {p[0] for p in stored})
        if absent and not grown:
            made_from = ", ".join(self.info["sources"]) or "a file"
            raise InputError(
                f"{where}: its {name} has no {', '.join(absent)}, as {made_from} had none; convert "
                f"a file that has: `python -m launch.convert --{name}=FILE --output={where}`"
            )
        wrong = [
            f"{'/'.join(p)} is {s.shape} by the config, {stored.get(p)} in the checkpoint"
            for p, s in wanted.items()
            if stored.get(p) != s.shape and not (grown and p not in stored)
        ]
        wrong += [
            f"{'/'.join(p)} {shape} is not in the config"
            for p, shape in stored.items()
            if p[0] in spec and p not in wanted and not some
        ]
        own = self.dtypes()
        wrong += [
            f"{'/'.join(p)} is {np.dtype(s.dtype)} by the recipe, {own[p]} in the checkpoint"
            for p, s in wanted.items()
            if s.dtype is not None and p in own and own[p] != s.dtype
        ]
        # Settings that no shape shows.
        section = self.network.section if self.network else ""
        made = self.info["config"].get(section, {})
        heads, had = getattr(config, "num_heads", None), made.get("num_heads")
        other_heads = had is not None and heads not in (None, had)
        if other_heads:
            wrong += [f"num_heads is {heads} by the config, {had} in the checkpoint"]
        acting = {} if grown else _other_actions(config, made)
        wrong = [
            f"{name} is {value!r} by the config, {there!r} in the checkpoint"
            for name, (value, there) in acting.items()
        ] + wrong
        if wrong:
            sizes = self.network.sizes(layout.torch_shapes(spec)) if self.network else {}
            differing = {k: made[k] for k, v in sizes.items() if made.get(k, v) != v}
            if had is not None and (heads is None or other_heads):
                differing["num_heads"] = had
            fits = [f"--config.{section}.{k}={v}" for k, v in differing.items()]
            fits += [f"--config.{name}={there}" for name, (_, there) in acting.items()]
            flags = " ".join(fits)
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InputError(
                f"{where}: its {name} has other sizes than the config: "
                f"{'; '.join(wrong[:5])}{more}. It fits with {flags or 'another config'}"
            )

    def _other_recipe(self, recipe: Recipe | None) -> InputError:
        where, name = self.path.parent, self.name
        own, other = (r.name if r else "bf16" for r in (self.recipe, recipe))
        if self.recipe is None:
            return InputError(
                f"{where}: its {name} is not quantised, recipe {other!r} is asked for; make one "
                f"that is: `python -m launch.convert --checkpoint={where} --recipe={other} "
                "--output=DIR`"
            )
        return InputError(
            f"{where}: its {name} is quantised by recipe {own!r}, and {other!r} is asked for; to "
            f"sample from it set --config.quant.recipe={own}, for anything else give a checkpoint "
            "that is not quantised"
        )

    def checking(
        self, groups: Iterable[str]
    ) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        """`checksums.checking` of these groups, in the order in which they will be read."""
        if sums := self._index.checksums:
            into = self._here if self._here != self.path else None
            sums = {g: sums[g] for g in groups}
            return checksums.checking(self.path, sums, self._way_out, into)
        return contextlib.nullcontext(self._check_dtypes)

    def _check_dtypes(self, group: str) -> None:
        """Refuses a group without checksums that has other arrays than the index says.

        The reader would cast them, or take some rows of them, without a word.
        """
        checksums.check_links(self.path / group)
        with self._damage(group):
            found = params_lib.flatten(ocp.metadata(str(self.path / group)).metadata)
            for path, (_, n) in self.groups[group].items():
                leaf, has = self._index.leaves[path], found[path]
                wanted = (n, *leaf.shape[1:]), leaf.dtype
                if wanted != (tuple(has.shape), has.dtype):
                    raise ValueError(
                        f"{'/'.join(path)} is {tuple(has.shape)} {has.dtype}, by its index "
                        f"{wanted[0]} {wanted[1]}"
                    )

    @contextlib.contextmanager
    def _damage(self, group: str) -> Iterator[None]:
        """Makes an InputError of whatever the library finds wrong with a group's files."""
        try:
            yield
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of a file cut short it raises bare Exception
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise InputError(
                f"{self.path / group}: is damaged ({reason}); {self._way_out}"
            ) from error

    def read(
        self, group: str, abstract: Mapping[params_lib.Path, Any]
    ) -> dict[params_lib.Path, Any]:
        """A group's arrays of these paths, in the dtypes and shardings of `abstract`."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._damage(group), context:
            tree = ocp.load(str(self._here / group), params_lib.unflatten(abstract))
            check_read(tree)
            arrays = params_lib.flatten(tree)
            wanted = {path: (x.shape, x.dtype) for path, x in abstract.items()}
            if wrong := [p for p, x in arrays.items() if (x.shape, x.dtype) != wanted.get(p)]:
                raise ValueError(f"{'/'.join(wrong[0])} has another shape or dtype")
        self._read(group)
        return arrays

    def _read(self, group: str) -> None:
        """Removes the local copy of a group that was read."""
        if self._here != self.path:
            shutil.rmtree(self._here / group, ignore_errors=True)

    def copy(self, folder: pathlib.Path) -> None:
        """Copies the network's files, and no others, to an empty folder.

        Raises:
          InputError: they are damaged, or links that lead out of the network.
        """
        with self.checking(self.groups) as check:
            for group in self.groups:
                check(group)
                with self._damage(group):
                    shutil.copytree(self._here / group, folder / group)
                self._read(group)
            (folder / index_lib.FILE).write_bytes((self.path / index_lib.FILE).read_bytes())

    def extents(self) -> Iterator[tuple[params_lib.Path, int, int]]:
        """Path, first row and number of rows of each of `pieces`."""
        for rows in self.groups.values():
            yield from ((path, start, n) for path, (start, n) in rows.items())

    def pieces(self) -> Iterator[Piece]:
        """All arrays on the host, group by group, in the order in which they were saved."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        with self.checking(self.groups) as check:
            for group, rows in self.groups.items():
                leaves = {p: self._index.leaves[p] for p in rows}
                abstract = {
                    p: jax.ShapeDtypeStruct(
                        (n, *leaves[p].shape[1:]), leaves[p].dtype, sharding=here
                    )
                    for p, (_, n) in rows.items()
                }
                check(group)
                arrays = self.read(group, abstract)
                for path, (start, _) in rows.items():
                    yield Piece(path, start, np.asarray(arrays.pop(path)))


# Of an action path, what says which presets' weights these are.
_PRESET = (
    "kind", "keyboard_dim", "mouse_dim", "keyboard_keys", "mouse_degrees", "pad", "heads",
    "head_dim", "keyboard_embed", "layers",
)  # fmt: skip


def _other_actions(config: Any, made: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of the action path that differ: by name that of the config, and the stored one."""
    own = getattr(config, "actions", None)
    had = {name: made[f"actions.{name}"] for name in _PRESET if f"actions.{name}" in made}
    if own is None or own.kind == "none" or not had:
        return {}
    other = {k: (getattr(own, k), v) for k, v in had.items() if getattr(own, k) != v}
    with contextlib.suppress(InputError, TypeError):  # of a record that somebody edited
        if own.key_names == type(own)(**had).key_names:
            other.pop("keyboard_keys", None)
    return {f"actions.{name}": pair for name, pair in other.items()}
