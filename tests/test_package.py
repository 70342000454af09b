"""The package as a whole: what importing it costs, who imports whom, what every file says."""

import ast
import pathlib
import subprocess
import sys

import pytest

import vita_jax

ROOT = pathlib.Path(vita_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A file imports only what stands to its left; `models` and `data` never import each other.
ORDER = (
    "config batch sharding params models|data losses codec_losses codebooks optim checkpoint "
    "quantize|average deepen tables release_config release lora flops infer codec_tokens evaluate "
    "train_log train_state feed objectives train aot peer peer_programs bench bench_programs "
    "bench_chat bench_formats exam exam_voice eval_nano bench_all serve plot attend "
    "demo cli __main__"
).split()
LEVEL = {name: i for i, names in enumerate(ORDER) for name in names.split("|")}


def name_of(path):
    """The part a file belongs to: `models` for models/llm.py, `config` for config.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(tree):
    """The parts of vita_jax that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "vita_jax":
            # A public name counts as an import of the file it lives in.
            names = [vita_jax._MODULE_OF.get(a.name, f"vita_jax.{a.name}") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [node.module]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("vita_jax."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = name_of(path)
    if part == "__init__":
        return  # imports everything, by name and on first use
    assert part in LEVEL, f"say in ORDER where {part} stands"
    for imported in imported_parts(ast.parse(path.read_text())):
        assert imported == part or LEVEL[imported] < LEVEL[part], f"{part} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_holds(path):
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and path.parent != ROOT:
        assert not tree.body
        return
    assert ast.get_docstring(tree), "no module docstring"
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_only_the_command_line_prints():
    for path in FILES:
        names = [
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        ]
        assert "print" not in names or path.name == "cli.py", path


def test_no_file_collects_leftovers():
    vague = {"utils", "util", "helpers", "common", "misc", "base", "manager"}
    assert [path for path in FILES if path.stem in vague] == []


def test_import_loads_no_jax():
    heavy = "jax flax optax orbax grain librosa matplotlib numpy"
    code = f"import sys, vita_jax; print([m for m in {heavy.split()} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", vita_jax.__all__)
def test_public_names_resolve(name):
    assert callable(getattr(vita_jax, name))
    assert name in dir(vita_jax)


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="Engine"):
        vita_jax.nothing_of_the_kind  # noqa: B018
