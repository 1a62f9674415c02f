"""What a reader should know of a label before believing a score on it: named after its parent, made of clusters, confounded.

Everything is read from obs alone. Only columns with recognisable names are looked at, so that nothing is flagged does not mean
that there is nothing.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from scbench.evaluation.labels import read_labels

ONTOLOGY = "_ontology_term_id"  # behind a column's name, as CELLxGENE writes it
SAME_AS_CLUSTERS = 0.8  # normalised mutual information with a column of clusters
CONFOUNDED = 0.5  # share of the label's entropy that a column tells
NAMED = 5  # of a list
CLUSTERS = re.compile(r"leiden|louvain|cluster|seurat", re.IGNORECASE)
SAMPLES = re.compile(
    r"(^|[._ -])(librar(y|ies)|batch|donor|sample|patient|individual|subject|run|lane|channel|plate|platform|assay|"
    r"chemistry|dataset|study|experiment|orig[._]ident)([._ -]?(id|name|number|no|nr|uuid))?$", re.IGNORECASE,
)
ORIGINS = {  # what a suite file may say of a label
    "sorted": "The label comes from sorting the cells, not from their expression.",
    "assigned": "The label comes from the experiment or the donor's record, not from the cells' expression.",
    "clusters": "The label was named after clusters of the same cells' expression: how well expression predicts it is partly "
                "a circle.",
    "unknown": "Whether the label was made from clusters of the same expression is unknown.",
}


class LabelFlags(NamedTuple):
    """What was found."""

    sentences: list[str]
    record: dict  # what they are drawn from, JSON-able: origin, parents, ontology, clusters, samples

    def details(self) -> dict:
        """Both, as details of a table."""
        return {"label_flags": {"sentences": self.sentences, **self.record}}


def flags(obs: pd.DataFrame, label: str, origin: str | None = None) -> LabelFlags:
    """What stands in obs about a label.

    Parameters
    ----------
    obs
        A row a cell.
    label
        Its column that is predicted; cells without a label are ignored.
    origin
        Where the label comes from, one of ORIGINS; None if nobody said.
    """
    words = read_labels(obs, label, "obs")
    labelled = np.array([word is not None for word in words], dtype=bool)
    words, obs = words[labelled].astype(str), obs[labelled]
    classes = sorted(set(words))
    parents = _parents(classes)
    ontology = _ontology(obs, words, label)
    others = [name for name in obs.columns if name != label and not name.endswith(ONTOLOGY)]
    clusters = _found({name: _shared(obs[name], words) for name in others if CLUSTERS.search(name)})
    samples = _found({name: _confounding(obs[name], words) for name in others if SAMPLES.search(name)})
    record = {"origin": origin, "parents": parents, "ontology": ontology, "clusters": clusters, "samples": samples}
    said = [
        *([ORIGINS[origin]] if origin else []),
        *([f"By its name the label {label} is a clustering: if of the same expression, predicting it is a circle."]
          if CLUSTERS.search(label) else []),
        *_parent_sentences(parents), *_ontology_sentences(ontology),
        *_cluster_sentences(clusters, label), *_sample_sentences(samples, len(classes)),
    ]
    return LabelFlags(said, record)


def _found(flagged: dict[str, dict | None]) -> dict[str, dict]:
    return {name: one for name, one in flagged.items() if one is not None}


def _parents(classes: list[str]) -> dict[str, list[str]]:
    """Classes whose words all stand in the names of others, and these: "T cell" in "CD4 T cell"."""
    parts = {name: _words(name) for name in classes}
    found = {name: [other for other in classes if parts[name] < parts[other]] for name in classes if parts[name]}
    return {name: children for name, children in found.items() if children}


def _words(name: str) -> frozenset[str]:
    """The words of a class's name, without "cell", plurals and plus signs; "CD25-" keeps its minus."""
    found = re.findall(r"[^\W_]+(?:-(?![^\W_]))?", name.lower())
    singular = (word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found)
    return frozenset(word for word in singular if word != "cell")


def _ontology(obs: pd.DataFrame, words: np.ndarray, label: str) -> dict[str, list[str]] | None:
    """The ontology ids of each class, where obs has them."""
    column = f"{label}{ONTOLOGY}"
    if column not in obs.columns:
        return None
    found = defaultdict(set)
    for word, term in zip(words, obs[column].astype(object), strict=True):
        if not pd.isna(term):
            found[word].add(str(term))
    return {word: sorted(found[word]) for word in sorted(found)}


def _codes(column: pd.Series, words: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A column's values and the labels, of the cells that have both; None if the column has one value, or about one a cell."""
    there = column.notna().to_numpy()
    values = column[there].astype(str).to_numpy()
    different = len(np.unique(values))
    return None if different < 2 or different > len(values) / 2 else (values, words[there])


def _shared(column: pd.Series, words: np.ndarray) -> dict | None:
    """How much clusters and labels say of each other."""
    if (both := _codes(column, words)) is None:
        return None
    return {"nmi": float(normalized_mutual_info_score(both[1], both[0])), "values": len(np.unique(both[0]))}


def _confounding(column: pd.Series, words: np.ndarray) -> dict | None:
    """How much of the label a column of samples tells, and which classes occur in one of its values only.

    The share is (I − E) / (H − E): mutual information, entropy of the label, and what independent columns would share in so
    few cells, (rows − 1)(columns − 1) / 2n (Miller, 1955).
    """
    if (both := _codes(column, words)) is None:
        return None
    values, labels = both
    table = contingency_matrix(labels, values).astype(np.float64)  # rows: classes, ascending
    n, of_class, of_value = table.sum(), table.sum(1), table.sum(0)
    if len(of_class) < 2:
        return None
    filled = table[table > 0]
    entropy = -(of_class / n * np.log(of_class / n)).sum()
    information = (filled / n * np.log(filled / n)).sum() + entropy - (of_value / n * np.log(of_value / n)).sum()
    chance = (len(of_class) - 1) * (len(of_value) - 1) / (2 * n)
    share = 0.0 if chance >= entropy else (information - chance) / (entropy - chance)
    names, places = np.unique(labels), (table > 0).sum(1)
    return {
        "values": len(of_value), "told": float(min(1.0, max(0.0, share))),
        "in_one_value": names[places == 1].tolist(),
    }


def _parent_sentences(parents: dict[str, list[str]]) -> list[str]:
    if not parents:
        return []
    named = _some([f"{parent} (of {_some(children)})" for parent, children in parents.items()])
    return [f"By their names some classes are parents of others, so a prediction may be right and count as wrong: {named}."]


def _ontology_sentences(ontology: dict[str, list[str]] | None) -> list[str]:
    """Where classes and ontology terms are not one to one."""
    said = []
    if several := [name for name, terms in (ontology or {}).items() if len(terms) > 1]:
        said.append(f"Classes with more than one ontology id: {_some(several)}.")
    owners = defaultdict(list)
    for name, terms in (ontology or {}).items():
        for term in terms:
            owners[term].append(name)
    if shared := [f"{term} ({_some(names)})" for term, names in owners.items() if len(names) > 1]:
        said.append(f"Ontology ids that several classes share: {_some(shared)}.")
    return said


def _cluster_sentences(clusters: dict[str, dict], label: str) -> list[str]:
    return [
        f"{label} and the clusters of column {name} share nearly all that they say (normalised mutual information "
        f"{found['nmi']:.2f}): if these are clusters of the same expression, predicting the label from it is a circle."
        for name, found in clusters.items() if found["nmi"] >= SAME_AS_CLUSTERS
    ]


def _sample_sentences(samples: dict[str, dict], classes: int) -> list[str]:
    said = []
    for name, found in samples.items():
        alone = found["in_one_value"]
        if found["told"] < CONFOUNDED and not alone:
            continue
        parts = [f"column {name} alone tells {found['told']:.0%} of what the label says"]
        if alone:
            parts.append(f"{len(alone)} of {classes} classes occur in one of its {found['values']} values only "
                         f"({_some(alone)}), where the label and {name} cannot be told apart")
        said.append(f"Confounded: {'; '.join(parts)}.")
    return said


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
