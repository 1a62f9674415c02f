"""The reference implementation's models, dense and padded, in plain PyTorch modules: the oracle of the parity tests
(tests/models/test_import_reference.py), and what rivals.py times.

The keys of `state_dict()` are those of the reference's checkpoints, unused parameters included. Nothing of scbench is used.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TABLE_WIDTH = 256  # of the reference's gene table, whatever the model's width
MASKED_VALUE, LARGEST_VALUE = -1.0, 512.0
POOLED = ("cnn_base", "cnn_ours", "linear_ours")  # structures that end in one state a cell


class LinearBase(nn.Module):
    """A feed-forward network for every token by itself."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.ffns = nn.ModuleList()
        for _ in range(layers):
            self.ffns.append(nn.ModuleDict({"fc1": nn.Linear(width, width), "fc2": nn.Linear(width, width)}))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for ffn, norm in zip(self.ffns, self.layer_norms, strict=True):
            x = x + F.gelu(norm(ffn["fc2"](torch.relu(ffn["fc1"](x)))))
        return x


class LinearOurs(nn.Module):
    """Linear over channels, then over positions; the length halves in each layer and is 1 after the last."""

    def __init__(self, width: int, layers: int, length: int):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(layers):
            shorter = 1 if i == layers - 1 else length // 2
            self.layers.append(nn.ModuleDict({
                "linear_channel": nn.Linear(width, width),
                "linear_seq": nn.Linear(length, shorter),
                "bn": nn.BatchNorm1d(width),
            }))
            length = shorter

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            mixed = layer["linear_seq"](layer["linear_channel"](x).transpose(1, 2))  # [B, D, S']
            shortcut = F.adaptive_avg_pool1d(x.transpose(1, 2), mixed.shape[-1])
            x = (F.gelu(layer["bn"](mixed)) + shortcut).transpose(1, 2)
        return x[:, 0]


class Cnn(nn.Module):
    """Convolutions over the tokens in the order that they come in; every sixth has stride 1, the others 2."""

    def __init__(self, width: int, layers: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList()
        for i in range(layers):
            convolution = nn.Conv1d(width, width, 9, stride=1 if i % 6 == 0 else 2, padding=4)
            self.layers.append(nn.ModuleDict({"conv": convolution, "bn": nn.BatchNorm1d(width)}))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for layer in self.layers:
            stride = layer["conv"].stride[0]
            x = self.dropout(F.gelu(layer["bn"](layer["conv"](x)))) + F.max_pool1d(x, stride, stride)
        return F.adaptive_avg_pool1d(x, 1)[..., 0]


class GnnLayer(nn.Module):
    """The mixing of one layer: softmax(F Fᵀ + G Gᵀ) x, F and G from per-gene tables of width 64."""

    def __init__(self, vocabulary_size: int, width: int):
        super().__init__()
        self.factor_linear = nn.Parameter(torch.rand(vocabulary_size, 64))
        self.factor = nn.Parameter(torch.rand(vocabulary_size, 64))
        self.linear_trans = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, genes: Tensor, pads: Tensor) -> Tensor:
        f, g = self.linear_trans(self.factor_linear[genes]), self.factor[genes]
        logits = f @ f.transpose(1, 2) + g @ g.transpose(1, 2)
        adjacency = logits.masked_fill(pads[:, None, :], -torch.inf).softmax(-1)
        return self.linear(adjacency @ x)


class Gnn(nn.Module):
    """GnnLayer → LayerNorm → GELU, with a residual."""

    def __init__(self, vocabulary_size: int, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(GnnLayer(vocabulary_size, width) for _ in range(layers))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: Tensor, genes: Tensor, pads: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.layer_norms, strict=True):
            x = x + F.gelu(norm(layer(x, genes, pads)))
        return x


def head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.LeakyReLU(0.01), nn.Linear(width, width), nn.LeakyReLU(0.01), nn.Linear(width, outputs)
    )


class OracleOutput(NamedTuple):
    cell_embedding: Tensor  # [B, D]
    regression: Tensor  # [B, S]
    mvc: Tensor  # [B, S]


class ReferenceModel(nn.Module):
    """The reference's model of one structure. `length`: tokens of a cell, <cls> included (linear_ours needs it)."""

    def __init__(
        self, structure: str, vocabulary_size: int, pad: int, *, width: int, layers: int, heads: int = 8,
        length: int = 513, pooling: str = "cls", dropout: float = 0.0,
    ):
        super().__init__()
        self.structure, self.pad, self.pooling = structure, pad, pooling
        self.embedding = nn.Embedding(vocabulary_size, TABLE_WIDTH, padding_idx=pad)  # but drawn: see randomize
        if width != TABLE_WIDTH:
            self.emb_trans = nn.Linear(TABLE_WIDTH, width)
        self.value_encoder = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width))
        self.layer_norm = nn.LayerNorm(width)  # never used
        self.decoder = head(width, 1)
        self.gene2query = head(width, width)
        if structure == "transformer":
            layer = nn.TransformerEncoderLayer(width, heads, width, dropout, "relu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        elif structure == "linear_base":
            self.encoder = LinearBase(width, layers)
        elif structure == "linear_ours":
            self.encoder = LinearOurs(width, layers, length)
        elif structure in ("cnn_base", "cnn_ours"):
            self.encoder = Cnn(width, layers, dropout)
        elif structure == "gnn_cp":
            self.encoder = Gnn(vocabulary_size, width, layers)
        else:
            raise ValueError(structure)

    def forward(self, genes: Tensor, values: Tensor) -> OracleOutput:
        """genes int64 [B, S]: <cls> first, pads last; values [B, S]: 0 at <cls> and pads, −1 where masked."""
        states, cells, gene_states = self.encode(genes, values)
        mvc = (self.gene2query(gene_states.detach()) * cells[:, None]).sum(-1)
        regression = mvc.detach() if self.structure in POOLED else self.decoder(states)[..., 0]
        return OracleOutput(cells, regression, mvc)

    def encode(self, genes: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(states [B, S, D] or what the structure ends in, cell embeddings [B, D], gene states [B, S, D])."""
        pads = genes == self.pad
        gene_states = self.embedding(genes)
        if hasattr(self, "emb_trans"):
            gene_states = self.emb_trans(gene_states)
        x = gene_states + self.value_encoder(values.clamp(max=LARGEST_VALUE)[..., None])
        if self.structure == "transformer":
            states = self.encoder(x, src_key_padding_mask=pads)
            if not self.training:  # torch's fast path leaves pads out and puts zeros in their place
                states = states.masked_fill(pads[..., None], 0.0)
        elif self.structure == "gnn_cp":
            states = self.encoder(x, genes, pads)
        elif self.structure == "cnn_ours":  # <cls> first, then ascending ids, pads last
            rank = genes.masked_fill(pads, torch.iinfo(torch.int64).max)
            rank[:, 0] = -1
            order = rank.argsort(dim=1, stable=True)
            states = self.encoder(x.gather(1, order[..., None].expand_as(x)))
        else:
            states = self.encoder(x)
        if self.structure in POOLED:
            return states, states, gene_states
        # the average is over all positions, pads and <cls> too
        return states, states[:, 0] if self.pooling == "cls" else states.mean(1), gene_states

    @torch.no_grad()
    def randomize(self, seed: int = 0) -> "ReferenceModel":
        """Move every parameter and statistic away from where it starts, so that an error in any of them shows."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim == 1:
                tensor.add_(torch.empty_like(tensor).normal_(0, 0.2, generator=generator))
            else:
                fan_in = tensor[0].numel() if "factor" not in name and name != "embedding.weight" else tensor.shape[1]
                tensor.normal_(0, fan_in**-0.5, generator=generator)
        return self
