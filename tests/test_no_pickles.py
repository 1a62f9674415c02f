"""Nothing in scbench executes what a file asks for."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_no_code_reads_pickles():
    calls = []
    for path in [*(ROOT / "scbench").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & UNPICKLERS, path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
                assert [alias.name for alias in node.names] == ["UnpicklingError"], path
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "pd.read_pickle"):
                calls.append(f"{ast.unparse(node.func)} {[ast.unparse(keyword) for keyword in node.keywords]}")
    assert calls
    for call in calls:
        assert "weights_only=True" in call or "allow_pickle=False" in call, call
