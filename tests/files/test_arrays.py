import errno
import struct
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import InputError
from longlive_jax.files import arrays as arrays_lib
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.files.atomic import atomic_path


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "a.npz"
    arrays = {"latents": np.random.randn(2, 3).astype(np.float32), "path": np.array(["é", "b"])}
    save_npz(path, **arrays, seed=jnp.int32(7))
    loaded = load_npz(path, required=("latents", "seed"))
    assert list(loaded) == ["latents", "path", "seed"] and loaded["seed"] == 7
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("array", [jnp.zeros(2, jnp.bfloat16), np.array([{}], object)])
def test_dtypes_that_npz_cannot_hold(tmp_path, array):
    with pytest.raises(InputError, match=r"'x' is .*cast it"):
        save_npz(tmp_path / "a.npz", x=array)
    assert not list(tmp_path.iterdir())


def test_missing_array_names_the_found(tmp_path):
    save_npz(tmp_path / "a.npz", noise=np.zeros(2), mask=np.zeros(2))
    with pytest.raises(InputError, match="'latents' is missing; found: noise, mask"):
        load_npz(tmp_path / "a.npz", required=("noise", "latents"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_are_named(tmp_path, value):
    save_npz(tmp_path / "a.npz", good=np.arange(3), bad=np.array([0, value, 1, value]))
    with pytest.raises(InputError, match="2 of 4 values of 'bad' are not finite"):
        load_npz(tmp_path / "a.npz")


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(InputError, match="'x' cannot be read: pickled objects are refused"):
        load_npz(tmp_path / "a.npz")


def test_what_is_not_npz(tmp_path):
    save_npz(tmp_path / "good.npz", x=np.random.randn(100))
    good = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "one.npz", np.zeros(3), allow_pickle=False)
    (tmp_path / "one.npz.npy").rename(tmp_path / "one.npz")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    damaged = bytearray(good)
    damaged[400] ^= 255
    for name, data, message in [
        ("empty.npz", b"", "it is empty"),
        ("text.npz", b"hello there", "11 bytes, the first are b'hello th'"),
        ("cut.npz", good[:300], "300 bytes"),
        ("damaged.npz", damaged, "'x' cannot be read"),
        ("one.npz", None, "one unnamed array"),
        ("zip.npz", None, "not an array"),
    ]:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message) as raised:
            load_npz(tmp_path / name)
        assert name in str(raised.value)
    with pytest.raises(InputError, match="no such file"):
        load_npz(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="folder"):
        load_npz(tmp_path)


def with_head(file, head, content=bytes(24)):
    """A .npz whose array `x` has this text as its head."""
    head = head + b" " * (63 - (10 + len(head)) % 64) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "x.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + content
        )
    return file


HEAD = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }"


@pytest.mark.parametrize(
    "head",
    [
        b"", b"\0", b"{\x01}", b"'", b"{'descr", b"(" * 1000, b"{}", b"[1]", b"9" * 9000, b"\xff",
        HEAD.replace(b"<f8", b"?!"), HEAD.replace(b"(3,)", b"(-3,)"), HEAD.replace(b"(3,)", b"'3'"),
        HEAD.replace(b"(3,)", b"(3000000000000000,)"), HEAD.replace(b"(3,)", b"(9, 9)"),
        HEAD.replace(b"'<f8'", b"[('a', '<f8', 3)] * 9"), HEAD.replace(b"False", b"None"),
    ],
)  # fmt: skip
def test_heads_that_are_not_of_numpy(tmp_path, head):
    assert load_npz(with_head(tmp_path / "good.npz", HEAD))["x"].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"a\.npz: array 'x' cannot be read"):
        load_npz(with_head(tmp_path / "a.npz", head))


def test_small_files_do_not_eat_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_lib, "_FREE", 1 << 16)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, zeros=np.zeros(1 << 20), x=np.arange(3))
    with pytest.raises(InputError, match=r"unpacks to 8388\d+ bytes, the limit for a file of its"):
        load_npz(path)
    assert list(load_npz(path, ("x",), ("y",))) == ["x"]  # what is not needed is not read
    np.savez(path, zeros=np.zeros(1 << 20))
    assert load_npz(path)["zeros"].size == 1 << 20


def test_arrays_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with archive.open("x.npy", "w") as file:
                np.save(file, np.zeros(2))
    with pytest.raises(InputError, match="arrays of one name"):
        load_npz(tmp_path / "a.npz")


def edited(path, edit, **arrays):
    """A file of arrays, whose bytes `edit(bytes, start of the directory)` changes."""
    np.savez(path, **arrays)
    data = bytearray(path.read_bytes())
    edit(data, zipfile.ZipFile(path).start_dir)
    path.write_bytes(data)
    return path


def header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def member(path, data, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("x.npy", data)
    return path


def test_members_that_cannot_be_unpacked_are_refused(tmp_path):
    encrypted = edited(
        tmp_path / "e.npz", lambda x, c: x.__setitem__(c + 8, x[c + 8] | 1), x=np.zeros(4)
    )
    with pytest.raises(InputError, match=r"e.npz: array 'x' cannot be read: it is encrypted"):
        load_npz(encrypted)
    for method in (99, 14, 12):
        unknown = edited(
            tmp_path / "m.npz", lambda x, c, m=method: x.__setitem__(c + 10, m), x=np.zeros(4)
        )
        with pytest.raises(InputError, match=f"m.npz: array 'x' .*compression method {method}"):
            load_npz(unknown)


@pytest.mark.parametrize(
    "shape, size", [((10**13,), 16), ((2**40, 2**40), 16), ((4,), 12), ((3,), 16), ((), 0)], ids=str
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_arrays_that_declare_another_size_take_no_memory(tmp_path, shape, size, compression):
    path = member(tmp_path / "a.npz", header(shape) + bytes(size), compression=compression)
    with pytest.raises(InputError, match=f"a.npz: array 'x' .* declares .* and has {size}"):
        load_npz(path)


def test_small_files_that_unpack_to_much(tmp_path, monkeypatch):
    many = {name: np.zeros(3000, np.float32) for name in "abc"}
    np.savez_compressed(tmp_path / "small.npz", **many)
    np.savez(tmp_path / "plain.npz", **many)
    assert (tmp_path / "small.npz").stat().st_size < 2000
    assert len(load_npz(tmp_path / "small.npz")) == 3
    monkeypatch.setattr(arrays_lib, "MAX_UNPACKED", 30000)
    with pytest.raises(InputError, match=r"36384 bytes, .* compressed arrays is 30000; save"):
        load_npz(tmp_path / "small.npz")
    assert len(load_npz(tmp_path / "small.npz", (), ("a", "c"))) == 2
    assert len(load_npz(tmp_path / "plain.npz")) == 3


def test_only_what_is_needed_is_read(tmp_path):
    np.savez(
        tmp_path / "a.npz", noise=np.zeros(2), other=np.array([{}], object), bad=np.array(np.nan)
    )
    assert list(load_npz(tmp_path / "a.npz", ("noise",), ("init",))) == ["noise"]
    with pytest.raises(InputError, match="'init' is missing; found: noise, other, bad"):
        load_npz(tmp_path / "a.npz", ("init",), ())


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file(tmp_path, stop):
    path = tmp_path / "a.txt"
    with atomic_path(path) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".txt" and not path.exists()
        partial.write_text("old")
    with pytest.raises(stop), atomic_path(path) as partial:
        partial.write_text("ne")
        raise stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_names_the_file_when_the_disk_is_full(tmp_path):
    with (
        pytest.raises(OSError) as raised,
        atomic_path(tmp_path / "a.txt"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_atomic_path_refuses_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in [(tmp_path, "folder"), (tmp_path / "file" / "a.npz", "cannot be written")]:
        with pytest.raises(InputError, match=message), atomic_path(path):
            pytest.fail("the block was entered")
