"""scbench's own training step, as `scbench pretrain` runs it, on one process."""

from scbench.config import PretrainConfig
from scbench.data.batch import CellBatch
from scbench.errors import UserError
from scbench.models.model import ExpressionModel
from scbench.training import engine as engines
from scbench.training.deepspeed_settings import read_deepspeed_config
from scbench.training.engine import dist
from scbench.training.pretrain import backward


class ScbenchStep:
    """A DeepSpeed engine around an ExpressionModel, and what the training loop does with it in a step."""

    def __init__(self, model: ExpressionModel, config: PretrainConfig):
        _, world = engines.start_process_group()
        if world > 1:
            raise UserError(f"the benchmarks run on one process, not on {world}: start them without a launcher.")
        settings, _ = read_deepspeed_config(config, micro_steps=1)
        self.engine, self.rate = engines.make_engine(model, config, settings), config.lr
        self.engine.train()

    def prepare(self, batch: CellBatch) -> list[CellBatch]:
        """What the loader hands over: the window of a step."""
        return [batch]

    def forward_backward(self, window: list[CellBatch]) -> float:
        """The loss, with gradients left behind."""
        denominator = window[0].denominator.to(self.engine.device)
        dist.all_reduce(denominator)
        engines.set_learning_rate(self.engine, self.rate)
        self.losses = backward(self.engine, window, denominator)
        return float(self.losses[:2].sum())

    def update(self) -> None:
        """The optimizer's step, with the gradient's norm that the run's metrics record."""
        norm = engines.gradient_norm_before_step(self.engine)
        self.engine.step()
        dist.all_reduce(self.losses)
        self.norm = float(engines.gradient_norm(self.engine) if norm is None else norm)

    def gradient_norm(self) -> float:
        """Of all gradients together, before clipping. It makes the step: that is when DeepSpeed knows."""
        self.update()
        return self.norm
