"""Properties of the tree itself: imports point one way, nothing loads code from data, the README runs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedbbpt_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from its own layer and from those before it.
LAYERS = [
    {"types", "errors"},
    {"objectives", "prompts", "estimators", "models", "data", "pretrained"},
    {"optimizers", "black_box"},
    {"federated"},
    {"training"},
    {"commands"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
APART = {("estimators", "federated"), ("estimators", "models"), ("black_box", "estimators"), ("models", "estimators")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[str]:
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    return names + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != PACKAGE or f.name != "__init__.py"], ids=str)
def test_imports_point_one_way(path):
    here = room_of(path)
    for module in imported_modules(ast.parse(path.read_text())):
        if module.startswith("fedbbpt_jax."):
            there = module.split(".")[1]
            assert LEVEL[there] <= LEVEL[here], f"{here} imports {module}"
            assert (here, there) not in APART, f"{here} imports {module}"


def test_no_code_is_loaded_from_data():
    """No pickle, no eval, no exec, no torch anywhere in the package or the experiments."""
    for path in [*FILES, *(ROOT / "experiments").glob("*.py")]:
        tree = ast.parse(path.read_text())
        modules = {module.split(".")[0] for module in imported_modules(tree)}
        assert not modules & {"pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve", "torch"}, path
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile"}, path


def test_there_is_one_round_body():
    loops = [f for f in FILES if "vmap(optimizer.tell)" in f.read_text()]
    assert loops == [PACKAGE / "federated" / "round.py"]


def test_files_stay_readable():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in FILES}
    assert max(lengths.values()) <= 350, lengths


def readme_code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_readme_example_runs_and_learns(capsys):
    (code,) = readme_code()
    assert len(code.splitlines()) <= 30
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert float(capsys.readouterr().out.split()[-1]) > 0.85
