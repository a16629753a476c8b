"""Who writes files: one module, and those that are handed a place that it made.

`persona_nnsight.storage.files` has the ways to write in a directory that may be somebody else's.
The others named here write where nobody could prepare anything: into a directory that was made new,
with a random name, for this.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Calls that write, as methods and functions are called: whatever they are called on.
WRITING = {
    *("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "link", "symlink"),
    *("to_csv", "to_parquet", "to_pickle", "to_json", "to_feather", "savefig", "savez", "savetxt"),
    *("save_file", "save_pretrained", "tofile", "copyfile", "copy2", "copytree", "copymode"),
    *("move", "replace_file", "mkstemp", "NamedTemporaryFile", "TemporaryFile", "mknod", "mkfifo"),
    *("GGUFWriter", "FileHandler", "dump_to_file", "extractall", "truncate", "ftruncate"),
}
#: Of these modules only what is named.
OF_MODULES = {
    "os.open",
    "os.replace",
    "os.rename",
    "os.write",
    "np.save",
    "torch.save",
    "shutil.copy",
    "tempfile.mkdtemp",
    "tempfile.mktemp",
    "tempfile.TemporaryDirectory",
}

#: What each module may, and why nothing lies in wait there.
ALLOWED: dict[str, set[str]] = {
    # The one place.
    "persona_nnsight/storage/files.py": {"os.open", "os.replace", "tempfile.TemporaryDirectory"},
    # A lock, opened there; and a file in a workshop.
    "persona_nnsight/storage/lock.py": {"os.write", "ftruncate", "write_text"},
    # Into a workshop, or into the directory that is given to what `save_run` calls, which is one.
    "persona_nnsight/storage/journal.py": {"write_text", "save_file"},
    "persona_nnsight/storage/run_directory.py": {"os.replace"},
    "persona_nnsight/storage/residuals.py": {"open"},
    "persona_nnsight/storage/vectors.py": {"write_bytes"},
    "persona_nnsight/storage/control_vectors.py": {"GGUFWriter"},
    "persona_nnsight/experiments/results.py": {"to_csv", "write_text", "open"},
    "persona_nnsight/reproduction/reproduce.py": {"to_csv", "write_text"},
    "persona_nnsight/report/write.py": {"write_text"},
    "persona_nnsight/pages/figures/canvas.py": {"write_text", "savefig"},
    "cli/persona_cli/commands/grids.py": {"write_text"},
    # Into a directory of its own in the cache of models, and in the system's temporary one.
    "persona_nnsight/models/weights/gguf_convert.py": {
        *("tempfile.TemporaryDirectory", "os.replace", "write_text", "save_pretrained", "copymode"),
    },
    "persona_nnsight/models/weights/embedded.py": {"tempfile.TemporaryDirectory", "open"},
    # To nowhere.
    "cli/persona_cli/console.py": {"os.open", "open"},
    # To memory.
    "cli/persona_cli/running.py": {"to_json"},
}


def writes(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if name in OF_MODULES:
            yield name
        elif last in WRITING or (last == "open" and _for_writing(node, method=name != "open")):
            yield last


def _for_writing(call: ast.Call, *, method: bool) -> bool:
    """Whether a file is opened in another mode than to be read; a mode that is computed may be."""
    given = [word.value for word in call.keywords if word.arg == "mode"]
    given += call.args[0 if method else 1 :][:1]
    return any(
        not (isinstance(mode, ast.Constant) and isinstance(mode.value, str))
        or bool(set(mode.value) & set("wax+"))
        for mode in given
    )


def found() -> dict[str, set[str]]:
    return {
        path.relative_to(ROOT).as_posix(): calls
        for top in ("persona_nnsight", "cli/persona_cli")
        for path in (ROOT / top).rglob("*.py")
        if (calls := set(writes(ast.parse(path.read_text(encoding="utf-8")))))
    }


def test_nobody_else_writes() -> None:
    more = {path: calls - ALLOWED.get(path, set()) for path, calls in found().items()}
    assert {path: calls for path, calls in more.items() if calls} == {}


def test_what_writes_is_seen() -> None:
    for text in (
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, how)",
        "path.open('x')",
        "path.write_text(text)",
        "table.to_csv(path)",
        "os.open(path, flags)",
        "shutil.copy(a, b)",
    ):
        assert list(writes(ast.parse(text))), text
    for text in ("open(path)", "path.open('rb')", "archive.open('rb')", "text.replace(a, b)"):
        assert not list(writes(ast.parse(text))), text


#: What prints, and the one module that may.
PRINTING = {"print", "echo", "secho", "Console", "stdout.write", "stderr.write"}


def test_nobody_else_prints() -> None:
    """`persona_cli.console` escapes what others wrote; around it, nothing is printed."""
    printing = set()
    for top in ("persona_nnsight", "cli/persona_cli"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if name in PRINTING or name.endswith((".echo", ".secho", ".stdout.write")):
                    printing.add(path.relative_to(ROOT).as_posix())
    assert printing == {"cli/persona_cli/console.py"}
