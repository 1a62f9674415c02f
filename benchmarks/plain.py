"""Good plain PyTorch versions of every structure: padded or length-bucketed batches, scaled_dot_product_attention or matrix
products, torch.compile, bf16 autocast, fused AdamW, dropout where ours is, heads at masked positions only. No gradient
clipping, which ours does: the doubt is the rival's.

Its modules bear the names of ExpressionModel's, so that it loads the same weights as they are.
"""

import torch
from dense_batch import DenseBatch, buckets, pad
from plain_encoders import ENCODERS
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary

LEARNING_RATE, WEIGHT_DECAY = 2e-4, 0.01


class Embedding(nn.Module):
    """Gene table and value MLP."""

    def __init__(self, vocabulary_size: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(vocabulary_size, width))
        self.value_weight1 = nn.Parameter(torch.empty(width, 1))
        self.value_bias1 = nn.Parameter(torch.empty(width))
        self.value_weight2 = nn.Parameter(torch.empty(width, width))
        self.value_bias2 = nn.Parameter(torch.empty(width))

    def forward(self, genes: Tensor, values: Tensor) -> Tensor:
        """[B, L] → [B, L, D]."""
        values = values.to(self.value_weight1.dtype)
        hidden = torch.relu(F.linear(values[..., None], self.value_weight1, self.value_bias1))
        return F.embedding(genes, self.table) + F.linear(hidden, self.value_weight2, self.value_bias2)


class Head(nn.Module):
    """MLP D → D → D → out, LeakyReLU."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """[M, D] → [M, out]."""
        return self.linear3(F.leaky_relu(self.linear2(F.leaky_relu(self.linear1(x)))))


class PlainModel(nn.Module):
    """Masked value prediction from the token, where the structure keeps tokens, and from the cell embedding."""

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.pooling = config.pooling
        self.embedding = Embedding(config.vocabulary_size, config.width)
        self.encoder = ENCODERS[config.structure](config, attention)
        self.regression_head = Head(config.width, 1) if config.regression else None
        self.mvc_head = Head(config.width, config.width)

    def forward(self, batch: DenseBatch, padded: bool) -> Tensor:
        """The loss: squared errors of both predictions at masked positions, over the step's number of them."""
        states, cells = self.encode(batch, padded)
        queries = self.mvc_head(self.embedding.table.detach()[batch.genes.flatten()[batch.masked]])
        mvc = (queries * cells[batch.cells]).sum(1)
        loss = F.mse_loss(mvc.float(), batch.targets, reduction="sum")
        if self.regression_head is not None:
            regression = self.regression_head(states.flatten(0, 1)[batch.masked])[:, 0]
            loss = loss + F.mse_loss(regression.float(), batch.targets, reduction="sum")
        return loss / batch.denominator

    def encode(self, batch: DenseBatch, padded: bool) -> tuple[Tensor, Tensor]:
        """(token states [B, L, D], or what the structure ends in; cell embeddings [B, D])."""
        states = self.encoder(self.embedding(batch.genes, batch.values), batch, padded)
        if self.pooling == "own":
            return states, states
        if self.pooling == "cls":
            return states, states[:, 0].float()
        genes = states[:, 1:].float()
        if padded:
            genes = genes.masked_fill(batch.padding[:, 1:, None], 0)
        return states, genes.sum(1) / (batch.lengths - 1).clamp(min=1)[:, None]


Bucket = tuple[Tensor, DenseBatch, bool]  # which cells, their rectangle, whether it has pads (known on the host)


class PlainStep:
    """A training step, and cell embeddings without one.

    Parameters
    ----------
    autocast
        To bf16.
    bucketed
        Cells of a batch that differ in length are computed in several rectangles, one after the other.
    compiled
        Through torch.compile.
    """

    def __init__(
        self, model: PlainModel, vocabulary: Vocabulary, *, autocast: bool, bucketed: bool, compiled: bool,
        device: torch.device,
    ):
        self.model = model.to(device).train()
        self.run = torch.compile(self.model) if compiled else self.model
        self.encode = torch.compile(self.model.encode) if compiled else self.model.encode
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.pad_token, self.autocast, self.bucketed, self.device = vocabulary.pad, autocast, bucketed, device

    def prepare(self, batch: CellBatch) -> list[Bucket]:
        """Padded to the longest cell of the batch or the bucket."""
        if self.bucketed:
            found = buckets(batch, self.pad_token)
        else:
            found = [(torch.arange(batch.n_cells), pad(batch, batch.max_tokens, self.pad_token))]
        return [(rows.to(self.device), dense.to(self.device), bool(dense.padding.any())) for rows, dense in found]

    def forward_backward(self, batch: list[Bucket]) -> Tensor:
        """The loss, with gradients left behind."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for _, dense, padded in batch:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.run(dense, padded)
            loss.backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def gradient_norm(self) -> float:
        """Of all gradients together."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))

    def embed(self, batch: list[Bucket]) -> Tensor:
        """Cell embeddings, float32 [B, D], without dropout and gradients."""
        self.model.eval()
        parts = []
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            for _, dense, padded in batch:
                parts.append(self.encode(dense, padded)[1].float())
        places = torch.cat([rows for rows, *_ in batch])
        return torch.cat(parts)[places.argsort()]
