"""From a model spec (hub id, directory, GGUF file, embedded alias) to a traceable nnsight model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from persona_nnsight.errors import PersonaError, first_line
from persona_nnsight.models.classes import ModelClass, class_of
from persona_nnsight.models.decoding import GREEDY, decoding_of
from persona_nnsight.models.end_tokens import end_tokens
from persona_nnsight.models.left_behind import LeftBehind
from persona_nnsight.models.module_tree import ModuleTree, find_tree, has_few_bits
from persona_nnsight.models.observation import observed
from persona_nnsight.models.paths import AUTO, PATHS
from persona_nnsight.models.quantization import not_here, quantization_of
from persona_nnsight.models.unused_tensors import refuse_unused
from persona_nnsight.models.weights.embedded import ALIAS
from persona_nnsight.models.weights.model_files import (
    GENERATION_CONFIG,
    code_references,
    has_vocabulary,
    settings_of,
)
from persona_nnsight.models.weights.resolve import Weights, resolve

if TYPE_CHECKING:
    from nnsight.modeling.transformers import TransformersModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEFAULT_MODEL = ALIAS

#: Attention implementations; transformers would take others, and fetch some from the hub to run.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")

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
        eos_ids: tokens that end a continuation (`persona_nnsight.models.end_tokens`).
        architecture: transformers' ``config.model_type``, such as ``llama``.
        n_parameters: number of weights.
        has_weights: False for a skeleton that only plans.
        trust_remote_code: whether code that comes with the checkpoint was allowed to run.
        decoding: settings of the checkpoint that decoding keeps to; none where the largest logit
            wins.
        path: which way rows take through the engine: ``auto``, ``fast`` or ``whole``.
        quantization: the method that the weights are quantised with, or None.
    """

    lm: TransformersModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    tree: ModuleTree
    dtype: torch.dtype
    device: str
    attention: str
    eos_ids: tuple[int, ...]
    architecture: str
    n_parameters: int
    has_weights: bool
    trust_remote_code: bool = False
    decoding: dict[str, Any] = field(default_factory=dict)
    path: str = AUTO
    quantization: str | None = None

    def without_weights(self) -> Model:
        """What it is, for a result that is pickled: without weights and tokenizer."""
        behind: Any = LeftBehind()
        return replace(self, lm=behind, tokenizer=behind, has_weights=False)

    @property
    def rounds(self) -> bool:
        """Whether the dtype has fewer bits than float32, so that its rounding shows in KLs."""
        return has_few_bits(self.dtype)

    @property
    def embedding_rows(self) -> int:
        """How many token ids can be fed; of some models more than it tells apart in its output."""
        try:
            embedding: Any = self.lm._module.get_input_embeddings()
        except NotImplementedError:  # code of its own that does not say which it is
            return self.tree.vocab_size
        return int(embedding.weight.shape[0])


def load_model(
    spec: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn: str | None = None,
    trust_remote_code: bool = False,
    decoding: str = GREEDY,
    path: str = AUTO,
    weights: bool = True,
    fetch: bool = True,
    needs_template: bool = False,
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
        trust_remote_code: run Python code that comes with the checkpoint, where transformers has
            none of its own for it. That code has all rights of this process: read it first, and
            of a hub model give `revision` as a commit, so that it stays what was read.
        decoding: ``greedy``, where the largest logit wins, or ``checkpoint``: the largest after
            what the checkpoint's generation_config.json does to logits (a penalty of repetition,
            tokens that it suppresses), as far as that is the same every time.
        path: how rows run: ``fast`` shares openings, pads batches and skips layers below an edit;
            ``whole`` runs every row from its first token, in batches of one length; ``auto`` takes
            the first where it gives the numbers of the second on two prompts of a plan.
        weights: False builds the skeleton alone, enough to plan a run; of a hub model only the
            configuration and tokenizer are fetched for it.
        fetch: False never downloads or converts weights.
        needs_template: True refuses a GGUF file without a chat template before it is converted, as
            such a model has no user turn; False leaves it to you to give the tokenizer one.
        notify: called with a line of text before something slow (a download, a conversion).

    Raises:
        PersonaError: no such model, device or dtype, files that cannot be read, or code in them
            that is not trusted.
    """
    placement = _device(device)
    chosen_dtype = _dtype(dtype, placement)
    if path not in PATHS:
        raise PersonaError(
            f"The path {path!r} is not known; use auto (as the model allows), fast (with shared "
            "openings and padded batches) or whole (every row from its first token)."
        )
    if attn not in (None, *ATTENTION):
        raise PersonaError(f"Attention {attn!r} is not known; use {', '.join(ATTENTION)}.")
    source = resolve(
        spec,
        revision=revision,
        fetch=fetch,
        weights=weights,
        needs_template=needs_template,
        notify=notify,
    )
    with _in_one_sentence(source):
        if trust_remote_code:
            _check_origin_of_code(source)
        config = _load_config(source, trust_remote_code)
        loader, quantization = class_of(config, source.spec), quantization_of(config, source.spec)
        tokenizer = _load_tokenizer(source, trust_remote_code)
        options = _options(config, chosen_dtype, attn, trust_remote_code)
        # Before weights are read, which may take minutes.
        skeleton = _skeleton(source, config, loader, tokenizer, options)
        tree = observed(skeleton._module, find_tree(skeleton._module, chosen_dtype))
        lm = skeleton
        if weights:
            lm = _load_lm(source, config, loader, tokenizer, placement, options)
        module = lm._module
        return Model(
            lm=lm,
            tokenizer=tokenizer,
            weights=source,
            tree=tree,
            dtype=chosen_dtype,
            device=placement,
            attention=str(module.config._attn_implementation),
            architecture=str(module.config.model_type),
            eos_ids=end_tokens(Path(source.path), config, tokenizer, tree.vocab_size),
            n_parameters=sum(parameter.numel() for parameter in module.parameters()),
            has_weights=weights,
            trust_remote_code=trust_remote_code,
            decoding=decoding_of(settings_of(Path(source.path), GENERATION_CONFIG), decoding),
            path=path,
            quantization=quantization,
        )


@contextmanager
def _in_one_sentence(source: Weights) -> Iterator[None]:
    """Say of whatever a model of another kind makes fail that the model cannot be loaded."""
    try:
        yield
    except PersonaError:
        raise
    except Exception as error:
        raise _unreadable(source, error) from error


def load_tokenizer(
    spec: str = DEFAULT_MODEL, *, notify: Callable[[str], None] | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone; `spec` and `notify` are those of `load_model`.

    Raises:
        PersonaError: no such model, files that cannot be read, or code in them.
    """
    source = resolve(spec, weights=False, notify=notify)
    return _load_tokenizer(source, trust_remote_code=False)


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


def default_placement() -> tuple[str, torch.dtype]:
    """The device and the dtype that ``auto`` is on this machine."""
    device = _device("auto")
    return device, _dtype("auto", device)


def _dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise PersonaError(f"Dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _check_origin_of_code(source: Weights) -> None:
    """Refuse code from another repository, which no revision of this one pins."""
    elsewhere = sorted(name for name in code_references(Path(source.path)) if "--" in name)
    if elsewhere:
        raise PersonaError(
            f"The model {source.spec!r} takes its code from another repository "
            f"({elsewhere[0].split('--')[0]}), which --revision does not pin; download both into "
            "one directory, correct auto_map in its config.json, and give that."
        )


def _load_tokenizer(source: Weights, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        if _asks_for_code(error, trust_remote_code):
            raise _untrusted(source) from error
        found = has_vocabulary(Path(source.path))
        reason = first_line(error) if found else "its vocabulary is missing"
        raise PersonaError(
            f"The tokenizer of {source.spec!r} cannot be read ({reason}); a model "
            "directory needs tokenizer.json or the tokenizer files of its family."
        ) from error


def _load_config(source: Weights, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.path, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if _asks_for_code(error, trust_remote_code):
            raise _untrusted(source) from error
        raise _unreadable(source, error) from error
    return config


def _options(
    config: PretrainedConfig, dtype: torch.dtype, attn: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Arguments of what builds a model of a configuration, with weights or without."""
    if attn is None and getattr(config.get_text_config(decoder=True), _SOFT_CAP, None):
        attn = "eager"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn is not None:
        options["attn_implementation"] = attn
    return options


def _load_lm(
    source: Weights,
    config: PretrainedConfig,
    loader: ModelClass,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    options: dict[str, Any],
) -> TransformersModel:
    """The model with its weights on `device`."""
    from transformers import GenerationConfig

    try:
        module, report = loader.auto.from_pretrained(
            source.path,
            device_map=device if device == "balanced" else {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            generation_config=GenerationConfig(),  # ours says all; its own may contradict itself
            use_safetensors=True,  # anything else is a pickle, which can run code
            **options,
        )
    except Exception as error:
        if (method := quantization_of(config, source.spec)) is not None:
            raise not_here(source.spec, method, error) from error
        raise _unreadable(source, error) from error
    if report["mismatched_keys"]:
        name, there, needed = sorted(report["mismatched_keys"])[0]
        raise PersonaError(
            f"The weights of {source.spec!r} do not fit its config.json: {name} has the shape "
            f"{list(there)} and should have {list(needed)}; fetch or copy the model again, whole."
        )
    if report["missing_keys"]:
        # transformers would go on with random values in their place.
        missing = sorted(report["missing_keys"])
        raise PersonaError(
            f"The weights of {source.spec!r} lack {len(missing)} of the model's tensors "
            f"({missing[0]}, ...); fetch or copy the model again, whole."
        )
    refuse_unused(source, config, module, report["unexpected_keys"])
    module.eval()
    module.requires_grad_(False)
    return _wrapped(module, tokenizer)


#: The task of every model as nnsight knows it here, whatever else it was trained for.
_TASK = "text-generation"


def _skeleton(
    source: Weights,
    config: PretrainedConfig,
    loader: ModelClass,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> TransformersModel:
    """The model without its weights, on the meta device."""
    from nnsight.modeling.transformers import TransformersModel

    try:
        if loader.task == _TASK:
            return TransformersModel(source.path, task=_TASK, tokenizer=tokenizer, **options)
        with torch.device("meta"):
            module = loader.auto.from_config(config, **options)
    except Exception as error:
        if _asks_for_code(error, options["trust_remote_code"]):
            raise _untrusted(source) from error
        raise _unreadable(source, error) from error
    return _wrapped(module, tokenizer)


def _wrapped(module: Any, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """A model for tracing; nnsight need not know what turns pictures into numbers."""
    from nnsight.modeling.transformers import TransformersModel
    from transformers.utils import logging

    chatter: Any = logging
    before = chatter.get_verbosity()
    # It is called an error that a model which also sees is used for text alone.
    chatter.set_verbosity(chatter.CRITICAL)
    try:
        return TransformersModel(module, task=_TASK, tokenizer=tokenizer, **stay(module))
    finally:
        chatter.set_verbosity(before)


def stay(module: Any) -> dict[str, Any]:
    """What `TransformersModel` has to be told for a loaded model to stay where it is.

    The pipeline that it makes moves a model to the first GPU there is, unless it is told a device;
    one that is shared out over several devices it leaves alone, and takes no device for.
    """
    return {} if getattr(module, "hf_device_map", None) else {"device": module.device}


#: Set in the configuration of models that cap their attention logits (Gemma 2). transformers'
#: default attention there, sdpa, silently leaves the cap out, which changes the logits.
_SOFT_CAP = "attn_logit_softcapping"


def _asks_for_code(error: Exception, trusted: bool) -> bool:
    """Whether transformers gave up because it would have to run code, which it is told not to."""
    return not trusted and "trust_remote_code" in str(error)


def _untrusted(source: Weights) -> PersonaError:
    return PersonaError(
        f"The model {source.spec!r} needs Python code that comes with the checkpoint, which was "
        "not run; read it, and if you trust it with all your rights on this machine, add "
        "--trust-remote-code (trust_remote_code=True in Python) and, for a hub model, --revision "
        "with a commit."
    )


def _unreadable(source: Weights, error: Exception) -> PersonaError:
    return PersonaError(
        f"The model {source.spec!r} cannot be loaded ({first_line(error)}); check that it is a "
        "causal language model that this version of transformers reads, and that its files are "
        "whole."
    )
