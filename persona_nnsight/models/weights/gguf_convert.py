"""A GGUF file -> a directory that transformers loads in seconds.

Reading a GGUF through transformers takes half a minute even for a small model, because every
metadata string is parsed one by one, several times over, and the result refuses to be saved as it
counts as quantised. So a file is read once, de-quantised to float32, and saved as safetensors with
its tokenizer and chat template; from then on it is an ordinary model directory. The tensors are
those of transformers' own GGUF loader, bit for bit; what that loader passes over of the file is put
into the configuration, or the file is refused (`gguf_settings`, `gguf_rope`, `gguf_tensors`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError, first_line
from persona_nnsight.models.weights.model_files import CONFIG, human_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MARKER = "persona-model.json"
"""Written last into a converted directory: where it came from, hashes and versions."""

MAGIC = b"GGUF"

_TEMPLATE = "tokenizer.chat_template"
"""What the keys of a file's chat templates begin with."""

_METHOD = 2
"""Which conversion made a directory; one of another number is made again from its file."""

_one_at_a_time = threading.Lock()  # within a process, as transformers is patched meanwhile


def read_marker(directory: Path) -> dict[str, Any] | None:
    """Return what a converted directory records about itself; None when it is not one."""
    try:
        marker = json.loads((directory / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def is_converted(directory: Path) -> bool:
    """Tell whether a directory is a conversion as it is done now."""
    marker = read_marker(directory)
    return marker is not None and marker.get("method") == _METHOD


def convert(
    gguf: Path,
    target: Path,
    *,
    record: Mapping[str, str],
    needs_template: bool = False,
    notify: Callable[[str], None],
) -> Path:
    """Convert `gguf` into the model directory `target`, once; return `target`.

    `record` goes into the marker file. The directory is built beside `target` and renamed into
    place, so a reader sees all of it or nothing; of two processes that convert at the same time
    the first to finish wins and the other throws its copy away. With `needs_template` a file that
    holds no chat template is refused before anything is converted.
    """
    with _one_at_a_time:
        if not is_converted(target):
            _build(gguf, target, record, needs_template, notify)
    return target


def _build(
    gguf: Path,
    target: Path,
    record: Mapping[str, str],
    needs_template: bool,
    notify: Callable[[str], None],
) -> None:
    """Convert into a directory beside `target`, then rename it."""
    notify(f"reading {gguf.name}")
    reader = _read(gguf)
    architecture = _architecture(reader, gguf)
    if needs_template and not any(key.startswith(_TEMPLATE) for key in reader.fields):
        raise PersonaError(
            f"The tokenizer of '{gguf}' has no chat template, so there is no user turn to put a "
            "role prompt in; use an instruction-tuned model."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if read_marker(target):  # of an older conversion
            shutil.rmtree(target)
    except OSError as error:
        raise PersonaError(
            f"The cache directory '{target.parent}' cannot be written: {first_line(error)}; "
            "set PERSONA_CACHE to a directory that can be written."
        ) from error
    needed = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise PersonaError(
            f"Converting {gguf.name} takes {human_size(needed)} of disk and only "
            f"{human_size(free)} are free; make room, or set PERSONA_CACHE to a directory "
            "on a larger disk."
        )
    notify(f"converting {gguf.name} to float32 safetensors ({human_size(needed)}), once")
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as scratch:
        built = Path(scratch) / "model"
        try:
            with _quiet(), _read_once(reader):
                _save(gguf, built)
        except PersonaError:
            raise
        except Exception as error:  # whatever transformers meets in a file it does not know
            raise PersonaError(
                f"'{gguf}' (architecture {architecture!r}) cannot be converted: "
                f"{first_line(error)}; try the model's safetensors from the hub instead."
            ) from error
        versions = _versions()
        marker = {**record, "dtype": "float32", "method": _METHOD, "versions": versions}
        (built / MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")
        _publish(built, target)


def _publish(built: Path, target: Path) -> None:
    """Rename `built` to `target`, unless another process got there first."""
    try:
        os.replace(built, target)
    except OSError:
        if not read_marker(target):
            raise


def _read(gguf: Path) -> Any:
    """Parse the file's metadata and tensor table; bytes that are no GGUF are one sentence."""
    from gguf import GGUFReader

    try:
        return GGUFReader(gguf)
    except Exception as error:  # the reader trusts the file and trips in as many ways as there are
        raise PersonaError(
            f"'{gguf}' ({human_size(gguf.stat().st_size)}) is not a complete GGUF file, "
            "it is cut off or damaged; download or copy it again."
        ) from error


def _architecture(reader: Any, gguf: Path) -> str:
    """Return the architecture a GGUF file names, which every model's file does."""
    field = reader.fields.get("general.architecture")
    if field is None:
        raise PersonaError(
            f"'{gguf}' is a GGUF file that names no model architecture; give one that holds "
            "a whole language model."
        )
    return str(field.contents())


def _save(gguf: Path, target: Path) -> None:
    """Load with transformers, de-quantised, and save what an ordinary model directory holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as loader

    from persona_nnsight.models.weights import gguf_settings, gguf_tensors

    auto: Any = AutoModelForCausalLM
    reader = _read(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    factors = gguf_tensors.rotary_factors(reader)
    config = gguf_settings.as_the_file_says(
        AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name),
        gguf_settings.metadata_of(reader),
        gguf_settings.read_by_transformers(gguf),
        factors,
        str(gguf),
    )
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)
    with ExitStack() as stack:
        if (places := gguf_tensors.places(reader, model)) is not None:
            unused = gguf_tensors.left_out(reader, places) - factors.keys()
            gguf_tensors.refuse_left_out(unused, model, str(gguf))
            # They take long to find.
            known = _swapped(loader, "get_gguf_hf_weights_map", lambda *_, **__: places)
            stack.enter_context(known)
        loaded, report = auto.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise PersonaError(
            f"'{gguf}' lacks {len(report['missing_keys'])} of the model's tensors "
            f"({sorted(report['missing_keys'])[0]}, …); give a file that holds a whole model."
        )
    gguf_tensors.refuse_left_out(report["unexpected_keys"], model, str(gguf))
    # A loaded GGUF counts as quantised for good and will not save: hand its tensors, uncopied,
    # to a plain model of the same configuration.
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    for file in target.glob("*.safetensors"):  # written for the owner's eyes only
        shutil.copymode(target / CONFIG, file)
    _agree_on_special_tokens(tokenizer, config)
    tokenizer.save_pretrained(target)


def _agree_on_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give the tokenizer the end and padding tokens of the model where the two disagree.

    transformers reads them from a GGUF for the model but not always for the tokenizer:
    SmolLM2's would end its turns with `<|im_start|>`.
    """
    for name in ("eos_token", "pad_token"):
        ids = getattr(config, f"{name}_id", None)
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and getattr(tokenizer, f"{name}_id") != first:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(first))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' log and progress bars; put them back as they were."""
    import huggingface_hub.utils
    import transformers.utils.logging
    from transformers import modeling_gguf_pytorch_utils as loader

    chatter: Any = transformers.utils.logging
    hub: Any = huggingface_hub.utils
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()  # the hub's too
    try:
        with _swapped(loader, "tqdm", lambda items, **_: items):
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()


@contextmanager
def _read_once(reader: Any) -> Iterator[None]:
    """Let transformers use `reader` where it would parse the same file again, three times."""
    import gguf

    with _swapped(gguf, "GGUFReader", lambda *_: reader):
        yield


@contextmanager
def _swapped(module: Any, name: str, value: object) -> Iterator[None]:
    """Replace a module's attribute for a while; do nothing where this version has none."""
    with ExitStack() as stack:
        if hasattr(module, name):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that did the conversion."""
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "gguf", "torch")}
