"""Which of transformers' classes loads a configuration, and which have no answer to continue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelClass:
    """How a model is loaded.

    Attributes:
        auto: transformers' class that picks the model's own by its configuration.
        task: the same, as nnsight and its servers call it.
    """

    auto: Any
    task: str


def class_of(config: PretrainedConfig, spec: str) -> ModelClass:
    """The class that loads a model as one that continues a text.

    A model that also sees or hears is loaded whole where it has no class of its text decoder alone.

    Raises:
        PersonaError: a model that does not continue a text from left to right.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    if config.is_encoder_decoder:
        raise PersonaError(
            f"The model {spec!r} is an encoder-decoder ({config.model_type}), which has no "
            "prompt-to-answer residual stream; use a decoder-only language model."
        )
    encoders = known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.model_type in encoders and not getattr(config, "is_decoder", False):
        raise PersonaError(
            f"The model {spec!r} is an encoder ({config.model_type}), whose every token sees those "
            "behind it; use a decoder-only language model."
        )
    causal = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not causal and config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return ModelClass(AutoModelForImageTextToText, "image-text-to-text")
    return ModelClass(AutoModelForCausalLM, "text-generation")
