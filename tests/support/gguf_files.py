"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from tiny import CHATML, IM_END, IM_START, PAD
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCAB_SIZE = 261
"""Tokens of the byte-level tokenizer: bytes, two merges, and three special ones."""

_IM_START_ID, _IM_END_ID, _PAD_ID = 258, 259, 260
_ADDS_ONE = ("gemma2", "gemma3")  # to the weights of norms
_TURNS_NEIGHBOURS = ("llama",)  # so that rows of queries and keys are in another order


def export(
    model: PreTrainedModel,
    path: Path,
    architecture: str,
    *,
    keys: Mapping[str, object] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    eos: bool = True,
) -> Path:
    """Write a model as a GGUF file in float32, with a byte-level tokenizer and a chat template.

    Args:
        model: on the CPU, of a kind that transformers reads from GGUF, with `VOCAB_SIZE` tokens.
        path: where to.
        architecture: what GGUF calls the kind.
        keys: more metadata, by full names.
        tensors: more tensors, by their names in the file.
        eos: whether it says which token ends a text.
    """
    config: Any = model.config.get_text_config()
    settings = config.to_dict()
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(settings.get("intermediate_size") or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    if "num_key_value_heads" in settings:
        writer.add_head_count_kv(config.num_key_value_heads)
    if "rms_norm_eps" in settings:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(next(settings[name] for name in settings if "eps" in name))
    for key, value in (keys or {}).items():
        _add(writer, key, value)
    _add_tokenizer(writer, eos=eos)
    for name, tensor in [*_tensors(model, architecture), *(tensors or {}).items()]:
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    adders: dict[type, Callable[..., None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, *, eos: bool) -> None:
    byte_letters: Callable[[], dict[int, str]] = bytes_to_unicode
    special = [IM_START, IM_END, PAD]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*byte_letters().values(), "ab", "cd", *special])
    writer.add_token_types([1] * (VOCAB_SIZE - len(special)) + [3] * len(special))
    writer.add_token_scores([0.0] * VOCAB_SIZE)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(_IM_START_ID)
    if eos:
        writer.add_eos_token_id(_IM_END_ID)
    writer.add_pad_token_id(_PAD_ID)
    writer.add_chat_template(CHATML)


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model under the names and with the values that they have in the file."""
    config: Any = model.config.get_text_config()
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        written = names.get_name(stem)
        assert written is not None, name
        if architecture in _TURNS_NEIGHBOURS and written.endswith(("attn_q", "attn_k")):
            keys = written.endswith("attn_k")
            heads = config.num_key_value_heads if keys else config.num_attention_heads
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if architecture == "gpt2" and ending == "weight" and stem.split(".")[-1].startswith("c_"):
            tensor = tensor.T
        if architecture in _ADDS_ONE and written.endswith("norm"):
            tensor = tensor + 1
        yield f"{written}.{ending}", tensor
