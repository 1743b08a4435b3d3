"""The scales of a LoRA's adapters, from wherever trainers write their alpha."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from longlive_jax.errors import InputError
from longlive_jax.files import versioned

# Fields that hold more settings, as objects or as JSON texts.
_NESTED = ("lora_adapter_metadata", "adapter_config", "lora_config", "adapter", "ss_network_args")
_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_STABILISED = ("use_rslora", "rslora", "rs_lora", "use_dora", "dora")
_OTHERS = ("text_encoder", "text_encoder_2", "te", "lora_te")  # components that are no transformer
_FALSE = ("false", "0", "no", "off", "none", "null", "")
_TRUE = ("true", "1", "yes", "on")
_MAX_SCALE = 1024.0  # alpha / rank; published adapters have up to about 64
_MAX_PATTERN = 200  # characters of a pattern of PEFT
# What a pattern may consist of, so that it is matched in no time: names, dots, \d+ and two .*
_PATTERN = re.compile(r"\^?(?:[\w-]|\.(?![*+?])|\\\.|\\d\+|\[0-9\]\+|\.\*)+\$?")


@dataclasses.dataclass(frozen=True)
class Scales:
    """A file's words on alpha: one for all adapters or None, and some for modules of a pattern."""

    file: str
    alpha: float | None
    patterns: Mapping[str, float]

    def of(self, modules: tuple[str, ...], rank: int, *, own: float | None) -> float:
        """An adapter's scale.

        Args:
          modules: names of the adapted module, as patterns may have them.
          own: the alpha that lies beside the adapter; it outweighs patterns, they the file's word.

        Raises:
          InputError: the scale is not positive, or absurd.
        """
        found = (a for p, a in self.patterns.items() if any(_fits(p, m) for m in modules))
        alpha = next((a for a in (own, next(found, None), self.alpha) if a is not None), rank)
        return check(alpha, rank, f"{self.file}: {modules[0]}")


def check(alpha: float, rank: int, where: str, *, zero: bool = False) -> float:
    """alpha / rank, if it is one that an adapter can have.

    zero: it may be 0, by the user's own word; in files 0 also stands for the rank.

    Raises:
      InputError: it is not.
    """
    good = math.isfinite(alpha) and 0 <= alpha <= _MAX_SCALE * rank and (alpha > 0 or zero)
    if not good:
        raise InputError(
            f"{where} has alpha {alpha:g} at rank {rank}; it must be above 0 and at most "
            f"{_MAX_SCALE:g} times the rank: give --lora_alpha, if you know the right one"
        )
    return alpha / rank


def read(saved: Any, file: str) -> Scales:
    """The words on alpha in a LoRA file's content, or in the header that came with it.

    Raises:
      InputError: they contradict each other or are no numbers; the scales are rank-stabilised.
    """
    alphas: dict[str, float] = {}
    patterns: dict[str, float] = {}
    for settings in _settings(saved, file):
        for key, value in settings.items():
            component, _, name = key.rpartition(".") if isinstance(key, str) else ("", "", "")
            if component in _OTHERS or hasattr(value, "read"):  # a tensor is of one layer
                continue
            if name in _STABILISED and _truth(value, f"{file}: {key}"):
                raise InputError(
                    f"{file}: is a rank-stabilised or DoRA adapter; only plain LoRA merges"
                )
            if name in _ALPHAS:
                number = _number(value, f"{file}: {key}")
                if number is not None:
                    alphas[key] = number
            if name == "alpha_pattern":
                patterns |= _patterns(value, f"{file}: {key}")
    if len(set(alphas.values())) > 1:
        words = ", ".join(f"{key[:60]} {alpha:g}" for key, alpha in alphas.items())
        raise InputError(f"{file}: has several words on alpha, {words}; give --lora_alpha")
    return Scales(file, next(iter(alphas.values()), None), patterns)


def _settings(saved: Any, file: str) -> Iterator[Mapping]:
    """A file's own fields, and those inside them that hold more."""
    if not isinstance(saved, Mapping):
        return
    yield saved
    for name in _NESTED:
        inner = saved.get(name)
        if isinstance(inner, str):
            if inner.strip().lower() in _FALSE:
                continue
            try:
                inner = versioned.parse(inner)
            except ValueError as error:
                raise InputError(f"{file}: its field {name} is no JSON ({error})") from error
        if isinstance(inner, Mapping):
            yield inner


def _number(value: Any, where: str) -> float | None:
    """A number, or a text of one; None for "none"."""
    if isinstance(value, str):
        text = value.strip().strip("\"'")
        if text.lower() in ("none", "null", ""):
            return None
        try:
            return float(text)
        except ValueError:
            value = text[:60]
    elif value is None:
        return None
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    raise InputError(f"{where} is {_shown(value)}, not a number; give --lora_alpha")


def _truth(value: Any, where: str) -> bool:
    """Whether a field says yes; a text that says false is false."""
    if isinstance(value, str):
        text = value.strip().strip("\"'").lower()
        if text in _FALSE or text in _TRUE:
            return text in _TRUE
    elif value is None or isinstance(value, int | float):
        return bool(value)
    raise InputError(f"{where} is {_shown(value)}, neither true nor false")


def _shown(value: Any) -> str:
    # Nothing nested is printed: a pickle makes 2^40 items of a few bytes.
    plain = isinstance(value, str | int | float)
    return repr(str(value)[:60]) if plain else f"a {type(value).__name__}"


def _patterns(value: Any, where: str) -> dict[str, float]:
    if isinstance(value, str):
        try:
            value = versioned.parse(value) if value.strip().lower() not in _FALSE else {}
        except ValueError:
            value = None
    if value is None or not isinstance(value, Mapping):
        raise InputError(f"{where} is no object of patterns; give --lora_alpha")
    result = {}
    for pattern, alpha in value.items():
        text = pattern if isinstance(pattern, str) else ""
        bad = len(text) > _MAX_PATTERN or not _PATTERN.fullmatch(text) or text.count(".*") > 2
        number = None if bad else _number(alpha, where)
        if number is None:
            raise InputError(f"{where} has {text[:60]!r}, which is not read; give --lora_alpha")
        result[text] = number
    return result


def _fits(pattern: str, module: str) -> bool:
    """Whether a pattern names a module: as PEFT has it, the end of its name after a dot."""
    if pattern.startswith("^"):
        return re.match(pattern, module) is not None
    return re.match(rf"(?:.*\.)?(?:{pattern.removesuffix('$')})$", module) is not None
