"""From a model spec (hub id, directory, GGUF file, embedded alias) to a traceable nnsight model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from persona_nnsight.errors import PersonaError
from persona_nnsight.module_tree import ModuleTree, find_tree
from persona_nnsight.weights import Weights, resolve
from persona_nnsight.weights.embedded import ALIAS
from persona_nnsight.weights.model_files import first_line

if TYPE_CHECKING:
    from nnsight.modeling.transformers import TransformersModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEFAULT_MODEL = ALIAS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CUDA = re.compile(r"cuda(?::(0|[1-9][0-9]{0,3}))?")


@dataclass(frozen=True)
class Model:
    """A model ready to be traced, or its weightless skeleton.

    Attributes:
        lm: the nnsight model; on the meta device when `has_weights` is False.
        tokenizer: its tokenizer, with the chat template.
        weights: where the weights come from, and what identifies them.
        tree: where the decoder layers are, and the sizes the plan needs.
        dtype: of the weights and activations. Residual arithmetic is float32 regardless.
        device: ``cpu``, ``cuda:0``, ``mps``, … or ``balanced`` over several GPUs.
        attention: the attention implementation in use, such as ``sdpa``.
        eos_ids: tokens that end a continuation.
        n_parameters: number of weights.
        has_weights: False for a skeleton that only plans.
    """

    lm: TransformersModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    tree: ModuleTree
    dtype: torch.dtype
    device: str
    attention: str
    eos_ids: tuple[int, ...]
    n_parameters: int
    has_weights: bool


def load_model(
    spec: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn: str | None = None,
    weights: bool = True,
    fetch: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Model:
    """Load a causal language model for tracing.

    Args:
        spec: a hub id (``google/gemma-2-2b-it``), a local directory, a ``.gguf`` file, or the
            alias of the embedded model, ``smollm2-135m``.
        revision: branch, tag or commit of a hub model.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 on a GPU, float32 on a
            CPU. float16 is never chosen for you; it overflows on several models.
        device: ``auto`` (the best single device), ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or
            ``balanced`` (shared out over all GPUs).
        attn: attention implementation (``eager``, ``sdpa``, ``flash_attention_2``); None leaves
            the choice to transformers, but for models that cap their attention logits (Gemma 2),
            where only ``eager`` computes the cap.
        weights: False builds the skeleton alone, enough to plan a run; of a hub model only the
            configuration and tokenizer are fetched for it.
        fetch: False never downloads or converts weights.
        notify: called with a line of text before something slow (a download, a conversion).

    Raises:
        PersonaError: no such model, device or dtype, or files that cannot be read.
    """
    placement = _device(device)
    chosen_dtype = _dtype(dtype, placement)
    source = resolve(spec, revision=revision, fetch=fetch, weights=weights, notify=notify)
    tokenizer = _load_tokenizer(source)
    lm = _load_lm(source, tokenizer, chosen_dtype, placement if weights else None, attn)
    module = lm._module
    return Model(
        lm=lm,
        tokenizer=tokenizer,
        weights=source,
        tree=find_tree(module, chosen_dtype),
        dtype=chosen_dtype,
        device=placement,
        attention=str(module.config._attn_implementation),
        eos_ids=_eos_ids(module.generation_config, module.config, tokenizer),
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        has_weights=weights,
    )


def _device(device: str) -> str:
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cpu":
        return device
    cuda = _CUDA.fullmatch(device)
    if device == "balanced" or cuda:
        count = torch.cuda.device_count()
        if count == 0:
            raise PersonaError(f"Device {device!r} needs a CUDA GPU and there is none; use cpu.")
        if cuda and int(cuda[1] or 0) >= count:
            raise PersonaError(
                f"Device {device!r} does not exist: there are {count} GPUs, cuda:0 to "
                f"cuda:{count - 1}."
            )
        return "cuda:0" if device == "cuda" else device
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise PersonaError("Device 'mps' is not available on this machine; use cpu.")
        return device
    raise PersonaError(
        f"Device {device!r} is not known; use auto, cpu, cuda, cuda:N, mps or balanced."
    )


def _dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise PersonaError(f"Dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _load_tokenizer(source: Weights) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path, **_NO_CODE)
    except Exception as error:
        raise PersonaError(
            f"The tokenizer of {source.spec!r} cannot be read ({first_line(error)}); a model "
            "directory needs tokenizer.json or the tokenizer files of its family."
        ) from error


def _load_lm(
    source: Weights,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: str | None,
    attn: str | None,
) -> TransformersModel:
    """The model with its weights on `device`, or its skeleton when that is None."""
    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.path, **_NO_CODE)
    except Exception as error:
        raise _unreadable(source, error) from error
    if config.is_encoder_decoder:
        raise PersonaError(
            f"The model {source.spec!r} is an encoder-decoder ({config.model_type}), which has no "
            "prompt-to-answer residual stream; use a decoder-only language model."
        )
    if attn is None and getattr(config.get_text_config(decoder=True), _SOFT_CAP, None):
        attn = "eager"
    options: dict[str, Any] = {"dtype": dtype, **_NO_CODE}
    if attn is not None:
        options["attn_implementation"] = attn
    wrapping: dict[str, Any] = {"task": "text-generation", "tokenizer": tokenizer}
    loader: Any = AutoModelForCausalLM
    try:
        if device is None:
            return TransformersModel(source.path, **wrapping, **options)
        module, report = loader.from_pretrained(
            source.path,
            device_map=device if device == "balanced" else {"": device},
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise _unreadable(source, error) from error
    if report["missing_keys"]:
        # transformers would go on with random values in their place.
        missing = sorted(report["missing_keys"])
        raise PersonaError(
            f"The weights of {source.spec!r} lack {len(missing)} of the model's tensors "
            f"({missing[0]}, ...); fetch or copy the model again, whole."
        )
    module.eval()
    module.requires_grad_(False)
    return TransformersModel(module, **wrapping)


#: Code that comes with a model is never run, nor is the user asked whether to.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}

#: Set in the configuration of models that cap their attention logits (Gemma 2). transformers'
#: default attention there, sdpa, silently leaves the cap out, which changes the logits.
_SOFT_CAP = "attn_logit_softcapping"


def _unreadable(source: Weights, error: Exception) -> PersonaError:
    return PersonaError(
        f"The model {source.spec!r} cannot be loaded ({first_line(error)}); check that it is a "
        "causal language model that this version of transformers reads, and that its files are "
        "whole."
    )


def _eos_ids(
    generation_config: Any, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    candidates = (
        getattr(generation_config, "eos_token_id", None),
        getattr(config.get_text_config(decoder=True), "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    for eos in candidates:
        if eos is not None:
            return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    return ()
