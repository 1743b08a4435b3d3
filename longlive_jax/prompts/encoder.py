"""Prompts to embeddings, by the text encoder."""

import collections
from collections.abc import Sequence

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models import umt5
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.prompts.embeddings import Embeddings

_KEPT = 256  # embeddings, on the host


class PromptEncoder:
    """The text encoder and its tokenizer; of the prompts used last, none is embedded twice.

    params: of `umt5.spec`, in compute dtype: whole on each device that computes.
    """

    def __init__(self, cfg: config_lib.Config, params: params_lib.Tree, tokenizer: Tokenizer):
        self._cfg, self._params, self._tokenizer = cfg, params, tokenizer
        self._rows: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._negative: np.ndarray | None = None

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[prompt, text_len, text_dim] in compute dtype."""
        wanted = dict.fromkeys(prompts)
        if new := [prompt for prompt in wanted if prompt not in self._rows]:
            self._rows.update(zip(new, self._encode(*self._read(new))))
        for prompt in wanted:
            self._rows.move_to_end(prompt)
        rows = np.stack([self._rows[prompt] for prompt in prompts])
        while len(self._rows) > _KEPT:
            self._rows.popitem(last=False)
        return rows

    @property
    def negative(self) -> np.ndarray | None:
        """[text_len, text_dim] of the config's negative prompt; None without guidance."""
        if self._negative is None and self._cfg.sample.guided:
            self._negative = self.embed_negative()
        return self._negative

    def embed_negative(self) -> np.ndarray:
        """[text_len, text_dim] of the config's negative prompt, whether the sampler is guided."""
        return self._encode(*self._read_negative())[0]

    def all(self, prompts: Sequence[str], guided: bool) -> Embeddings:
        """Embeddings of a run's prompts and, if `guided`, of the config's negative prompt."""
        ids, mask = self._read(prompts)
        if guided:
            negative = self._read_negative()
            ids, mask = np.concatenate([ids, negative[0]]), np.concatenate([mask, negative[1]])
        rows = self._encode(ids, mask)
        return Embeddings(prompts, rows[: len(prompts)], rows[-1] if guided else None)

    def _read(self, prompts, **kwargs):
        return self._tokenizer(prompts, self._cfg.model.text_len, **kwargs)

    def _read_negative(self):
        return self._read([self._cfg.sample.negative_prompt], allow_empty=True)

    def _encode(self, ids, mask):
        cfg = self._cfg
        return umt5.encode_prompts(
            self._params, cfg.umt5, ids, mask, cfg.model.text_len, cfg.compute_dtype
        )
