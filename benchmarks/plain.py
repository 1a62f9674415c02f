"""A good plain PyTorch version: padded batch, scaled_dot_product_attention, bf16 autocast, fused AdamW, dropout where ours
is, heads at masked positions only. No gradient clipping, which ours does: the doubt is the rival's.

Its modules bear the names of ExpressionModel's, so that it loads the same weights as they are.
"""

import torch
from dense_batch import DenseBatch, pad
from torch import Tensor, nn
from torch.nn import functional as F

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
        hidden = torch.relu(F.linear(values[..., None], self.value_weight1, self.value_bias1))
        return F.embedding(genes, self.table) + F.linear(hidden, self.value_weight2, self.value_bias2)


class Layer(nn.Module):
    """A post-LN transformer layer, ReLU, feed-forward width = width."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """x [B, L, D]; attended bool [B, 1, 1, L], None where nothing is padded."""
        cells, length, width = x.shape
        query, key, value = self.query_key_value(x).view(cells, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended)
        mixed = self.attention_output(mixed.transpose(1, 2).reshape(cells, length, width))
        x = self.attention_norm(x + self.dropout(mixed))
        inner = self.dropout(torch.relu(self.linear1(x)))
        return self.feed_forward_norm(x + self.dropout(self.linear2(inner)))


class Encoder(nn.Module):
    """The layers."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        for layer in self.layers:
            x = layer(x, attended)
        return x


class Head(nn.Module):
    """MLP D → D → D → out, LeakyReLU."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """[M, D] → [M, out]."""
        return self.linear3(F.leaky_relu(self.linear2(F.leaky_relu(self.linear1(x)))))


class PlainModel(nn.Module):
    """Masked value prediction from the token and from the cell embedding (`<cls>`)."""

    def __init__(self, vocabulary_size: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.embedding = Embedding(vocabulary_size, width)
        self.encoder = Encoder(width, layers, heads, dropout)
        self.regression_head = Head(width, 1)
        self.mvc_head = Head(width, width)

    def forward(self, batch: DenseBatch, padded: bool) -> Tensor:
        """The loss: mean squared errors of both predictions at masked positions, added up."""
        attended = ~batch.padding[:, None, None, :] if padded else None  # without a mask SDPA is quicker
        states = self.encoder(self.embedding(batch.genes, batch.values), attended)
        regression = self.regression_head(states.flatten(0, 1)[batch.masked])[:, 0]
        queries = self.mvc_head(self.embedding.table.detach()[batch.genes.flatten()[batch.masked]])
        mvc = (queries * states[:, 0][batch.cells]).sum(1)
        return F.mse_loss(regression.float(), batch.targets) + F.mse_loss(mvc.float(), batch.targets)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of an ExpressionModel."""
        self.load_state_dict(weights)


class PlainStep:
    """Its training step, through torch.compile if `compiled`."""

    def __init__(self, model: PlainModel, vocabulary: Vocabulary, precision: str, compiled: bool, device: torch.device):
        self.model = model.to(device).train()
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.pad_token, self.autocast, self.device = vocabulary.pad, precision == "bf16", device

    def prepare(self, batch: CellBatch) -> tuple[DenseBatch, bool]:
        """Padded to the longest cell; and whether there is any padding, known on the host."""
        dense = pad(batch, batch.max_tokens, self.pad_token)
        return DenseBatch(*(x.to(self.device) for x in dense)), bool(dense.padding.any())

    def forward_backward(self, batch: tuple[DenseBatch, bool]) -> float:
        """The loss, with gradients left behind."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.run(*batch)
        loss.backward()
        return loss.item()

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def gradient_norm(self) -> float:
        """Of all gradients together."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))
