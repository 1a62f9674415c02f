"""Halves of counts: their law, their independence, and that they depend on nothing but seed, cell and gene."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

from scbench.cli import main
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.counts.thinning import read_halves, thin
from scbench.kernels import random


def halves_of(cells: anndata.AnnData, seed: int = 0):
    with AnnDataSource(cells) as source:
        return read_halves(source, seed)


def by_name(cells: anndata.AnnData, seed: int = 0) -> pd.DataFrame:
    """Half A with cells and genes by name."""
    halves = halves_of(cells, seed)
    return pd.DataFrame(halves.seen.toarray(), halves.ids, cells.var_names).sort_index(axis=0).sort_index(axis=1)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 64 * 1024, 64 * 2050 + 7])
def test_a_draw_is_the_number_of_ones_among_as_many_bits(count):
    keys = random.bits(3, np.arange(3))
    words, rest = divmod(count, 64)
    for key, found in zip(keys.tolist(), thin(np.full(3, count, dtype=np.uint32), keys).tolist(), strict=True):
        ones = (int(random.bits(key, 0)[()]) & (1 << rest) - 1).bit_count()
        assert found == ones + sum(int(word).bit_count() for word in random.bits(key, np.arange(1, words + 1)))


@pytest.mark.parametrize("count", [1, 2, 5, 63, 64, 65, 200])
def test_draws_have_the_binomial_law(count):
    drawn = thin(np.full(20_000, count, dtype=np.uint32), random.bits(11, np.arange(20_000)))
    law = scipy.stats.binom(count, 0.5)
    edges = np.unique(law.ppf(np.linspace(0, 1, 12)[1:-1]))  # bins of about equal probability
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * len(drawn)
    observed = np.bincount(np.searchsorted(edges, drawn), minlength=len(expected))
    keep = expected > 0
    assert observed[~keep].sum() == 0
    assert scipy.stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected.sum()).pvalue > 1e-3


def test_draws_of_mixed_and_huge_counts():
    counts = np.array([0, 3, 10_000_000, 64, 1_000_000, 1], dtype=np.uint32)
    keys = random.bits(5, np.arange(6))
    drawn = thin(counts, keys)
    assert all(thin(counts[[i]], keys[[i]])[0] == drawn[i] for i in range(6))
    for place in (2, 4):
        assert abs(drawn[place] - counts[place] / 2) < 5 * np.sqrt(counts[place]) / 2


def test_halves_add_up_to_the_cells(cells):
    halves = halves_of(cells)
    assert (np.diff(halves.keys.astype(object)) > 0).all()
    assert (halves.ids == cells.obs_names[halves.rows]).all()
    whole = (halves.seen + halves.unseen).toarray()
    np.testing.assert_array_equal(whole, cells.X[halves.rows].toarray())
    total = cells.X.sum()
    assert abs(halves.seen.sum() - total / 2) < 5 * np.sqrt(total) / 2
    assert (halves.seen.data > 0).all() and (halves.unseen.data > 0).all()


def test_halves_of_poisson_counts_are_independent():
    generator = np.random.default_rng(0)
    counts = generator.poisson(6.0, (3000, 5)).astype(np.int32)
    obs = pd.DataFrame(index=[f"cell {i}" for i in range(3000)])
    halves = halves_of(anndata.AnnData(scipy.sparse.csr_matrix(counts), obs, pd.DataFrame(index=list("abcde"))))
    seen, unseen = halves.seen.toarray().ravel(), halves.unseen.toarray().ravel()
    for half in (seen, unseen):
        assert half.mean() == pytest.approx(3, abs=0.06)
        assert half.var() == pytest.approx(3, abs=0.15)
    table = np.histogram2d(np.minimum(seen, 6), np.minimum(unseen, 6), bins=np.arange(8))[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3
    whole = seen + unseen  # a whole cell is not independent of its half
    assert np.corrcoef(whole, unseen)[0, 1] > 0.6


def test_the_order_of_cells_and_genes_and_other_cells_do_not_matter(cells):
    generator = np.random.default_rng(0)
    found = by_name(cells)
    shuffled = cells[generator.permutation(cells.n_obs), generator.permutation(cells.n_vars)].copy()
    pd.testing.assert_frame_equal(by_name(shuffled), found)
    some = by_name(cells[30:50].copy())
    pd.testing.assert_frame_equal(some, found.loc[some.index])
    assert not by_name(cells, seed=1).equals(found)
    assert halves_of(cells[::-1].copy()).digest == halves_of(cells).digest != halves_of(cells, 1).digest


@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_cells_and_genes_that_share_a_name_are_split_on_their_own():
    x = scipy.sparse.csr_matrix(np.full((2, 2), 1000, dtype=np.int32))
    cells = anndata.AnnData(x, pd.DataFrame(index=["one", "one"]), pd.DataFrame(index=["g", "g"]))
    assert len(set(halves_of(cells).seen.data)) == 4


def test_counts_that_are_not_whole_are_refused(cells):
    cells.X = cells.X.astype(np.float32)
    cells.X.data[0] = 1.5
    with AnnDataSource(cells, fractional="keep") as source, pytest.raises(UserError, match="not whole"):
        read_halves(source)


def test_thin_writes_half_a_under_names_of_its_own(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    main(["benchmark", "thin", str(tmp_path / "cells.h5ad"), "-o", str(tmp_path / "half.h5ad"), "--seed", "4", "--json"])
    half, expected = anndata.read_h5ad(tmp_path / "half.h5ad"), halves_of(cells, 4)
    assert half.obs["cell"].tolist() == cells.obs_names.tolist()
    assert half.obs_names[expected.rows].tolist() == expected.half_ids.tolist()
    assert half.obs_names[0].startswith("cell 0|half-")
    np.testing.assert_array_equal(half.X.toarray()[expected.rows], expected.seen.toarray())
    assert half.var["gene_symbol"].tolist() == cells.var_names.tolist()
    for arguments in (["half.h5ad"], ["half.csv"], ["other.h5ad", "--values", "as_is"]):
        with pytest.raises(SystemExit) as stop:
            main(["benchmark", "thin", str(tmp_path / "cells.h5ad"), "-o", str(tmp_path / arguments[0]), *arguments[1:]])
        assert stop.value.code == 2
