"""safetensors as the format asks: every byte in one tensor, and what is none is named."""

import json
import struct

import numpy as np
import pytest

from longlive_jax.checkpoints import four_over_six, from_torch, safetensors, sources
from longlive_jax.errors import InputError
from longlive_jax.files import regular, versioned
from longlive_jax.files import schema as schema_lib
from tests.checkpoints import tiny

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def _entry(begin, end, dtype="F32", shape=None):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _write(file, header, data=24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _entry(0, 24), "b": _entry(0, 24)}, "b overlaps a"),
        ({"a": _entry(0, 16), "b": _entry(12, 24)}, "b overlaps a"),
        ({"a": _entry(0, 24), "b": _entry(8, 12)}, "b overlaps a"),
        ({"a": _entry(0, 8), "b": _entry(12, 24)}, "b leaves a hole after a"),
        ({"a": _entry(4, 24)}, "a leaves a hole after its header"),
        ({"a": _entry(0, 20)}, "ends at byte .*, its tensors at byte"),
        ({"a": _entry(0, 28)}, "ends at byte .*, its tensors at byte"),
        ({}, "ends at byte"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(_entry(0, 24)).encode(),) * 2), "'a' is in it twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "'dtype' is in it twice"),
        (b"[" * 200_000, "no JSON object"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b' {"a": 1}', "no JSON object"),
        ({"a": _entry(0, 24, shape=[True, 6])}, "a.shape.0. is True, not a whole number"),
        ({"a": _entry(0, 24, shape=[6.0])}, "a.shape.0. is 6.0, not a whole number"),
        ({"a": _entry(0, 24, shape=[1] * 70 + [6])}, "a has shape"),
        ({"a": _entry(0, 24, shape=[2**62, 2**62])}, "24 bytes for a"),
        ({"a": _entry(0, 24, shape="6")}, "a.shape is '6', not a list"),
        ({"a": _entry(0, 24) | {"data_offsets": [0]}}, "a has shape"),
        ({"a": _entry(0, 24) | {"data_offsets": [0, 10**400]}}, "not a whole"),
        ({"a": _entry(0, 24), "__metadata__": [1]}, "__metadata__ is a list"),
        ({"a": _entry(0, 24), "__metadata__": "x"}, "__metadata__ is 'x'"),
        ({"a": []}, "a is a list"),
        ({"a": _entry(0, 24, "F8_E8M0")}, "a has dtype F8_E8M0, which is not read"),
        ({"a": _entry(0, 24, "F4")}, "a has dtype F4, which is not read"),
        ({"a": _entry(0, 24, "F6_E2M3")}, "F6_E2M3"),
        ({"a": _entry(0, 24, "C64")}, "a has dtype C64, which is not read"),
        ({"a": _entry(0, 24, "Q" * 1000)}, "a has dtype Q{20}, which"),
    ],
)
def test_headers(tmp_path, header, message):
    file = tmp_path / "f.safetensors"
    _write(file, header)
    with pytest.raises(InputError, match=message) as error:
        safetensors.read(file)
    assert str(error.value).startswith(str(file)) and len(str(error.value)) < 700


def test_bytes_after_the_tensors(tmp_path):
    file = tmp_path / "f.safetensors"
    _write(file, {"a": _entry(0, 24)}, 25)
    with pytest.raises(InputError, match="ends at byte"):
        safetensors.read(file)


def test_what_the_format_allows(tmp_path):
    """Any order, empty tensors anywhere, spaces after the header, fields of any kind."""
    file = tmp_path / "f.safetensors"
    header = {
        "__metadata__": {"text": "x", "number": 1},
        "late": _entry(8, 24),
        "empty": _entry(8, 8, shape=[0, 5]),
        "early": _entry(0, 8),
        "scalarless": _entry(0, 0, shape=[0]),
    }
    _write(file, json.dumps(header).encode() + b"   ")
    tensors, metadata = safetensors.read(file)
    assert {k: t.read().shape for k, t in tensors.items()} == {
        "late": (4,), "empty": (0, 5), "early": (2,), "scalarless": (0,)}  # fmt: skip
    assert metadata == {"text": "x", "number": 1}


PAGES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n": "Git LFS pointer",
    b"<!DOCTYPE html>\n<html>": "web page",
    b"\n\n  <!doctype HTML><body>": "web page",
    b"\xef\xbb\xbf<html lang=en>": "web page",
    b"<?xml version='1.0'?><Error/>": "XML page",
    b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00": "GGUF",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00": "gzip",
    b"Entry not found": "server's error message",
    b"Access denied. Log in.": "server's error message",
    b"": "is empty",
}


@pytest.mark.parametrize("name", ["f.safetensors", "f.pt"])
@pytest.mark.parametrize(("content", "message"), PAGES.items(), ids=PAGES.values())
def test_files_that_are_no_weights_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=rf"{name}: is an? .*{message}|{name}: {message}|{message}"
    ):
        sources.read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x" * 300 + "/y", "a/" * 3000])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(InputError, match="there is no such file or folder"):
        sources.locate(f"{tmp_path}/{name}", "dit")
    with pytest.raises(InputError):
        sources.read(f"{tmp_path}/{name}")
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="are not there"):
        sources.read(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[" * 200_000, "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": null}}', '{"weight_map": {"a": "b", "a": "c"}}', "\xff"],
)  # fmt: skip
def test_indices_of_the_wrong_kind(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"index\.json: .*copy or download it again"):
        sources.read(str(tmp_path))


def test_what_systems_leave_is_not_read(tmp_path):
    tiny.write_safetensors(tmp_path / "model.safetensors", {"w": W})
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"\0\5\x16\7")
    assert list(sources.read(sources.locate(str(tmp_path), "dit"))) == ["w"]


# A tokenizer beside the text encoder's weights.


def _umt5(tmp_path, **more):
    tensors = tiny.weights("umt5") | more
    file = tiny.write_safetensors(tmp_path / "umt5.safetensors", tensors)
    return from_torch.open_part("umt5", file, tiny.config())


@pytest.mark.parametrize("name", ["spiece_model", "tokenizer_json"])
def test_a_tokenizer_beside_the_weights(tmp_path, name):
    source = _umt5(tmp_path, **{name: np.frombuffer(b"a model", np.uint8)})
    assert source.tensors.keys() == tiny.weights("umt5").keys()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("spiece_model", np.zeros(7, np.float32)),
        ("spiece_model", np.zeros((7, 1), np.uint8)),
        ("another_model", np.zeros(7, np.uint8)),
        ("scaled_fp8", np.zeros(2, np.uint8)),
    ],
)
def test_other_companions_are_refused(tmp_path, name, tensor):
    with pytest.raises(InputError, match=f"1 not expected .{name}"):
        _umt5(tmp_path, **{name: tensor})


# Quantised files.


@pytest.mark.parametrize("part", ["scale_factors", "amax"])
def test_negative_scales(part):
    class Held:
        def __init__(self, array):
            self.shape, self.dtype, self._array = array.shape, array.dtype, array

        def read(self, start=0, stop=None):
            return self._array

    def packed(changed):
        tensors = {
            name: np.ones(shape, dtype)
            for name, (shape, dtype) in four_over_six._entries((128, 64)).items()
        }
        tensors["metadata"] = np.array([128, 64, 128, 64], np.int32)
        tensors[part].reshape(-1)[0] = changed
        key = "blocks.0.ffn.0.quantized_weight_"
        group = {f"{key}{name}": Held(t) for name, t in tensors.items()}
        return four_over_six.collect(group, "f")["blocks.0.ffn.0.weight"]

    for good in (0.5, 0.0, -0.0):
        packed(good).read()
    with pytest.raises(InputError, match=f"{part}: 1 of .* values are negative"):
        packed(-1.0).read()


def test_metadata_of_another_shape_is_not_read():
    class Huge:
        shape, dtype = (10**9,), np.dtype(np.int32)

    tensors = {
        f"m.quantized_weight_{name}": type("T", (), {"shape": (1,), "dtype": np.dtype(dtype)})
        for name, dtype in four_over_six._DTYPES.items()
    }
    tensors["m.quantized_weight_metadata"] = Huge
    with pytest.raises(InputError, match=r"has shape \(1000000000,\)"):
        four_over_six.collect(tensors, "f")


# The schema.


def test_schema():
    schema = {"a": [int], "b?": (str, None), "c?": {str: float}, "d?": bool}
    good = [{"a": []}, {"a": [1], "b": None, "x": 1}, {"a": [], "c": {"k": 1, "l": 0.5}, "d": True}]
    assert not any(schema_lib.mismatch(value, schema) for value in good)
    wrong = {
        "the content is a list, not an object": [],
        "the content has no 'a'": {},
        "a is an object, not a list": {"a": {}},
        "a[1] is '2', not a whole number below 2^63": {"a": [1, "2"]},
        "a[0] is True, not a whole number below 2^63": {"a": [True]},
        "a[0] is a huge number, not a whole number below 2^63": {"a": [2**63]},
        "b is 1, not a text": {"a": [], "b": 1},
        "c.k is True, not a number": {"a": [], "c": {"k": True}},
        "d is 1, not true or false": {"a": [], "d": 1},
    }
    for message, value in wrong.items():
        assert schema_lib.mismatch(value, schema) == message


def test_json_past_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(regular, "MAX_BYTES", 10)
    (tmp_path / "a.json").write_text("[" + " " * 10 + "]")
    with pytest.raises(InputError, match="more than 10 bytes"):
        versioned.read_json(tmp_path / "a.json")
