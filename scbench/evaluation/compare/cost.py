"""What a row of a comparison costs, and how many steps its budget buys."""

import math
from typing import NamedTuple

import numpy as np
import torch

from scbench.config import CompareConfig, PretrainConfig
from scbench.data.batch import CellBatch
from scbench.data.loader import Loader
from scbench.data.store import Store
from scbench.models.flops import count_parameters, training_flops
from scbench.models.model import ExpressionModel

FEW_CELLS = 8  # of the batch whose activations are counted


class Cost(NamedTuple):
    """Of a cell, unless it says otherwise: the mean over the training split."""

    tokens: float  # `<cls>` included
    flops: float  # of training
    activations: int  # bytes that a forward pass keeps for the backward
    parameters: int  # of the model, all but the gene table
    encoder_parameters: int  # of the encoder, without tables of genes


def cost_of(config: PretrainConfig, store: Store) -> Cost:
    """What it costs to train a model of `config` on `store`. Memory: 8 bytes for each training cell."""
    train = store.split("train")
    train = train.first(math.ceil(config.data_share * train.n_cells))
    shape = config.model(store.vocabulary.size)
    genes = np.minimum(train.cells(["n_genes"])["n_genes"].to_numpy(), config.max_genes)
    with Loader(
        train, store.vocabulary, shape.inputs, seed=config.seed, batch_cells=config.batch_cells,
        micro_batch_cells=FEW_CELLS, mask_ratio=config.mask_ratio,
        weighted_share=0.5 if config.weighted_sampling else 0.0, lanes=None,
    ) as loader:
        window = next(loader)
    distinct = len(np.unique(np.concatenate([batch.query_genes.numpy() for batch in window])))
    flops = training_flops(shape, genes + 1, config.mask_ratio * genes, distinct / config.batch_cells)
    model = ExpressionModel(shape, store.vocabulary, config.seed).to(
        torch.bfloat16 if config.precision == "bf16" else torch.float32
    )
    return Cost(
        tokens=float(genes.mean() + 1),
        flops=float(flops.mean()),
        activations=_kept_bytes(model, window[0]) // window[0].n_cells,
        parameters=count_parameters(model, lambda name: name != "embedding.table"),
        encoder_parameters=count_parameters(model.encoder, lambda name: not name.endswith("table")),
    )


def _kept_bytes(model: ExpressionModel, batch: CellBatch) -> int:
    """Bytes of the tensors, weights left out, that autograd keeps from a training step's forward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(batch)
    return sum(storage.nbytes() for storage in kept.values())


def steps_of(config: CompareConfig, cost: Cost, seconds_per_step: float | None) -> int:
    """Optimizer steps that the budget buys, at least one.

    `seconds_per_step` is what a pilot measured; budgets in tokens and in FLOPs need none.
    """
    if config.budget_tokens is not None:
        return max(1, round(config.budget_tokens / (cost.tokens * config.batch_cells)))
    if config.budget_flops is not None:
        return max(1, round(config.budget_flops / (cost.flops * config.batch_cells)))
    return max(1, round(config.budget_seconds / seconds_per_step))
