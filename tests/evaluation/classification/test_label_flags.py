"""Flags of labels, on planted columns of obs."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from scbench.evaluation.classification.label_flags import ORIGINS, flags

CELLS = 240


@pytest.fixture
def obs() -> pd.DataFrame:
    """Three types, four donors and three clusters that know nothing of each other."""
    generator = np.random.default_rng(0)
    kind = np.array(["alpha", "beta", "gamma"])[np.arange(CELLS) % 3]
    return pd.DataFrame({
        "type": kind, "donor": generator.integers(0, 4, CELLS).astype(str), "leiden": generator.integers(0, 3, CELLS),
        "barcode": [f"cell {i}" for i in range(CELLS)],
    })


def test_nothing_is_flagged_where_nothing_is_planted(obs):
    found = flags(obs, "type")
    assert found.sentences == []
    assert found.record["parents"] == {} and found.record["ontology"] is None and found.record["origin"] is None
    assert found.record["clusters"]["leiden"]["nmi"] < 0.05
    assert found.record["samples"]["donor"]["told"] < 0.05
    assert found.record["samples"]["donor"]["in_one_value"] == []


def test_a_label_that_copies_clusters(obs):
    obs["leiden"] = pd.Categorical(obs["type"].map({"alpha": "2", "beta": "0", "gamma": "1"}))
    found = flags(obs, "type")
    assert found.record["clusters"]["leiden"]["nmi"] == pytest.approx(1)
    assert len(found.sentences) == 1 and "clusters of column leiden" in found.sentences[0]
    noisy = obs["leiden"].astype(str).where(np.arange(CELLS) % 10 != 0, "1")
    expected = normalized_mutual_info_score(obs["type"], noisy)
    assert flags(obs.assign(leiden=noisy), "type").record["clusters"]["leiden"]["nmi"] == pytest.approx(expected)
    assert "By its name" in flags(obs, "leiden").sentences[0]


def test_a_label_nested_in_donors(obs):
    """Two donors a type: the donor tells all of the label; a type of one donor only is named."""
    obs["donor"] = [f"{kind} {number % 2}" for number, kind in enumerate(obs["type"])]
    found = flags(obs, "type")
    assert found.record["samples"]["donor"]["told"] == pytest.approx(1)
    assert "column donor alone tells 100% of what the label says" in found.sentences[0]
    obs["donor"] = np.where(obs["type"] == "alpha", "first", np.random.default_rng(1).choice(["second", "third"], CELLS))
    found = flags(obs, "type")
    assert found.record["samples"]["donor"]["in_one_value"] == ["alpha"]
    assert "1 of 3 classes occur in one of its 3 values only (alpha)" in found.sentences[0]


def test_the_share_that_a_column_tells_is_mutual_information_over_entropy_but_for_chance(obs):
    rng = np.random.default_rng(2)
    obs["library"] = np.where(rng.random(CELLS) < 0.7, obs["type"], rng.choice(["alpha", "beta", "gamma"], CELLS))
    information, chance = mutual_info_score(obs["type"], obs["library"]), 2 * 2 / (2 * CELLS)
    expected = (information - chance) / (entropy([1, 1, 1]) - chance)
    assert flags(obs, "type").record["samples"]["library"]["told"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["batch", "Library", "donor_id", "sample", "orig.ident", "patient id", "sequencing_run",
                                  "platform", "plate_no"])
def test_columns_of_samples_are_known_by_their_names(obs, name):
    obs[name] = obs["type"]
    assert set(flags(obs, "type").record["samples"]) == {"donor", name}


def test_columns_without_a_say_are_passed_over(obs):
    obs["batch"], obs["sample_id"], obs["donorship"] = "one", obs["barcode"], obs["type"]
    assert set(flags(obs, "type").record["samples"]) == {"donor"}


def test_parents_by_name():
    names = ["T cell", "CD4 T cell", "CD8+ T cells", "Monocytes", "CD14+ monocyte", "B", "NK", "CD4+CD25- T", "CD25"]
    found = flags(pd.DataFrame({"type": names * 12}), "type")
    assert found.record["parents"] == {
        "CD4 T cell": ["CD4+CD25- T"], "Monocytes": ["CD14+ monocyte"],
        "T cell": ["CD4 T cell", "CD4+CD25- T", "CD8+ T cells"],
    }
    assert "T cell (of CD4 T cell, CD4+CD25- T, CD8+ T cells)" in found.sentences[0]


def test_ontology_terms_are_kept(obs):
    terms = {"alpha": "CL:1", "beta": "CL:2", "gamma": "CL:2"}
    obs["type_ontology_term_id"] = pd.Categorical(obs["type"].map(terms))
    obs.loc[0, "type_ontology_term_id"] = "CL:2"  # an alpha cell
    obs.loc[4, "type_ontology_term_id"] = None
    obs.loc[5, "type"] = None
    found = flags(obs, "type")
    assert found.record["ontology"] == {"alpha": ["CL:1", "CL:2"], "beta": ["CL:2"], "gamma": ["CL:2"]}
    assert found.sentences == [
        "Classes with more than one ontology id: alpha.", "Ontology ids that several classes share: CL:2 (alpha, beta, gamma)."
    ]


@pytest.mark.parametrize("origin", ORIGINS)
def test_what_is_said_of_the_label_comes_first(obs, origin):
    found = flags(obs, "type", origin)
    assert found.sentences == [ORIGINS[origin]] and found.record["origin"] == origin
