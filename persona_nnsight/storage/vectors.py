"""Saved effect vectors: what each persona and each task does to the residual, in one file.

The pure effects are differences from the baseline prompt BB: Δ_X = h_XB - h_BB for a persona and
Δ_Y = h_BY - h_BB for a task. At the two prompt positions they depend on nothing else, so they can
be measured once and used later. At g1, g2, … they depend on the cell's continuation, and are not
saved.

The file is a safetensors file: float32 tensors ``h_BB``, ``delta_x.<persona>`` and
``delta_y.<task>``, each [positions, layers, d_model], and one metadata entry ``persona_nnsight``
with the labels as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.prompts.rendering import parse_day
from persona_nnsight.storage.files import write_new

if TYPE_CHECKING:
    from torch import Tensor

#: The positions at which an effect does not depend on a continuation, in sequence order.
PROMPT_POSITIONS = ("p_user_last", "p_last")

#: Version of the layout of the file.
FORMAT = 1

_METADATA_KEY = "persona_nnsight"
_LABELS = (
    "model_id",
    "model_sha256",
    "architecture",
    "n_layers",
    "d_model",
    "template",
    "baseline_persona",
    "baseline_task",
    "positions",
    "layers",
    "personas",
    "tasks",
    "date",
)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Effects of personas and tasks on one model, with everything needed to use them again.

    Attributes:
        model_id: the hub id, the alias, or the name of the directory or GGUF file.
        model_sha256: hash of the weights where there is one (`Weights`).
        architecture: transformers' ``config.model_type``, such as ``llama``.
        n_layers, d_model: decoder layers of the model, and the width of its residual.
        template, baseline_persona, baseline_task: of the grid that was measured.
        positions: out of `PROMPT_POSITIONS`, in that order.
        layers: ascending; the residual at layer L is the input of decoder layer L.
        personas, tasks: text by key.
        base: h_BB, float32 [positions, layers, d_model].
        delta_x, delta_y: Δ_X by persona key and Δ_Y by task key, each like `base`.
        date: the day that was written into the prompts, ``YYYY-MM-DD``; None for none.

    Raises:
        PersonaError: the labels are no grid, or a tensor does not fit them, is not float32, or
            holds a value that is not finite.
    """

    model_id: str
    model_sha256: str | None
    architecture: str
    n_layers: int
    d_model: int
    template: str
    baseline_persona: str
    baseline_task: str
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    personas: dict[str, str]
    tasks: dict[str, str]
    base: Tensor
    delta_x: dict[str, Tensor]
    delta_y: dict[str, Tensor]
    date: str | None = None

    def __post_init__(self) -> None:
        self._check_model()
        self._check_sites()
        self._check_grid()
        self._check_tensors()

    def save(self, path: str | Path) -> Path:
        """Write the file, and its directory where that is missing; return its path.

        Raises:
            PersonaError: `path` exists already, or cannot be written.
        """
        labels = {name: getattr(self, name) for name in _LABELS}
        metadata = {_METADATA_KEY: json.dumps({"format": FORMAT, **labels}, ensure_ascii=False)}
        # Copies, because safetensors refuses views, which slices of captured residuals are.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors().items()
        }
        return write_new(path, lambda partial: partial.write_bytes(save(tensors, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> Vectors:
        """Read a file that `save` wrote.

        Raises:
            PersonaError: there is no such file, it is damaged or of another kind or version, or
                its tensors do not fit its labels.
        """
        path = Path(path)
        if not path.is_file():
            problem = "is a directory" if path.is_dir() else "does not exist"
            raise PersonaError(
                f"{str(path)!r} {problem}; give the path of a file of saved vectors."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PersonaError(
                f"{str(path)!r} cannot be read as a safetensors file ({error}); it may be of "
                "another kind or cut short, so save the vectors again."
            ) from error
        try:
            return cls._from_parts(metadata, tensors)
        except PersonaError as problem:
            raise PersonaError(f"{path}: {problem}") from None

    @classmethod
    def _from_parts(cls, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Vectors:
        if _METADATA_KEY not in metadata:
            raise PersonaError(
                f"the file has no metadata {_METADATA_KEY!r}, so it holds no saved vectors; give "
                "a file that persona-nnsight saved as vectors (residuals of a run are no vectors)."
            )
        try:
            labels = json.loads(metadata[_METADATA_KEY])
        except (ValueError, RecursionError):
            labels = None
        if not isinstance(labels, dict):
            raise PersonaError(
                f"the metadata {_METADATA_KEY!r} is not a JSON object; save the vectors again."
            )
        if labels.get("format") != FORMAT:
            raise PersonaError(
                f"the vectors are in format {labels.get('format')!r}, and this version reads "
                f"format {FORMAT}; update persona-nnsight or save the vectors again."
            )
        labels.setdefault("date", None)
        missing = [name for name in _LABELS if name not in labels]
        if missing:
            raise PersonaError(f"the label {missing[0]!r} is missing; save the vectors again.")
        known = {name: labels[name] for name in _LABELS}
        for name in ("positions", "layers"):
            if isinstance(known[name], list):
                known[name] = tuple(known[name])
        base = tensors.pop("h_BB", None)
        if base is None:
            raise PersonaError("the tensor 'h_BB' is missing; save the vectors again.")
        effects: dict[str, dict[str, Tensor]] = {"delta_x": {}, "delta_y": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition(".")
            if kind not in effects:
                raise PersonaError(
                    f"the tensor {name!r} is none of h_BB, delta_x.<persona> and delta_y.<task>; "
                    "save the vectors again."
                )
            effects[kind][key] = tensor
        return cls(**known, base=base, delta_x=effects["delta_x"], delta_y=effects["delta_y"])

    def check(
        self,
        *,
        model_id: str,
        model_sha256: str | None,
        n_layers: int,
        d_model: int,
        grid: Grid,
        layers: tuple[int, ...],
        positions: tuple[str, ...],
        date: str | None = None,
    ) -> None:
        """Refuse vectors that do not belong to what is about to run.

        Models are the same if their hashes are, and where one has no hash, if their ids are.

        Args:
            model_id, model_sha256, n_layers, d_model: the model that runs.
            grid: its template, its baselines and its selected personas must be those of the file.
            layers, positions: the sites that are read; each must be in the file.
            date: the day that is written into the prompts; it must be that of the file.

        Raises:
            PersonaError: anything of that is different or missing.
        """
        again = "save vectors again with this model"
        if self.model_sha256 and model_sha256:
            if self.model_sha256 != model_sha256:
                raise PersonaError(
                    f"The vectors are of other weights ({self.model_id!r}, sha256 "
                    f"{self.model_sha256[:12]}…) than the model {model_id!r} (sha256 "
                    f"{model_sha256[:12]}…); run the model they were measured on, or {again}."
                )
        elif self.model_id != model_id:
            raise PersonaError(
                f"The vectors are of the model {self.model_id!r}, not of {model_id!r}; run "
                f"{self.model_id!r}, or {again}."
            )
        if (self.n_layers, self.d_model) != (n_layers, d_model):
            raise PersonaError(
                f"The vectors are of a model with {self.n_layers} layers and d_model "
                f"{self.d_model}, but {model_id!r} has {n_layers} layers and d_model {d_model}; "
                f"{again}."
            )
        for field in ("template", "baseline_persona", "baseline_task"):
            saved, asked = getattr(self, field), getattr(grid, field)
            if saved != asked:
                raise PersonaError(
                    f"The vectors were measured with the {field.replace('_', ' ')} {saved!r}, but "
                    f"the grid {grid.name!r} has {asked!r}; use the same, or save vectors again "
                    "with this grid."
                )
        texts = {persona.key: persona.text for persona in grid.personas}
        for key in grid.persona_keys:
            _index("persona", key, tuple(self.personas))
            if self.personas[key] != texts[key]:
                raise PersonaError(
                    f"The persona {key!r} is {self.personas[key]!r} in the vectors, but "
                    f"{texts[key]!r} in the grid {grid.name!r}; use the same text, or save "
                    "vectors again with this grid."
                )
        if self.date != date:
            saved, asked = (
                f"dated {day}" if day else "without a date" for day in (self.date, date)
            )
            raise PersonaError(
                f"The vectors were measured on prompts {saved}, and the prompts of this run are "
                f"{asked}; leave --date out, use the chat template that they were measured with, "
                "or save vectors again."
            )
        for position in positions:
            _index("position", position, self.positions)
        for layer in layers:
            _index("layer", layer, self.layers)

    def given_x(
        self, personas: Iterable[str], positions: Sequence[str], layers: Sequence[int]
    ) -> dict[str, tuple[tuple[tuple[float, ...], ...], ...]]:
        """Δ_X by persona key as plain numbers, [positions][layers][d_model] in the order asked.

        Raises:
            PersonaError: a persona, position or layer that is not in the file.
        """
        rows = [_index("position", position, self.positions) for position in positions]
        columns = [_index("layer", layer, self.layers) for layer in layers]
        keys = tuple(self.personas)
        given = {}
        for persona in personas:
            _index("persona", persona, keys)
            values = self.delta_x[persona].tolist()
            given[persona] = tuple(tuple(tuple(values[p][k]) for k in columns) for p in rows)
        return given

    def delta_x_at(self, persona: str, position: str, layer: int) -> Tensor:
        """Δ_X of one persona at one site, float32 [d_model].

        Raises:
            PersonaError: a persona, position or layer that is not in the file.
        """
        _index("persona", persona, tuple(self.personas))
        site = _index("position", position, self.positions), _index("layer", layer, self.layers)
        return self.delta_x[persona][site]

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "h_BB": self.base,
            **{f"delta_x.{key}": tensor for key, tensor in self.delta_x.items()},
            **{f"delta_y.{key}": tensor for key, tensor in self.delta_y.items()},
        }

    def _check_model(self) -> None:
        texts: dict[str, Any] = {"model_id": self.model_id, "architecture": self.architecture}
        if self.model_sha256 is not None:
            texts["model_sha256"] = self.model_sha256
        for name, text in texts.items():
            if not isinstance(text, str) or not text or not text.isprintable():
                raise PersonaError(f"{name} is {text!r}; it must be a text of one line.")
        for name, number in (("n_layers", self.n_layers), ("d_model", self.d_model)):
            if type(number) is not int or number < 1:
                raise PersonaError(f"{name} is {number!r}; it must be a whole number from 1 on.")

        if self.date is not None and parse_day(self.date, "date") != self.date:
            raise PersonaError(f"date is {self.date!r}; it must be written as YYYY-MM-DD.")

    def _check_sites(self) -> None:
        if self.positions not in (PROMPT_POSITIONS, *((name,) for name in PROMPT_POSITIONS)):
            raise PersonaError(
                f"positions are {_plain(self.positions)}; vectors are saved at p_user_last, "
                "p_last or both, in this order (at g1, g2, … effects depend on the continuation)."
            )
        if (
            not isinstance(self.layers, tuple)
            or not self.layers
            or any(type(layer) is not int for layer in self.layers)
            or list(self.layers) != sorted(set(self.layers))
            or not 0 <= self.layers[0] <= self.layers[-1] < self.n_layers
        ):
            raise PersonaError(
                f"layers are {_plain(self.layers)}; they must be whole numbers from 0 to "
                f"{self.n_layers - 1}, ascending and without repeats."
            )

    def _check_grid(self) -> None:
        # Keys, texts, template and baselines follow the rules of a grid, so a grid checks them.
        grid = Grid.from_dict(
            {
                "name": "vectors",
                "template": self.template,
                "baseline": {"persona": self.baseline_persona, "task": self.baseline_task},
                "personas": self.personas,
                "tasks": self.tasks,
            }
        )
        for kind, given, entries in (
            ("persona", self.personas, grid.personas),
            ("task", self.tasks, grid.tasks),
        ):
            for entry in entries:
                if given[entry.key] != entry.text:
                    raise PersonaError(
                        f"the {kind} {entry.key!r} is {given[entry.key]!r}, which is no plain text "
                        f"without white space around it; use {entry.text!r}."
                    )

    def _check_tensors(self) -> None:
        for kind, effects, texts in (
            ("delta_x", self.delta_x, self.personas),
            ("delta_y", self.delta_y, self.tasks),
        ):
            unpaired = sorted(effects.keys() ^ texts.keys())
            if unpaired:
                key = unpaired[0]
                has, lacks = ("tensor", "text") if key in effects else ("text", "tensor")
                raise PersonaError(
                    f"'{kind}.{key}' has a {has} but no {lacks}; give both, or neither."
                )
        shape = (len(self.positions), len(self.layers), self.d_model)
        for name, tensor in self._tensors().items():
            if tensor.dtype != torch.float32:
                raise PersonaError(
                    f"the tensor {name!r} is {_plain(tensor.dtype)}; effects are float32, and are "
                    "subtracted in float32 whatever the model's dtype."
                )
            if tuple(tensor.shape) != shape:
                raise PersonaError(
                    f"the tensor {name!r} has the shape {list(tensor.shape)}, but the labels say "
                    f"{list(shape)} (positions, layers, d_model); save the vectors again."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise PersonaError(
                    f"the tensor {name!r} holds a value that is not finite; measure it again in "
                    "float32 or bfloat16 (float16 overflows in some models)."
                )


def _index(kind: str, wanted: str | int, known: Sequence[str | int]) -> int:
    if wanted not in known:
        names = ", ".join(map(str, known))
        raise PersonaError(
            f"The vectors hold no {kind} {wanted!r}; choose among theirs ({names}), or save "
            f"vectors again with that {kind}."
        )
    return known.index(wanted)


def _plain(value: object) -> str:
    """A value as a message shows it: tuples as lists, types without ``torch.``."""
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
