"""Which rows a comparison has, what is refused, and how a budget becomes steps."""

import numpy as np
import pytest

from scbench.config import STRUCTURES, CompareConfig
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.evaluation.compare.cost import Cost, cost_of, steps_of
from scbench.evaluation.compare.plan import plan, pretrain_options
from scbench.models.flops import encoder_parameters


def config_of(**options) -> CompareConfig:
    return CompareConfig(**{"store": "store", "output": "out", "budget_tokens": 1e6, "width": 32, "layers": 2, "heads": 2,
                            "max_genes": 30, **options})


def test_every_structure_with_average_and_native_pooling():
    rows = plan(config_of()).rows
    assert [row.name for row in rows] == [
        "transformer-avg", "transformer-cls", "cnn", "cnn_sorted", "linear-avg", "linear_mixer", "mamba-avg", "gnn-avg",
        "gnn-cls",
    ]
    assert {row.options["structure"] for row in rows} == set(STRUCTURES)
    assert [row.name for row in plan(config_of(structures="cnn_ours,linear")).rows] == ["cnn_sorted", "linear-avg"]


def test_a_row_trains_with_the_comparison_s_options_and_its_own():
    config = config_of(max_genes=20, precision="fp32", weighted_sampling=False)
    found = vars(pretrain_options(config, plan(config).rows[1], seed=3))
    expected = {"structure": "transformer", "pooling": "cls", "max_genes": 20, "precision": "fp32",
                "weighted_sampling": False, "seed": 3}
    assert {name: found[name] for name in expected} == expected


def test_equal_parameters_is_as_near_as_widths_of_eight_allow():
    config = config_of(equal_parameters=True, width=64)
    rows = [row for row in plan(config).rows if "width" in row.options]
    assert [row.options["structure"] for row in rows] == ["cnn", "cnn_sorted", "linear", "linear_mixer", "gnn"]  # mamba fits
    transformer = plan(config).rows[0]

    def parameters(row, **change) -> int:
        return encoder_parameters(pretrain_options(config, row._replace(options={**row.options, **change})).model(9))

    wanted = parameters(transformer)
    for row in rows:
        width = row.options["width"]
        assert width % 8 == 0
        assert 1 <= row.options["layers"] <= 12
        miss = abs(parameters(row) - wanted)
        assert miss <= min(abs(parameters(row, width=width + change) - wanted) for change in (-8, 8) if width + change > 0)


def test_all_combinations_of_the_varied_options():
    planned = plan(config_of(vary="weighted-sampling,mvc,size", sizes="1x16,2x16,2x32"))
    assert len(planned.rows) == 12
    assert planned.refused == []
    assert len({row.name for row in planned.rows}) == 12
    row = planned.rows[-1]
    assert row.name == "weighted-sampling=on,mvc=on,size=2x32"
    assert row.options == {"structure": "transformer", "weighted_sampling": True, "mvc": True, "layers": 2, "width": 32}
    assert row.levels == {"weighted-sampling": "on", "mvc": "on", "size": "2x32"}
    shares = plan(config_of(vary="data-share")).rows
    assert [row.options["data_share"] for row in shares] == [1.0, 0.1, 0.01]


def test_combinations_that_make_no_sense_are_listed_with_the_reason():
    planned = plan(config_of(vary="preprocess,normalize,library-size-offset"))
    assert len(planned.rows) == 6
    assert [refused["name"] for refused in planned.refused] == [
        "preprocess=bin,normalize=total,library-size-offset=off", "preprocess=bin,normalize=total,library-size-offset=on",
    ]
    assert all("does not go with" in refused["reason"] for refused in planned.refused)
    linear = plan(config_of(vary="pooling", structure="linear"))
    assert [row.name for row in linear.rows] == ["pooling=avg"]
    with pytest.raises(UserError, match=r"no combination of --vary pooling can be trained: .*cnn"):
        plan(config_of(vary="pooling", structure="cnn"))
    with pytest.raises(UserError, match="not divisible"):
        plan(config_of(heads=3))


@pytest.mark.parametrize(("options", "message"), [
    ({"budget_tokens": None}, "exactly one of --budget-tokens, --budget-flops and --budget-seconds"),
    ({"budget_flops": 1e9}, "exactly one of"),
    ({"budget_tokens": 0}, "the budget is 0: it must be positive"),
    ({"budget_tokens": float("inf")}, "it must be positive"),
    ({"seeds": 0}, "--seeds is 0"),
    ({"evaluation_cells": 0}, "--evaluation-cells is 0"),
    ({"structures": "transformer,rnn"}, "--structures: unknown 'rnn': choose among transformer, cnn"),
    ({"structures": "cnn,cnn_base"}, "--structures 'cnn,cnn_base' is not a list of different values"),
    ({"vary": "mvc,dropout"}, "--vary: unknown 'dropout': choose among weighted-sampling"),
    ({"vary": "mvc", "structures": "cnn"}, "--structures does not go with --vary"),
    ({"vary": "mvc", "equal_parameters": True}, "--equal-parameters does not go with --vary"),
    ({"structure": "linear"}, "--structure goes with --vary"),
    ({"learning_rates": "1e-3,fast"}, "--learning-rates '1e-3,fast' is not a list of different values"),
    ({"learning_rates": "1e-3,0"}, "rates must be positive"),
    ({"sizes": "6-256"}, "--sizes '6-256' is not a list"),
])
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        config_of(**options)


def test_a_budget_becomes_steps():
    cost = Cost(tokens=50.0, flops=2e6, activations=0, parameters=0, encoder_parameters=0)
    ten_cells = {"batch_cells": 10, "budget_tokens": None}
    assert steps_of(config_of(**{**ten_cells, "budget_tokens": 50 * 10 * 7.4}), cost, None) == 7
    assert steps_of(config_of(**ten_cells, budget_flops=2e6 * 10 * 12), cost, None) == 12
    assert steps_of(config_of(**ten_cells, budget_seconds=3.0), cost, 0.25) == 12
    assert steps_of(config_of(**{**ten_cells, "budget_tokens": 1}), cost, None) == 1


def test_the_mean_cell_of_the_training_split(small_store):
    store = Store.open(small_store)
    config = config_of(store=small_store, max_genes=40, batch_cells=16)
    rows = {row.name: row for row in plan(config).rows}
    linear, transformer = (
        cost_of(pretrain_options(config, rows[name], steps=1), store) for name in ("linear-avg", "transformer-avg")
    )
    split = store.split("train")
    offsets = [split.read_extent(number).offsets for number in range(len(split.extent_sizes))]
    lengths = np.minimum(np.concatenate([np.diff(one) for one in offsets]), 40)
    assert linear.tokens == transformer.tokens == pytest.approx(lengths.mean() + 1)
    tokens = lengths + 1
    more = 3 * 2 * (8 * 32**2 * tokens + 4 * 32 * tokens**2).mean()
    assert transformer.flops - linear.flops == pytest.approx(more)
    assert transformer.encoder_parameters == 2 * (6 * 32**2 + 6 * 32 + 4 * 32)
    assert transformer.parameters - transformer.encoder_parameters == linear.parameters - linear.encoder_parameters


def test_activations_grow_by_the_same_with_every_layer(small_store):
    store = Store.open(small_store)
    kept = []
    for layers in (1, 2, 3):
        config = config_of(store=small_store, layers=layers, structures="linear", batch_cells=16)
        kept.append(cost_of(pretrain_options(config, plan(config).rows[0], steps=1), store).activations)
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], abs=2)
    assert kept[1] > kept[0]
