"""Files of torch.save: every dtype and stride of real ones, only weights from bad ones."""

import contextlib
import io
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.checkpoints import pickle_reader
from longlive_jax.errors import InputError
from tests.checkpoints import torch_file

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def test_tensors_of_real_torch():
    """`fixtures/tensors.pt` is of torch 2.13."""
    found = pickle_reader.read(FIXTURES / "tensors.pt")
    expected = {
        "f32": BASE,
        "f16": BASE.astype(np.float16),
        "bf16": BASE.astype(ml_dtypes.bfloat16),
        "f64": BASE.astype(np.float64),
        "i64": np.arange(5),
        "u8": np.arange(5, dtype=np.uint8),
        "bool": np.array([True, False]),
        "transposed": BASE.T,
        "sliced": BASE[1:3, ::2],
        "expanded": np.array([[1, 1, 1], [2, 2, 2]], np.float32),
        "scalar": np.float32(3.5),
        "empty": np.empty((0, 3), np.float32),
        "parameter": BASE,
        "parameter_with_attribute": BASE,
        "fp8": BASE.astype(ml_dtypes.float8_e4m3fn),
        "fp8_e5m2": BASE.astype(ml_dtypes.float8_e5m2),
        "uint16": np.arange(4, dtype=np.uint16),
    }
    assert list(found) == list(expected)
    for name, array in expected.items():
        got = found[name].read()
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(got, array, err_msg=name)
        assert got.flags.c_contiguous
    np.testing.assert_array_equal(found["transposed"].read(1, 3), BASE.T[1:3])
    np.testing.assert_array_equal(found["sliced"].read(1), BASE[2:3, ::2])


def test_training_checkpoint_of_real_torch():
    found = pickle_reader.read(FIXTURES / "training.pt")
    weight = found["generator"]["weight"].read()
    np.testing.assert_array_equal(weight, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert found["generator_optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert (found["step"], found["shape"], found["set"]) == (7, (1, 2), {1, 2})
    assert found["bytes"] == b"\x00\xff"


def test_our_writer(tmp_path):
    storage = BASE.reshape(-1)
    value = OrderedDict(
        a=BASE,
        b={"c": BASE.astype(ml_dtypes.bfloat16), "step": 3},
        view=torch_file.Strided(storage, (2, 3), (1, 6), offset=4),
    )
    torch_file.save(tmp_path / "f.pt", value)
    found = pickle_reader.read(tmp_path / "f.pt")
    np.testing.assert_array_equal(found["a"].read(), BASE)
    assert found["b"]["c"].read().dtype == ml_dtypes.bfloat16
    assert found["b"]["step"] == 3
    np.testing.assert_array_equal(found["view"].read(), BASE[:3, 4:].T)


class _Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("call", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "eval"),
        (os.makedirs, ("{}",), "os.makedirs"),
        (getattr, (pathlib.Path, "home"), "getattr"),
    ],
)
def test_malicious_pickle_is_named_and_not_run(tmp_path, protocol, call, args, name):
    trace = tmp_path / "ran"
    args = tuple(a.format(trace) if isinstance(a, str) else a for a in args)
    program = pickle.dumps(_Evil(call, *args), protocol)[2:-1]
    file = tmp_path / "evil.pt"
    torch_file.save(file, {"generator": {"w": BASE}, "x": torch_file.Raw(program)})
    with pytest.raises(InputError, match=rf"evil.pt: wants to run .*{name} while loading"):
        pickle_reader.read(file)
    assert not trace.exists()


def test_object_of_another_library_is_refused():
    with pytest.raises(InputError, match=r"wants to run argparse\.Namespace"):
        pickle_reader.read(FIXTURES / "namespace.pt")


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb",  # BUILD on a dtype
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00_callK\x01s\x86b",  # on a callable
        b"ccollections\nOrderedDict\n)\x81",  # NEWOBJ
        b"ctorch\nSize\nI5\n\x85R",  # a call that fails
        b"(X\x01\x00\x00\x00aX\x01\x00\x00\x00btQ",  # a foreign persistent id
        b"Pabc\n",
        b"0000",
    ],
)
def test_odd_programs_are_refused(tmp_path, program):
    torch_file.save(tmp_path / "odd.pt", {"x": torch_file.Raw(program)})
    with pytest.raises(InputError, match=r"odd\.pt: its data\.pkl is damaged"):
        pickle_reader.read(tmp_path / "odd.pt")


def test_a_tensor_cannot_be_told_to_read_another_file(tmp_path):
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    storage += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85\x89NtR"
    steal = tensor + b"}X\x04\x00\x00\x00fileX\x0b\x00\x00\x00/etc/passwdsb"
    torch_file.save(tmp_path / "f.pt", {"w": BASE, "x": torch_file.Raw(steal)})
    with pytest.raises(InputError, match="damaged"):
        pickle_reader.read(tmp_path / "f.pt")


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((5, 6), (6, 1), 0),
        ((4, 6), (6, 1), 1),
        ((2,), (-1,), 3),
        ((2,), (1, 1), 0),
        ((-1,), (1,), 0),
    ],
)
def test_views_that_leave_their_storage_are_refused(tmp_path, shape, strides, offset):
    view = torch_file.Strided(BASE.reshape(-1), shape, strides, offset)
    torch_file.save(tmp_path / "f.pt", {"w": view})
    with pytest.raises(InputError, match="damaged"):
        pickle_reader.read(tmp_path / "f.pt")


def test_truncated_at_any_byte(tmp_path):
    torch_file.save(tmp_path / "whole.pt", {"w": BASE})
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.pt"):
            pickle_reader.read(tmp_path / "cut.pt")


def test_any_corrupt_byte_gives_an_input_error_or_values(tmp_path):
    """Fuzz: no byte of the pickle or the directory, changed, may raise anything else."""
    torch_file.save(tmp_path / "whole.pt", {"w": BASE, "step": 3})
    whole = (tmp_path / "whole.pt").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        with contextlib.suppress(InputError):
            found = pickle_reader.read(tmp_path / "bad.pt")
            for value in found.values() if isinstance(found, dict) else ():
                if hasattr(value, "read"):
                    value.read()


def _tar(file):
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f.write_bytes(b""), "is empty"),
        (lambda f: f.write_bytes(b"hello"), "neither a torch.save nor a safetensors"),
        (_tar, "tar archive"),
        (
            lambda f: zipfile.ZipFile(f, "w").writestr("a.txt", "a"),
            "not one of torch.save|cut short",
        ),
        (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        (lambda f: f.mkdir(), "Is a directory"),
        (lambda f: None, "No such file"),
    ],
)
def test_foreign_files(tmp_path, write, message):
    file = tmp_path / "foreign.pt"
    write(file)
    with pytest.raises(InputError, match=message):
        pickle_reader.read(file)


def test_compressed_archive_is_refused(tmp_path):
    torch_file.save(tmp_path / "f.pt", {"w": BASE})
    with (
        zipfile.ZipFile(tmp_path / "f.pt") as old,
        zipfile.ZipFile(tmp_path / "new.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="compressed"):
        pickle_reader.read(tmp_path / "new.pt")


def test_big_endian_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/byteorder", "big")
    with pytest.raises(InputError, match="endian"):
        pickle_reader.read(tmp_path / "f.pt")


# The format of before PyTorch 1.6.

LEGACY = (FIXTURES / "legacy.pt").read_bytes()


def test_before_pytorch_1_6():
    found = pickle_reader.read(FIXTURES / "legacy.pt")
    assert list(found) == ["w"]
    np.testing.assert_array_equal(found["w"].read(), BASE)
    np.testing.assert_array_equal(found["w"].read(1, 3), BASE[1:3])


def test_legacy_files_with_several_tensors(tmp_path):
    """Shared storages, other dtypes and views, as that torch's pickles have them."""
    half = np.arange(6, dtype=np.float16)

    def storage(key, kind, count):
        return (
            b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"Storage\nX\x01\x00\x00\x00" + key
            + b"X\x03\x00\x00\x00cpuK" + bytes([count]) + b"NtQ"
        )  # fmt: skip

    def tensor(storage, offset, rows, stride):
        sizes = b"K" + bytes([offset]) + b"K" + bytes([rows]) + b"\x85K" + bytes([stride]) + b"\x85"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"\x89NtR"

    program = (
        b"\x80\x02}(X\x01\x00\x00\x00a" + tensor(storage(b"x", b"Float", 24), 0, 24, 1)
        + b"X\x01\x00\x00\x00b" + tensor(storage(b"y", b"Half", 6), 1, 2, 3)
        + b"X\x01\x00\x00\x00c" + tensor(storage(b"x", b"Float", 24), 4, 5, 2) + b"u."
    )  # fmt: skip
    head = LEGACY[:137]  # magic number, version, and facts of the machine
    keys = pickle.dumps(["y", "x"], 2)
    data = b"\x06" + bytes(7) + half.tobytes() + b"\x18" + bytes(7) + BASE.tobytes()
    file = tmp_path / "f.pt"
    file.write_bytes(head + program + keys + data)
    found = {name: t.read() for name, t in pickle_reader.read(file).items()}
    np.testing.assert_array_equal(found["a"], BASE.reshape(-1))
    np.testing.assert_array_equal(found["b"], half[[1, 4]])
    np.testing.assert_array_equal(found["c"], BASE.reshape(-1)[4:14:2])
    for other in (pickle.dumps(["x"], 2), pickle.dumps(["y", "x", "z"], 2), pickle.dumps({}, 2)):
        file.write_bytes(head + program + other + data)
        with pytest.raises(InputError, match="other storages than its tensors have"):
            pickle_reader.read(file)
    file.write_bytes(head + program + keys + data + b"x")
    with pytest.raises(InputError, match="it ends at byte"):
        pickle_reader.read(file)


def test_legacy_files_cut_short(tmp_path):
    for size in range(len(LEGACY)):
        (tmp_path / "cut.pt").write_bytes(LEGACY[:size])
        with pytest.raises(InputError, match=r"cut\.pt"):
            pickle_reader.read(tmp_path / "cut.pt")


def test_any_corrupt_byte_of_a_legacy_file(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(LEGACY)
        damaged[rng.integers(len(LEGACY))] = rng.integers(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        with contextlib.suppress(InputError):
            found = pickle_reader.read(tmp_path / "bad.pt")
            for value in found.values() if isinstance(found, dict) else ():
                if hasattr(value, "read"):
                    value.read()


def test_a_legacy_file_of_another_byte_order(tmp_path):
    at = LEGACY.index(b"\x88")  # true
    (tmp_path / "f.pt").write_bytes(LEGACY[:at] + b"\x89" + LEGACY[at + 1 :])
    with pytest.raises(InputError, match="byte order"):
        pickle_reader.read(tmp_path / "f.pt")
