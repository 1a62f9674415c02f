"""What a run trains on: in every epoch each cell, in another order, with other genes and other masks."""

import itertools

import pytest

from scbench import pretrain
from scbench.training import pretrain as module

SMALL = {"width": 8, "layers": 1, "heads": 2, "max_genes": 20, "batch_cells": 35, "epochs": 3, "precision": "fp32",
         "validation_cells": 1}


def cells_by_epoch(store, output, monkeypatch, **options) -> list[dict]:
    """For each of three epochs of 210 cells: cell → (its genes, its masked genes), in the order of training."""
    cells = []
    real = module.backward

    def spy(engine, window, denominator):
        for batch in window:
            hidden = set(batch.masked.tolist())
            for cell, (start, stop) in zip(batch.cells.tolist(), itertools.pairwise(batch.cell_offsets.tolist()), strict=True):
                shown = frozenset(batch.genes[start + 1 : stop].tolist())
                masked = frozenset(int(batch.genes[i]) for i in range(start, stop) if i in hidden)
                cells.append((cell, (shown, masked)))
        return real(engine, window, denominator)

    with monkeypatch.context() as patch:
        patch.setattr(module, "backward", spy)
        pretrain(store, output, **{**SMALL, **options})
    return [dict(cells[start : start + 210]) for start in range(0, len(cells), 210)]


@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_every_epoch_has_its_own_order_genes_and_masks(recipe, small_store, tmp_path, monkeypatch):
    epochs = cells_by_epoch(small_store, tmp_path / "run", monkeypatch, recipe=recipe)
    assert [sorted(epoch) for epoch in epochs] == [list(range(210))] * 3
    for a, b in itertools.combinations(epochs, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 30, "about one cell is at its old place by chance"
        assert sum(a[cell] == b[cell] for cell in a) < 30, "a mask comes again by chance in cells of few genes"
        long = [cell for cell, (shown, _) in a.items() if len(shown) == 20]
        assert len(long) > 100
        assert sum(a[cell][0] == b[cell][0] for cell in long) < 30, "cells of exactly 20 genes have nothing to draw"


def test_the_seed_decides_all_of_it_in_the_recipe_of_the_paper_too(small_store, tmp_path, monkeypatch):
    first, again, other = (cells_by_epoch(small_store, tmp_path / name, monkeypatch, recipe="aaai2025", seed=seed, epochs=1)
                           for name, seed in [("a", 3), ("b", 3), ("c", 4)])
    assert [list(epoch.items()) for epoch in first] == [list(epoch.items()) for epoch in again]
    assert list(first[0]) != list(other[0])


@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_weighted_sampling_changes_half_of_the_long_cells(recipe, small_store, tmp_path, monkeypatch):
    """The laws are keyed alike: where the coin says uniform, the same genes come with the option and without."""
    on, off = (cells_by_epoch(small_store, tmp_path / str(weighted), monkeypatch, recipe=recipe, epochs=1,
                              weighted_sampling=weighted)[0] for weighted in (True, False))
    assert list(on) == list(off)
    long = [cell for cell, (shown, _) in on.items() if len(shown) == 20]
    changed = sum(on[cell][0] != off[cell][0] for cell in long)
    assert abs(changed / len(long) - 0.5) < 5 * 0.5 / len(long) ** 0.5
    assert all(on[cell] == off[cell] for cell in on.keys() - set(long))
