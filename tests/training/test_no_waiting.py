"""The loop asks a device for nothing that is not ready: no step's numbers are read before READ_LAG more steps are queued.

On a GPU each such read would wait for everything that was queued. Counted here on the CPU, with a GPU's lag: every call of the
loop that turns a tensor into a number or brings it to the host. (DeepSpeed's own are its own: ZeRO 1 and 2 read the norm of
each parameter's gradient, one after the other, in every step; ZeRO 3 and fp32 without ZeRO hardly any.)
"""

import sys
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from scbench import pretrain
from scbench.training import pretrain as module

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero", "cpu", "numpy", "unique",
         "masked_select", "equal", "allclose"}
SMALL = {"width": 16, "layers": 1, "heads": 2, "max_genes": 40, "batch_cells": 32, "micro_batch_cells": 8, "steps": 12,
         "validate_every": 100, "validation_cells": 1}
LAG = 8


class Reads(TorchFunctionMode):
    """Counts reads by the loop: by scbench/training, but for what it reads of the host's copy of a window."""

    def __init__(self):
        super().__init__()
        self.by_owner, self.on = Counter(), False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if self.on and name in READS:
            frame = sys._getframe(1)
            while frame and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            path = frame.f_code.co_filename
            if "scbench/training/" in path and not path.endswith("step_facts.py"):
                self.by_owner[path, frame.f_code.co_name, name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("deepspeed", ["zero1", pytest.param("zero0", marks=pytest.mark.full),
                                       pytest.param("zero3", marks=pytest.mark.full)])
def test_no_step_reads_a_tensor_before_the_lag_is_over(deepspeed, small_store, tmp_path, monkeypatch):
    reads, steps, read = Reads(), [], []
    real, real_read = module.backward, module._read

    def backward(*arguments):
        steps.append(1)
        reads.on = 2 <= len(steps) <= LAG  # from the second step to the last whose numbers are not due
        return real(*arguments)

    def noted(unread, *rest):
        reads.on = False
        read.append((len(steps), unread.step))
        return real_read(unread, *rest)

    monkeypatch.setattr(module, "_read_lag", lambda device: LAG)
    monkeypatch.setattr(module, "backward", backward)
    monkeypatch.setattr(module, "_read", noted)
    with reads:
        pretrain(small_store, tmp_path / "run", **SMALL, deepspeed=deepspeed)
    assert read[:4] == [(9, 1), (10, 2), (11, 3), (12, 4)], "a step's numbers are read eight steps later"
    assert reads.by_owner == {}


def test_a_read_in_the_loop_is_seen():
    reads = Reads()
    reads.on = True
    code = compile("x = float(tensor)", "/somewhere/scbench/training/planted.py", "exec")
    with reads:
        exec(code, {"tensor": torch.ones(())})
    assert sum(reads.by_owner.values()) == 1
