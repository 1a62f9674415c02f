"""scbench: pretrain and benchmark foundation models of single-cell transcriptomes.

The public names load on first use (PEP 562), so `import scbench` costs milliseconds and needs neither torch nor a GPU.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "prepare": "scbench.data.prepare",
    "merge": "scbench.data.merge",
    "Store": "scbench.data.store",
    "Vocabulary": "scbench.data.vocabulary",
    "CellBatch": "scbench.data.batch",
    "pretrain": "scbench.training.pretrain",
    "ExpressionModel": "scbench.models.model",
    "embed": "scbench.evaluation.embed",
    "find_seen_cells": "scbench.evaluation.leakage",
    "UserError": "scbench.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'scbench' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
