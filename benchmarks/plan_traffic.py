"""What `scbench plan` assumes of the PyTorch paths' memory traffic and launches: counted, op by op.

One cell, one attention head and few tokens, so that paths which go cell by cell make each launch once and their scores are
small beside the states. Of few tokens the weights are no small part: what their passes move is shown apart, three of them
(forward, and twice backward). The last column is what scbench/training/plan_time.py has, rounded: bytes moved over bytes kept.

    python benchmarks/plan_traffic.py
"""

import record
import torch
from plan_worker import Case, synthetic_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scbench.config import STRUCTURES
from scbench.data.vocabulary import Vocabulary
from scbench.models.flops import encoder_parameters
from scbench.models.model import ExpressionModel
from scbench.training.plan_memory import ELEMENT, Micro, kept_bytes

WIDTH, GENES, VOCABULARY = 256, 32, 300
LAYERS = (7, 13)  # whole turns of the CNN's strides
NO_LAUNCH = ("detach", "empty", "_local_scalar_dense")
WEIGHT_PASSES = 3


class Traffic(TorchDispatchMode):
    """Bytes that ops read and write, and how many ops touch memory (views do not)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), result))
        if not function.is_view and outputs and function.overloadpacket.__name__ not in NO_LAUNCH:
            self.launches += 1
            self.bytes += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        return result


def case_of(structure: str, layers: int, precision: str) -> Case:
    """One cell."""
    return Case(structure=structure, width=WIDTH, layers=layers, heads=1, vocabulary_size=VOCABULARY, cells=1, genes=GENES,
                precision=precision)


def count(structure: str, layers: int, precision: str) -> tuple[int, int, float]:
    """(bytes moved, launches) of forward and backward, and the bytes kept in between."""
    case = case_of(structure, layers, precision)
    config = case.config().model(VOCABULARY)
    model = ExpressionModel(config, Vocabulary.build(f"gene-{i}" for i in range(VOCABULARY - 3)))
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    batch = model._resolved(synthetic_batch(case))
    with Traffic() as traffic:
        model(batch).loss.backward()
    micro = Micro(1, GENES + 1, GENES + 1, len(batch.masked), len(batch.query_genes))
    return traffic.bytes, traffic.launches, kept_bytes(config, precision, micro)


def main() -> None:
    """Count and print."""
    lines, added = [], LAYERS[1] - LAYERS[0]
    for structure in STRUCTURES:
        for precision in ("bf16", "fp32"):
            few, many = (count(structure, layers, precision) for layers in LAYERS)
            moved, launches, kept = ((b - a) / added for a, b in zip(few, many, strict=True))
            shapes = [case_of(structure, layers, precision).config().model(VOCABULARY) for layers in LAYERS]
            weights = (encoder_parameters(shapes[1]) - encoder_parameters(shapes[0])) / added * ELEMENT[precision]
            others = moved - WEIGHT_PASSES * weights
            lines.append([f"{structure} {precision}", f"{moved:,.0f}", f"{WEIGHT_PASSES * weights:,.0f}", f"{kept:,.0f}",
                          f"{launches:.1f}", f"{few[1] - LAYERS[0] * launches:.0f}", f"{others / kept:.1f}"])
    columns = ["a layer of", "bytes moved", "by weights", "bytes kept", "launches", "launches of the rest", "moved / kept"]
    record.print_table(columns, lines)


if __name__ == "__main__":
    main()
