"""The oracle of blocked attention and of grafted keys and values: plain transformers, eager.

No nnsight, no KV cache, no batching: one sequence and one full forward for each number. What an
attention layer is given is changed where it computes, in transformers' own function for it. Imports
nothing from the package, so that agreement with it means something.

A graft is one forward over the host, whose layers also see the donor's prompt: its keys and values
are appended to the host's, and masks say which query sees which of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from reference import Reference, kl
from torch import Tensor

Groups = Collection[str]
Entries = Collection[tuple[int, int]]
"""(layer, token of the donor) each."""

#: What an attention layer is given, and what it shall have instead: (layer, keys, values, mask,
#: sliding window); keys and values are [1, heads, tokens, width], masks are added to scores.
Change = Callable[[int, Tensor, Tensor, Tensor, "int | None"], tuple[Tensor, Tensor, Tensor]]

_WEIGHTLESS = -torch.inf


@dataclass(frozen=True)
class Message:
    """A user message, and where the persona's and the task's texts begin and end in it."""

    text: str
    persona: tuple[int, int]
    task: tuple[int, int]


def message(persona: str, task: str, template: str = "As {persona}, {task}") -> Message:
    """A role prompt."""
    texts = {"{persona}": persona, "{task}": task}
    first, second = sorted(texts, key=template.index)
    before, rest = template.split(first)
    between, after = rest.split(second)
    at_first = len(before)
    at_second = at_first + len(texts[first]) + len(between)
    spans = {
        first: (at_first, at_first + len(texts[first])),
        second: (at_second, at_second + len(texts[second])),
    }
    text = before + texts[first] + between + texts[second] + after
    return Message(text, spans["{persona}"], spans["{task}"])


class Mechanism(Reference):
    """Knockouts and grafts of one model, one forward at a time."""

    _donor: tuple[tuple[str, tuple[int, ...]], dict[int, tuple[Tensor, Tensor]]] | None = None
    """The donor that was asked for last, and its keys and values: it is asked for again."""

    # --------------------------------------------------------------------- token groups

    def groups(self, message: Message) -> list[str]:
        """The group of every token of a prompt."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": message.text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        assert isinstance(rendered, str)
        start = rendered.rindex(message.text)
        of_character = ["frame"] * len(rendered)
        (first, own), (second, other) = sorted(
            [(message.persona, "persona"), (message.task, "task")]
        )
        for index in range(start + first[0], len(rendered)):
            inside = index - start
            of_character[index] = (
                own if inside < first[1] else other if inside < second[1] else "header"
            )
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        found = []
        for begin, end in cast("list[tuple[int, int]]", encoded["offset_mapping"]):
            seen = [index for index in range(begin, end) if not rendered[index].isspace()]
            found.append(of_character[seen[0] if seen else begin])
        return [*found[:-1], "answer"]

    # -------------------------------------------------------------------- one forward

    @contextmanager
    def _attending(self, change: Change | None, weights: list[Tensor] | None) -> Iterator[None]:
        """Attention computes eagerly, from what `change` makes of its keys, values and mask."""
        attention = next(
            module for module in self.layers[0].modules() if hasattr(module, "layer_idx")
        )
        modeling = sys.modules[type(attention).__module__]
        plain: Any = vars(modeling)["eager_attention_forward"]

        def eager(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
        ) -> tuple[Tensor, Tensor]:
            lowest = torch.finfo(mask.dtype).min
            mask = mask.masked_fill(mask == lowest, _WEIGHTLESS)
            if change is not None:
                window = options.get("sliding_window")
                key, value, mask = change(module.layer_idx, key, value, mask, window)
            if (mask == _WEIGHTLESS).all(-1).any():
                raise ValueError(f"layer {module.layer_idx}: a token is left with nothing to see")
            output, seen = plain(module, query, key, value, mask, **options)
            if weights is not None:
                weights.append(seen[0])
            return output, seen

        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with patch.object(modeling, "eager_attention_forward", eager):
                yield
        finally:
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def run(
        self,
        prompt: Message,
        tokens: Sequence[int],
        change: Change | None = None,
        *,
        shift: int = 0,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Log-probabilities [len(tokens), vocab] of the tokens that follow a prompt.

        Args:
            prompt: the prompt.
            tokens: its continuation.
            change: what is done to attention.
            shift: added to every position.
            weights: gets what every layer's heads attend to, [heads, tokens, tokens].
        """
        ids = self.ids(prompt.text)
        learned = any(name.endswith("wpe.weight") for name, _ in self.model.named_parameters())
        if learned and shift < 0:
            raise ValueError(f"this model has no position {shift}")
        sequence = torch.tensor([[*ids, *tokens]], device=self.model.device)
        positions = torch.arange(sequence.shape[1], device=self.model.device)[None] + shift
        with self._attending(change, weights):
            output = self.model(input_ids=sequence, position_ids=positions, use_cache=False)
        logits = cast(Tensor, output.logits[0].float())
        return logits[len(ids) - 1 : len(ids) - 1 + len(tokens)].log_softmax(-1)

    # ----------------------------------------------------------------------- knockout

    def blocked(
        self,
        prompt: Message,
        tokens: Sequence[int],
        queries: Groups,
        keys: Groups | Collection[int],
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> Tensor:
        """`run` without the attention from some groups of tokens to others.

        Args:
            prompt, tokens: what is run.
            queries: groups whose tokens see less.
            keys: groups, or indices of tokens, that they do not see.
            layers: where.
            heads: query heads; None for all.
        """
        names = [*self.groups(prompt), *["answer"] * len(tokens)]
        asks = torch.tensor([name in queries for name in names])
        hides = torch.tensor([name in keys or index in keys for index, name in enumerate(names)])
        edges = asks[:, None] & hides[None, :]

        def change(
            layer: int, key: Tensor, value: Tensor, mask: Tensor, window: int | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            if layer not in layers:
                return key, value, mask
            n_heads = self.model.config.get_text_config().num_attention_heads
            chosen = range(n_heads) if heads is None else heads
            per_head = mask.expand(-1, n_heads, -1, -1).clone()
            for head in chosen:
                per_head[:, head].masked_fill_(edges, _WEIGHTLESS)
            return key, value, per_head

        return self.run(prompt, tokens, change)

    def knockout(
        self,
        target: Message,
        host: Message,
        tokens: Sequence[int],
        queries: Groups,
        keys: Groups | Collection[int],
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> dict[str, float]:
        """`kl`, `share_of_host` and `toward_host` of a knockout in the target, XY."""
        clean, unnamed = self.run(target, tokens), self.run(host, tokens)
        patched = self.blocked(target, tokens, queries, keys, layers, heads)
        return {
            "kl": kl(clean, patched),
            "share_of_host": kl(clean, patched) / kl(clean, unnamed),
            "toward_host": 1 - kl(unnamed, patched) / kl(unnamed, clean),
        }

    def host_knockout(
        self,
        host: Message,
        tokens: Sequence[int],
        queries: Groups,
        keys: Groups,
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> float:
        """The control: KL of the same edges blocked in the host."""
        patched = self.blocked(host, tokens, queries, keys, layers, heads)
        return kl(self.run(host, tokens), patched)

    # -------------------------------------------------------------------------- graft

    def keys_and_values(
        self, prompt: Message, tokens: Sequence[int]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Those of a prompt's tokens, by layer, as attention multiplies them: rotated."""
        asked = prompt.text, tuple(tokens)
        if self._donor is not None and self._donor[0] == asked:
            return self._donor[1]
        n = len(self.ids(prompt.text))
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(
            layer: int, key: Tensor, value: Tensor, mask: Tensor, window: int | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            found[layer] = key[:, :, :n].clone(), value[:, :, :n].clone()
            return key, value, mask

        self.run(prompt, tokens, keep)
        self._donor = asked, found
        return found

    def grafted(
        self,
        donor: Message,
        host: Message,
        tokens: Sequence[int],
        groups: Groups,
        layers: Collection[int],
        *,
        recompute: bool = False,
        entries: Entries | None = None,
    ) -> Tensor:
        """Log-probabilities of a host whose answer sees a donor's keys and values.

        Args:
            donor, host: the prompts.
            tokens: the continuation.
            groups: of persona, task and header, those that are the donor's.
            layers: where they are.
            recompute: the host's task and header see them too.
            entries: of the groups' entries only these; None for all.
        """
        assert not (recompute and set(groups) - {"persona"})
        given, own = self.groups(donor), self.groups(host)
        shift = len(given) - len(own)
        cached = self.keys_and_values(donor, tokens)
        names = [*own, *["answer"] * len(tokens)]
        anew = {"task", "header", "answer"} if recompute else {"answer"}
        asks = torch.tensor([name in anew for name in names])
        replaced = {"frame", "persona"} if "persona" in groups else set()

        def taken(layer: int, token: int) -> bool:
            """Whether an entry of the donor is seen."""
            if given[token] == "frame":
                return "persona" in groups
            return given[token] in groups and (entries is None or (layer, token) in entries)

        def hidden(layer: int, token: int) -> bool:
            """Whether an entry of the host is not."""
            if names[token] in replaced:
                return True
            if token >= len(own) or names[token] not in groups:
                return False
            partner = token + shift
            has_partner = 0 <= partner < len(given) and given[partner] == names[token]
            return taken(layer, partner) if has_partner else True

        def change(
            layer: int, key: Tensor, value: Tensor, mask: Tensor, window: int | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            if layer not in layers:
                return key, value, mask
            away = torch.tensor([hidden(layer, token) for token in range(len(names))])
            mask = mask.masked_fill(asks[:, None] & away[None, :], _WEIGHTLESS)
            there = torch.tensor([taken(layer, token) for token in range(len(given))])
            back = (torch.arange(len(names)) + shift)[:, None] - torch.arange(len(given))[None, :]
            sees = asks[:, None] & there[None, :] & (back >= 0)
            if window is not None:
                sees &= back < window
            more = torch.zeros(sees.shape, dtype=mask.dtype).masked_fill(~sees, _WEIGHTLESS)
            keys, values = cached[layer]
            return (
                torch.cat([keys, key], dim=2),
                torch.cat([values, value], dim=2),
                torch.cat([more.expand(*mask.shape[:2], -1, -1), mask], dim=3),
            )

        return self.run(host, tokens, change, shift=shift)

    def mass(self, prompt: Message, tokens: Sequence[int]) -> Tensor:
        """How much attention each entry of a prompt gets from the answer: [layers, tokens].

        Summed over query heads and over the tokens of which one of `tokens` is predicted.
        """
        n = len(self.ids(prompt.text))
        weights: list[Tensor] = []
        self.run(prompt, tokens, weights=weights)
        rows = slice(n - 1, n - 1 + len(tokens))
        return torch.stack([layer[:, rows, :n].sum((0, 1)) for layer in weights])

    def most_seen(
        self,
        prompt: Message,
        tokens: Sequence[int],
        groups: Groups,
        layers: Collection[int],
        share: float,
    ) -> set[tuple[int, int]]:
        """The entries of some groups with the most attention mass, rounded to a whole number."""
        mass, names = self.mass(prompt, tokens), self.groups(prompt)
        candidates = [
            (layer, token) for layer in layers for token, name in enumerate(names) if name in groups
        ]
        candidates.sort(key=lambda entry: -float(mass[entry]))
        return set(candidates[: round(share * len(candidates))])


def gap_closed(clean: Tensor, host: Tensor, patched: Tensor) -> float:
    """Of the KL of a host from the clean run, the share that is gone."""
    return 1 - kl(clean, patched) / kl(clean, host)


def cell_messages(
    texts: Mapping[str, str], template: str = "As {persona}, {task}"
) -> dict[str, Message]:
    """XY, BY and X'Y of a cell, from the texts X, Y, B and X'."""
    pairs = {"XY": "X", "BY": "B", "X'Y": "X'"}
    return {
        name: message(texts[key], texts["Y"], template)
        for name, key in pairs.items()
        if key in texts
    }
