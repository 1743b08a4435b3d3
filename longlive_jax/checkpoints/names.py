"""From the layouts that files have to the original's own state-dict keys.

Wrappers around the state dict, prefixes that trainers leave on keys, and the names that diffusers
and transformers give to the same weights end here.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from longlive_jax.checkpoints.tensor import Tensor
from longlive_jax.errors import InputError

Tensors = dict[str, Tensor]

_WRAPPERS = ("model", "state_dict", "gen_model", "generator", "module", "model_state_dict")
_MAX_WRAPPERS = 16  # of each other; more is a dict that contains itself
# The networks of a distillation that have adapters, and the field of a header that names one.
GENERATOR, CRITIC, NETWORK = "generator", "critic", "longlive_network"
_TOKENIZERS = ("spiece_model", "tokenizer_json")  # files as tensors of bytes, beside weights
_INNER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LORA = re.compile(r"\.lora[_.](?:A|B|down|up)\.|\.diff(?:_b|_m)?$")
_COMPONENT = re.compile(r"(?:transformer|unet|dit)\.|(?:lora_unet|lora_transformer|lycoris)_")
_OUTER = re.compile(r"(?:base_model\.model|diffusion_model|model|module)\.")


def state_dict(saved: Any, part: str, use_ema: bool, file: str) -> Tensors:
    """The weights of `part` ("dit", "vae" or "umt5") in a saved object, by the original's keys.

    Args:
      saved: a file's content: nested dicts with `Tensor`s.
      use_ema: take the moving average of the weights, `generator_ema`.
      file: for messages.

    Raises:
      InputError: no weights in it, two for one key, a LoRA alone, or TransformerEngine's modules.
    """
    if not isinstance(saved, Mapping):
        raise InputError(f"{file}: holds a {type(saved).__name__}, not a dict of weights")
    _refuse_transformer_engine(saved, file)
    inner = _generator(saved, use_ema, file) if part == "dit" else saved
    wrappers = 0
    while isinstance(found := next((inner[k] for k in _WRAPPERS if k in inner), None), Mapping):
        wrappers += 1
        if wrappers > _MAX_WRAPPERS:
            raise InputError(f"{file}: has weights in more than {_MAX_WRAPPERS} dicts around them")
        inner = found
    tensors = _tensors(inner)
    if part == "umt5":
        tensors = {key: t for key, t in tensors.items() if not _is_tokenizer(key, t)}
    if not tensors:
        raise InputError(f"{file}: holds no weights of the {part}; its keys are {_listing(saved)}")
    rename = {"dit": dit_key, "vae": vae_key, "umt5": umt5_key}[part]
    return _renamed(tensors, lambda key: rename(strip(key)), file)


def lora_state_dict(saved: Any, file: str, network: str = GENERATOR) -> Tensors:
    """The tensors of a LoRA: a dict with `generator_lora`, or a bare one as PEFT saves it.

    network: the one to take from a dict of two; a bare one whose header names the other is refused.
    """
    inner = saved
    if isinstance(saved, Mapping):
        inner = saved.get(f"{network}_lora", saved)
        others = {n for n in (GENERATOR, CRITIC) if f"{n}_lora" in saved}
        named = saved.get(NETWORK)
        others |= {named} if isinstance(named, str) else set()
        if inner is saved and others and network not in others:
            raise InputError(
                f"{file}: holds the adapters of the {', '.join(sorted(others))[:80]}, not those "
                f"of the {network}; give the {network}'s file"
            )
    tensors = _tensors(inner) if isinstance(inner, Mapping) else {}
    if not any(map(_LORA.search, tensors)):
        raise InputError(
            f"{file}: holds no LoRA (no lora_A, lora_B, lora_down, lora_up); its keys are "
            f"{_listing(saved)}"
        )
    return tensors


def lora_module(module: str) -> str:
    """A module's name in a LoRA file, without the prefixes that trainers put before it."""
    module = strip(module)
    while match := _COMPONENT.match(module):
        module = module[match.end() :]
    return module


def lora_target(module: str, written: Mapping[str, str]) -> str:
    """The original's name of a module in a LoRA file.

    Args:
      written: the original's names, by their spelling with underscores.
    """
    name = lora_module(module)
    if "." not in name:
        for spelling in (name, _underscored(name)):
            if spelling in written:
                return written[spelling]
    return dit_key(f"{name}.weight").removesuffix(".weight")


def _generator(saved: Mapping, use_ema: bool, file: str) -> Mapping:
    names = [k for k in ("generator", "generator_ema") if isinstance(saved.get(k), Mapping)]
    if "generator_lora" in saved:
        if not names and not isinstance(saved.get("model"), Mapping):
            raise InputError(
                f"{file}: holds only a LoRA; give it as --lora={file}, and as --dit the weights "
                "that it was trained on, Wan2.2-TI2V-5B"
            )
        logging.warning("%s: also holds a LoRA, which --lora=%s would merge", file, file)
    wanted = "generator_ema" if use_ema else "generator"
    if use_ema and wanted not in names:
        raise InputError(f"--use_ema: {file} has no generator_ema; its keys are {_listing(saved)}")
    if names and wanted not in names:
        raise InputError(f"{file}: holds only generator_ema, the moving average; add --use_ema")
    return saved[wanted] if names else saved


def _refuse_transformer_engine(saved: Mapping, file: str) -> None:
    if saved.get("checkpoint_format") == "longlive_generator_te_nvfp4":
        raise InputError(
            f"{file}: holds the state of TransformerEngine's modules (checkpoint_format "
            "longlive_generator_te_nvfp4), which only that can read; convert the bfloat16 file of "
            "the same model instead (model_bf16.pt, or model_te.pt)"
        )


def _tensors(d: Mapping) -> Tensors:
    return {k: v for k, v in d.items() if isinstance(k, str) and hasattr(v, "read")}


def _is_tokenizer(key: str, t: Tensor) -> bool:
    return strip(key) in _TOKENIZERS and t.dtype == np.uint8 and len(t.shape) == 1


def _listing(saved: Any) -> str:
    keys = [str(k)[:120] for k in saved] if isinstance(saved, Mapping) else []
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") if keys else "none"


def _renamed(tensors: Tensors, rename: Callable[[str], str | None], file: str) -> Tensors:
    result: Tensors = {}
    origin: dict[str, str] = {}
    for key, t in tensors.items():
        new = rename(key)
        if new is None:
            continue
        if new in result:
            raise InputError(f"{file}: {origin[new]!r} and {key!r} are both {new!r}; remove one")
        result[new], origin[new] = t, key
    return result


def strip(key: str) -> str:
    """Removes the prefixes of FSDP, checkpointing, torch.compile, DDP, PEFT and wrapper classes."""
    key = _INNER.sub("", key)
    while match := _OUTER.match(key):
        key = key[match.end() :]
    return key


def _rules(*pairs: tuple[str, str]) -> Callable[[str], str]:
    compiled = [(re.compile(pattern), new) for pattern, new in pairs]

    def rename(key: str) -> str:
        for pattern, new in compiled:
            key = pattern.sub(new, key)
        return key

    return rename


# Diffusers counts a block's norms in the order of their use; the original's norm3 is the second.
dit_key = _rules(
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"^(blocks\.\d+\.(?:self|cross)_attn)\.to_([qkv])\.", r"\1.\2."),
    (r"^(blocks\.\d+\.(?:self|cross)_attn)\.to_out\.0\.", r"\1.o."),
    (r"^(blocks\.\d+\.ffn)\.net\.0\.proj\.", r"\1.0."),
    (r"^(blocks\.\d+\.ffn)\.net\.2\.", r"\1.2."),
)

# The same with underscores, where the spelling itself shows no end of a name.
_underscored = _rules(
    (r"^condition_embedder_(time|text)_embedder_linear_1$", r"\1_embedding_0"),
    (r"^condition_embedder_(time|text)_embedder_linear_2$", r"\1_embedding_2"),
    (r"^condition_embedder_time_proj$", "time_projection_1"),
    (r"^proj_out$", "head_head"),
    (r"^(blocks_\d+)_attn1_", r"\1_self_attn_"),
    (r"^(blocks_\d+)_attn2_", r"\1_cross_attn_"),
    (r"^(blocks_\d+_(?:self|cross)_attn)_to_([qkv])$", r"\1_\2"),
    (r"^(blocks_\d+_(?:self|cross)_attn)_to_out_0$", r"\1_o"),
    (r"^(blocks_\d+_ffn)_net_0_proj$", r"\1_0"),
    (r"^(blocks_\d+_ffn)_net_2$", r"\1_2"),
)

_side = r"^(encoder|decoder)"
_block = r"^((?:encoder|decoder)\.(?:middle\.\d+|(?:down|up)samples\.\d+\.(?:down|up)samples\.\d+))"
_vae_rules = _rules(
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (_side + r"\.conv_in\.", r"\1.conv1."),
    (_side + r"\.norm_out\.", r"\1.head.0."),
    (_side + r"\.conv_out\.", r"\1.head.2."),
    (_side + r"\.mid_block\.resnets\.0\.", r"\1.middle.0."),
    (_side + r"\.mid_block\.attentions\.0\.", r"\1.middle.1."),
    (_side + r"\.mid_block\.resnets\.1\.", r"\1.middle.2."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.downsamples.\1.downsamples."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.upsamples.\1.upsamples."),
    (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
    (r"^decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3."),
    (_block + r"\.norm1\.", r"\1.residual.0."),
    (_block + r"\.conv1\.", r"\1.residual.2."),
    (_block + r"\.norm2\.", r"\1.residual.3."),
    (_block + r"\.conv2\.", r"\1.residual.6."),
    (_block + r"\.conv_shortcut\.", r"\1.shortcut."),
)


def vae_key(key: str) -> str | None:
    """The original's key of a Wan2.2 VAE's or LightVAE's weight; None: used in training only."""
    if key.startswith("dynamic_feature_projection_heads."):
        return None
    return _vae_rules(key)


_attention = r"^encoder\.block\.(\d+)\.layer\.0"
_ffn = r"^encoder\.block\.(\d+)\.layer\.1"
_umt5_rules = _rules(
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (_attention + r"\.layer_norm\.", r"blocks.\1.norm1."),
    (_attention + r"\.SelfAttention\.([qkvo])\.", r"blocks.\1.attn.\2."),
    (
        _attention + r"\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (_ffn + r"\.layer_norm\.", r"blocks.\1.norm2."),
    (_ffn + r"\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (_ffn + r"\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (_ffn + r"\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)


def umt5_key(key: str) -> str | None:
    """The original's key of a UMT5 weight; None: the decoder's, or a second name of `shared`."""
    if key.startswith(("decoder.", "lm_head.")) or key == "encoder.embed_tokens.weight":
        return None
    return _umt5_rules(key)
