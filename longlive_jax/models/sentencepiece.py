"""SentencePiece's own file, spiece.model, as a tokenizer of the tokenizers library.

The file is a protocol buffer. Of its pieces, its trainer and its normaliser we read only the
fields that decide a text's ids.
"""

import struct
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

_UNIGRAM = 1  # of the trainer's model_type
_CONTROL, _USER_DEFINED = 3, 4  # of a piece's type


def read(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer that a spiece.model describes.

    As in the tokenizer.json files of such models, a control symbol (</s>) in a text is read as
    that symbol.

    Raises:
      ValueError: an incomplete spiece.model, or one of another model than unigram.
    """
    vocabulary: list[tuple[str, float]] = []
    added: list[tokenizers.AddedToken] = []
    trainer: dict = {}
    normaliser: dict = {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            text, kind = piece[1].decode(), piece.get(3, 1)
            vocabulary.append((text, struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0))
            if kind in (_CONTROL, _USER_DEFINED):
                added.append(
                    tokenizers.AddedToken(text, normalized=False, special=kind == _CONTROL)
                )
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normaliser = dict(_fields(value))
    if not trainer or trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{len(vocabulary)} pieces, and no unigram model's trainer")
    steps: list[Any] = [normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if normaliser.get(2):
        steps.insert(0, normalizers.Precompiled(normaliser[2]))
    # Fields 40 and 35 of the trainer: the unknown piece, and whether bytes stand for it.
    model = models.Unigram(vocabulary, trainer.get(40, 0), bool(trainer.get(35, 0)))
    result = tokenizers.Tokenizer(model)
    result.normalizer = normalizers.Sequence(steps)
    result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    result.decoder = decoders.Metaspace(prepend_scheme="first")
    result.add_tokens(added)
    return result


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: an int, or bytes as they lie there."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError(f"a number of more than 64 bits at byte {at}")

    try:
        while at < len(message):
            tag = varint()
            if tag & 7 == 0:
                yield tag >> 3, varint()
                continue
            size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
            if at + size > len(message):
                raise ValueError(f"it ends inside a field at byte {at}")
            yield tag >> 3, message[at : at + size]
            at += size
    except (IndexError, KeyError) as error:
        raise ValueError(f"it is no protocol buffer at byte {at}") from error
