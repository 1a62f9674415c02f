"""Mean expression, and its change against the controls of the same context."""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from scbench.evaluation import baselines


class Changes(NamedTuple):
    """Changes of some pairs, and the mean change of each context: what a predictor is fitted on."""

    perturbation: np.ndarray  # int64 [n]
    context: np.ndarray  # int64 [n]
    change: np.ndarray  # float64 [n, genes]
    scored: np.ndarray  # bool [n, genes], False at a pair's own targets
    mean: np.ndarray  # float64 [contexts, genes], of the context's pairs; of all pairs in a context without any

    @classmethod
    def of(cls, perturbation: np.ndarray, context: np.ndarray, change: np.ndarray, scored: np.ndarray, contexts: int):
        """With the means of the pairs given."""
        return cls(perturbation, context, change, scored, context_means(change, context, contexts))

    def take(self, rows: np.ndarray) -> "Changes":
        """Some of the pairs, with the means of these alone."""
        return Changes.of(self.perturbation[rows], self.context[rows], self.change[rows], self.scored[rows], len(self.mean))


def group_means(values: scipy.sparse.csr_matrix, group: np.ndarray, groups: int) -> np.ndarray:
    """Mean of each group's cells, float64 [groups, genes]; zeros count; NaN for a group without cells.

    `group`: int64 [cells], −1 for cells of none.
    """
    inside = np.flatnonzero(group >= 0)
    sizes = np.bincount(group[inside], minlength=groups)
    shape = (groups, values.shape[0])
    indicator = scipy.sparse.csr_matrix((np.ones(len(inside)), (group[inside], inside)), shape)
    with np.errstate(invalid="ignore"):
        return np.asarray((indicator @ values).todense(), dtype=np.float64) / sizes[:, None]


def context_means(change: np.ndarray, context: np.ndarray, contexts: int) -> np.ndarray:
    """The mean change in each context, float64 [contexts, genes]; the mean of all where a context has none."""
    means = np.repeat(change.mean(axis=0)[None], contexts, axis=0)
    for number in np.unique(context):
        means[number] = change[context == number].mean(axis=0)
    return means


def gene_list(values: scipy.sparse.csr_matrix) -> np.ndarray:
    """Columns to predict: those expressed in the given cells (controls, training cells), at most the 2,000 most variable."""
    expressed = np.flatnonzero(np.asarray((values != 0).sum(axis=0)).ravel())
    return expressed[baselines.variable_genes(values[:, expressed])]
