"""Recipe aaai2025 on two ranks: batch norm counts each rank's own cells, and the first rank's statistics are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scbench import ExpressionModel, Store
from scbench.data.loader import Loader

BIN = Path(sys.executable).parent
OPTIONS = ["--structure", "cnn", "--recipe", "aaai2025", "--width", "16", "--layers", "2", "--dropout", "0",
           "--max-genes", "40", "--batch-cells", "32", "--steps", "1"]


@pytest.mark.full
def test_statistics_are_the_first_ranks_own(small_store, tmp_path):
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "scbench", "pretrain", small_store,
               "-o", tmp_path / "run", *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = ExpressionModel.from_pretrained(tmp_path / "run" / "model")
    store = Store.open(small_store)

    def statistics(rank: int, world: int) -> list[torch.Tensor]:
        """Of a new model that has seen one rank's cells of the first step."""
        model = ExpressionModel(trained.config, trained.vocabulary, 0).train()
        with Loader(store.split("train"), store.vocabulary, model.config.inputs, seed=0, batch_cells=32,
                    micro_batch_cells=None, mask_ratio=0.4, weighted_share=0.5, lanes=None, rank=rank, world=world) as loader:
            (batch,) = next(loader)
        model(batch)
        return [buffer for _, buffer in model.named_buffers()]

    kept = [buffer for _, buffer in trained.named_buffers()]
    assert len(kept) == 4
    for buffer, own in zip(kept, statistics(0, 2), strict=True):
        torch.testing.assert_close(buffer, own, rtol=1e-5, atol=1e-6)
    for others in (statistics(1, 2), statistics(0, 1)):
        assert not any(torch.allclose(buffer, other, rtol=1e-4) for buffer, other in zip(kept, others, strict=True))
