"""Pickles that attack: nothing large is made, hashed or printed, and nothing hangs."""

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.checkpoints import from_torch, names, pickle_machine, pickle_reader
from longlive_jax.errors import InputError
from tests.checkpoints import tiny, torch_file

PROTO = b"\x80\x02"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def run(program):
    def refuse(*args):
        raise AssertionError(args)

    return pickle_machine.run(program, refuse, refuse)


_leaf = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
_leaf |= st.text() | st.binary()
_key = st.text() | st.integers(-(2**62), 2**62) | st.booleans()
_value = st.recursive(
    _leaf,
    lambda inner: st.lists(inner) | st.dictionaries(_key, inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(_value, st.sampled_from([3, 4, 5]))
@settings(deadline=None, max_examples=150)
def test_plain_values_are_those_of_pythons_machine(value, protocol):
    program = pickle.dumps(value, protocol)
    got, size = run(program + b"more")
    assert (got, size) == (value, len(program))
    assert repr(got) == repr(value)  # types too


def test_sets_and_shared_values():
    shared = [1]
    value = {"a": {1, "x"}, "b": frozenset([2, b"y"]), "c": [shared, shared], "d": bytearray(b"z")}
    got = run(pickle.dumps(value, 5))[0]
    assert got == value and got["c"][0] is got["c"][1]


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_bytes_raise_or_give_a_value(program):
    try:
        pickle_machine.run(program, lambda module, name: None, lambda pid: pid)
    except Exception as error:
        assert not isinstance(error, MemoryError | RecursionError)


TUPLES = text("a") + b"2\x86" * 40  # 2^40 leaves in a few bytes
CYCLE = b"]q\x00h\x00a"
ATTACKS = {
    "a key that takes years to hash": b"}" + TUPLES + b"K\x01s.",
    "such keys in one step": b"}(" + TUPLES + b"K\x01u.",
    "a member of a set": b"\x8f(" + TUPLES + b"\x90.",
    "a frozen set": b"(" + TUPLES + b"\x91.",
    "a set by a call": b"cbuiltins\nset\n]" + TUPLES + b"a\x85R.",
    "a frozen set by a call": b"c__builtin__\nfrozenset\n]" + TUPLES + b"a\x85R.",
    "a set of a dict": b"cbuiltins\nset\n" + b"]" + TUPLES + b"a\x85R.",
    "keys of pairs": b"ccollections\nOrderedDict\n]" + TUPLES + b"K\x01\x86a\x85R.",
    "a device that takes years to print": b"ctorch\ndevice\n" + TUPLES + b"\x85R.",
    "a size": b"ctorch\nSize\n" + b"]" + TUPLES + b"a\x85R.",
    "a storage's key": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + TUPLES + b"NK\x01tQ.",
    "a name": TUPLES + text("x") + b"\x93.",
    "an encoding": b"c_codecs\nencode\n" + text("a") + TUPLES + b"\x86R.",
    "a shape": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + TUPLES + b"h\x00tR.",
    "a list that holds itself": CYCLE + b".",
    "a dict that holds itself": b"}q\x00" + text("a") + b"h\x00s.",
    "two that hold each other": b"}q\x00" + text("a") + b"}q\x01" + text("b") + b"h\x00ss.",
    "nested too deep": b"]" * 101 + b"a" * 100 + b".",
    "nested past any stack": b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples nested too deep": b")" + b"\x85" * 1000 + b".",
    "too many steps": b"]" + b"N0" * 600_000 + b".",
    "too large a number": b"\x8b" + struct.pack("<i", 1000) + b"\x01" * 1000 + b".",
    "numbers of one hash": b"}" + b"\x8a\x09" + (2**61 - 1 << 8).to_bytes(9, "little") + b"Ns.",
    "nothing remembered": b"r\xff\xff\xff\xff.",
    "a mark remembered": b"(q\x00h\x00.",
    "a mark left": b"(.",
    "a list changed by a call": b"]}b.",
    "an extension": b"\x82\x01.",
    "an object": b"(i" + b"os\nsystem\n.",
    "a class": b"ctorch\nTensor\n)\x81.",
    "no end": b"]",
    "nothing": b".",
    "a key alone": b"}(" + text("a") + b"u.",
    "a text that ends too early": b"X\xff\xff\xff\x7fabc.",
}


def _file(tmp_path, program):
    file = tmp_path / "x.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", PROTO + program)
        archive.writestr("a/data/0", bytes(96))
    return file


@pytest.mark.parametrize("program", ATTACKS.values(), ids=ATTACKS)
def test_attacks(tmp_path, program):
    file = _file(tmp_path, program)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"x\.pt: its data\.pkl is damaged|wants to run") as error:
        pickle_reader.read(file)
    assert time.monotonic() - start < 30
    assert len(str(error.value)) < 1000


def test_a_far_place_of_the_memo_costs_nothing(tmp_path):
    got = pickle_reader.read(_file(tmp_path, b"}r\xff\xff\xff\xff."))
    assert got == {}


def test_a_set_that_is_made_again_and_again(tmp_path):
    """Each call counts what it is given."""
    many = b"](" + b"K\x01" * 5000 + b"e\x85q\x000"
    program = b"](cbuiltins\nset\nq\x010" + many + b"h\x01h\x00R0" * 1000 + b"e."
    with pytest.raises(InputError, match="steps"):
        pickle_reader.read(_file(tmp_path, program))


def test_a_large_program(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="has 1013 bytes, at most 1000"):
        pickle_reader.read(_file(tmp_path, b"X" + struct.pack("<I", 1005) + b"a" * 1005 + b"."))


def test_dicts_around_weights_end():
    loop = {}
    loop["model"] = loop
    with pytest.raises(InputError, match="more than 16 dicts"):
        names.state_dict(loop, "umt5", False, "x.pt")
    cycle = {"model": {"state_dict": None}}
    cycle["model"]["state_dict"] = cycle
    with pytest.raises(InputError, match="more than 16 dicts"):
        names.state_dict(cycle, "dit", False, "x.pt")


# Tensors.


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((10**9,), (0,)),
        ((10**8, 64), (0, 0)),
        ((1 << 20, 1 << 20), (0, 1)),
        ((1 << 40,), (0,)),
        ((5000, 5000), (1, 0)),
        ((1,) * 17, (1,) * 17),
        ((1,) * 100, (0,) * 100),
        ((2**63,), (0,)),
        ((2**200,), (0,)),
        ((0, 2**63), (1, 1)),
    ],
)
def test_tensors_larger_than_their_storage(tmp_path, shape, strides):
    torch_file.save(tmp_path / "f.pt", {"w": torch_file.Strided(BASE.reshape(-1), shape, strides)})
    with pytest.raises(InputError, match="damaged") as error:
        pickle_reader.read(tmp_path / "f.pt")
    assert len(str(error.value)) < 600


def test_small_expanded_tensors_are_read(tmp_path):
    view = torch_file.Strided(BASE[0], (1000, 6), (0, 1))
    torch_file.save(tmp_path / "f.pt", {"w": view})
    got = pickle_reader.read(tmp_path / "f.pt")["w"].read()
    np.testing.assert_array_equal(got, np.broadcast_to(BASE[0], (1000, 6)))


# The archive.


def test_members_have_their_crc(tmp_path):
    """Read whole, by rows or as a view, before and after the storage was read."""
    storage = np.arange(4000, dtype=np.float32)
    value = {"w": storage.reshape(40, 100), "view": torch_file.Strided(storage, (3, 4), (8, 2), 5)}
    torch_file.save(tmp_path / "f.pt", value)
    content = bytearray((tmp_path / "f.pt").read_bytes())
    for needle in (storage[3990:].tobytes(), b"little", b"step"):
        damaged = bytearray(content)
        at = bytes(content).find(needle)
        while at >= 0:
            damaged[at + 1] ^= 0x40
            at = bytes(content).find(needle, at + 1)
        (tmp_path / "bad.pt").write_bytes(damaged)
        for read in (
            lambda t: [x.read() for x in t.values()],
            lambda t: [x.read(1, 2) for x in t.values()],
            lambda t: t["view"].read(),
        ):
            if damaged == content:
                continue
            with pytest.raises(InputError, match=r"bad\.pt: archive/.* has CRC"):
                read(pickle_reader.read(tmp_path / "bad.pt"))
    found = pickle_reader.read(tmp_path / "f.pt")
    np.testing.assert_array_equal(found["view"].read(1, 2), [[13, 15, 17, 19]])
    np.testing.assert_array_equal(found["w"].read(), value["w"])


def _patched(file, at, value):
    """Changes a field of each entry of the archive's directory."""
    content = bytearray(file.read_bytes())
    place = zipfile.ZipFile(io.BytesIO(bytes(content))).start_dir
    while content[place : place + 4] == b"PK\x01\x02":
        content[place + at : place + at + len(value)] = value
        sizes = struct.unpack("<HHH", content[place + 28 : place + 34])
        place += 46 + sum(sizes)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (8, b"\x01\x00"),  # encrypted
        (8, b"\x41\x00"),  # strongly
        (8, b"\x00\x20"),  # the directory itself
        (8, b"\x20\x00"),  # patches
        (8, b"\x00\x08"),  # UTF-8, checked below with a name that is not
        (6, b"\xff\x00"),  # a version to come
        (10, b"\x63\x00"),  # a method that nobody knows
        (10, b"\x08\x00"),
        (16, b"\x00\x00\x00\x01"),  # the CRC
        (20, b"\x01\x00\x00\x00"),  # the size
        (24, b"\xff\xff\xff\x7f"),
        (24, b"\xff\xff\xff\xff"),
        (42, b"\xff\xff\xff\x7f"),  # where the member is
        (42, b"\xff\xff\xff\xff"),
        (46, b"\x00"),
    ],
)
def test_directories_of_the_archive(tmp_path, at, value):
    file = tmp_path / "f.pt"
    torch_file.save(file, {"w": BASE})
    _patched(file, at, value)
    if value == b"\x00\x08":
        _patched(file, 46, b"\xff")
    if value in (b"\x20\x00", b"\xff\x00"):  # told of by the library, or of no consequence
        try:
            pickle_reader.read(file)["w"].read()
        except InputError as error:
            assert "f.pt" in str(error)
        return
    with pytest.raises(InputError, match=r"f\.pt"):
        pickle_reader.read(file)["w"].read()


def test_members_of_one_name(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "f.pt", "w") as archive:
        archive.writestr("a/data.pkl", PROTO + b"}.")
        archive.writestr("a/data/0", b"1")
        archive.writestr("a/data/0", b"2")
    with pytest.raises(InputError, match="members of one name"):
        pickle_reader.read(tmp_path / "f.pt")


def test_a_whole_network(tmp_path):
    """The machine gives what the writer had, for all of a network's tensors."""
    value = OrderedDict(model=OrderedDict(tiny.weights("umt5")), step=3)
    torch_file.save(tmp_path / "f.pt", value)
    source = from_torch.open_part("umt5", str(tmp_path / "f.pt"), tiny.config())
    for key, array in tiny.weights("umt5").items():
        np.testing.assert_array_equal(source.tensors[key].read(), array)
