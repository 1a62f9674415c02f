"""scbench's own training step, as `scbench pretrain` runs it, and its cell embeddings."""

import torch
from torch import Tensor

from scbench.config import PretrainConfig
from scbench.data.batch import CellBatch
from scbench.models.model import ExpressionModel
from scbench.training import engine as engines
from scbench.training.allocator import keep_freed_memory
from scbench.training.deepspeed_settings import read_deepspeed_config
from scbench.training.engine import dist
from scbench.training.pretrain import backward


class ScbenchStep:
    """A DeepSpeed engine around an ExpressionModel, and what the training loop does with it in a step. Under a launcher it
    is one of several ranks."""

    def __init__(self, model: ExpressionModel, config: PretrainConfig):
        engines.start_process_group()
        settings, _ = read_deepspeed_config(config, micro_steps=1)
        self.engine, self.rate = engines.make_engine(model, config, settings), config.lr
        self.engine.train()

    def prepare(self, batch: CellBatch) -> list[CellBatch]:
        """What the loader hands over: the window of a step."""
        return [batch.to(self.engine.device)]

    def forward_backward(self, window: list[CellBatch]) -> Tensor:
        """This rank's part of the loss, not waited for, with gradients left behind."""
        denominator = window[0].denominator.clone()
        dist.all_reduce(denominator)
        engines.set_learning_rate(self.engine, self.rate)
        self.losses = backward(self.engine, window, denominator)
        return self.losses.sum()

    def update(self) -> None:
        """The optimizer's step, with the gradient's norm that the run's metrics record."""
        norm = engines.gradient_norm_before_step(self.engine)
        self.engine.step()
        dist.all_reduce(self.losses)
        self.norm = engines.gradient_norm(self.engine) if norm is None else norm

    def gradient_norm(self) -> float:
        """Of all gradients together, before clipping. It makes the step: that is when DeepSpeed knows."""
        self.update()
        return float(self.norm)


class ScbenchEmbedding:
    """An ExpressionModel without gradients, in a precision of choice."""

    def __init__(self, model: ExpressionModel, precision: str, device: torch.device):
        keep_freed_memory()  # as `scbench embed` does; the others in this process gain by it too
        self.model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).eval()
        self.device = device

    def prepare(self, batch: CellBatch) -> CellBatch:
        """On the device."""
        return batch.to(self.device)

    def embed(self, batch: CellBatch) -> Tensor:
        """Cell embeddings, float32 [B, D]."""
        with torch.inference_mode():
            return self.model.encode(batch)
