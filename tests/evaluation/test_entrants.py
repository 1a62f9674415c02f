"""Models by name for every table, and what the leakage guard says of all of them."""

import numpy as np
import pytest

from scbench.data.cells import content_hash, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.entrants import check, entrants_of
from scbench.evaluation.external import ExternalEmbedding
from scbench.models.model import ExpressionModel

ASKED = {"max_overlap": 0.5, "allow_overlap": False, "progress": False}


@pytest.fixture
def source(cells) -> AnnDataSource:
    cells.obsm["X_other"] = np.zeros((120, 2), dtype=np.float32)
    return AnnDataSource(cells)


def seen_by(model, source, cells: slice) -> np.ndarray:
    """The sorted content hashes of some cells, as a model trained on them carries them."""
    tokens = to_tokens(source.read(0, 120), map_genes(source.identity, model.vocabulary, "cells"))
    return np.sort(content_hash(tokens.genes, tokens.counts, tokens.offsets)[cells])


def test_names_of_models_and_of_their_pretraining_seeds(model):
    assert [entrant.name for entrant in entrants_of(model, ())] == ["trained model"]
    assert [entrant.name for entrant in entrants_of(ExternalEmbedding("obsm:X_other"), ())] == ["X_other"]
    twice, once = entrants_of({"ours": [model, model], "PCA (x)": [model]}, ("PCA", r"PCA \([0-9]+\)"))
    assert [member.name for member in twice.members] == ["ours, pretraining seed 1", "ours, pretraining seed 2"]
    assert [member.name for member in once.members] == ["PCA (x)"]
    with pytest.raises(UserError, match="no model is given"):
        entrants_of({}, ())
    with pytest.raises(UserError, match=r"a model cannot be called 'PCA \(50\)', as another row of the table is"):
        entrants_of({"ours": [model], "PCA (50)": [model]}, ("PCA", r"PCA \([0-9]+\)"))


def test_what_any_seed_of_any_model_has_seen_is_left_out(model, source):
    second = ExpressionModel(model.config, model.vocabulary, seed=2)
    model.training_cells, second.training_cells = seen_by(model, source, slice(10)), seen_by(model, source, slice(5, 20))
    entrants = entrants_of({"ours": [model, second], "theirs": [ExternalEmbedding("obsm:X_other")]}, ())
    found = check(entrants, source, **ASKED)
    assert np.flatnonzero(found.seen).tolist() == list(range(20))
    assert found.overlap == {"ours": "unseen", "theirs": "not checkable"}
    assert [sum(one["seen"].values()) for one in found.details["ours"]] == [10, 15]
    kept = check(entrants, source, **ASKED | {"allow_overlap": True})
    assert kept.overlap == {"ours": "transductive", "theirs": "not checkable"} and not kept.seen.any()
    second.training_cells = None
    assert check(entrants, source, **ASKED).overlap["ours"] == "not checkable"


def test_too_many_seen_cells_of_those_that_count_are_refused(model, source):
    model.training_cells = seen_by(model, source, slice(40))
    few = np.arange(120) < 60
    assert check(entrants_of(model, ()), source, **ASKED).seen.sum() == 40
    said = r"the model was trained or validated on 40 of the 60 labelled cells \(40 by content\), 66\.7%, and 50\.0% are"
    with pytest.raises(UserError, match=said):
        check(entrants_of(model, ()), source, few, **ASKED)
    with pytest.raises(UserError, match=r"ours was trained or validated on 40 of the 120 cells .* and 10\.0% are allowed"):
        check(entrants_of({"ours": [model], "x": [model]}, ()), source, **ASKED | {"max_overlap": 0.1})
