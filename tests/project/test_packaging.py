"""The wheel: what is in it, and that it works in an environment that holds nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(directory)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (built,) = directory.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"persona_nnsight", "persona_cli", f"{wheel.name.split('-py3')[0]}.dist-info"}
    for needed in (
        "persona_nnsight/prompts/builtin_grids/short.yaml",
        "persona_nnsight/prompts/builtin_grids/long.yaml",
        "persona_nnsight/py.typed",
        "persona_nnsight/reproduction/published.csv",
    ):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_it_works_alone(wheel: Path, tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    """Installed with the pinned set into an empty environment, from nothing but the wheel."""
    bin_dir = tmp_path / "venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = [str(bin_dir / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def persona(*arguments: str) -> str:
        return subprocess.run(
            [str(bin_dir / "persona"), *arguments],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert "persona-nnsight 0." in persona("--version")
    assert "48" in persona("grids")
    model = str(tiny_dir("llama"))
    persona("inject", "-m", model, "--personas", "yoda", "--layers", "2", "--out", "run")
    table = pd.read_csv(tmp_path / "run" / "kl.csv")
    assert len(table) == 4 * 3  # host, oracle, cached, clean
    assert table["kl"].notna().all()
    persona("report", "run")
    assert "</html>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
