"""Perturbation prediction as the AAAI 2025 reference does it: prompts on a frozen network that is fed no values.

    trial       one of 5; of all cells, controls and perturbed ones, 70 % train and 30 % test, drawn anew by cell; or, of the
                perturbed genes, 70 % train, with all controls, and the cells of the other 30 % test (`unseen`)
    genes       of a cell with more genes than the model takes at once, one subset a trial, drawn by weight from those that the
                cell itself expresses; what is asked is the value of each
    stage 1     a base prompt, added to the state of <cls>, is learnt from control cells: 50 epochs
    stage 2     prompt = Linear(embedding of the perturbed gene) + a bias vector, from perturbed cells: 50 epochs
    both        mean squared error, Adam at 5e-3, batches of 128; the last epoch counts; the network stays as it is
    reported    mean squared error over the genes of held-out perturbed cells, mean and population SD over trials; beside it
                the network without any prompt, with the base prompt alone, and (ours) each gene's mean over training cells

Where the protocol is not known to the last detail: the base prompt starts at 0, the bias vector where the base prompt ended,
and the network is in evaluation mode. What differs from the reference: pads, in cells with fewer genes, are not scored (there
they are asked about, with the answer 0); exact copies and cells seen in pretraining are left out.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.config import Values
from scbench.data.batch import CellBatch
from scbench.data.cells import CellTokens
from scbench.data.sampler import CellSampler, Sampled
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.reference_pt import CONTROL, CONTROL_NAME, PERTURBED, ReferencePtSource, is_reference_pt
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.aaai2025 import LEARNING_RATE, PROTOCOL, TRIALS, split_cells
from scbench.evaluation.guard import NOT_CHECKABLE
from scbench.evaluation.labelled_cells import read_unseen
from scbench.evaluation.perturbation import prompt_report as report
from scbench.evaluation.perturbation.features import target_tokens
from scbench.evaluation.perturbation.names import is_control, targets_of
from scbench.evaluation.perturbation.prompt_report import BASE, GENE_MEAN, NOTHING, PROMPT
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.reference_cells import labelled_source, values_sentences
from scbench.evaluation.report import Table
from scbench.kernels import random
from scbench.kernels.random import Stream
from scbench.models.model import ExpressionModel

BATCH_CELLS, EPOCHS = 128, 50  # of both stages
_UNKNOWN = -2  # where a perturbed gene's token would be
_PROMPTS = 21  # what a key of Stream.EVALUATION decides, beside those of the other files
SPLIT, DRAW, BASE_ORDER, PROMPT_ORDER, START = range(5)  # and what a trial's

class PromptCells(NamedTuple):
    """Perturbed cells and controls, each once, on the model's vocabulary."""

    name: str  # of their file
    tokens: CellTokens
    hashes: np.ndarray  # uint64 [cells], content hashes of `tokens`
    perturbed: np.ndarray  # int64 [cells], token id of the perturbed gene, or CONTROL
    overlap: str = NOT_CHECKABLE  # as in LabelledCells
    left_out: dict[str, int] | None = None  # perturbations of several or unknown genes, and how many cells have each
    column: str = PERTURBED  # that names the perturbations
    values: str = "as_is"  # what the file holds
    said: tuple[str, ...] = ()  # of these values


def read_prompt_cells(
    model: ExpressionModel,
    source: AnnDataSource | anndata.AnnData | Path | str,
    column: str | None = None,
    control: str = "control",
    *,
    values: Values = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    progress: bool = False,
) -> PromptCells:
    """Controls and cells with one perturbed gene that the model knows; others are left out and counted.

    Parameters
    ----------
    model
        The model that is to predict them.
    source
        Raw counts, or the reference's .pt file with `single_ctrl`.
    column, control
        The column of obs that names each cell's perturbation, and what it calls controls; a .pt file implies both.
    values, layer, genes_column, max_overlap, allow_overlap, progress
        As in `benchmark_classification`.

    Raises
    ------
    UserError
        If the source can't be read, has no controls, or if the model has seen too many of its cells.
    """
    column = PERTURBED if is_reference_pt(source) else column
    with labelled_source(model, source, column, layer=layer, genes_column=genes_column, values=values) as (opened, column):
        read, guarded, _ = read_unseen(
            model, opened, column, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
        )
        read = read.take(np.flatnonzero(~guarded.cells[read.rows]))
        if isinstance(opened, ReferencePtSource):
            perturbed, left_out = opened.perturbed[read.rows], {}
        else:
            perturbed, left_out = _perturbed_genes(model, opened, read.words, control)
    kept = perturbed != _UNKNOWN
    tokens, hashes = read.take(np.flatnonzero(kept)).tokens_on(model.vocabulary)
    return PromptCells(
        opened.name, tokens, hashes, perturbed[kept], guarded.overlap, left_out, column, opened.values,
        tuple(values_sentences(opened)),
    )


def _perturbed_genes(
    model: ExpressionModel, source: AnnDataSource, words: np.ndarray, control: str
) -> tuple[np.ndarray, dict[str, int]]:
    """The token of the gene that each cell's label names, CONTROL or _UNKNOWN, int64; the labels left out, and their cells."""
    genes = {*model.vocabulary.tokens, *source.identity.symbols, *source.identity.ids}
    targets = {word: targets_of(word, control, genes) for word in set(words)}
    if not any(is_control(word, control) for word in targets):
        raise UserError(f"no cell of {source.name} is called {control!r}, as controls would be: say what controls are called.")
    tokens = target_tokens(model, sorted({target for names in targets.values() for target in names}))
    token_of = {word: tokens.get(names[0], _UNKNOWN) if len(names) == 1 else _UNKNOWN for word, names in targets.items()}
    token_of |= {word: CONTROL for word, names in targets.items() if not names}
    left_out = Counter(word for word in words.tolist() if token_of[word] == _UNKNOWN)
    return np.array([token_of[word] for word in words], dtype=np.int64), dict(sorted(left_out.items()))


def benchmark_prompts_of(
    model: ExpressionModel,
    source: AnnDataSource | anndata.AnnData | Path | str,
    perturbation_column: str | None = None,
    control: str | None = None,
    *,
    unseen: bool = False,
    values: Values = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """The table of one model on the cells of a file: `benchmark_prompts` of `read_prompt_cells`, with their parameters.

    `perturbation_column`, `control`: of AnnData; a .pt file implies both.

    Raises
    ------
    UserError
        As these two; or if the model is none of ours, or a column or control is missing.
    """
    if not isinstance(model, ExpressionModel):
        raise UserError(f"the protocol {PROTOCOL} learns prompts on the network itself, and {model.name} is none: give a "
                        "model directory, or choose the default protocol.")
    if not is_reference_pt(source) and (perturbation_column is None or control is None):
        raise UserError("--perturbation-column and --control must be given for AnnData: say which column of obs names the "
                        "perturbations, and what it calls controls.")
    cells = read_prompt_cells(
        model, source, perturbation_column, control or CONTROL_NAME, values=values, layer=layer, genes_column=genes_column,
        max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress,
    )
    return benchmark_prompts(model, cells, unseen=unseen, seed=seed, progress=progress)


def benchmark_prompts(
    model: ExpressionModel, cells: PromptCells, *, unseen: bool = False, seed: int = 0, progress: bool = False
) -> Table:
    """The table of one model on one set of perturbed cells, by the reference's protocol.

    Parameters
    ----------
    model
        The pretrained model. Its weights stay as they are.
    cells
        Of `read_prompt_cells`.
    unseen
        Split by perturbed gene instead of by cell.
    seed
        Of splits, draws, start values and orders; with the trial's number.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If a part of a trial's split would have no cells.
    """
    _check(cells, unseen)
    errors: dict[str, list[float]] = {}
    tested = []
    with _frozen(model), progress_bar("trials", TRIALS, progress) as advance:
        for trial in range(TRIALS):
            found, cells_tested = run_trial(model, cells, unseen, random.key(seed, Stream.EVALUATION, _PROMPTS, trial))
            for name, error in found.items():
                errors.setdefault(name, []).append(error)
            tested.append(cells_tested)
            advance(1)
    genes = np.unique(cells.perturbed[cells.perturbed != CONTROL])
    common = {
        "protocol": PROTOCOL, "split": "unseen" if unseen else "seen in training", "values": cells.values, "seeds": TRIALS,
        "cells": len(cells.hashes), "perturbations": len(genes),
    }
    rows = [
        {"task": "perturbation", "dataset": cells.name, "perturbation_column": cells.column,
         **report.row(name, scores, cells.overlap), **common}
        for name, scores in errors.items()
    ]
    details = {
        "protocol": _protocol(model, unseen),
        "model": {"fingerprint": embed.fingerprint(model), "provenance": model.provenance},
        "preprocess": model.config.preprocess,
        "left_out": cells.left_out,
        "trials": [{"model": name, "mse": scores} for name, scores in errors.items()],
        "differences": report.differences(errors),
        "comparisons": report.comparisons(errors),
        "test_cells": tested,
        "seed": seed,
    }
    title = f"Perturbation prediction in {cells.name}, protocol {PROTOCOL}"
    said = [*report.sentences(errors, cells.left_out or {}, unseen, model.config.preprocess == "bin"), *cells.said]
    return Table(title, rows, report.COLUMNS, said, details, metric="mse")


def run_trial(model: ExpressionModel, cells: PromptCells, unseen: bool, key: int) -> tuple[dict[str, float], int]:
    """Mean squared errors on a trial's held-out perturbed cells, and how many those are."""
    train, test = split_perturbed(cells, unseen, random.fold(key, SPLIT))
    drawn = _Drawn(model, cells, random.fold(key, DRAW))
    controls, perturbed = (train[(cells.perturbed[train] == CONTROL) == wanted] for wanted in (True, False))
    if not (len(controls) and len(perturbed) and len(test)):
        raise UserError(f"{cells.name}: {len(cells.hashes)} cells split into {len(controls)} controls and {len(perturbed)} "
                        f"perturbed cells to train and {len(test)} perturbed ones to test: give more cells.")
    table = model.embedding.gene_table().float()
    base = torch.zeros(model.config.width, device=table.device, requires_grad=True)
    _learn(model, drawn, controls, [base], lambda rows: base.expand(len(rows), -1), random.fold(key, BASE_ORDER))
    base_prompt = base.detach().clone()
    bound, generator = model.config.width**-0.5, random.generator(random.fold(key, START))
    weight = torch.empty(model.config.width, model.config.width).uniform_(-bound, bound, generator=generator)
    weight, bias = weight.to(table.device).requires_grad_(), base_prompt.clone().requires_grad_()

    def prompt(rows: np.ndarray) -> Tensor:
        return F.linear(table[torch.from_numpy(cells.perturbed[rows]).to(table.device)], weight, bias)

    _learn(model, drawn, perturbed, [weight, bias], prompt, random.fold(key, PROMPT_ORDER))
    prompts = {PROMPT: prompt, BASE: lambda rows: base_prompt.expand(len(rows), -1), NOTHING: lambda rows: None}
    errors = {name: _error(model, drawn, test, prompt_of) for name, prompt_of in prompts.items()}
    return {**errors, GENE_MEAN: drawn.error_of_gene_means(perturbed, test)}, len(test)


def split_perturbed(cells: PromptCells, unseen: bool, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training part, controls among them, and of the perturbed test cells, int64."""
    is_control = cells.perturbed == CONTROL
    if unseen:
        genes = np.unique(cells.perturbed[~is_control])
        genes = genes[random.permutation(key, len(genes))]
        held_out = np.isin(cells.perturbed, genes[max(1, len(genes) * 7 // 10) :])
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)
    train, test = split_cells(cells.hashes, key)
    return train, test[~is_control[test]]


class _Drawn:
    """One draw of every cell's genes, all of them asked about."""

    def __init__(self, model: ExpressionModel, cells: PromptCells, key: int):
        self._sampler = CellSampler(model.vocabulary, model.config.inputs, seed=key, mask_ratio=1.0, weighted_share=1.0)
        self._sampled: Sampled = self._sampler.draw(cells.tokens, cells.hashes)
        self._hashes, self._device = cells.hashes.view(np.int64), embed.device_of(model)

    def batch(self, rows: np.ndarray) -> CellBatch:
        """The batch of some cells."""
        return self._sampler.pack(self._sampled, rows, self._hashes[rows], rows).to(self._device)

    def error_of_gene_means(self, train: np.ndarray, test: np.ndarray) -> float:
        """Of each gene's mean over training cells that show it; of a gene that none shows, the mean of all."""
        lengths = np.diff(self._sampled.offsets)
        cell = np.repeat(np.arange(len(lengths)), lengths)
        fitted, asked = np.isin(cell, train), np.isin(cell, test)
        genes, values = self._sampled.genes.astype(np.int64), self._sampled.values.astype(np.float64)
        size = int(genes.max(initial=0)) + 1
        shown = np.bincount(genes[fitted], minlength=size)
        sums = np.bincount(genes[fitted], weights=values[fitted], minlength=size)
        means = np.where(shown > 0, sums / np.maximum(shown, 1), values[fitted].mean())
        return float(np.mean((means[genes[asked]] - values[asked]) ** 2))


def _learn(
    model: ExpressionModel, drawn: _Drawn, rows: np.ndarray, parameters: list[Tensor],
    prompt_of: Callable[[np.ndarray], Tensor], key: int,
) -> None:
    """Fit the prompts' parameters, in place."""
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for epoch in range(1, EPOCHS + 1):
        order = rows[random.permutation(random.fold(key, epoch), len(rows))]
        for start in range(0, len(order), BATCH_CELLS):
            chosen = order[start : start + BATCH_CELLS]
            batch = drawn.batch(chosen)
            optimizer.zero_grad()
            squares, predictions = model.prompted(batch, prompt_of(chosen))
            (squares / max(1, len(predictions))).backward()
            optimizer.step()


@torch.no_grad()
def _error(model: ExpressionModel, drawn: _Drawn, rows: np.ndarray, prompt_of: Callable[[np.ndarray], Tensor | None]) -> float:
    """The mean squared error over all genes of some cells."""
    total, genes = 0.0, 0
    for start in range(0, len(rows), BATCH_CELLS):
        chosen = rows[start : start + BATCH_CELLS]
        squares, predictions = model.prompted(drawn.batch(chosen), prompt_of(chosen))
        total, genes = total + float(squares), genes + len(predictions)
    return total / max(1, genes)


@contextlib.contextmanager
def _frozen(model: ExpressionModel) -> Iterator[None]:
    """In evaluation mode, with weights that take no gradients; both are put back."""
    training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in parameters:
            parameter.requires_grad_()


def _check(cells: PromptCells, unseen: bool) -> None:
    genes = len(np.unique(cells.perturbed[cells.perturbed != CONTROL]))
    if genes < (2 if unseen else 1):
        needed = "two are needed to hold one out" if unseen else "one is needed"
        raise UserError(f"{cells.name} has {genes} perturbed genes, and {needed}: give another file.")
    if not (cells.perturbed == CONTROL).any():
        raise UserError(f"{cells.name} has no control cell ({PERTURBED} {CONTROL}), from which the base prompt is learnt: "
                        "give a file with controls.")


def _protocol(model: ExpressionModel, unseen: bool) -> str:
    split = "30 % of the perturbed genes held out" if unseen else "30 % of the cells held out"
    return (
        f"{PROTOCOL}: {TRIALS} trials, {split}, drawn anew; the values of at most {model.config.max_genes} expressed genes of "
        "a held-out cell, drawn by weight, predicted by the frozen network without any value; a base prompt on <cls> learnt "
        f"from control cells, then Linear(embedding of the perturbed gene) + bias, each {EPOCHS} epochs of Adam at "
        f"{LEARNING_RATE:g} in batches of {BATCH_CELLS}; mean and population SD over trials"
    )
