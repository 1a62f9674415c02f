"""Validation: cells of a split of their own, and the same genes and masks at any time, in any run, under any options."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from scbench import Store, pretrain
from scbench.training import validation as module

SMALL = {"width": 8, "layers": 1, "heads": 2, "max_genes": 25, "batch_cells": 32, "steps": 4, "validate_every": 2,
         "precision": "fp32"}


def validations(store, output, monkeypatch, **options) -> list[list[tuple]]:
    """For each validation of a run: (cell, its genes, its masked genes and their counts)."""
    seen = []
    real = module.validation_batches

    def spy(*arguments, **named):
        seen.append([])
        for batch in real(*arguments, **named):
            counts = dict(zip(batch.masked.tolist(), batch.target_counts.tolist(), strict=True))
            for number, start in enumerate(batch.cell_offsets[:-1].tolist()):
                stop = start + int(batch.lengths[number])
                masked = {int(batch.genes[i]): counts[i] for i in range(start, stop) if i in counts}
                seen[-1].append((int(batch.cells[number]), frozenset(batch.genes[start + 1 : stop].tolist()), masked))
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(module, "validation_batches", spy)
        pretrain(store, output, **{**SMALL, **options})
    return seen


@pytest.fixture(scope="module")
def expected(small_store, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return validations(small_store, tmp_path_factory.mktemp("validation") / "run", patch)


def test_it_is_fixed_and_on_cells_of_its_own_split(expected, small_store):
    first, second = expected
    assert first == second
    split = Store.open(small_store).split("validation")
    extent = split.read_extent(0)
    cells = [dict(zip(extent.genes[a:b].tolist(), extent.counts[a:b].tolist(), strict=True))
             for a, b in itertools.pairwise(extent.offsets)]
    assert [cell for cell, *_ in first] == list(range(split.n_cells)) == list(range(len(cells)))
    for cell, genes, masked in first:
        assert len(genes) == min(25, len(cells[cell]))
        assert genes <= cells[cell].keys()
        assert masked.items() <= cells[cell].items()


@pytest.mark.parametrize("options", [{"weighted_sampling": False}, {"recipe": "aaai2025"}, {"preprocess": "bin"},
                                     {"structure": "cnn"}, {"micro_batch_cells": 5}])
def test_no_option_of_the_training_changes_it(options, expected, small_store, tmp_path, monkeypatch):
    assert validations(small_store, tmp_path / "run", monkeypatch, **options) == expected


def test_the_last_step_is_the_model_however_it_validates(small_store, tmp_path):
    """Nothing is chosen by a loss: where validation gets worse and worse, the last weights are the model's all the same."""
    options = {"validate_every": 1, "checkpoint_every": 1, "keep_last": 9, "optimizer": "sgd", "lr": 0.3, "clip": 0.0}
    run = pretrain(small_store, tmp_path / "run", **{**SMALL, **options})
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) == 4 and losses[-1] > losses[0]
    model = load_file(run.model_dir / "model.safetensors")
    last, *others = (load_file(run.directory / "checkpoints" / f"step-{step:08d}" / "master.safetensors")
                     for step in (4, 3, 2, 1))
    assert all(torch.equal(model[name], last[name]) for name in model)
    assert not any(torch.equal(model["embedding.table"], other["embedding.table"]) for other in others)
