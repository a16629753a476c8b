"""The oracle of knockouts and grafts against what must hold whatever the weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from mechanism import Mechanism, Message, cell_messages, gap_closed
from reference import Reference, kl
from tiny import IM_END_ID, N_LAYERS, Tiny
from torch import Tensor

from persona_nnsight import Grid, Model

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_neox", "gpt2")
LAYERS = range(N_LAYERS)
ALL = ("persona", "task", "header")
EXACT = 1e-10
"""Nats in float64."""


def of(model: Model) -> Mechanism:
    return Mechanism(model.lm._module, model.tokenizer, [IM_END_ID])


@dataclass(frozen=True)
class Case:
    """One cell of a tiny model, whose persona is longer than the baseline."""

    oracle: Mechanism
    target: Message
    host: Message
    other: Message
    tokens: Sequence[int]
    clean: Tensor
    unnamed: Tensor

    def grafted(
        self, groups: Sequence[str], layers: Sequence[int] = LAYERS, *, recompute: bool = False
    ) -> float:
        """KL from clean."""
        found = self.oracle.grafted(
            self.target, self.host, self.tokens, groups, layers, recompute=recompute
        )
        return kl(self.clean, found)


def case_of(model: Model) -> Case:
    oracle = of(model)
    texts = {
        "X": "Karl Marx, the author",
        "Y": "write a haiku.",
        "B": "someone",
        "X'": "a head chef",
    }
    found = cell_messages(texts)
    target, host = found["XY"], found["BY"]
    tokens = oracle.greedy(oracle.ids(target.text), 5)
    clean, unnamed = oracle.run(target, tokens), oracle.run(host, tokens)
    return Case(oracle, target, host, found["X'Y"], tokens, clean, unnamed)


@pytest.fixture
def case(tiny64: Tiny) -> Callable[[str], Case]:
    return lambda family: case_of(tiny64(family))


def test_the_groups_of_a_prompt(tiny: Tiny) -> None:
    oracle = of(tiny("llama"))
    (first, second) = (
        cell_messages({"X": "Yoda", "Y": "write.", "B": "me"}, template)["XY"]
        for template in ("As {persona}, {task}", "{task} As {persona}!")
    )
    for message, expected in (
        (first, {"frame": 1 + 5 + 3, "persona": 4, "task": 2 + 6, "header": 1 + 1 + 1 + 9}),
        (second, {"frame": 1 + 5, "task": 6, "persona": 4 + 4, "header": 1 + 1 + 1 + 1 + 9}),
    ):
        names = oracle.groups(message)
        assert names[-1] == "answer"
        assert list(dict.fromkeys(names)) == [*expected, "answer"]
        assert {name: names.count(name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unedited_run_is_the_models_own(case: Callable[[str], Case], family: str) -> None:
    found = case(family)
    ids = found.oracle.ids(found.target.text)
    plain = Reference.logprobs(found.oracle, [*ids, *found.tokens], len(ids), len(found.tokens))
    assert abs(kl(plain, found.clean)) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_of_nothing_is_the_host(case: Callable[[str], Case], family: str) -> None:
    """With the positions that the graft has, of which rotary models do not notice."""
    found = case(family)
    shift = len(found.oracle.ids(found.target.text)) - len(found.oracle.ids(found.host.text))
    assert shift > 0
    shifted = found.oracle.run(found.host, found.tokens, shift=shift)
    assert found.grafted([]) == pytest.approx(kl(found.clean, shifted), abs=EXACT)
    assert found.grafted(ALL, []) == pytest.approx(kl(found.clean, shifted), abs=EXACT)
    if family == "gpt2":
        assert kl(found.unnamed, shifted) > 1e-3
    else:
        assert abs(kl(found.unnamed, shifted)) < EXACT
        assert found.grafted([]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_of_everything_is_clean(case: Callable[[str], Case], family: str) -> None:
    found = case(family)
    assert abs(found.grafted(ALL)) < EXACT
    for part in (ALL[:1], ALL[:2]):
        assert found.grafted(part) > 1e-6, part
    assert found.grafted(ALL, [0, 1, 2]) > 1e-6
    # What no window of the answer reaches back to makes no difference to it.
    assert (found.grafted(ALL[1:]) > 1e-6) == (family != "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_a_grafted_persona_is_clean(case: Callable[[str], Case], family: str) -> None:
    """The prefix cache of the persona."""
    found = case(family)
    assert abs(found.grafted(ALL[:1], recompute=True)) < EXACT
    assert found.grafted(ALL[:1], [1, 2], recompute=True) > 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_identities_in_float32(tiny: Tiny, family: str) -> None:
    found = case_of(tiny(family))
    assert abs(found.grafted(ALL)) < 1e-5
    assert abs(found.grafted(ALL[:1], recompute=True)) < 1e-5


def test_every_entry_is_the_whole_graft(case: Callable[[str], Case]) -> None:
    found = case("llama")
    oracle, pair, tokens = found.oracle, (found.target, found.host), found.tokens
    for groups in (ALL[:1], ALL[:2], ALL):
        every = oracle.most_seen(found.target, tokens, groups, LAYERS, 1.0)
        some = oracle.most_seen(found.target, tokens, groups, LAYERS, 0.3)
        assert some < every
        assert len(every) == N_LAYERS * sum(n in groups for n in oracle.groups(found.target))
        whole = oracle.grafted(*pair, tokens, groups, LAYERS)
        assert abs(kl(whole, oracle.grafted(*pair, tokens, groups, LAYERS, entries=every))) < EXACT
        assert kl(whole, oracle.grafted(*pair, tokens, groups, LAYERS, entries=some)) > 1e-6
    # Without entries of the task and the header they are the host's own.
    none = oracle.grafted(*pair, tokens, ALL[1:], LAYERS, entries=())
    assert kl(found.clean, none) == pytest.approx(found.grafted([]), abs=EXACT)


def test_the_mass_of_attention(case: Callable[[str], Case]) -> None:
    """Every head of every query gives away one; what is not in the prompt went to the answer."""
    found = case("llama")
    mass = found.oracle.mass(found.target, found.tokens[:1])
    assert mass.shape == (N_LAYERS, len(found.oracle.ids(found.target.text)))
    assert torch.allclose(mass.sum(1), torch.tensor(4.0))
    more = found.oracle.mass(found.target, found.tokens)
    assert ((more > mass - 1e-12) & (more.sum(1, keepdim=True) < 4 * len(found.tokens))).all()


def test_the_controls_of_a_graft(case: Callable[[str], Case]) -> None:
    found = case("qwen3")
    own = found.oracle.grafted(found.host, found.host, found.tokens, ALL, LAYERS)
    assert abs(kl(found.unnamed, own)) < EXACT
    assert gap_closed(found.clean, found.unnamed, own) == pytest.approx(0, abs=1e-8)
    other = found.oracle.grafted(found.other, found.host, found.tokens, ALL, LAYERS)
    assert abs(kl(found.oracle.run(found.other, found.tokens), other)) < EXACT
    assert kl(found.clean, other) > 1e-3


def test_learned_positions_below_none_are_refused(case: Callable[[str], Case]) -> None:
    """A host that is longer than its donor."""
    found = case("gpt2")
    with pytest.raises(ValueError, match="no position -14"):
        found.oracle.grafted(found.host, found.target, found.tokens, ALL, LAYERS)
    rotary = case("gpt_neox")
    clean = rotary.oracle.run(rotary.host, rotary.tokens)
    whole = rotary.oracle.grafted(rotary.host, rotary.target, rotary.tokens, ALL, LAYERS)
    assert abs(kl(clean, whole)) < EXACT


# -------------------------------------------------------------------------------- knockouts


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_blocked_in_no_layer_or_head(case: Callable[[str], Case], family: str) -> None:
    found = case(family)
    edges = (found.target, found.tokens, ["answer"], ["persona"])
    assert abs(kl(found.clean, found.oracle.blocked(*edges, []))) < EXACT
    assert abs(kl(found.clean, found.oracle.blocked(*edges, LAYERS, heads=[]))) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_blocking_all_is_removing(case: Callable[[str], Case], family: str) -> None:
    """A persona that nothing later sees is not there, and leaves its positions empty."""
    found = case(family)
    later = ["task", "header", "answer"]
    blocked = found.oracle.blocked(found.target, found.tokens, later, ["persona"], LAYERS)
    assert kl(found.clean, blocked) > 1e-6
    removed = without(found, "persona")
    assert abs(kl(removed, blocked)) < EXACT


def without(found: Case, group: str) -> Tensor:
    """The log-probabilities of a prompt that lacks a group's tokens, at the positions as before.

    A window of attention is counted in tokens by transformers, so that it gets a mask that counts
    in positions.
    """
    ids, names = found.oracle.ids(found.target.text), found.oracle.groups(found.target)
    kept = [index for index, name in enumerate(names) if name != group]
    answer = range(len(ids), len(ids) + len(found.tokens))
    positions = torch.tensor([*kept, *answer])
    sequence = torch.tensor([[*(ids[index] for index in kept), *found.tokens]])

    def by_position(
        layer: int, key: Tensor, value: Tensor, mask: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        back = positions[:, None] - positions[None, :]
        sees = (back >= 0) if window is None else (back >= 0) & (back < window)
        return key, value, torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[None, None]

    with torch.no_grad(), found.oracle._attending(by_position, None):
        logits: Tensor = found.oracle.model(
            input_ids=sequence,
            position_ids=positions[None],
            attention_mask=torch.ones_like(sequence),
            use_cache=False,
        ).logits[0]
    start = len(kept) - 1
    return logits[start : start + len(found.tokens)].log_softmax(-1)


def test_heads_are_blocked_each_alone(case: Callable[[str], Case]) -> None:
    found = case("qwen3")
    edges = (found.target, found.tokens, ["answer"], ["persona"], LAYERS)
    every = kl(found.clean, found.oracle.blocked(*edges))
    together = kl(found.clean, found.oracle.blocked(*edges, heads=range(4)))
    alone = [kl(found.clean, found.oracle.blocked(*edges, heads=[head])) for head in range(4)]
    assert together == pytest.approx(every, abs=EXACT)
    assert all(1e-9 < one != every for one in alone)
    assert len(set(alone)) == 4


def test_keys_can_be_given(case: Callable[[str], Case]) -> None:
    found = case("llama")
    names = found.oracle.groups(found.target)
    persona = [index for index, name in enumerate(names) if name == "persona"]
    edges = (found.target, found.tokens, ["answer", "task"])
    by_group = found.oracle.blocked(*edges, ["persona"], LAYERS)
    assert torch.equal(by_group, found.oracle.blocked(*edges, persona, LAYERS))
    other = found.oracle.blocked(*edges, [index - 3 for index in persona], LAYERS)
    assert kl(by_group, other) > 1e-6


def test_the_measures_of_a_knockout(case: Callable[[str], Case]) -> None:
    """Both shares are of the distance between the target and the host."""
    found = case("llama")
    pair, tokens = (found.target, found.host), found.tokens
    nothing = found.oracle.knockout(*pair, tokens, ["answer"], ["persona"], [])
    assert nothing == pytest.approx({"kl": 0, "share_of_host": 0, "toward_host": 0}, abs=1e-8)
    some = found.oracle.knockout(*pair, tokens, ["answer"], ["persona"], LAYERS)
    distance = kl(found.clean, found.unnamed)
    assert some["share_of_host"] == pytest.approx(some["kl"] / distance)
    assert some["toward_host"] < 1
    assert found.oracle.host_knockout(found.host, tokens, ["answer"], ["persona"], LAYERS) > 1e-6


def test_a_token_that_sees_nothing_is_refused(case: Callable[[str], Case]) -> None:
    found = case("llama")
    with pytest.raises(ValueError, match="layer 2: a token is left with nothing to see"):
        found.oracle.blocked(found.target, found.tokens, ["frame"], ["frame"], [2])


# ---------------------------------------------------------------------- the embedded model


@pytest.mark.smollm2
@pytest.mark.slow
def test_where_the_persona_of_the_embedded_model_is(smollm2: Model) -> None:
    """Of three cells, the medians: the persona's own entries, then the task's, not the header's."""
    oracle = Mechanism(smollm2.lm._module, smollm2.tokenizer, [2])
    layers = range(smollm2.tree.n_layers)
    found: dict[str, list[float]] = {}
    grid = Grid.load("long")
    for persona, task in (("chef", "plan"), ("engineer", "proposal"), ("counselor", "arch")):
        (cell,) = grid.select([persona], [task]).cells
        texts = {"X": cell.persona.text, "Y": cell.task.text, "B": grid.baseline_persona}
        messages = cell_messages(texts)
        target, host = messages["XY"], messages["BY"]
        tokens = oracle.greedy(oracle.ids(target.text), 3)
        clean, unnamed = oracle.run(target, tokens), oracle.run(host, tokens)
        for name in ("persona", "task", "header"):
            patched = oracle.grafted(target, host, tokens, [name], layers)
            found.setdefault(name, []).append(gap_closed(clean, unnamed, patched))
        patched = oracle.blocked(target, tokens, ["answer"], ["persona"], layers)
        found.setdefault("blocked", []).append(kl(clean, patched) / kl(clean, unnamed))
    medians = {name: sorted(values)[1] for name, values in found.items()}
    assert medians["persona"] > medians["task"] > medians["header"], medians
    assert 0.4 < medians["persona"] < 1, medians
    assert abs(medians["header"]) < 0.3, medians
    assert medians["blocked"] > 0.3, medians
