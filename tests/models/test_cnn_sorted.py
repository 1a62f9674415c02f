"""cnn_sorted: what its convolutions run along is ascending ids, for any vocabulary, file and device."""

import itertools

import anndata
import numpy as np
import pytest
import scipy.sparse

from scbench.config import ModelConfig
from scbench.data.vocabulary import Vocabulary
from scbench.models.model import ExpressionModel

NAMES = [f"GENE{i}" for i in range(50)]


@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
@pytest.mark.parametrize("specials_first", [True, False])
def test_tokens_come_by_ascending_id_whatever_the_vocabulary(recipe, specials_first, monkeypatch):
    rng = np.random.default_rng(0)
    specials = ["<pad>", "<cls>", "<eoc>"]
    order = rng.permutation(NAMES).tolist()
    names = specials + order if specials_first else order + specials
    vocabulary = Vocabulary({name: id_ for id_, name in enumerate(names)})
    config = ModelConfig(vocabulary_size=vocabulary.size, structure="cnn_sorted", recipe=recipe, width=8, layers=2,
                         max_genes=20)
    model = ExpressionModel(config, vocabulary)
    counts = scipy.sparse.random(30, 50, 0.4, "csr", np.float32, rng, lambda n: rng.integers(1, 9, n))
    cells = anndata.AnnData(counts)
    cells.var_names = NAMES
    lengths = np.diff(cells.X.indptr)
    assert lengths.min() < 20 < lengths.max()
    batches = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda batch: batches.append(batch) or encode(batch))
    found = model.embed(cells)
    for batch in batches:
        for (start, stop), real in zip(itertools.pairwise(batch.cell_offsets.tolist()), batch.lengths.tolist(), strict=True):
            tokens = batch.genes[start:stop].tolist()
            assert tokens[0] == vocabulary.cls
            assert tokens[1:real] == sorted(set(tokens[1:real]))
            assert tokens[real:] == [vocabulary.pad] * (stop - start - real)
            assert not {vocabulary.cls, vocabulary.pad, vocabulary.eoc} & set(tokens[1:real])
    shuffled = cells[:, rng.permutation(50)].copy()
    np.testing.assert_allclose(model.embed(shuffled), found, rtol=1e-5, atol=1e-6)
