"""What a pretrained model has to be compared with. Everything that is fitted is fitted on training cells alone.

Totals and normalised counts are over all genes of the file, matched by a vocabulary or not: that is what a user
without the model has.
"""

import numpy as np
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from scbench.evaluation import probes

COMPONENTS = 50
VARIABLE_GENES = 2000


def log_normalise(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """log1p of counts per 10⁴, float32 CSR [cells, genes]. A cell without counts stays empty."""
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scale = 1e4 / np.maximum(totals, 1)
    values = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr)))
    return scipy.sparse.csr_matrix((values.astype(np.float32), counts.indices, counts.indptr), counts.shape)


def depth_features(counts: scipy.sparse.csr_matrix) -> np.ndarray:
    """Log total counts and the number of expressed genes, float64 [cells, 2]."""
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    return np.column_stack([np.log1p(totals), np.diff(counts.indptr)])


def standardised(features: np.ndarray, train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows `train` and each of the other rows of dense features, standardised by the training rows."""
    scaler = StandardScaler().fit(features[train])
    return tuple(scaler.transform(features[rows]) for rows in (train, *others))


def principal_components(
    values: scipy.sparse.csr_matrix, train: np.ndarray, *others: np.ndarray, components: int = COMPONENTS
) -> tuple[np.ndarray, ...]:
    """Coordinates of rows `train` and of each of the other rows on the first components (or as many as there are) of the
    training rows."""
    components = min(components, len(train) - 1, values.shape[1] - 1)
    # random_state: ARPACK's start vector, which only has to be fixed
    pca = PCA(components, svd_solver="arpack", random_state=0).fit(values[train])
    return tuple(pca.transform(values[rows]) for rows in (train, *others))


def variable_genes(values: scipy.sparse.csr_matrix) -> np.ndarray:
    """The 2,000 columns with the largest variance, ascending (plain variance of log-normalised values).

    On small public sets the plain variance did as well as one corrected for a mean-variance trend.
    """
    means = np.asarray(values.mean(axis=0), dtype=np.float64).ravel()
    variances = np.asarray(values.multiply(values).mean(axis=0), dtype=np.float64).ravel() - means**2
    return np.sort(np.argsort(-variances, kind="stable")[:VARIABLE_GENES])


def regress_on_genes(
    values: scipy.sparse.csr_matrix, classes: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Logistic regression (C = 1) on the training cells' 2,000 variable genes: the test cells' classes, int64."""
    genes = variable_genes(values[train])
    return probes.logistic_regression(values[train][:, genes], classes[train], values[test][:, genes])


def majority(classes: np.ndarray, cells: int) -> np.ndarray:
    """The most frequent training class (the first of equals), `cells` times."""
    return np.full(cells, np.bincount(classes).argmax())
