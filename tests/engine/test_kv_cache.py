"""KV caches of many rows, prefill and grouped attention against plain forwards of single texts."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnsight
import pytest
import torch
from rounding import assert_close
from tiny import MISTRAL_WINDOW, N_LAYERS, PAD_ID, SLIDING_WINDOW, Tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trees import plan_of

from persona_nnsight import Model, load_model
from persona_nnsight.engine.fast import attention
from persona_nnsight.engine.fast.attention import grouped_attention
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.fast.kv_cache import KVCache, gather
from persona_nnsight.engine.fast.prefill import prefill
from persona_nnsight.plan.prefix_tree import PrefixTree, prefix_tree

Tokens = list[int]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*lengths: int, seed: int = 0) -> list[Tokens]:
    source = random.Random(seed)
    return [[source.randrange(256) for _ in range(length)] for length in lengths]


def module_of(model: Model, window: int | None = None) -> Any:
    """The transformers model; with `window`, one of the same weights and another window."""
    module = model.lm._module
    if window is None:
        return module
    config = copy.deepcopy(module.config)
    config.sliding_window = window
    other = type(module)(config)
    other.load_state_dict(module.state_dict())
    return other.eval()


def layers_of(kv: KVCache) -> list[Any]:
    return list(kv.cache.layers)


def cached(module: Any, texts: Sequence[Tokens], extra: int = 0) -> KVCache:
    """A forward of all texts in one batch, padded on the left, `extra` columns more than needed."""
    length = max(map(len, texts)) + extra
    ids = torch.tensor([[PAD_ID] * (length - len(text)) + text for text in texts])
    seen = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    return KVCache(module(**forward_inputs(None, ids, seen=seen)).past_key_values, seen)


def follow(module: Any, kv: KVCache, texts: Sequence[Tokens]) -> tuple[Tensor, KVCache]:
    """A forward of equally long texts after `kv`: its logits, and the cache that it leaves."""
    inputs = forward_inputs(kv, torch.tensor(texts))
    out = module(**inputs)
    return out.logits, KVCache(out.past_key_values, inputs["attention_mask"])


def assert_holds(module: Any, kv: KVCache, texts: Sequence[Tokens]) -> None:
    """Row by row, the keys and values of a forward of that text alone, whose window is wide."""
    assert kv.mask.sum(1).tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        alone = module(torch.tensor([text])).past_key_values
        own = kv.mask[row].bool()
        for layer, expected in zip(layers_of(kv), alone.layers, strict=True):
            assert layer.keys.shape[0] == layer.values.shape[0] == len(texts)
            assert_close(layer.keys[row][:, own], expected.keys[0])
            assert_close(layer.values[row][:, own], expected.values[0])


def assert_goes_on(
    module: Any, kv: KVCache, texts: Sequence[Tokens], sizes: Sequence[int] = (3,)
) -> None:
    """Forwards of so many tokens each after `kv` give the logits of one forward of the whole."""
    more = draw(*[sum(sizes)] * len(texts), seed=99)
    found, start = [], 0
    for size in sizes:
        logits, kv = follow(module, kv, [row[start : start + size] for row in more])
        found.append(logits)
        start += size
    for row, text in enumerate(texts):
        expected = module(torch.tensor([text + more[row]])).logits[0, len(text) :]
        assert_close(torch.cat(found, dim=1)[row], expected)


def picture(kv: KVCache) -> list[Any]:
    """All that a cache holds, to see whether it changes."""
    found: list[Any] = [kv.mask.clone()]
    for layer in layers_of(kv):
        found += [layer.keys.clone(), layer.values.clone(), layer.get_seq_length()]
        found.append(getattr(layer, "cumulative_length", None))
    return found


def assert_same(before: list[Any], after: list[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


#: Models none of whose windows slides past the first token here: family and window.
WHOLE = [
    ("llama", None),
    ("gpt2", None),
    ("mistral", None),
    ("gemma3_text", 64),
]
whole = pytest.mark.parametrize(("family", "window"), WHOLE)

TEXTS = draw(9, 16, 12, 16)


# --------------------------------------------------------------------------------------- select


@whole
@pytest.mark.parametrize("room", [0, 3])
def test_select(tiny64: Tiny, family: str, window: int | None, room: int) -> None:
    """Neighbours, rows apart, in another order, and several times."""
    module = module_of(tiny64(family), window)
    kv = cached(module, TEXTS)
    before = picture(kv)
    for rows in ([0, 1, 2, 3], [1, 2], [3], [0, 2], [2, 1], [1, 1], [0, 1, 1, 3], [3, 3, 0]):
        chosen = kv.select(rows, room=room)
        assert chosen.is_whole
        texts = [TEXTS[row] for row in rows]
        assert_holds(module, chosen, texts)
        assert_goes_on(module, chosen, texts)
        assert_same(before, picture(kv))


@whole
@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("rows", [[0, 1], [2, 0, 2]])
def test_select_cut(
    tiny64: Tiny, family: str, window: int | None, rows: list[int], room: int
) -> None:
    """The end is cut off, in rows with padding as well."""
    module = module_of(tiny64(family), window)
    kv = cached(module, TEXTS)
    before = picture(kv)
    chosen = kv.select(rows, length=11, room=room)
    assert chosen.is_whole
    texts = [TEXTS[row][: len(TEXTS[row]) - 5] for row in rows]
    assert_holds(module, chosen, texts)
    # Steps of one and of several tokens.
    assert_goes_on(module, chosen, texts, (1, 3, 1))
    assert_same(before, picture(kv))


@pytest.mark.parametrize("room", [0, 2])
def test_selections_do_not_see_each_other(tiny64: Tiny, room: int) -> None:
    module = module_of(tiny64("llama"))
    kv = cached(module, TEXTS)
    first, second = kv.select([1, 2], room=room), kv.select([1, 2], room=room)
    a, b = [[1, 2], [3, 4]], [[5, 6], [7, 8]]
    _, first = follow(module, first, a)
    _, second = follow(module, second, b)
    assert_holds(module, first, [TEXTS[1] + a[0], TEXTS[2] + a[1]])
    assert_holds(module, second, [TEXTS[1] + b[0], TEXTS[2] + b[1]])


@pytest.mark.parametrize("room", [0, 4])
def test_a_selection_of_a_cache_that_has_grown(tiny64: Tiny, room: int) -> None:
    """What was appended, into room or not, is selected, cut and appended to like the rest."""
    module = module_of(tiny64("llama"))
    more = draw(4, 4, 4, 4, seed=5)
    _, kv = follow(module, cached(module, TEXTS).select([0, 1, 2, 3], room=room), more)
    texts = [text + rest for text, rest in zip(TEXTS, more, strict=True)]
    assert_holds(module, kv, texts)
    before = picture(kv)
    for rows in ([1, 2], [3, 0, 3], [0, 1, 2, 3]):
        cut = [texts[row][:-2] for row in rows]
        for again in (0, 3):
            whole = [texts[row] for row in rows]
            assert_goes_on(module, kv.select(rows, room=again), whole)
            assert_goes_on(module, kv.select(rows, length=18, room=again), cut)
        assert_goes_on(module, gather([(kv, row) for row in rows]), whole)
    assert_same(before, picture(kv))


def test_what_is_appended_goes_into_the_room(tiny64: Tiny) -> None:
    module = module_of(tiny64("llama"))
    kv = cached(module, TEXTS).select([0, 2], room=3)
    storage = [layer.keys.data_ptr() for layer in layers_of(kv)]
    for ids in ([[1], [2]], [[3], [4]], [[5], [6]]):
        _, kv = follow(module, kv, ids)
    assert [layer.keys.data_ptr() for layer in layers_of(kv)] == storage
    assert_holds(module, kv, [[*TEXTS[0], 1, 3, 5], [*TEXTS[2], 2, 4, 6]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("first", [0, 1, 3, N_LAYERS - 1])
@pytest.mark.parametrize("room", [0, 4])
def test_select_from_a_layer_on(tiny64: Tiny, family: str, first: int, room: int) -> None:
    """With the layers below skipped, stored residuals go on as in one forward of the whole."""
    model = tiny64(family)
    module = module_of(model)
    kv = cached(module, TEXTS)
    before = picture(kv)
    rows, cut, more = [3, 1, 3], 13, draw(4, 4, 4, seed=7)
    # The cut texts are 3 tokens shorter.
    texts = [TEXTS[row][:-3] + rest for row, rest in zip(rows, more, strict=True)]
    chosen = kv.select(rows, length=cut, first_layer=first, room=room)
    for number, (layer, source) in enumerate(zip(layers_of(chosen), layers_of(kv), strict=True)):
        assert (layer.keys.shape[0] == 3) == (number >= first)
        if number < first:
            assert layer.keys.data_ptr() == source.keys.data_ptr()
    outs = [module(torch.tensor([text]), output_hidden_states=True) for text in texts]
    residuals = torch.cat([out.hidden_states[first][:, -4:] for out in outs])
    layers = model.lm.get(model.tree.layers)
    with model.lm.trace(**forward_inputs(chosen, torch.tensor(more))):
        for skipped in layers[:first]:
            skipped.skip(residuals)
        layers[first].input = residuals
        logits = nnsight.save(model.lm.output.logits)
    expected = torch.cat([out.logits[:, -4:] for out in outs])
    assert_close(logits, expected)
    assert_same(before, picture(kv))


# ------------------------------------------------------------------------------ sliding windows


@pytest.mark.parametrize(
    ("family", "window"), [("mistral", MISTRAL_WINDOW), ("gemma3_text", SLIDING_WINDOW)]
)
def test_a_cache_is_whole_until_a_window_slides(tiny64: Tiny, family: str, window: int) -> None:
    """The window holds the token itself, so a cache keeps one less."""
    module = module_of(tiny64(family))
    assert cached(module, draw(window - 1, 5)).is_whole
    assert not cached(module, draw(window, 5)).is_whole
    grown = cached(module, draw(window - 2, 5)).select([1, 0], room=3)
    _, grown = follow(module, grown, [[1], [2]])
    assert grown.is_whole
    _, grown = follow(module, grown, [[1], [2]])
    assert not grown.is_whole


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("room", [0, 8])
def test_select_where_a_window_has_slid(tiny64: Tiny, family: str, room: int) -> None:
    module = module_of(tiny64(family))
    texts = draw(33, 6, 40, 28, seed=2)
    kv = cached(module, texts)
    assert not kv.is_whole
    before = picture(kv)
    for rows in ([1, 2], [3, 0, 0], [1]):
        chosen = kv.select(rows, room=room)
        assert not chosen.is_whole
        assert_goes_on(module, chosen, [texts[row] for row in rows], (1, 5, 1, 1))
    assert_same(before, picture(kv))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_window_slides_after_what_was_cut_and_gathered(tiny64: Tiny, family: str) -> None:
    module = module_of(tiny64(family))
    window = {"mistral": MISTRAL_WINDOW, "gemma3_text": SLIDING_WINDOW}[family]
    texts = draw(window - 1, window - 3, seed=3)
    kv = cached(module, texts)
    assert_goes_on(
        module, kv.select([1, 0], length=window - 2), [t[:-1] for t in texts[::-1]], (9,)
    )
    assert_goes_on(module, gather([(kv, 1), (kv, 0)]), texts[::-1], (1, 9, 1))
    # Shorter than before: the window has its whole way before it.
    assert_goes_on(module, gather([(kv.select([1]), 0)]), texts[1:], (1, 1, 1, 1))


# --------------------------------------------------------------------------------------- gather


@whole
def test_gather(tiny64: Tiny, family: str, window: int | None) -> None:
    module = module_of(tiny64(family), window)
    others = draw(3, 11, seed=8)
    long, short = cached(module, TEXTS), cached(module, others, extra=2)
    before = [picture(long), picture(short)]
    orders: list[list[tuple[KVCache, int]]] = [
        [(long, 0), (long, 1), (short, 1)],
        [(short, 0), (long, 1), (short, 0), (short, 1), (long, 3), (long, 3)],
        # Shorter than their source.
        [(long, 2), (short, 0), (long, 0)],
        [(short, 1)],
        [(long, 3), (long, 1), (long, 0), (long, 0)],
    ]
    for order in orders:
        texts = [TEXTS[row] if source is long else others[row] for source, row in order]
        found = gather(order)
        assert found.is_whole
        length = max(map(len, texts))
        padding = [[0] * (length - len(text)) + [1] * len(text) for text in texts]
        assert found.mask.tolist() == padding
        assert found.mask.dtype == long.mask.dtype
        assert_holds(module, found, texts)
        assert_goes_on(module, found, texts)
    for source, old in zip((long, short), before, strict=True):
        assert_same(old, picture(source))


@whole
def test_gather_closes_gaps(tiny64: Tiny, family: str, window: int | None) -> None:
    """Padding between tokens, as segments after their parents leave it, moves to the left."""
    module = module_of(tiny64(family), window)
    ends = draw(5, 2, 4, 1, seed=9)
    ids = torch.tensor([[PAD_ID] * (5 - len(end)) + end for end in ends])
    seen = torch.tensor([[0] * (5 - len(end)) + [1] * len(end) for end in ends])
    inputs = forward_inputs(cached(module, TEXTS), ids, seen=seen)
    kv = KVCache(module(**inputs).past_key_values, inputs["attention_mask"])
    texts = [text + end for text, end in zip(TEXTS, ends, strict=True)]
    assert_holds(module, kv, texts)
    assert_goes_on(module, kv.select([3, 0], room=3), [texts[3], texts[0]])
    rows = [3, 0, 2, 1]
    found = gather([(kv, row) for row in rows])
    length = max(map(len, texts))
    assert found.mask.tolist() == [
        [0] * (length - len(texts[row])) + [1] * len(texts[row]) for row in rows
    ]
    assert_holds(module, found, [texts[row] for row in rows])
    assert_goes_on(
        module, found.select([1, 2, 3], room=4), [texts[row] for row in rows[1:]], (3, 1)
    )


# -------------------------------------------------------------------------------------- prefill


def prompts(*stem_lengths: int, seed: int, ways: int) -> list[Tokens]:
    """Texts that share a stem, groups of which share a second one, and the stem itself."""
    first, *others = draw(*stem_lengths, seed=seed)
    source = random.Random(seed)
    found = [list(first)]
    for second in others:
        for way in range(ways):
            end = [way, *(source.randrange(256) for _ in range(source.randrange(4)))]
            found.append([*first, *second, *end])
    found.append(draw(5, seed=seed + 1)[0])
    source.shuffle(found)
    return found


def prefilled(model: Model, openings: Sequence[Tokens], most_tokens: int) -> PrefixTree:
    """Prefill prompts of these openings, and see that all is as in a forward per prompt."""
    module = module_of(model)
    plan = plan_of(
        [tuple(opening) for opening in openings], positions=("p_user_last",), tail=2, window=1
    )
    # Not all prompts of the plan, and not in its order.
    tree = prefix_tree(plan, plan.cells[:0:-1], window=model.tree.window, most_tokens=most_tokens)
    prefix = prefill(model.lm, plan, tree)
    assert sorted(prefix.row) == list(range(1, len(openings)))
    assert sorted(prefix.row.values()) == list(range(len(prefix.row)))
    by_row = sorted(prefix.row, key=lambda prompt: prefix.row[prompt])
    texts = [openings[prompt] for prompt in by_row]
    for row, text in enumerate(texts):
        assert prefix.opening[row][prefix.kv.mask[row].bool()].tolist() == text
    assert prefix.opening.shape == prefix.kv.mask.shape
    assert prefix.tails.tolist() == [list(plan.prompts[prompt].ids[-2:]) for prompt in by_row]
    if prefix.kv.is_whole:
        assert_holds(module, prefix.kv, texts)
    rows = [prefix.row[prompt] for prompt in (3, 1, 2, 1)]
    room = 0 if model.tree.window < 100 else 4
    assert_goes_on(module, prefix.kv.select(rows, room=room), [texts[row] for row in rows], (3, 1))
    return tree


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "olmo2"])
@pytest.mark.parametrize("most_tokens", [60, 1000])
def test_prefill_shares_what_prompts_begin_with(
    tiny64: Tiny, family: str, most_tokens: int
) -> None:
    openings = prompts(20, 17, 11, 30, seed=4, ways=4)
    tree = prefilled(tiny64(family), openings, most_tokens)
    assert max(segment.depth for segment in tree.segments) == 2
    assert tree.n_tokens < sum(map(len, openings)) / 2
    sizes = [{len(tree.segments[number].ids) for number in batch} for batch in tree.batches]
    assert any(len(found) > 1 for found in sizes), "no batch was padded"


def test_prefill_shares_within_a_window(tiny64: Tiny) -> None:
    tree = prefilled(tiny64("mistral"), prompts(10, 3, 2, seed=6, ways=4), 40)
    assert max(segment.depth for segment in tree.segments) >= 1
    assert len(tree.batches) > 2


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_prefill_where_windows_slide(tiny64: Tiny, family: str) -> None:
    tree = prefilled(tiny64(family), prompts(20, 7, 11, seed=4, ways=3), 40)
    assert len(tree.batches) == 1


# ---------------------------------------------------------------------------- grouped attention

Shapes = list[tuple[int, ...]]


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Shapes of the keys of every attention that groups its query heads."""
    shapes: Shapes = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(key.shape))
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    return shapes


def implementations(model: Model) -> list[str]:
    """What every part of a model uses."""
    return [
        str(module.config._attn_implementation)
        for module in model.lm._module.modules()
        if hasattr(module, "config")
    ]


GROUPED = ["llama", "qwen2", "mistral", "gemma3_text", "gemma3_vlm"]


@pytest.mark.parametrize("family", GROUPED)
def test_grouped_heads_give_the_logits_of_sdpa(tiny64: Tiny, family: str, grouped: Shapes) -> None:
    """Padded prefill, one token after another, and several at once."""
    model = tiny64(family)
    module = module_of(model)

    def logits() -> list[Tensor]:
        length = max(map(len, TEXTS))
        ids = torch.tensor([[PAD_ID] * (length - len(text)) + text for text in TEXTS])
        seen = (ids != PAD_ID).long()
        out = module(**forward_inputs(None, ids, seen=seen))
        found = [out.logits[row, -len(text) :] for row, text in enumerate(TEXTS)]
        kv = KVCache(out.past_key_values, seen).select([2, 0, 1], room=7)
        for fed in ([[1], [2], [3]], [[4], [5], [6]], draw(5, 5, 5, seed=1)):
            more, kv = follow(module, kv, fed)
            found.append(more)
        return found

    expected = logits()
    assert grouped == []
    with grouped_attention(model.lm):
        found = logits()
    # Four forwards, each over two key heads, not repeated.
    assert len(grouped) == 4 * N_LAYERS
    assert {shape[1] for shape in grouped} == {2}
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_grouped_heads_decode_the_same(tiny64: Tiny, family: str, grouped: Shapes) -> None:
    """In nnsight's own generate, and what it leaves is what it found."""
    model = tiny64(family)
    ids = torch.tensor([[PAD_ID] * (16 - len(text)) + text for text in TEXTS])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = module_of(model).generate(**inputs, **options)
    with grouped_attention(model.lm), model.lm.generate(**inputs, **options) as tracer:
        found = nnsight.save(tracer.result)
    assert grouped
    assert torch.equal(found, expected)
    count = len(grouped)
    assert torch.equal(module_of(model).generate(**inputs, **options), expected)
    assert len(grouped) == count


def test_no_mask_is_a_causal_one(tiny64: Tiny, grouped: Shapes) -> None:
    model = tiny64("llama")
    expected = module_of(model)(torch.tensor([TEXTS[0]])).logits
    with grouped_attention(model.lm):
        found = module_of(model)(torch.tensor([TEXTS[0]])).logits
    assert torch.equal(found, expected)
    assert grouped == []


@pytest.mark.parametrize("family", [*GROUPED, "gpt2"])
def test_attention_is_restored(tiny64: Tiny, family: str) -> None:
    model = tiny64(family)
    before = implementations(model)
    assert set(before) == {"sdpa"}
    for _ in range(2):
        with grouped_attention(model.lm):
            assert implementations(model) != before
        assert implementations(model) == before
    with pytest.raises(ZeroDivisionError), grouped_attention(model.lm):
        raise ZeroDivisionError
    assert implementations(model) == before
    # A generator that is left half-way, as a run is.
    steps = (step for step in _steps(model))
    next(steps)
    assert implementations(model) != before
    steps.close()
    assert implementations(model) == before


def _steps(model: Model) -> Iterator[int]:
    with grouped_attention(model.lm):
        yield 1
        yield 2


def test_an_eager_model_is_left_as_it_is(tiny_dir: Callable[..., Path], grouped: Shapes) -> None:
    model = load_model(str(tiny_dir("llama")), attn="eager")
    expected = cached(model.lm._module, TEXTS)
    with grouped_attention(model.lm):
        assert set(implementations(model)) == {"eager"}
        found = cached(model.lm._module, TEXTS)
    assert set(implementations(model)) == {"eager"}
    assert_same(picture(expected), picture(found))
    assert grouped == []


def test_a_model_without_weights_is_left_as_it_is(tiny_dir: Callable[..., Path]) -> None:
    model = load_model(str(tiny_dir("llama")), weights=False)
    before = implementations(model)
    with grouped_attention(model.lm):
        assert implementations(model) == before
    assert implementations(model) == before


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_heads_that_are_not_grouped_are_left_alone(
    tiny64: Tiny, family: str, grouped: Shapes
) -> None:
    model = tiny64(family)
    expected = cached(module_of(model), TEXTS)
    with grouped_attention(model.lm):
        found = cached(module_of(model), TEXTS)
    assert_same(picture(expected), picture(found))
    assert grouped == []


@pytest.mark.parametrize("mask", ["bool", "additive", "none", "bias"])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_by_itself(mask: str, heads: int, tokens: int) -> None:
    """Three or more query heads to a key head, values of another width, a scale of its own."""
    noise = torch.Generator().manual_seed(0)
    rows, keys, width, values = 3, 2, 8, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise)

    # As the layers hand them over: a transposed view.
    query = normal(rows, tokens, heads, width).transpose(1, 2)
    key, value = normal(rows, keys, 9, width), normal(rows, keys, 9, values)
    seen = normal(rows, 1, tokens, 9) > 0
    seen[..., 0] = True
    options: dict[str, Any] = {"scaling": 0.7}
    given: Tensor | None = seen
    if mask == "additive":
        given = normal(rows, 1, tokens, 9)
    elif mask == "none":
        given = None
    elif mask == "bias":
        options["position_bias"] = normal(rows, heads, tokens, 9)
    module: Any = SimpleNamespace(num_key_value_groups=heads // keys, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, given, **options)
    found, weights = attention._attention(module, query, key, value, given, **options)
    assert weights is None
    assert found.shape == (rows, tokens, heads, values)
    assert found.is_contiguous()
    assert_close(found, expected)
