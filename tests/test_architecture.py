"""Imports point one way, heavy packages stay in their rooms, and `import scbench` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "data", "models", "training", "evaluation", "cli"]  # each may import itself and what stands before it
ROOMS = {"triton": "kernels", "flash_attn": "kernels", "deepspeed": "training", "tensorstore": "data"}


def modules() -> list[tuple[str, Path]]:
    found = [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]
    for layer in LAYERS[1:-1]:
        found += [(layer, path) for path in (ROOT / "scbench" / layer).rglob("*.py")]
    return [*found, ("cli", ROOT / "scbench" / "cli.py")]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("layer", "path"), modules(), ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_imports_point_one_way(layer, path):
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for name in imports(path, top_level_only=True):
        parts = name.split(".")
        if parts[0] == "scbench" and len(parts) > 1 and parts[1] in LAYERS:
            assert parts[1] in allowed, f"{path.name} ({layer}) imports {name}"
        if parts[0] in ROOMS:
            assert ROOMS[parts[0]] == layer, f"{path.name} ({layer}) imports {name}"
    if layer == "kernels":
        assert not [n for n in imports(path) if n.startswith("scbench.") and not n.startswith("scbench.kernels")]
    if layer == "models":
        data = {n for n in imports(path) if n.startswith("scbench.data.")}
        assert all(n.startswith(("scbench.data.batch.", "scbench.data.vocabulary.")) for n in data), data


def test_importing_scbench_and_its_options_loads_nothing_heavy():
    code = ("import sys, scbench, scbench.cli, scbench.config;"
            "print([m for m in ('torch', 'anndata', 'pandas', 'deepspeed', 'tensorstore', 'triton') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_everything_public_can_be_had():
    import scbench

    for name in scbench.__all__:
        assert getattr(scbench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        scbench.nonsense  # noqa: B018 - the access is the test
