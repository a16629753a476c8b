"""Tiny models of every class, with loud random weights, saved as a user's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import IM_END_ID, IM_START_ID, PAD_ID, SEED, randomize, save_tokenizer
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from architectures.configs import LONG, SHORT, tiny_config

TEXT, IMAGE_TEXT = "text", "image-text"


@dataclass(frozen=True, order=True)
class Architecture:
    """A model type, and the class that transformers has for it.

    Attributes:
        task: what the class is for: text, or images and text.
        model_type: as in ``config.json``.
        class_name: of transformers.
    """

    task: str
    model_type: str
    class_name: str


def architectures() -> list[Architecture]:
    """All that transformers has, in the order of the page."""
    mappings = {
        TEXT: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        IMAGE_TEXT: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    return [
        Architecture(task, model_type, class_name)
        for task, names in mappings.items()
        for model_type, class_name in sorted(names.items())
    ]


def build(architecture: Architecture, window: int) -> PreTrainedModel:
    """A tiny model with random weights.

    Args:
        architecture: its model type and class.
        window: of its layers with a sliding window, in tokens.

    Raises:
        Exception: whatever transformers has against it.
    """
    model_class: Any = getattr(transformers, architecture.class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = model_class._from_config(_config(architecture, window))
        randomize(model)
    model.train(False)
    return model


def save(model: PreTrainedModel, directory: Path) -> None:
    """Save a model and its tokenizer as a directory that a user may name."""
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.bos_token_id = IM_START_ID
        generation.eos_token_id = IM_END_ID
        generation.pad_token_id = PAD_ID
    model.save_pretrained(str(directory))
    save_tokenizer(directory)


def windows_of(architecture: Architecture) -> tuple[int, ...]:
    """A long window, and a short one where it makes another model."""
    long, short = (_config(architecture, window).to_dict() for window in (LONG, SHORT))
    return (LONG, SHORT) if long != short else (LONG,)


def _config(architecture: Architecture, window: int) -> Any:
    """Of the class where it is for text, which is a part of the model type's in some."""
    model_class: Any = getattr(transformers, architecture.class_name)
    is_text = architecture.task == TEXT
    return tiny_config(
        model_class.config_class if is_text else CONFIG_MAPPING[architecture.model_type], window
    )
