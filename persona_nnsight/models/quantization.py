"""Quantised checkpoints: which method made them, and what to say where it cannot be undone here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def quantization_of(config: PretrainedConfig, spec: str) -> str | None:
    """The method that the weights of a checkpoint are quantised with, such as ``gptq``, or None.

    Raises:
        PersonaError: a method that this version of transformers passes over, so that the numbers
            of the weights would be taken for what they stand for.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    # transformers tells its two widths of bitsandbytes apart.
    if method not in (*AUTO_QUANTIZER_MAPPING, "bitsandbytes"):
        raise PersonaError(
            f"The weights of {spec!r} are quantised by {method!r}, which this version of "
            "transformers does not know; use the model as it was before, or a newer version."
        )
    return str(method)


def not_here(spec: str, method: str, error: Exception) -> PersonaError:
    """The error for quantised weights that cannot be loaded."""
    return PersonaError(
        f"The weights of {spec!r} are quantised by {method} and cannot be loaded here "
        f"({first_line(error)}); install or use what that names, or the model as it was before."
    )
