"""Imported checkpoints against the reference's own forward pass (benchmarks/reference_model.py), and those that do not fit."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scbench.cli import main
from scbench.config import ImportReferenceConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.models.import_reference import reference_name, run_import_reference
from scbench.models.model import ExpressionModel

_path = Path(__file__).parents[2] / "benchmarks" / "reference_model.py"
_spec = importlib.util.spec_from_file_location("reference_model", _path)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

VOCABULARY = Vocabulary.build(f"ENSG{i:011d}" for i in range(80))
THEIR_NAMES = {"transformer": "transformer", "linear": "linear_base", "linear_mixer": "linear_ours", "cnn": "cnn_base",
               "cnn_sorted": "cnn_ours", "gnn": "gnn_cp"}
CASES = [(structure, pooling) for structure in ("transformer", "linear", "gnn") for pooling in ("cls", "avg")]
CASES += [(structure, None) for structure in ("linear_mixer", "cnn", "cnn_sorted")]
MAX_GENES = 31  # with <cls> 32 tokens: the reference's convolutions need a length that halves


def make_oracle(structure, pooling=None, *, width=32, layers=3, max_genes=MAX_GENES, seed=0):
    return reference.ReferenceModel(
        THEIR_NAMES[structure], VOCABULARY.size, VOCABULARY.pad, width=width, layers=layers, heads=4, length=max_genes + 1,
        pooling=pooling or "cls",
    ).randomize(seed).eval()


def import_state(folder, state, structure, **options) -> ExpressionModel:
    """What `scbench import-reference` makes of a state dict."""
    VOCABULARY.save(folder / "vocabulary.json")
    torch.save(state, folder / "best_model.pt")
    options = {"heads": 4, **({} if structure == "linear_mixer" else {"max_genes": MAX_GENES}), **options}
    run_import_reference(ImportReferenceConfig(
        checkpoint=folder / "best_model.pt", structure=structure, vocabulary=folder / "vocabulary.json",
        output=folder / "model", json=True, **options,
    ))
    return ExpressionModel.from_pretrained(folder / "model")


def make_cells(masked, max_genes=MAX_GENES, lengths=(5, None, 1, 0, 17)):
    """Ascending genes (as the model gets them for every structure but those whose order is the draw's), values, masks."""
    rng = np.random.default_rng(3)
    lengths = [max_genes if n is None else n for n in lengths]
    genes = [np.sort(rng.choice(80, n, replace=False)) for n in lengths]
    values = [np.log1p(rng.integers(1, 500, n)).astype(np.float32) for n in lengths]
    ratio = {"some": 0.4, "none": 0.0, "all": 1.1}[masked]
    return genes, values, [rng.random(n) < ratio for n in lengths]


def dense(genes, values, masked, max_genes=MAX_GENES, dtype=torch.float64):
    """The same cells as the reference has them: ids, inputs, true values and mask, [B, S] each."""
    shape = (len(genes), max_genes + 1)
    ids, hidden = torch.full(shape, VOCABULARY.pad), torch.zeros(shape, dtype=torch.bool)
    inputs, truth = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    ids[:, 0] = VOCABULARY.cls
    for i, (g, v, m) in enumerate(zip(genes, values, masked, strict=True)):
        n = len(g) + 1
        ids[i, 1:n], hidden[i, 1:n], truth[i, 1:n] = torch.from_numpy(g), torch.from_numpy(m), torch.from_numpy(v).to(dtype)
        inputs[i] = torch.where(hidden[i], -1.0, truth[i])
    return ids, inputs, truth, hidden


def assert_near(ours, theirs, tolerance, what, floor=1e-30):
    """Within `tolerance` of the largest value (at least `floor`: what cancels out is zero up to rounding)."""
    assert ours.shape == theirs.shape, what
    if theirs.numel():
        error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=floor))
        assert error <= tolerance, f"{what}: {error:.1e}"


def assert_same_outputs(model, oracle, dtype, tolerance, max_genes=MAX_GENES):
    model, oracle = model.to(dtype), oracle.to(dtype)
    for masked in ("some", "none", "all"):
        cells = make_cells(masked, max_genes)
        ids, inputs, _, hidden = dense(*cells, max_genes, dtype)
        if oracle.structure == "cnn_ours":  # the reference sorts by itself: hand it the genes in disorder
            shuffle = torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(len(g)),
                                              torch.arange(len(g) + 1, max_genes + 1)]) for g in cells[0]])
            oracle_ids, oracle_inputs = ids.gather(1, shuffle), inputs.gather(1, shuffle)
            back = shuffle.argsort(1)
        else:
            oracle_ids, oracle_inputs, back = ids, inputs, torch.arange(max_genes + 1).expand_as(ids)
        with torch.no_grad():
            theirs = oracle(oracle_ids, oracle_inputs)
            batch = CellBatch.from_lists(*cells, pad_to=max_genes)
            ours, embedding = model(batch), model.encode(batch)
        assert ours.cell_embedding.dtype == dtype
        assert_near(ours.cell_embedding, theirs.cell_embedding, tolerance, f"{masked}: cell embedding")
        assert_near(embedding, theirs.cell_embedding, tolerance, f"{masked}: encode")
        assert_near(ours.regression, theirs.regression.gather(1, back)[hidden], tolerance, f"{masked}: regression")
        assert_near(ours.mvc, theirs.mvc.gather(1, back)[hidden], tolerance, f"{masked}: MVC")


def test_the_oracle_has_the_reference_s_parameter_counts():
    """In millions, all and the encoder's, of 6 layers × 256 and 60,697 tokens: counted on the reference itself."""
    known = {"transformer": (18.31, 2.37), "linear_base": (16.73, 0.79), "linear_ours": (16.51, 0.57),
             "cnn_base": (19.48, 3.54), "cnn_ours": (19.48, 3.54), "gnn_cp": (None, 47.06)}
    for structure, (total, encoder) in known.items():
        with torch.device("meta"):
            model = reference.ReferenceModel(structure, 60697, 60694, width=256, layers=6)
        assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6, 2) == encoder, structure
        assert total in (None, round(sum(p.numel() for p in model.parameters()) / 1e6, 2)), structure
    with torch.device("meta"):
        model = reference.ReferenceModel("transformer", 60697, 60694, width=512, layers=12)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 36.18


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize(("structure", "pooling"), CASES)
def test_imported_models_say_what_the_reference_says(tmp_path, structure, pooling, width):
    oracle = make_oracle(structure, pooling, width=width)
    model = import_state(tmp_path, oracle.state_dict(), structure, pooling=pooling)
    assert_same_outputs(model, oracle, torch.float32, 1e-5)
    assert_same_outputs(model, oracle, torch.float64, 1e-9)


@pytest.mark.parametrize(("structure", "layers", "max_genes"),
                         [("cnn", 7, 63), ("linear_mixer", 4, 40), ("linear_mixer", 1, 9)])
def test_depths_and_lengths(tmp_path, structure, layers, max_genes):
    """The seventh convolution has stride 1 again; positions 41 → 20 → 10 → 5 → 1, and straight to 1."""
    oracle = make_oracle(structure, layers=layers, max_genes=max_genes)
    given = None if structure == "linear_mixer" else max_genes
    model = import_state(tmp_path, oracle.state_dict(), structure, max_genes=given)
    assert model.config.max_genes == max_genes
    assert model.config.layers == layers
    lengths = (5, None, 1, 0)
    cells = make_cells("some", max_genes, lengths)
    ids, inputs, *_ = dense(*cells, max_genes)
    with torch.no_grad():
        ours = model.double().encode(CellBatch.from_lists(*cells, pad_to=max_genes))
        assert_near(ours, oracle.double()(ids, inputs).cell_embedding, 1e-9, "cell embedding")


@pytest.mark.parametrize(("structure", "pooling"), CASES)
def test_embedding_an_anndata_gives_the_reference_s_embeddings(tmp_path, structure, pooling):
    oracle = make_oracle(structure, pooling)
    model = import_state(tmp_path, oracle.state_dict(), structure, pooling=pooling)
    rng = np.random.default_rng(5)
    counts = np.zeros((20, 80), dtype=np.float32)
    for i, row in enumerate(counts):  # cells of 1 to MAX_GENES genes: none is sampled
        genes = rng.choice(80, 1 + i * (MAX_GENES - 1) // 19, replace=False)
        row[genes] = rng.integers(1, 200, len(genes))
    genes = [np.flatnonzero(row) for row in counts]
    values = [np.log1p(row[g]) for row, g in zip(counts, genes, strict=True)]
    ids, inputs, *_ = dense(genes, values, [np.zeros(len(g), bool) for g in genes], dtype=torch.float32)
    with torch.no_grad():
        theirs = oracle(ids, inputs).cell_embedding
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.var_names = [name for name in VOCABULARY.names if name.startswith("ENSG")]
    assert_near(torch.from_numpy(model.embed(adata, batch_cells=7)), theirs, 1e-5, "embedding")


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize(("structure", "pooling"), CASES)
def test_losses_gradients_and_batch_statistics_of_training_equal_the_reference_s(tmp_path, structure, pooling, width):
    """Training mode without dropout, float64: the fine-tuning of an imported model is the reference's training."""
    oracle = make_oracle(structure, pooling, width=width).double().train()
    imported = import_state(tmp_path, oracle.state_dict(), structure, pooling=pooling)
    model = ExpressionModel(dataclasses.replace(imported.config, dropout=0.0), VOCABULARY)
    model.load_state_dict(imported.state_dict())
    model.double().train()
    oracle.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in oracle.state_dict().items()})
    cells = make_cells("some")
    ids, inputs, truth, hidden = dense(*cells)
    theirs = oracle(ids, inputs)
    mvc_loss = (theirs.mvc - truth)[hidden].square().mean()
    regression_loss = (theirs.regression - truth)[hidden].square().mean()  # detached where it is MVC's own prediction
    loss = mvc_loss + regression_loss if theirs.regression.requires_grad else mvc_loss
    loss.backward()
    ours = model(CellBatch.from_lists(*cells, pad_to=MAX_GENES))
    ours.loss.backward()
    assert_near(ours.loss, loss, 1e-9, "loss")
    keys = {name: reference_name(name, structure) for name in model.state_dict()}
    assert len(set(keys.values())) == len(keys)
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        gradient = oracle.get_parameter(keys[name]).grad
        assert parameter.grad is not None, name
        assert_near(parameter.grad, gradient, 1e-8, name, floor=largest * 1e-4)  # a bias before a batch norm has none
    statistics = [name for name, _ in model.named_buffers() if "running" in name]
    assert (len(statistics) > 0) == (structure in ("cnn", "cnn_sorted", "linear_mixer"))
    for name in statistics:
        assert_near(model.get_buffer(name), oracle.get_buffer(keys[name]), 1e-9, name)


def test_what_is_inferred_and_recorded(tmp_path):
    state = make_oracle("linear_mixer").state_dict()
    model = import_state(tmp_path, state, "linear_ours")
    config = model.config
    assert (config.structure, config.recipe, config.width, config.layers) == ("linear_mixer", "aaai2025", 32, 3)
    assert (config.max_genes, config.mvc, config.pooling, config.vocabulary_size) == (MAX_GENES, True, "own", 83)
    assert model.provenance["imported_from"]["file"] == "best_model.pt"
    assert len(model.provenance["imported_from"]["sha256"]) == 64
    assert "max_genes" in model.provenance["inferred_from_the_weights"]
    assert "decoder.0.weight" in model.provenance["unused_tensors"]
    assert model.training_cells is None  # the benchmarks then say that overlap cannot be checked


def test_the_number_of_genes_that_is_assumed(tmp_path):
    for structure, expected in [("transformer", 512), ("cnn", 511)]:
        folder = tmp_path / structure
        folder.mkdir()
        model = import_state(folder, make_oracle(structure).state_dict(), structure, max_genes=None)
        assert model.config.max_genes == expected


def prefixed(state):
    return {f"module.{name}": x for name, x in state.items()}


@pytest.mark.parametrize("change", [
    prefixed,
    lambda state: {"model_state_dict": state, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}},
    lambda state: {"state_dict": prefixed(state)},
    lambda state: {name: x.double() if x.is_floating_point() else x for name, x in state.items()},
], ids=["module.", "nested", "nested module.", "float64"])
def test_ways_to_save_a_state_dict(tmp_path, change):
    oracle = make_oracle("cnn", layers=1)
    assert_same_outputs(import_state(tmp_path, change(oracle.state_dict()), "cnn_base"), oracle, torch.float32, 1e-5)


def test_files_of_old_torch_and_factors_in_an_nn_embedding(tmp_path):
    oracle = make_oracle("gnn", layers=1)
    state = {f"{name}.weight" if "factor" in name else name: x for name, x in oracle.state_dict().items()}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    VOCABULARY.save(tmp_path / "vocabulary.json")
    main(["import-reference", str(tmp_path / "old.pt"), "--structure", "gnn_cp", "--vocabulary",
          str(tmp_path / "vocabulary.json"), "-o", str(tmp_path / "model"), "--max-genes", str(MAX_GENES)])
    assert_same_outputs(ExpressionModel.from_pretrained(tmp_path / "model"), oracle, torch.float32, 1e-5)


def test_a_checkpoint_without_the_mvc_head(tmp_path):
    state = {name: x for name, x in make_oracle("transformer").state_dict().items() if not name.startswith("gene2query")}
    model = import_state(tmp_path, state, "transformer_ours")
    assert not model.config.mvc
    assert model.mvc_head is None


def test_the_command(tmp_path, capsys):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    torch.save(make_oracle("linear").state_dict(), tmp_path / "best_model.pt")
    arguments = ["import-reference", tmp_path / "best_model.pt", "--structure", "linear_base", "--vocabulary",
                 tmp_path / "vocabulary.json", "-o", tmp_path / "model", "--pooling", "cls", "--preprocess", "bin", "--json"]
    main([str(a) for a in arguments])
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["model"]["structure"] == "linear"
    assert result["model"]["preprocess"] == "bin"
    assert "every cell has the same embedding" in captured.err
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err


def without(key):
    return lambda state: {name: x for name, x in state.items() if name != key}


def changed(**tensors):
    return lambda state: {**state, **{name.replace("__", "."): x for name, x in tensors.items()}}


@pytest.mark.parametrize(("change", "options", "said"), [
    (without("encoder.layers.1.norm2.bias"), {}, "it lacks encoder.layers.1.norm2.bias"),
    (without("embedding.weight"), {}, "lacks the matrix embedding.weight"),
    (changed(encoder__extra=torch.ones(3)), {}, "it has encoder.extra"),
    (changed(emb_trans__weight=torch.ones(32, 255)), {}, "of another shape or type are emb_trans.weight"),
    (changed(decoder__4__bias=torch.ones(1, dtype=torch.int64)), {}, "of another shape or type are decoder.4.bias"),
    (changed(decoder__4__bias=torch.tensor([torch.nan])), {}, "decoder.4.bias holds numbers that are not finite"),
    (changed(embedding__weight=torch.ones(84, 256)), {}, "the vocabulary holds 83 tokens, the gene table of"),
    (lambda state: [torch.ones(2)], {}, "is not a checkpoint of the reference"),
    (lambda state: {}, {}, "is not a checkpoint of the reference"),
    (lambda state: state, {"heads": 5}, "not divisible by --heads 5"),
    (lambda state: state, {"heads": 0}, "not divisible by --heads 0"),
    (lambda state: state, {"max_genes": 0}, "--max-genes is 0"),
    (lambda state: state, {"structure": "mamba"}, "never published"),
    (lambda state: state, {"structure": "linear_ours"}, "give --structure transformer"),
])
def test_checkpoints_that_do_not_fit(tmp_path, change, options, said):
    state = change(make_oracle("transformer", layers=2).state_dict())
    with pytest.raises(UserError) as error:
        import_state(tmp_path, state, **{"structure": "transformer", **options})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_the_structure_that_a_checkpoint_looks_like(tmp_path):
    with pytest.raises(UserError, match=r"holds? .*linear model .*give --structure cnn or cnn_sorted"):
        import_state(tmp_path, make_oracle("cnn", layers=1).state_dict(), "linear")
    with pytest.raises(UserError, match="none of the reference's structures"):
        import_state(tmp_path, {name: x for name, x in make_oracle("gnn", layers=1).state_dict().items()
                                if not name.startswith("encoder.")}, "gnn")
    with pytest.raises(UserError, match=f"trained on {MAX_GENES} genes a cell, not 30"):
        import_state(tmp_path, make_oracle("linear_mixer").state_dict(), "linear_mixer", max_genes=30)


class Trap:
    """Pickled, it runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("kind", "said"), [
    ("trap", "executes no pickle"),
    ("module", "executes no pickle"),
    ("cut", "damaged"),
    ("text", "not a checkpoint written by torch.save"),
    ("empty", "not a checkpoint written by torch.save"),
    ("folder", "cannot be read"),
    ("absent", "cannot be read"),
])
def test_files_that_are_no_state_dict(tmp_path, kind, said):
    path, sprung = tmp_path / "best_model.pt", tmp_path / "sprung"
    if kind == "trap":
        torch.save({**make_oracle("cnn", layers=1).state_dict(), "extra": Trap(sprung)}, path)
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "cut":
        torch.save(make_oracle("cnn", layers=1).state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("hello world\n" * 50)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    VOCABULARY.save(tmp_path / "vocabulary.json")
    with pytest.raises(UserError) as error:
        run_import_reference(ImportReferenceConfig(
            checkpoint=path, structure="cnn", vocabulary=tmp_path / "vocabulary.json", output=tmp_path / "model"
        ))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not sprung.exists()
    assert not (tmp_path / "model").exists()
