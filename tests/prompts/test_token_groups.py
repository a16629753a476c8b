"""Which tokens are the persona's and the task's, with templates and tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cells import TINY_GRID
from hypothesis import given
from hypothesis import strategies as st
from mechanism import Mechanism, message
from tiny import (
    CHATML,
    CHATML_DEFAULT_SYSTEM,
    DATED,
    IM_START,
    NO_SYSTEM,
    THINKING,
    save_tokenizer,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from persona_nnsight import PersonaError
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.data import digest, from_data, to_data
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.joining import join
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.chat_template import render
from persona_nnsight.prompts.encoding import encode_prompt
from persona_nnsight.prompts.grids import DEFAULT_TEMPLATE, Grid
from persona_nnsight.prompts.prompt import GROUPS, Prompt, TokenGroups
from persona_nnsight.prompts.rendering import Rendering
from persona_nnsight.prompts.role_prompt import RolePrompt, bare_task
from persona_nnsight.prompts.token_groups import encode_grouped, pieces

YODA, HAIKU = "Yoda", "write a haiku."


def grid_of(persona: str, task: str, template: str = DEFAULT_TEMPLATE) -> Grid:
    """A grid of one cell, with texts as they are."""
    grid = Grid.from_dict(
        {"name": "one", "template": template, "personas": {"x": "x"}, "tasks": {"y": "y"}}
    )
    return replace(
        grid,
        personas=(replace(grid.personas[0], text=persona),),
        tasks=(replace(grid.tasks[0], text=task),),
    )


def role(persona: str, task: str, template: str = DEFAULT_TEMPLATE) -> RolePrompt:
    (cell,) = (grid := grid_of(persona, task, template)).cells
    return grid.role_prompt(cell.persona, cell.task)


def texts(tokenizer: Any, found: RolePrompt, rendering: Rendering | None = None) -> dict[str, str]:
    """The text of every group's tokens."""
    more = () if rendering is None else (rendering,)
    prompt = encode_grouped(tokenizer, found, *more)
    groups = prompt.groups
    assert groups is not None
    spans = [groups.tokens(name) for name in GROUPS]
    assert sorted(index for span in spans for index in span) == list(range(len(prompt.ids)))
    cut = pieces(tokenizer, prompt, *more)
    assert "".join(cut) == render(tokenizer, [("user", found.text)], *(more or (Rendering(),)))
    return {
        name: "".join(cut[index] for index in span)
        for name, span in zip(GROUPS, spans, strict=True)
    }


OPENING = "<|im_start|>user\n"
END, HEADER = "<|im_end|>\n<|im_start|>assistant", "\n"
TEMPLATES = {
    "As {persona}, {task}": (f"{OPENING}As ", "Yoda", ", write a haiku.", END),
    "{task} As {persona}": (OPENING, " As Yoda", "write a haiku.", END),
    "{persona}: {task} Begin.": (OPENING, "Yoda", ": write a haiku.", f" Begin.{END}"),
    "{persona}{task}": (OPENING, "Yoda", "write a haiku.", END),
    "You are {persona}.\n\n\t{task}": (f"{OPENING}You are ", "Yoda", ".\n\n\twrite a haiku.", END),
    "Do {task} ({persona})": (f"{OPENING}Do ", " (Yoda", "write a haiku.", f"){END}"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_of_grids(tmp_path: Path, template: str) -> None:
    frame, persona, task, header = TEMPLATES[template]
    assert texts(save_tokenizer(tmp_path), role(YODA, HAIKU, template)) == {
        "frame": frame,
        "persona": persona,
        "task": task,
        "header": header,
        "answer": HEADER,
    }


WITH_THE_WORDS = CHATML.replace(
    "{% for", "{{ '<|im_start|>system\nAs Yoda, write a haiku.<|im_end|>\n' }}{% for", 1
)
AFTERWARDS = CHATML.replace(
    "message['content'] +", "message['content'] + ' (As Yoda, write a haiku.)' +", 1
)
CLOSED = "{{ 'User: ' + messages[0]['content'] | trim }}"
"""No header: p_last is the task's last token."""
CHAT_TEMPLATES = {
    "chatml": (CHATML, f"{OPENING}As ", END, "\n"),
    "a system message": (
        CHATML_DEFAULT_SYSTEM,
        f"<|im_start|>system\nYou are a helpful tiny model.<|im_end|>\n{OPENING}As ",
        END,
        "\n",
    ),
    "one with the words": (
        WITH_THE_WORDS,
        f"<|im_start|>system\nAs Yoda, write a haiku.<|im_end|>\n{OPENING}As ",
        END,
        "\n",
    ),
    "the words afterwards": (
        AFTERWARDS,
        f"{OPENING}As ",
        f" (As Yoda, write a haiku.){END}",
        "\n",
    ),
    "no system message": (
        NO_SYSTEM,
        "<|im_start|><start_of_turn>user\nAs ",
        "<end_of_turn>\n<start_of_turn>model",
        "\n",
    ),
    "thinking": (THINKING, f"{OPENING}As ", f"{END}\n<think>\n\n</think>\n", "\n"),
    "no header": (CLOSED, "User: As ", "", "."),
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_templates(tmp_path: Path, name: str) -> None:
    template, frame, header, answer = CHAT_TEMPLATES[name]
    found = texts(save_tokenizer(tmp_path, template), role(YODA, HAIKU))
    task = ", write a haiku" if name == "no header" else ", write a haiku."
    expected = {"persona": "Yoda", "task": task, "header": header, "answer": answer}
    assert found == {"frame": frame, **expected}


def test_a_date(tmp_path: Path) -> None:
    found = texts(save_tokenizer(tmp_path, DATED), role("26 July", HAIKU), Rendering("2024-07-26"))
    assert found["frame"].endswith("26 July 2024<|im_end|>\n<|im_start|>user\nAs ")
    assert found["persona"] == "26 July"


@pytest.mark.parametrize(
    ("persona", "task"),
    [
        ("Yoda, who says: write a haiku. Now", HAIKU),
        ("Yoda", "As Yoda, be Yoda, and Yoda"),
        ("Yoda", "Yoda"),
        ("user", "assistant"),
        ("a", "a"),
        ("a {task} {persona}", "b {persona}"),
    ],
)
@pytest.mark.parametrize("template", ["As {persona}, {task}", "{task} As {persona}"])
def test_texts_within_each_other(tmp_path: Path, persona: str, task: str, template: str) -> None:
    found = texts(save_tokenizer(tmp_path), role(persona, task, template))
    last = {"persona": f" As {persona}", "task": task}
    first = {"persona": persona, "task": f", {task}"}
    expected = first if template.startswith("As") else last
    assert {name: found[name] for name in expected} == expected


def test_the_task_alone(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    found = texts(tokenizer, bare_task(HAIKU))
    assert (found["frame"], found["persona"], found["task"]) == (OPENING, "", HAIKU)
    odd = save_tokenizer(tmp_path / "odd", CHANGING["writes more before some messages"][0])
    found = texts(odd, bare_task(HAIKU))
    assert (found["frame"], found["persona"], found["task"]) == (f"{OPENING}Please: ", "", HAIKU)


CONTENT = "message['content']"
CHANGING = {
    "trims": (CHATML.replace(CONTENT, f"{CONTENT} | trim"), OPENING, HAIKU, ""),
    "begins with a small letter": (
        CHATML.replace(CONTENT, f"{CONTENT}[0] | lower + {CONTENT}[1:]"),
        OPENING,
        HAIKU,
        "",
    ),
    "ends with another full stop": (
        CHATML.replace(CONTENT, f"({CONTENT}[:-1] + '!' if 'haiku' in {CONTENT} else {CONTENT})"),
        OPENING,
        "write a haiku!",
        "",
    ),
    "takes the full stop": (
        CHATML.replace(CONTENT, f"({CONTENT}[:-1] if 'haiku' in {CONTENT} else {CONTENT})"),
        OPENING,
        "write a haiku",
        "",
    ),
    "writes more before some messages": (
        CHATML.replace(CONTENT, f"('Please: ' if 'haiku' in {CONTENT} else '') + {CONTENT}"),
        f"{OPENING}Please: ",
        HAIKU,
        "",
    ),
    "writes more after some messages": (
        CHATML.replace(CONTENT, f"{CONTENT} + (' Thanks.' if 'haiku' in {CONTENT} else '')"),
        OPENING,
        HAIKU,
        " Thanks.",
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_texts_that_a_template_changes_at_the_ends(tmp_path: Path, name: str) -> None:
    template, frame, task, more = CHANGING[name]
    tokenizer = save_tokenizer(tmp_path, template)
    found = texts(tokenizer, role(YODA, HAIKU))
    begins = "as " if "small" in name else "As "
    assert (found["frame"], found["persona"]) == (frame + begins, "Yoda")
    assert (found["task"], found["header"]) == (f", {task}", more + END)


@pytest.mark.parametrize("space", ["", "  ", "\n", " \n\t "])
def test_white_space_at_the_ends(tmp_path: Path, space: str) -> None:
    """What a trimming template leaves of it; grids built in code may have some."""
    trims, keeps = CHANGING["trims"][0], CHATML
    persona, task = f"{space}Yoda{space}", f"{space}{HAIKU}{space}"
    bare = role(persona, task, "{persona},{task}")
    found = texts(save_tokenizer(tmp_path / "trims", trims), bare)
    assert found["frame"] == OPENING
    assert found["persona"] == f"Yoda{space}"
    assert found["task"] == f",{space}{HAIKU}"
    found = texts(save_tokenizer(tmp_path / "keeps", keeps), bare)
    assert (found["persona"], found["task"]) == (persona, f",{task}")


def test_a_text_that_a_template_leaves_out(tmp_path: Path) -> None:
    """All of the task is white space in its eyes, or cut."""
    cuts = CHATML.replace(CONTENT, f"{CONTENT}.split('###')[0]")
    tokenizer = save_tokenizer(tmp_path, cuts)
    with pytest.raises(PersonaError, match=r"leaves the text 'write a haiku\.' out of the prompt"):
        encode_grouped(tokenizer, role("Yoda###", HAIKU))


def test_a_template_that_writes_a_message_twice(tmp_path: Path) -> None:
    twice = CHATML.replace(CONTENT, f"{CONTENT} + ' | ' + {CONTENT}")
    tokenizer = save_tokenizer(tmp_path, twice)
    assert encode_prompt(tokenizer, "As Yoda, write.").groups is None
    with pytest.raises(PersonaError, match="writes a message 2 times"):
        encode_grouped(tokenizer, role(YODA, HAIKU))


# ------------------------------------------------------------------------------- tokenizers


def fast(core: Tokenizer) -> Any:
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=core, bos_token=IM_START, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def _special(core: Tokenizer) -> Tokenizer:
    core.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    )
    return core


def byte_level(merges: Sequence[tuple[str, str]], *, trims: bool) -> Any:
    """Bytes with some merges, and offsets with white space or without."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trims)
    return fast(_special(core))


def byte_fallback(*, prepends: bool) -> Any:
    """As SentencePiece's: ▁ for spaces, bytes for what the vocabulary lacks."""
    pieces_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,."
    vocab = {piece: i for i, piece in enumerate(["<unk>", *pieces_, *letters, "▁▁", "▁Y", "▁w"])}
    merges = [("▁", "▁"), ("▁", "Y"), ("▁", "w")]
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace_ = normalizers.Replace(" ", "▁")
    core.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace_]) if prepends else replace_
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return fast(_special(core))


MERGES = [("Ġ", "Y"), ("a", ","), ("Ġ", "w"), (",", "Ġw"), ("Ġ", "ð"), ("Ġ", "Ġ"), ("Ġ", "Ċ")]
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes, white space kept": lambda: byte_level(MERGES, trims=False),
    "bytes, white space left out": lambda: byte_level(MERGES, trims=True),
    "sentencepiece": lambda: byte_fallback(prepends=False),
    "sentencepiece, a space before": lambda: byte_fallback(prepends=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_begin_with_white_space(name: str) -> None:
    """A space before a word goes with it where they are one token."""
    found = texts(TOKENIZERS[name](), role(YODA, HAIKU, "As {persona}: {task}"))
    assert found["frame"].endswith("As")
    assert (found["persona"], found["task"]) == (" Yoda", ": write a haiku.")


def test_tokens_across_groups() -> None:
    """The first character that is not white space decides."""
    merged = texts(TOKENIZERS["bytes, white space kept"](), role(YODA, HAIKU))
    assert merged["frame"].endswith("As")
    assert merged["persona"] == " Yoda,"  # the token "a,"
    assert merged["task"] == " write a haiku."
    merged = texts(TOKENIZERS["bytes, white space kept"](), role("Yodo", HAIKU))
    assert (merged["persona"], merged["task"]) == (" Yodo", ", write a haiku.")


@pytest.mark.parametrize("trims", [False, True])
def test_tokens_of_white_space_alone(trims: bool) -> None:
    """Two spaces and more are tokens of their own, which belong to where they begin."""
    tokenizer = byte_level([("Ġ", "Ġ")], trims=trims)
    found = texts(tokenizer, role(YODA, HAIKU, "As  {persona}  {task}  now"))
    assert found["frame"] == f"{OPENING}As  "
    assert (found["persona"], found["task"]) == ("Yoda", "  write a haiku.")
    assert found["header"] == f"  now{END}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("persona", "task"),
    [
        ("🧙", "老 🧙🧙"),
        ("é", "é"),
        ("Ada 🧙‍♀️", "معلّم, 老师"),
        ("a🧙", "🧙a"),
        ("e\u0301", "\u0301x"),
    ],
)
def test_characters_of_several_tokens(name: str, persona: str, task: str) -> None:
    """Each counts with its character, also where the tokenizer gives one place for all."""
    tokenizer = TOKENIZERS[name]()
    prompt = encode_grouped(tokenizer, role(persona, task, "As\n{persona}\n{task}\nnow"))
    assert prompt.groups is not None
    tokens = [
        [prompt.ids[index] for index in prompt.groups.tokens(group)]
        for group in ("persona", "task")
    ]
    spelled = [str(tokenizer.decode(ids)).strip() for ids in tokens]
    assert spelled == [persona, task]


#: Letters, white space, characters of several bytes, and what the chat template writes.
_TEXT = st.text("ab ,.\né老🧙Y", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(
    persona=_TEXT,
    task=_TEXT,
    template=st.sampled_from(list(TEMPLATES)),
    name=st.sampled_from([name for name in TOKENIZERS if "left out" not in name]),
)
def test_any_texts_against_the_oracle(persona: str, task: str, template: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    prompt = encode_grouped(tokenizer, role(persona, task, template))
    oracle = Mechanism.__new__(Mechanism)  # needs no model to tell tokens apart
    oracle.tokenizer = tokenizer
    assert prompt.groups is not None
    named = {index: group for group in GROUPS for index in prompt.groups.tokens(group)}
    expected = oracle.groups(message(persona, task, template))
    assert [named[index] for index in range(len(prompt.ids))] == expected


@dataclass(eq=False)
class Telling:
    """A tokenizer whose offsets are other; each kind of tokenizer says in its own way that not."""

    of: Any
    tells: Callable[[Any], Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if options.pop("return_offsets_mapping", False):
            return self.tells(self.of(*arguments, return_offsets_mapping=True, **options))
        return self.of(*arguments, **options)


def raising(error: Exception) -> Callable[[Any], Any]:
    def tells(_: Any) -> Any:
        raise error

    return tells


NOT_TELLING: dict[str, Callable[[Any], Any]] = {
    "in Python": raising(NotImplementedError("not available when using Python tokenizers")),
    "of others": raising(ValueError("unexpected option")),
    "silent": lambda found: {"input_ids": found["input_ids"]},
    "empty": lambda found: {**found, "offset_mapping": [(0, 0)] * len(found["input_ids"])},
    "backwards": lambda found: {**found, "offset_mapping": found["offset_mapping"][::-1]},
    "of other tokens": lambda found: {**found, "input_ids": found["input_ids"][::-1]},
    "of fewer tokens": lambda found: {**found, "offset_mapping": found["offset_mapping"][:-1]},
    "nothing": lambda found: {**found, "offset_mapping": None},
}


@pytest.mark.parametrize("kind", NOT_TELLING)
def test_a_tokenizer_that_does_not_tell(tmp_path: Path, kind: str) -> None:
    tokenizer: Any = Telling(save_tokenizer(tmp_path), NOT_TELLING[kind])
    assert encode_prompt(tokenizer, "As Yoda, write a haiku.").groups is None
    with pytest.raises(PersonaError, match="does not tell which characters its tokens stand for"):
        encode_grouped(tokenizer, role(YODA, HAIKU))


# ------------------------------------------------------------------------------------ plans


class Grouping(Unedited):
    """An intervention that has to know the groups."""

    @property
    def needs_groups(self) -> bool:
        return True


PLAIN = Edit(Write("additive", ("p_last",), (2,)))
GROUPED = Edit(Grouping("host", ("p_last",)), host="BY")


def plan_of(tokenizer: Any, grid: Grid, *edits: Edit) -> Plan:
    return build_plan(
        "substitute", tokenizer, grid, layers=(2,), positions=("p_last",), window=3, edits=edits
    )


def test_a_plan_has_groups_where_an_edit_needs_them(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    bare = Edit(Unedited("bare", ("p_last",)), host="Y", scored=False, generate=2)
    plan = plan_of(tokenizer, TINY_GRID, PLAIN, GROUPED, bare)
    for cell in plan.cells:
        for key, index in cell.prompts.items():
            groups = plan.prompts[index].groups
            assert groups is not None
            assert (len(groups.tokens("persona")) == 0) == (key == "Y")
            assert list(groups.tokens("answer")) == [len(plan.prompts[index].ids) - 1]
    assert {key for cell in plan.cells for key in cell.prompts} == {
        *("BB", "XB", "BY", "XY", "OB", "Y")
    }
    again = from_data(json.loads(json.dumps(to_data(replace(plan, edits=(PLAIN,))))))
    assert again.prompts == plan.prompts
    assert hash(again.prompts[0]) == hash(plan.prompts[0])


def test_a_plan_without_them_is_as_it_was(tmp_path: Path) -> None:
    """It asks no tokenizer for characters, and its data does not speak of groups."""
    tokenizer: Any = Telling(save_tokenizer(tmp_path), NOT_TELLING["in Python"])
    plan = plan_of(tokenizer, TINY_GRID, PLAIN)
    data = to_data(plan)
    assert all(list(prompt) == ["text", "ids", "user_last"] for prompt in data["prompts"])
    assert from_data(json.loads(json.dumps(data))) == plan
    grouped = plan_of(save_tokenizer(tmp_path / "other"), TINY_GRID, PLAIN, GROUPED)
    assert digest(replace(grouped, edits=plan.edits)) != digest(plan)
    with pytest.raises(PersonaError, match="does not tell which characters"):
        plan_of(tokenizer, TINY_GRID, GROUPED)


def test_one_text_of_two_personas(tmp_path: Path) -> None:
    """They are one prompt but for its groups."""
    grid = Grid.from_dict(
        {
            "name": "same",
            "personas": {"a": "Ada", "b": "Ada, dear"},
            "tasks": {"one": "dear, write.", "two": "write."},
        }
    )
    tokenizer = save_tokenizer(tmp_path)
    plain, grouped = (plan_of(tokenizer, grid, edit) for edit in (PLAIN, GROUPED))
    same = "As Ada, dear, write."
    assert sum(prompt.text == same for prompt in plain.prompts) == 1
    first, second = (prompt for prompt in grouped.prompts if prompt.text == same)
    assert first.ids == second.ids
    assert first.groups != second.groups
    assert len(grouped.prompts) == len(plain.prompts) + 1


def test_plans_with_and_without_groups_share_their_prompts(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    plain, grouped = (plan_of(tokenizer, TINY_GRID, edit) for edit in (PLAIN, GROUPED))
    for plans in ((plain, grouped), (grouped, plain)):
        joint = join(plans).plan
        assert set(joint.prompts) == set(grouped.prompts)
        assert len(joint.prompts) == len(grouped.prompts)
        assert len(joint.cells) == len(plain.cells)
    assert join([plain, plain]).plan.prompts == plain.prompts


def test_groups_are_plain_data() -> None:
    groups = TokenGroups(persona=(3, 5), task=(5, 9), header=(9, 12))
    assert [groups.tokens(name) for name in GROUPS] == [
        *(range(0, 3), range(3, 5), range(5, 9), range(9, 12), range(12, 13))
    ]
    turned = TokenGroups(task=(3, 5), persona=(5, 9), header=(9, 12))
    assert turned.tokens("frame") == range(0, 3)
    prompt = Prompt("a", (1, 2), 1, groups)
    assert Prompt.from_data(json.loads(json.dumps(prompt.to_data()))) == prompt


@pytest.mark.smollm2
def test_the_embedded_model(smollm2: Any) -> None:
    found = texts(smollm2.tokenizer, role("Warren Buffett", HAIKU))
    assert found["frame"].endswith("<|im_end|>\n<|im_start|>user\nAs")
    assert (found["persona"], found["task"]) == (" Warren Buffett", ", write a haiku.")
    assert (found["header"], found["answer"]) == (END, HEADER)
