"""The house rules that a machine can check: layers, sizes, docstrings, and what an import may load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("memory", "parallel", "scheduler", "runtime", "perf")  # from the lowest up
FILES = [ROOT / "__init__.py", *sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LAZY_BY_NAME = {("runtime/cli.py", "outgrow.perf.cli"), ("runtime/cli.py", "outgrow.scheduler.schedule_cli")}
"""The command line hands two commands to other folders by name, when they are asked for."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=name_of(path))


def imported_modules(path: Path) -> list[str]:
    """Absolute names of all that a file imports anywhere, inside functions too; `from x import y` gives x and x.y."""
    package = ["outgrow", *path.relative_to(ROOT).parent.parts]
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "outgrow" and parts[1] in LAYERS else None


def test_every_layer_has_files():
    assert {path.relative_to(ROOT).parts[0] for path in FILES[1:]} == set(LAYERS)


def test_imports_point_down_only():
    wrong = []
    for path in FILES[1:]:
        own = path.relative_to(ROOT).parts[0]
        above = LAYERS[LAYERS.index(own) + 1 :]
        wrong += [f"{name_of(path)} imports {name}" for name in imported_modules(path) if layer_of(name) in above]
    assert not wrong


def test_the_search_sees_relative_and_lazy_imports():
    found = imported_modules(ROOT / "runtime" / "cli.py")
    assert {"outgrow.runtime.demo", "outgrow.memory.errors", "outgrow.__version__", "typer"} <= set(found)


def test_modules_named_in_text_point_down_only_but_for_the_command_line():
    found = set()
    for path in FILES[1:]:
        own = path.relative_to(ROOT).parts[0]
        texts = [node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)]
        for text in texts:
            layer = layer_of(text) if isinstance(text, str) and re.fullmatch(r"outgrow(\.\w+)+", text) else None
            if layer is not None and LAYERS.index(layer) > LAYERS.index(own):
                found.add((name_of(path), text))
    assert found <= LAZY_BY_NAME


def test_the_command_lines_handed_on_by_name_exist():
    handed_on = set(re.findall(r'_pass_on\("([\w.]+)"', (ROOT / "runtime" / "cli.py").read_text()))
    assert handed_on == {module for _, module in LAZY_BY_NAME}
    assert all(ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py") in FILES for module in handed_on)


def test_ray_is_imported_in_the_runtime_alone():
    importers = {
        name_of(path) for path in FILES if any(module.split(".")[0] == "ray" for module in imported_modules(path))
    }
    assert importers, "the search finds nothing at all"
    assert all(name.startswith("runtime/") for name in importers), sorted(importers)


def test_no_file_is_longer_than_400_lines():
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in FILES + TESTS}
    assert not {name: size for name, size in sizes.items() if size > 400}


def test_every_file_of_the_package_says_what_it_owns():
    assert not [name_of(path) for path in FILES if not ast.get_docstring(tree_of(path))]


def test_the_face_of_the_package_is_small():
    assert len((ROOT / "__init__.py").read_text().splitlines()) < 40


def test_no_file_is_called_utils():
    assert not [name_of(path) for path in FILES + TESTS if path.stem in {"utils", "util", "helpers", "common"}]


def test_library_code_does_not_print():
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls


def test_there_are_no_knobs_in_environment_variables_and_no_unfinished_notes():
    rest = re.compile(r"""\b(TODO|FIXME|XXX)\b|(environ(\.get\(|\[)|getenv\()["']OUTGROW""")
    assert not [name_of(path) for path in FILES if rest.search(path.read_text())]


LIST_LOADED = "import sys; sys.stderr.write(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter outside the repository."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LIST_LOADED}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=True,
    )
    return set(done.stderr.split())


def test_importing_the_package_loads_neither_torch_nor_ray():
    loaded = loaded_by("import outgrow; assert outgrow.__version__")
    assert "outgrow" in loaded
    assert not loaded & {"torch", "ray", "numpy", "numba"}


def test_help_loads_neither_torch_nor_ray():
    code = """
import runpy, sys
sys.argv = ["outgrow", "--help"]
try:
    runpy.run_module("outgrow.runtime.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    loaded = loaded_by(code)
    assert "typer" in loaded
    assert not loaded & {"torch", "ray", "numpy", "numba"}


def test_the_face_has_what_it_names_and_says_so_of_what_it_has_not():
    import outgrow

    for name in outgrow.__all__:
        assert getattr(outgrow, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'Engin'; it has .*Engine"):
        _ = outgrow.Engin  # pyright: ignore[reportAttributeAccessIssue]
