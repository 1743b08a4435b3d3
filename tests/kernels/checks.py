"""What holds for every kernel: a file of tests gives its cases to `kernel_tests`."""

import dataclasses
import fractions
import functools
import math
import types
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError

RACES = plgpu.InterpretGPUParams(detect_races=True)


def alone(interpreted: Callable) -> Callable:
    """Waits for what an interpreted kernel returns, before anything else is computed.

    The interpreter starts programs from the callbacks of one that runs, and XLA keeps at most 32
    computations of a device begun. An oracle's operations, each a computation that waits for the
    kernel's, would fill them: then the kernel waits for room, and all of it for ever.
    """
    return lambda *arguments, **how: jax.block_until_ready(interpreted(*arguments, **how))


def pretend_hopper(monkeypatch, capability="9.0"):
    """JAX says that this machine has such a GPU: enough to trace and lower for one."""
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def lowered(function, *arguments) -> tuple:
    """The text of a function lowered for a GPU, and the shapes and dtypes of its result."""
    # A function of its own: JAX would find what another test has traced, for another chip.
    traced = jax.jit(lambda *x: function(*x)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text(), traced.out_info


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def f32(*shape):
    return shaped(*shape, dtype=jnp.float32)


def zeros(*shape, dtype=jnp.bfloat16):
    return np.zeros(shape, dtype)


def error(out, expected):
    """Relative, of the whole."""
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def same_bits(result, expected):
    """Signs of zeros included; a NaN may be any NaN."""
    results, expected = jax.tree.leaves(result), jax.tree.leaves(expected)
    for a, b in zip(map(np.asarray, results), map(np.asarray, expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        nan = np.isnan(b.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), nan)
        unsigned = f"u{a.itemsize}"
        np.testing.assert_array_equal(a.view(unsigned)[~nan], b.view(unsigned)[~nan])


def next_numbers(result, expected, share=1e-3):
    """bfloat16, equal but for a share, where float32's last bits differed: the next number."""
    assert result.dtype == jnp.bfloat16 and result.shape == expected.shape
    result, expected = (np.asarray(x, np.float32) for x in (result, expected))
    np.testing.assert_allclose(result, expected, rtol=2**-7, atol=1e-6)
    assert np.mean((result != expected) & ~np.isnan(expected)) < share


def check_quotients(parts, divisor):
    """Products with two parts of 1 / divisor are rounded once, contracted or not.

    For all mantissas that a bfloat16 has.
    """
    high, low = map(fractions.Fraction, parts)

    def rounded(q):  # to 24 bits, to nearest; no ties here
        unit = fractions.Fraction(2) ** (math.frexp(q)[1] - 24)
        return round(q / unit) * unit

    for mantissa in range(128, 256):
        exact = rounded(fractions.Fraction(mantissa, divisor))
        assert rounded(mantissa * high) == mantissa * high
        assert rounded(mantissa * high + rounded(mantissa * low)) == exact
        assert rounded(mantissa * high + mantissa * low) == exact


class Case:
    """Arguments of a kernel; `make` makes them. options: the kernel's. how: of the comparison."""

    def __init__(self, make: Callable[[], tuple], options=None, slow: bool = False, **how):
        self.make, self.options, self.how = make, options or {}, how
        self.marks = [pytest.mark.slow] if slow else []


@dataclasses.dataclass(frozen=True)
class Public:
    """A function that calls the kernel where it runs, and what it must give.

    how: of the comparison where the kernel runs; elsewhere the bits are the oracle's.
    """

    function: Callable
    oracle: Callable
    make: Callable[[], tuple]
    how: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A function that calls the kernel on a Hopper GPU, with shapes for its arguments.

    calls: the kernels in its program.
    specs, out_specs: of a manual `jax.shard_map` of it over `mesh`; None: not tried.
    """

    function: Callable
    arguments: tuple
    calls: int = 1
    specs: tuple | None = None
    out_specs: object = None
    mesh: config_lib.Mesh = config_lib.Mesh(fsdp=1, seq=8)
    check_vma: bool = True


class _Tests:
    """Tests of one kernel; see `kernel_tests`."""

    def pytest_generate_tests(self, metafunc):
        test = metafunc.function.__name__
        if test in _PARAMETERS:
            argument, name = _PARAMETERS[test]
            cases = getattr(metafunc.cls, name)
            parameters = [
                pytest.param(case, id=name, marks=getattr(case, "marks", ()))
                for name, case in cases.items()
            ]
            metafunc.parametrize(argument, parameters)

    def test_kernel_is_its_oracle(self, case):
        arguments = case.make()
        result = self.compiled(tuple(case.options.items()))(*arguments)
        expected = self.oracle(*arguments, **case.options)
        self.check(result, self.given(result, expected, arguments), **case.how)

    @pytest.mark.parametrize("by_kernel", (True, False), ids=("kernel", "elsewhere"))
    def test_public_function_is_its_oracle(self, monkeypatch, public, by_kernel):
        monkeypatch.setattr(self.lib, "supports", lambda *_, **__: by_kernel)
        arguments = public.make()
        if by_kernel:
            with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
                result = alone(jax.jit(lambda *x: public.function(*x)))(*arguments)
        else:
            result = public.function(*arguments)  # operation by operation, as the oracle
        expected = public.oracle(*arguments)
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        expected = self.given(result, expected, arguments)
        self.check(result, expected, **(public.how if by_kernel else {}))

    def test_lowers_for_hopper(self, monkeypatch, chunk):
        expected = jax.eval_shape(lambda *x: chunk.function(*x), *chunk.arguments)
        assert not self.supports(*chunk.arguments)
        pretend_hopper(monkeypatch)
        assert self.supports(*chunk.arguments)
        text, out = lowered(chunk.function, *chunk.arguments)
        assert text.count("custom_call @mosaic_gpu") == chunk.calls
        assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, expected)

    def test_lowers_in_a_manual_shard_map_alone(self, monkeypatch, chunk):
        mesh, specs = mesh_lib.make_mesh(chunk.mesh), chunk.specs
        manual = jax.shard_map(
            chunk.function, mesh=mesh, in_specs=specs, out_specs=chunk.out_specs,
            check_vma=chunk.check_vma,
        )  # fmt: skip

        def place(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

        def place_all(spec, x):
            return jax.tree.map(functools.partial(place, spec=spec), x)

        placed = jax.tree.map(place_all, specs, chunk.arguments)
        pretend_hopper(monkeypatch)
        with jax.set_mesh(mesh):
            assert not self.supports(*placed)
            assert "mosaic_gpu" in lowered(manual, *placed)[0]

    def test_left_to_xla(self, monkeypatch, arguments):
        pretend_hopper(monkeypatch)
        assert not self.supports(*arguments)

    def test_refuses(self, wrong):
        message, *arguments = wrong
        with pytest.raises(InputError, match=message):
            self.lib.kernel(*arguments)


_PARAMETERS = {
    "test_kernel_is_its_oracle": ("case", "cases"),
    "test_public_function_is_its_oracle": ("public", "publics"),
    "test_lowers_for_hopper": ("chunk", "chunks"),
    "test_lowers_in_a_manual_shard_map_alone": ("chunk", "sharded"),
    "test_left_to_xla": ("arguments", "left"),
    "test_refuses": ("wrong", "refused"),
}


def kernel_tests(
    lib: types.ModuleType,
    oracle: Callable | None = None,
    check: Callable = same_bits,
    *,
    cases: dict[str, Case] | None = None,
    publics: dict[str, Public] | None = None,
    chunks: dict[str, Chunk] | None = None,
    left: Sequence[tuple] = (),
    refused: Sequence[tuple] = (),
    kernel: Callable | None = None,
    supports: Callable | None = None,
    given: Callable = lambda result, expected, arguments: expected,
    interpret: plgpu.InterpretGPUParams = RACES,
) -> type:
    """A class of tests of one kernel: those that it is given cases for. Call it Test*.

    Args:
      lib: the kernel's file, with `supports` and `kernel`.
      oracle: (*arguments, **options of a case) -> what the kernel, interpreted, must give.
      check: (result, expected, **how) asserts that it does.
      cases, publics, chunks: by name; see the classes.
      left: arguments that on a Hopper GPU are left to XLA.
      refused: (message, *arguments of `lib.kernel`).
      kernel: (*arguments, interpret, **options), to be compared; None: `lib.kernel`.
      supports: of the arguments of chunks and of `left`; None: `lib.supports`.
      given: (result, expected, arguments) -> expected, where one part of a result is made of another.
      interpret: how cases are interpreted.
    """
    run, chunks = kernel or lib.kernel, chunks or {}

    @functools.cache
    def compiled(options):
        """Once for all cases of one shape."""
        return alone(jax.jit(functools.partial(run, interpret=interpret, **dict(options))))

    functions = {
        "oracle": oracle,
        "check": check,
        "given": given,
        "compiled": compiled,
        "supports": supports or (lambda *arguments: lib.supports(*arguments)),
    }
    parameters = {
        "cases": cases or {},
        "publics": publics or {},
        "chunks": chunks,
        "sharded": {name: chunk for name, chunk in chunks.items() if chunk.specs},
        "left": {str(i): arguments for i, arguments in enumerate(left)},
        "refused": {f"{i}, {wrong[0]}": wrong for i, wrong in enumerate(refused)},
    }
    # pytest takes no notice of a test that is None.
    none = {test: None for test, (_, name) in _PARAMETERS.items() if not parameters[name]}
    functions = {name: staticmethod(f) for name, f in functions.items()}
    return type("KernelTests", (_Tests,), {"lib": lib, **functions, **parameters, **none})
