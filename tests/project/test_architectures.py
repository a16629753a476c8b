"""The sweep over transformers' classes: what it builds, sees, and says on its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import command, page, verdict
from architectures.building import IMAGE_TEXT, TEXT, Architecture, architectures, build, windows_of
from architectures.configs import LONG, N_LAYERS, SHORT, tiny_config
from architectures.verdict import EQUAL_FAST, NOT_BUILT, REFUSED, TRACEBACK, WRONG, Verdict, judge
from torch import Tensor
from transformers import CONFIG_MAPPING

from persona_nnsight.method.edit_vectors import edit_vector

LLAMA = Architecture(TEXT, "llama", "LlamaForCausalLM")
LIMIT = 300


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(("lfm2", "layer_types"), ("qwen3_next", "layer_types"), ("laguna", "mlp_layer_types")),
        *(("afmoe", "layer_types"), ("deepseek_v4", "layer_types")),
    ],
)
def test_every_kind_of_layer_is_left(model_type: str, name: str) -> None:
    config: Any = tiny_config(CONFIG_MAPPING[model_type])
    kinds = getattr(config, name)
    assert len(kinds) == N_LAYERS
    default: Any = CONFIG_MAPPING[model_type]()
    assert set(kinds) >= set(getattr(default, name))
    assert len(set(kinds)) > 1


@pytest.mark.parametrize(
    "architecture",
    [
        *(LLAMA, Architecture(TEXT, "falcon_h1", "FalconH1ForCausalLM")),
        Architecture(IMAGE_TEXT, "qwen2_vl", "Qwen2VLForConditionalGeneration"),
    ],
)
def test_models_are_tiny(architecture: Architecture) -> None:
    model = build(architecture, LONG)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6


def test_models_with_windows_are_built_twice() -> None:
    assert windows_of(LLAMA) == (LONG,)
    for model_type, name in (("mistral", "Mistral"), ("qwen2", "Qwen2"), ("gemma2", "Gemma2")):
        own = Architecture(TEXT, model_type, f"{name}ForCausalLM")
        assert windows_of(own) == (LONG, SHORT)
        config: Any = build(own, SHORT).config
        assert config.sliding_window == SHORT


def test_a_class_that_is_measured_right_is_equal() -> None:
    found = judge(LLAMA, LIMIT)
    assert (found.verdict, found.loaded) == (EQUAL_FAST, "LlamaForCausalLM"), found.told
    assert 0 < found.difference < 1e-4


def test_what_is_measured_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(*args: Any, **options: Any) -> Tensor:
        return edit_vector(*args, **options) * 1.01

    monkeypatch.setattr("persona_nnsight.engine.residual_writes.edit_vector", larger)
    found = judge(LLAMA, LIMIT)
    assert found.verdict == WRONG, found.told
    assert found.difference > 1e-4


def test_what_cannot_be_compared_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Architecture(TEXT, "nowhere", "NowhereForCausalLM")
    assert judge(nowhere, LIMIT).verdict == NOT_BUILT
    text = judge(Architecture(TEXT, "emu3", "Emu3ForCausalLM"), LIMIT)
    assert text.verdict == REFUSED
    assert "/" not in text.told  # where its directory was

    def fails(*_: Any) -> None:
        raise ValueError("first\nsecond")

    monkeypatch.setattr(verdict, "experiments", fails)
    found = judge(LLAMA, LIMIT)
    assert (found.verdict, found.told) == (TRACEBACK, "ValueError: first")
    assert "fails" in found.trace
    monkeypatch.setattr(verdict, "build", lambda *_: __import__("time").sleep(5))
    assert "more than 1 seconds" in judge(LLAMA, 1).told


@pytest.fixture
def own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "architectures.md"
    path.write_text(
        "before\n<!-- counts -->\nold\n<!-- end of counts -->\n"
        "<!-- tables -->\nold\n<!-- end of tables -->\nafter\n"
    )
    monkeypatch.setattr(page, "PAGE", path)
    return path


def test_the_page_says_what_came_out(own_page: Path) -> None:
    vision = Architecture(IMAGE_TEXT, "gemma3", "Gemma3ForConditionalGeneration")
    rows = page.rows_of(
        [
            Verdict(LLAMA, EQUAL_FAST, "KL off by 3e-06", loaded="Llama4ForCausalLM"),
            Verdict(vision, REFUSED, "one | two\n<b> a_b*"),
        ]
    )
    page.write_page(rows)
    text = own_page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "KL off by 3e-06; loaded as Llama4ForCausalLM" in text
    assert "Of 2 classes: 1 equal (fast), 1 refused." in text
    assert page.read_page() == rows
    assert page.disagreements(rows, rows, everything=True) == []
    changed = {LLAMA: (WRONG, "")}
    told = ["llama (text): equal (fast), now wrong"]
    assert page.disagreements(rows, changed, everything=False) == told
    gone = ["gemma3 (image-text): refused, now nothing"]
    assert page.disagreements(rows, {LLAMA: rows[LLAMA]}, everything=True) == gone
    page.write_page(rows)
    assert own_page.read_text() == text


def test_the_command_fails_where_the_page_says_otherwise(
    own_page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    outcome = [Verdict(LLAMA, EQUAL_FAST)]
    monkeypatch.setattr(command, "sweep", lambda *_: iter(outcome))
    with pytest.raises(SystemExit):
        command.main(["--only", "llama"])
    assert "llama (text): nothing, now equal (fast)" in capsys.readouterr().out
    command.main(["--only", "llama", "--write", "--csv", str(tmp_path / "verdicts.csv")])
    command.main(["--only", "llama"])
    assert "LlamaForCausalLM" in (tmp_path / "verdicts.csv").read_text()
    outcome[:] = [Verdict(LLAMA, WRONG, "KL off by 1")]
    with pytest.raises(SystemExit):
        command.main(["--only", "llama", "--write"])
    with pytest.raises(SystemExit, match="no model type nowhere"):
        command.main(["--only", "nowhere"])


def test_the_page_has_every_class() -> None:
    assert list(page.read_page()) == architectures()


def test_the_readme_counts_as_the_page_does() -> None:
    rows = page.read_page()
    run = sum(said.startswith("equal") for said, _ in rows.values())
    readme = (page.PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{run} of transformers' {len(rows)} classes" in readme
