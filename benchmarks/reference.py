"""The reference's model and training step as they are, written again in plain PyTorch.

Dense padded batch, nn.TransformerEncoder (post-LN, ReLU, dropout inside the modules, on attention probabilities too),
both heads on every position, fp32, torch.optim.Adam over everything, the gene table included.
"""

import torch
from dense_batch import DenseBatch, pad
from torch import Tensor, nn

from scbench.data.batch import MASKED_VALUE, CellBatch
from scbench.data.vocabulary import Vocabulary

VALUE_LIMIT = 512  # values are clamped before the value encoder
LEARNING_RATE = 2e-4

# Our name of a weight → the reference's, within an encoder layer and outside.
LAYER_NAMES = {
    "query_key_value.weight": "self_attn.in_proj_weight", "query_key_value.bias": "self_attn.in_proj_bias",
    "attention_output": "self_attn.out_proj", "attention_norm": "norm1", "feed_forward_norm": "norm2",
}
NAMES = {
    "embedding.table": "embedding.weight",
    "embedding.value_weight1": "value_encoder.0.weight", "embedding.value_bias1": "value_encoder.0.bias",
    "embedding.value_weight2": "value_encoder.2.weight", "embedding.value_bias2": "value_encoder.2.bias",
    **{f"{ours}.linear{i + 1}": f"{theirs}.{2 * i}" for ours, theirs in
       (("regression_head", "decoder"), ("mvc_head", "gene2query")) for i in range(3)},
}


def _head(width: int, out: int) -> nn.Sequential:
    first, second, third = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)
    return nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), third)


class ReferenceModel(nn.Module):
    """Masked value prediction from the token and from the cell embedding (`<cls>`)."""

    def __init__(self, vocabulary_size: int, pad_token: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=pad_token)
        self.value_encoder = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, heads, dim_feedforward=width, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.decoder = _head(width, 1)
        self.gene2query = _head(width, width)

    def forward(self, genes: Tensor, values: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """genes, values, padding [B, L] → (predictions of the decoder, and of MVC), [B, L] each."""
        gene_embeddings = self.embedding(genes)
        states = gene_embeddings + self.value_encoder(values.clamp(max=VALUE_LIMIT)[..., None])
        states = self.encoder(states, src_key_padding_mask=padding)
        queries = self.gene2query(gene_embeddings.detach())
        return self.decoder(states)[..., 0], torch.bmm(queries, states[:, 0, :, None])[..., 0]

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of an ExpressionModel."""
        self.load_state_dict({_reference_name(name): tensor for name, tensor in weights.items()})


def _reference_name(name: str) -> str:
    layer_names = LAYER_NAMES if name.startswith("encoder.layers.") else NAMES
    for ours, theirs in layer_names.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


class ReferenceStep:
    """The reference's training step. `precision` must be fp32, its only mode."""

    def __init__(self, model: ReferenceModel, vocabulary: Vocabulary, length: int, device: torch.device):
        self.model = model.to(device).train()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.pad_token, self.length, self.device = vocabulary.pad, length, device

    def prepare(self, batch: CellBatch) -> DenseBatch:
        """What its loader hands over: padded to the fixed length."""
        return DenseBatch(*(x.to(self.device) for x in pad(batch, self.length, self.pad_token)))

    def forward_backward(self, batch: DenseBatch) -> float:
        """The loss, with gradients left behind."""
        self.optimizer.zero_grad()
        masked = batch.values.eq(MASKED_VALUE)
        loss = sum(_masked_mse(predictions, batch.true_values, masked)
                   for predictions in self.model(batch.genes, batch.values, batch.padding))
        loss.backward()
        return loss.item()

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def gradient_norm(self) -> float:
        """Of all gradients together."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))


def _masked_mse(predictions: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    mask = masked.float()
    return nn.functional.mse_loss(predictions * mask, targets * mask, reduction="sum") / mask.sum()
