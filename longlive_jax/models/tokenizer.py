"""Prompts to token ids, as the UMT5 text encoder was trained: cleaning, EOS, padding."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from absl import logging

from longlive_jax.captions import clean
from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import remote
from longlive_jax.files.remote import RemotePath
from longlive_jax.models import sentencepiece

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
MAX_TOKENS = 512  # of UMT5 as Wan2.2 uses it, EOS included
_MAX_BYTES = 256 << 20  # of a tokenizer's file; UMT5's has 17 MB
_RARE = "\ue000\U0010fffd"  # of private use
NAME, FILE, SENTENCEPIECE = "tokenizer", "tokenizer.json", "spiece.model"


class Tokenizer:
    """UMT5's tokenizer, read from a `tokenizer.json` or a `spiece.model`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        # A tokenizer.json may carry truncation and padding of its own; ours are in `__call__`.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads such a file, or the one in the folder `path`.

        Raises:
          InputError: no such file, not a tokenizer, or one of another model.
        """
        path = remote.path(path)
        if not remote.is_remote(path) and os.path.isdir(path):
            path = path / (FILE if (path / FILE).is_file() else SENTENCEPIECE)
        if not remote.is_file(path):
            raise InputError(
                f"tokenizer: {path} is not a file; give UMT5's {FILE} or {SENTENCEPIECE}, which "
                "the released model keeps in google/umt5-xxl/"
            )
        content = as_json(path)
        with _refused(path):
            backend = tokenizers.Tokenizer.from_buffer(content)
        for token, expected in ((PAD, PAD_ID), (EOS, EOS_ID)):
            found = backend.token_to_id(token)
            if found != expected:
                has = "no such token" if found is None else f"id {found}"
                raise InputError(
                    f"tokenizer: {path} has {has} for {token!r}, UMT5 has id {expected}: this is "
                    f"the tokenizer of another model; give the {FILE} of google/umt5-xxl"
                )
        result = cls(backend)
        with _refused(path):
            # What no vocabulary has: a tokenizer may name an unknown token that it lacks.
            backend.encode(_RARE, add_special_tokens=False)
        return result

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self, prompts: Sequence[str], text_len: int = MAX_TOKENS, *, allow_empty: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cleaned, tokenised, ended with EOS, padded on the right to `text_len`.

        A prompt that is too long loses its last tokens, EOS stays, and a warning is logged.

        Args:
          prompts: texts, not yet cleaned.
          text_len: tokens of a prompt at most, EOS included.
          allow_empty: an empty prompt is EOS alone, as a negative prompt may be.

        Returns:
          ids and mask, int32 [prompt, text_len]; mask is 1 up to and at EOS.

        Raises:
          InputError: a prompt that is empty after cleaning, or is no text.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a str; give a list of str")
        if text_len < 1:
            raise InputError(f"model.text_len={text_len} must be at least 1")
        ids = np.full((len(prompts), text_len), PAD_ID, np.int32)
        mask = np.zeros((len(prompts), text_len), np.int32)
        rows: dict[str, list[int]] = {}  # the chunks of a video repeat a few prompts
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InputError(f"prompt {i + 1} is {str(prompt)[:60]!r}, not text")
            if prompt not in rows:
                rows[prompt] = self._encode(prompt, f"prompt {i + 1}", text_len, allow_empty)
            ids[i, : len(rows[prompt])] = rows[prompt]
            mask[i, : len(rows[prompt])] = 1
        return ids, mask

    def _encode(self, prompt: str, name: str, text_len: int, allow_empty: bool) -> list[int]:
        text = clean(prompt)
        # Without special tokens, because not every tokenizer.json adds EOS itself.
        with _refused(f"its file, for {name},"):
            tokens = self._backend.encode(text, add_special_tokens=False).ids if text else []
        if not tokens and not allow_empty:
            raise InputError(
                f"{name} is empty (the first is prompt 1): {prompt[:60]!r} has nothing left after "
                f"cleaning; write what the video shows"
            )
        if len(tokens) >= text_len:
            logging.warning(
                "%s has %d tokens with its end mark, the limit is %d: its end is cut off. "
                "It begins: %s", name, len(tokens) + 1, text_len, text[:60]
            )  # fmt: skip
        return [*tokens[: text_len - 1], EOS_ID]


def as_json(path: str | os.PathLike) -> bytes:
    """The content of a `tokenizer.json`, or its equivalent of a `spiece.model`.

    Raises:
      InputError: it is neither of them.
    """
    try:
        if isinstance(where := remote.path(path), RemotePath):
            content = where.read_bytes()
        else:
            with open(path, "rb") as file:
                content = file.read(_MAX_BYTES + 1)
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"tokenizer: {path}: {error.strerror or error}") from error
    with _refused(path):
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        # A spiece.model begins with the tag of its first piece, a line feed.
        if content[:1] == b"\n" and content.lstrip()[:1] != b"{":
            content = sentencepiece.read(content).to_str().encode()
        # Of numbers that are not finite the library writes what it cannot read.
        tokenizers.Tokenizer.from_buffer(content)
    return content


@contextlib.contextmanager
def _refused(path: object) -> Iterator[None]:
    """Makes an InputError of whatever the library makes of a damaged file."""
    try:
        yield
    except BaseException as error:
        # It raises bare Exception, and BaseException where its Rust code panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"tokenizer: {path} cannot be read as a {FILE} of the tokenizers library, or as a "
            f"{SENTENCEPIECE}: {str(error)[:200]}"
        ) from error


def train_tiny(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Trains a small byte-pair tokenizer with UMT5's special tokens, for tests and the tiny demo.

    Args:
      texts: what to train on.
      vocab_size: ids are below this; text with few words may give fewer.
      path: the `tokenizer.json` to write.

    Raises:
      InputError: a vocabulary with no place for a character.
    """
    special = [PAD, EOS, UNKNOWN]
    if vocab_size <= len(special):
        raise InputError(
            f"vocab_size={vocab_size} must be above {len(special)}, the special tokens"
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        # Characters come first and are not counted against vocab_size by the trainer.
        limit_alphabet=vocab_size - len(special),
        show_progress=False,
    )
    backend.train_from_iterator((clean(text) for text in texts), trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, EOS_ID)]
    )
    pathlib.Path(path).write_text(backend.to_str(pretty=True), encoding="utf-8")
    return Tokenizer.from_file(path)
