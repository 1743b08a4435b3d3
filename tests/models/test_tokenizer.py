"""Text cleaning, and ids with EOS, truncation and padding."""

import json
import logging
import pathlib
import shutil

import numpy as np
import pytest

from longlive_jax.captions import clean
from longlive_jax.errors import InputError
from longlive_jax.models import tokenizer as lib

TEXTS = [
    "A red fox runs through the snow at dawn.",
    "The scene transitions. A lighthouse stands in the rain, waves breaking below.",
    "Close-up of a potter's hands shaping clay.",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    lib.train_tiny(TEXTS, 128, path)
    return path


def test_ids_end_with_eos_and_padding(path):
    tokenizer = lib.Tokenizer.from_file(path)
    ids, mask = tokenizer(TEXTS, 64)
    assert ids.shape == mask.shape == (3, 64) and ids.dtype == mask.dtype == np.int32
    for row, valid in zip(ids, mask):
        n = valid.sum()
        assert valid.tolist() == [1] * n + [0] * (64 - n)
        assert row[n - 1] == 1 and (row == 1).sum() == 1
        assert not row[n:].any() and (row[: n - 1] > 2).all()
    assert ids.max() < tokenizer.vocab_size <= 128
    # Cleaning happens here, and equal texts have equal ids wherever they stand.
    again, _ = tokenizer([TEXTS[1], "  " + TEXTS[0].replace(" ", "&nbsp; "), TEXTS[1]], 64)
    np.testing.assert_array_equal(again, ids[[1, 0, 1]])


def test_eos_is_not_doubled(path, tmp_path):
    """Some files add EOS by themselves, some do not, some pad and truncate: the same ids."""
    want = lib.Tokenizer.from_file(path)(TEXTS, 64)
    bare = json.loads(path.read_text())
    assert bare["post_processor"]["type"] == "TemplateProcessing"
    bare["post_processor"] = None
    bare["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    bare["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    for where in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        got = lib.Tokenizer.from_file(where)(TEXTS, 64)
        np.testing.assert_array_equal(got, want)


def test_truncation_keeps_eos_and_warns(path, caplog):
    tokenizer = lib.Tokenizer.from_file(path)
    text = "unending " + "fox " * 40
    full, full_mask = tokenizer([text], 400)
    n = int(full_mask.sum())
    with caplog.at_level(logging.WARNING, logger="absl"):
        ids, mask = tokenizer([text, TEXTS[1], text, "a fox"], 16)
        assert len(caplog.records) == 2  # once for the long prompt, once for the other
        tokenizer([text], n)
        assert len(caplog.records) == 2  # one that just fits is no reason for it
    np.testing.assert_array_equal(ids[0], [*full[0, :15], 1])
    assert mask[0].all()
    message = caplog.records[0].getMessage()
    assert f"has {n} tokens" in message and "limit is 16" in message
    assert clean(text)[:60] in message and clean(text)[:61] not in message


def test_empty_prompts(path):
    tokenizer = lib.Tokenizer.from_file(path)
    with pytest.raises(InputError, match="prompt 3 is empty"):
        tokenizer(["a", "b", " &nbsp;\n", "c"], 8)
    ids, mask = tokenizer([""], 8, allow_empty=True)
    assert ids.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]] and mask.sum() == 1
    with pytest.raises(InputError, match=r"prompt 2 is .* not text"):
        tokenizer(["a", ["b"]], 8)
    with pytest.raises(InputError, match="text_len=0"):
        tokenizer(["a"], 0)
    with pytest.raises(TypeError):
        tokenizer("a cat", 8)
    ids, mask = tokenizer([], 8)
    assert ids.shape == mask.shape == (0, 8)


def test_bad_files(path, tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        lib.Tokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"spiece\.model is not a file"):
        lib.Tokenizer.from_file(tmp_path)
    bad = tmp_path / "bad.json"
    for content in (b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe\x00", path.read_bytes()[:900]):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            lib.Tokenizer.from_file(bad)
    foreign = json.loads(path.read_text())
    foreign["added_tokens"] = []
    vocab = foreign["model"]["vocab"]
    vocab["<s>"] = vocab.pop("<pad>")
    foreign["post_processor"] = None
    bad.write_text(json.dumps(foreign))
    with pytest.raises(InputError, match="another model"):
        lib.Tokenizer.from_file(bad)


# Two models of 400 and 700 pieces that SentencePiece trained on English with -> A, a, ... and the
# like as rules of normalisation; the ids are those that SentencePiece 0.2.3 gives these texts. The
# second falls back to bytes.
FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SENTENCEPIECE = {
    "spiece.model": [
        [107, 4, 50, 17, 4, 57, 20, 59, 158, 5, 321, 9, 4, 5, 46, 20, 80, 6],
        [107, 18, 21, 4, 6, 6, 6],
        [10, 4, 2, 83],
        [4, 99, 11, 4, 3, 33, 11, 50],
    ],
    "bytes.spiece.model": [
        [339, 456, 282, 438, 293, 301, 385, 261, 655, 265, 329, 310, 293, 353, 264],
        [339, 305, 271, 665],
        [266, 260, 244, 163, 156, 132, 244, 163, 156, 132, 330],
        [672, 260, 3, 336, 568],
    ],
}
SPIECE_TEXTS = ["A red fox runs through the snow.", "\uff21\u3042 and \u2026", "a 😀😀 b",
                "see <extra_id_0>here"]  # fmt: skip


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_spiece_model_gives_the_ids_of_sentencepiece(name, tmp_path, monkeypatch):
    # Cleaning would take the rules' work.
    monkeypatch.setattr(lib, "clean", str.strip)
    shutil.copyfile(FIXTURES / name, tmp_path / "spiece.model")
    read = lib.Tokenizer.from_file(tmp_path)
    ids, mask = read(SPIECE_TEXTS, 32)
    found = [row[: n - 1].tolist() for row, n in zip(ids, mask.sum(axis=1))]
    assert found == SENTENCEPIECE[name]
    assert [row[n - 1] for row, n in zip(ids, mask.sum(axis=1))] == [1] * 4
    # What a checkpoint keeps of it is a tokenizer.json, which counts first.
    (tmp_path / "tokenizer.json").write_bytes(lib.as_json(tmp_path / "spiece.model"))
    (tmp_path / "spiece.model").write_bytes(b"")
    again = lib.Tokenizer.from_file(tmp_path)
    assert again.vocab_size == read.vocab_size
    np.testing.assert_array_equal(again(SPIECE_TEXTS, 32)[0], ids)
    assert lib.as_json(tmp_path / "tokenizer.json") == (tmp_path / "tokenizer.json").read_bytes()


def test_bad_spiece_models(tmp_path):
    content, file = (FIXTURES / "spiece.model").read_bytes(), tmp_path / "spiece.model"
    bpe = content + b"\x12\x02\x18\x02"  # a trainer whose model_type is 2
    for damaged in (content[:900], content[:40], b"\n\x80", b"\n" + b"\xff" * 9, b"\n\x00", bpe):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot be read as a .* or as a spiece.model"):
            lib.Tokenizer.from_file(file)
    file.write_bytes(content[content.index(b"\n", 7) :])  # without its first piece
    with pytest.raises(InputError, match="another model"):
        lib.Tokenizer.from_file(file)


@pytest.mark.parametrize("score", [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"])
def test_scores_that_are_not_finite(tmp_path, score):
    content = (FIXTURES / "spiece.model").read_bytes()
    size, at = content[1], content.index(b"\x15")  # the tag of the first piece's score
    assert at < size
    (tmp_path / "spiece.model").write_bytes(content[: at + 1] + score + content[at + 5 :])
    with pytest.raises(InputError, match=r"cannot be read as a .* or as a spiece.model"):
        lib.Tokenizer.from_file(tmp_path)


def test_train_tiny(tmp_path):
    for size in (4, 20, 500):
        a, b = (lib.train_tiny(TEXTS, size, tmp_path / f"{name}.json") for name in "ab")
        assert a.vocab_size <= size
        ids, _ = a([*TEXTS, "жук"], 100)
        assert ids.max() < size
        np.testing.assert_array_equal(ids, b([*TEXTS, "жук"], 100)[0])
        assert 2 in ids[3] and ids[3, -1] == 0  # unknown letters have an id too
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(InputError, match="vocab_size=3"):
        lib.train_tiny(TEXTS, 3, tmp_path / "c.json")


def _changed(path, tmp_path, change):
    content = json.loads(path.read_text())
    change(content)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    "change",
    [
        # The library panics over it, which is no Exception.
        lambda x: x.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        lambda x: x["model"].update(unk_token="<nope>"),
        lambda x: x["model"].update(vocab={}),
        lambda x: x["model"].update(merges=[["a", "no such piece"]]),
        lambda x: x.update(model=None),
        lambda x: x.update(pre_tokenizer={"type": "?"}),
    ],
)
def test_files_that_the_library_fails_over(path, tmp_path, change):
    with pytest.raises(InputError, match=r"changed\.json") as error:
        lib.Tokenizer.from_file(_changed(path, tmp_path, change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a/" * 3000])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(InputError, match="is not a file"):
        lib.Tokenizer.from_file(f"{tmp_path}/{name}")


def test_files_past_a_limit(path, monkeypatch):
    monkeypatch.setattr(lib, "_MAX_BYTES", 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        lib.Tokenizer.from_file(path)


@pytest.mark.parametrize(
    "content", [b"\n" + b"\x80" * 100_000, b"\n\xff" + b"\xff" * 20, b"\n\x00"]
)
def test_numbers_without_end(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        lib.Tokenizer.from_file(tmp_path)
