"""Options that go together, and those that don't: refused with the reason, before any data is read."""

import pytest

from scbench.cli import main
from scbench.config import ALIASES, STRUCTURES, ModelConfig, PretrainConfig
from scbench.errors import UserError


def pretrain_config(**options) -> PretrainConfig:
    return PretrainConfig(store="there is none", output="o", **options)


@pytest.mark.parametrize(("options", "said"), [
    ({"structure": "cnn", "mvc": False}, "--structure cnn keeps no tokens to regress on"),
    ({"structure": "cnn_sorted", "mvc": False}, "nothing would be trained"),
    ({"structure": "linear_mixer", "mvc": False}, "leave --no-mvc out"),
    ({"structure": "linear", "pooling": "cls"}, "no token sees another, so all cells would share one embedding"),
    ({"structure": "mamba", "pooling": "cls"}, "stands first in a causal scan"),
    ({"structure": "cnn", "pooling": "avg"}, "--pooling avg does not go with --structure cnn, which pools by itself"),
    ({"structure": "linear_mixer", "pooling": "cls"}, "leave it out"),
    ({"structure": "gnn", "pooling": "own"}, "choose cls or avg"),
    ({"preprocess": "bin", "normalize": "total"}, "bins are ranks inside a cell"),
    ({"recipe": "aaai2025", "normalize": "total"}, "--normalize total is not part of --recipe aaai2025"),
    ({"recipe": "aaai2025", "library_size_offset": True}, "--library-size-offset is not part of --recipe aaai2025"),
    ({"recipe": "aaai2025", "structure": "linear_base", "pooling": "cls"}, "all cells would share one embedding"),
    ({"structure": "transformer", "width": 100, "heads": 8}, "not divisible by --heads"),
    ({"structure": "linear_mixer", "max_genes": 64, "validation_max_genes": 65}, "weights for the trained length only"),
    ({"layers": 0}, "--layers is 0"),
    ({"dropout": 1.0}, "--dropout is 1.0"),
    ({"mask_ratio": 0.0}, "--mask-ratio is 0.0"),
    ({"data_share": 0.0}, "--data-share is 0.0"),
    ({"data_share": 1.5}, "--data-share is 1.5"),
    ({"steps": 5, "epochs": 1.0}, "exclude each other"),
])
def test_refused_combinations(options, said):
    with pytest.raises(UserError) as refused:
        pretrain_config(**options)
    assert said in str(refused.value)
    assert str(refused.value).endswith(".")


def test_the_command_line_refuses_them_before_it_looks_for_the_store(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", str(tmp_path / "no store"), "-o", str(tmp_path / "run"), "--structure", "cnn_ours", "--no-mvc"])
    assert stop.value.code == 2
    assert "nothing would be trained" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_structures_of_a_model_file():
    with pytest.raises(UserError, match="unknown structure 'rnn'"):
        ModelConfig(vocabulary_size=5, structure="rnn")


@pytest.mark.parametrize(("alias", "structure"), ALIASES.items())
def test_the_references_names_mean_the_same(alias, structure):
    assert pretrain_config(structure=alias) == pretrain_config(structure=structure)
    assert pretrain_config(structure=alias).structure == structure


@pytest.mark.parametrize("structure", STRUCTURES)
def test_heads_matter_to_the_transformer_alone(structure):
    if structure != "transformer":
        pretrain_config(structure=structure, width=30, heads=8)


def test_what_pools_how_by_default():
    pooling = {s: ModelConfig(vocabulary_size=5, structure=s).pooling for s in STRUCTURES}
    assert pooling == {"transformer": "cls", "cnn": "own", "cnn_sorted": "own", "linear": "avg", "linear_mixer": "own",
                       "mamba": "avg", "gnn": "cls"}


def test_recipes_fill_in_what_is_not_given_and_nothing_else():
    fixed, faithful = pretrain_config(), pretrain_config(recipe="aaai2025")
    assert (fixed.optimizer, fixed.precision, fixed.clip) == ("adamw", "bf16", 1.0)
    assert (fixed.epochs, fixed.warmup_steps) == (1.0, None)
    assert (faithful.optimizer, faithful.precision, faithful.clip) == ("adam", "fp32", 0.0)
    assert (faithful.epochs, faithful.warmup_steps, faithful.lr) == (10.0, 10_000, 2e-4)
    assert (faithful.batch_cells, faithful.max_genes, faithful.mask_ratio, faithful.dropout) == (128, 512, 0.4, 0.15)
    given = pretrain_config(recipe="aaai2025", optimizer="sgd", clip=3.0, precision="bf16", steps=7, warmup_steps=2)
    assert (given.optimizer, given.clip, given.precision, given.steps, given.epochs, given.warmup_steps) == (
        "sgd", 3.0, "bf16", 7, None, 2)


def test_what_the_recipe_changes_in_the_inputs():
    def inputs(**options):
        return ModelConfig(vocabulary_size=5, max_genes=30, **options).inputs

    assert {s: inputs(structure=s).order for s in STRUCTURES if inputs(structure=s).order != "ascending"} == {"cnn": "random"}
    drawn = {s for s in STRUCTURES if inputs(structure=s, recipe="aaai2025").order == "drawn"}
    assert drawn == {"cnn", "linear_mixer", "mamba"}
    assert all(inputs(structure=s).pad_to is None for s in STRUCTURES)
    assert all(inputs(structure=s, recipe="aaai2025").pad_to == 30 for s in STRUCTURES)
    assert inputs(preprocess="bin").preprocess == "bin"
    assert inputs(preprocess="bin", recipe="aaai2025").preprocess == "bin_aaai2025"
