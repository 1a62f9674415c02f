"""Predictions from elsewhere: taken only on the split they were made on, complete, and of labels that there are."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scbench.errors import UserError
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.evaluation.split_files import Split

pytestmark = pytest.mark.filterwarnings("ignore:.*names are not unique")
CELLS = ["a", "b", "c", "b"]
SPLIT = Split.of("classification", "f.h5ad", "type", "cross", 2, "cell", ["a", "b", "c", "b#2"], np.array([[0, 1, 0, 1]] * 2))
LABELS = {"prediction_0": ["x", "y", "1", "y"], "prediction_1": ["y", "y", "x", "1"]}
GENES = ["G1", "G2", "G3"]
PAIRS = [(0, 0, "KLF1", ""), (0, 1, "KLF1+MYC", ""), (1, 0, "KLF1", ""), (1, 1, "KLF1+MYC", "")]


@pytest.fixture
def write(tmp_path):
    def save(obs: pd.DataFrame, X=None, digest: object = SPLIT.digest, var=GENES) -> ExternalPredictions:
        X = np.zeros((len(obs), len(var)), dtype=np.float32) if X is None else X
        uns = {} if digest is None else {"split_sha256": digest}
        obs.index = obs.index.astype(str)
        file = anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=var), uns=uns)
        file.write_h5ad(tmp_path / "mine.h5ad")
        return ExternalPredictions(tmp_path / "mine.h5ad")

    return save


def labels(cells=CELLS, **changes) -> pd.DataFrame:
    return pd.DataFrame(LABELS | changes, index=cells)


def profiles(**changes) -> pd.DataFrame:
    columns = dict(zip(["repetition", "fold", "perturbation", "context"], zip(*PAIRS, strict=True), strict=True))
    return pd.DataFrame({name: list(values) for name, values in (columns | changes).items()})


def test_labels_come_in_the_order_asked_for(write):
    predictions = write(labels(["c", "b", "a", "b"]))
    read = predictions.read_labels(SPLIT, ["a", "b#2", "c"], ["x", "y", "1"])
    assert read.tolist() == [["1", "y", "x"], ["x", "1", "y"]]
    assert predictions.name == "mine"
    assert predictions.provenance["split_sha256"] == SPLIT.digest
    numbers = write(labels(prediction_0=pd.Categorical([1, 2, 1, 2]), prediction_1=[2.0, 2, 1, 1]))
    assert numbers.read_labels(SPLIT, ["b", "c"], ["1", "2"]).tolist() == [["2", "1"], ["2", "1"]]


def test_labels_that_cannot_be_scored_are_refused(write):
    for obs, said in [
        (labels().drop(columns="prediction_1"), r"no column prediction_1 in obs: .* 2 repetitions"),
        (labels(["a", "b", "c", "d"]), r"no prediction for 1 of 4 cells \('b#2', say\)"),
        (labels(prediction_1=["y", "z", "x", "1"]), r"predicts 'z', which is no class of the benchmark, for cell 'b'"),
        (labels(prediction_1=["y", "y", None, "1"]), r"predicts no label for cell 'c' in prediction_1: give one of 1, x, y\."),
    ]:
        with pytest.raises(UserError, match=said):
            write(obs).read_labels(SPLIT, ["a", "b", "c", "b#2"], ["x", "y", "1"])


def test_predictions_on_another_split_are_refused(write, tmp_path):
    other = SPLIT._replace(fold={unit: folds[::-1] for unit, folds in SPLIT.fold.items()}, label="kind")
    with pytest.raises(UserError, match=r"predicted on the split .*…, not on this one"):
        write(labels()).read_labels(other, CELLS, ["x"])
    for digest in (None, 3):
        with pytest.raises(UserError, match=r'no text uns."split_sha256"'):
            write(labels(), digest=digest)
    with pytest.raises(UserError, match="there is no file"):
        ExternalPredictions(tmp_path / "gone.h5ad")
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(UserError, match="cannot be read as an h5ad"):
        ExternalPredictions(tmp_path / "text.h5ad")


@pytest.mark.parametrize("sparse", [False, True])
def test_profiles_by_what_they_are_of(write, sparse):
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    read = write(profiles(), scipy.sparse.csr_matrix(values) if sparse else values).read_profiles(SPLIT)
    np.testing.assert_array_equal(read.of(1, 0, "KLF1", "", ["G3", "G1"]), values[2, [2, 0]].astype(np.float64))
    np.testing.assert_array_equal(read.of(0, 1, "KLF1+MYC", "", GENES, study="any"), values[1])
    with pytest.raises(UserError, match=r"mine\.h5ad has no prediction of repetition 0, fold 0, perturbation 'MYC':"):
        read.of(0, 0, "MYC", "", GENES)
    with pytest.raises(UserError, match=r"nothing for 2 of the 3 genes to score \(H1, say\)"):
        read.of(0, 0, "KLF1", "", ["H1", "G1", "H2"])
    lines = write(profiles(context=pd.Categorical(["K562", "K562", "RPE1", None]), study=list("stst"))).read_profiles(SPLIT)
    assert lines.of(1, 0, "KLF1", "RPE1", ["G1"], "s").tolist() == [0]
    with pytest.raises(UserError, match="context 'RPE1', study 't'"):
        lines.of(1, 0, "KLF1", "RPE1", ["G1"], "t")


def test_profiles_that_cannot_be_read_are_refused(write):
    values = np.zeros((4, 3), dtype=np.float32)
    for obs, X, var, said in [
        (profiles().drop(columns=["fold", "context"]), values, GENES, "no column fold and no context"),
        (profiles(fold=[0, 0.5, 1, 1]), values, GENES, "no whole number"),
        (profiles(fold=["0", "first", "1", "1"]), values, GENES, "no whole number"),
        (profiles(perturbation=["A"] * 4, fold=[1] * 4), values, GENES, "twice"),
        (profiles(), values + np.nan, GENES, "no number"), (profiles(), values, ["G1", "G2", "G1"], "gene G1 twice"),
    ]:
        with pytest.raises(UserError, match=said):
            write(obs, X, var=var).read_profiles(SPLIT)
