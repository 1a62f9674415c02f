"""The reference's training step as it is, around its models (reference_model.py), and its cell embeddings.

Dense batch padded to the fixed length, dropout inside the modules (on attention probabilities too), both heads on every
position, batch norms over pads, fp32, torch.optim.Adam over everything, the gene table included.
"""

import torch
from dense_batch import DenseBatch, pad
from reference_model import POOLED, ReferenceModel
from torch import Tensor, nn

from scbench.config import ModelConfig
from scbench.config.model import ALIASES
from scbench.data.batch import MASKED_VALUE, CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.models.import_reference import reference_name

LEARNING_RATE = 2e-4
THEIR_NAMES = {ours: theirs for theirs, ours in ALIASES.items()} | {"transformer": "transformer"}


def reference_model(config: ModelConfig, vocabulary: Vocabulary, weights: dict[str, Tensor]) -> ReferenceModel:
    """The reference's model of a structure (mamba has none), with the weights of an ExpressionModel of the recipe aaai2025."""
    model = ReferenceModel(
        THEIR_NAMES[config.structure], vocabulary.size, vocabulary.pad, width=config.width, layers=config.layers,
        heads=config.heads, length=config.max_genes + 1, dropout=config.dropout,
        pooling="avg" if config.pooling == "avg" else "cls",
    )
    named = {reference_name(name, config.structure): tensor for name, tensor in weights.items()}
    model.load_state_dict(named, strict=False)  # it has weights that it never uses
    return model


class ReferenceStep:
    """A training step, and cell embeddings without one. fp32 is the only mode."""

    def __init__(self, model: ReferenceModel, vocabulary: Vocabulary, length: int, device: torch.device):
        self.model = model.to(device).train()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.pad_token, self.length, self.device = vocabulary.pad, length, device

    def prepare(self, batch: CellBatch) -> DenseBatch:
        """What its loader hands over: padded to the fixed length."""
        return pad(batch, self.length, self.pad_token).to(self.device)

    def forward_backward(self, batch: DenseBatch) -> Tensor:
        """The loss, with gradients left behind."""
        self.optimizer.zero_grad()
        masked = batch.values.eq(MASKED_VALUE)
        output = self.model(batch.genes, batch.values)
        loss = _masked_mse(output.mvc, batch.true_values, masked)
        if self.model.structure not in POOLED:
            loss = loss + _masked_mse(output.regression, batch.true_values, masked)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def gradient_norm(self) -> float:
        """Of all gradients together."""
        return float(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))

    def embed(self, batch: DenseBatch) -> Tensor:
        """Cell embeddings, float32 [B, D], of its model in evaluation mode; the heads are not computed."""
        self.model.eval()
        with torch.no_grad():
            return self.model.encode(batch.genes, batch.values)[1]


def _masked_mse(predictions: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    mask = masked.float()
    return nn.functional.mse_loss(predictions * mask, targets * mask, reduction="sum") / mask.sum()
