"""A cell's embedding is its own: whatever file, row, chunk or batch it is in."""

import dataclasses
import errno
import json
import re

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch

from scbench.cli import main
from scbench.config import EmbedConfig
from scbench.data.batch import CellBatch
from scbench.errors import UserError
from scbench.evaluation import embed as embed_module
from scbench.evaluation.embed import embed, fingerprint, run_embed
from scbench.models.model import ExpressionModel

ROUNDING = 1e-5


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def write(cells: anndata.AnnData, path) -> str:
    cells.write_h5ad(path)
    return str(path)


def test_cells_that_fit_are_encoded_once_from_all_their_genes(model, cells):
    dense = cells.X.toarray()
    expected = []
    with torch.inference_mode():
        for row in dense:
            genes = np.flatnonzero(row)
            tokens = [model.vocabulary.tokens[cells.var_names[g]] for g in genes]
            batch = CellBatch.from_lists([tokens], [np.log1p(row[genes])])
            expected.append(model.eval().encode(batch)[0].numpy())
    found = embed(model, cells, max_genes=len(cells.var))
    assert found.dtype == np.float32
    assert found.shape == (120, 16)
    assert distance(found, np.array(expected)) < ROUNDING
    assert distance(found, embed(model, cells, max_genes=len(cells.var), seed=9, draws=1)) < ROUNDING  # nothing is drawn


def test_long_cells_are_means_of_their_draws_which_are_uniform_subsets(model, cells, monkeypatch):
    drawn: dict[int, list] = {}
    encode = model.encode

    def record(batch):
        value = encode(batch)
        drawn.setdefault(int(batch.cells[0]), []).append((batch.genes[1:].tolist(), value[0].numpy()))
        return value

    monkeypatch.setattr(model, "encode", record)
    found = embed(model, cells, draws=3, batch_cells=1)
    lengths = np.diff(cells.X.indptr)
    assert (lengths > 30).sum() > 30
    assert (lengths <= 30).sum() > 5
    names = np.array(model.vocabulary.names)
    for cell, draws in drawn.items():
        own = set(cells.var_names[cells.X[cell].indices])
        assert len(draws) == (3 if lengths[cell] > 30 else 1)
        assert len({tuple(genes) for genes, _ in draws}) == len(draws)
        for genes, _ in draws:
            assert len(genes) == len(set(genes)) == min(30, lengths[cell])
            assert set(names[genes]) <= own
        assert distance(found[cell], np.mean([value for _, value in draws], axis=0)) < ROUNDING


def test_every_gene_is_drawn_equally_often(model, monkeypatch):
    counts = scipy.sparse.csr_matrix(np.arange(1, 41, dtype=np.int32)[None])
    cell = anndata.AnnData(X=counts)
    cell.var_names = [f"GENE{i}" for i in range(40)]
    seen = np.zeros(model.vocabulary.size)
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda batch: (np.add.at(seen, batch.genes.numpy(), 1), encode(batch))[1])
    embed(model, cell, draws=2000, max_genes=10)
    frequency = seen[[model.vocabulary.tokens[name] for name in cell.var_names]] / 2000
    assert abs(frequency - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_order_file_chunk_and_batch_do_not_matter(model, cells, tmp_path, monkeypatch):
    whole = embed(model, write(cells, tmp_path / "whole.h5ad"))
    order = np.random.default_rng(0).permutation(cells.n_obs)
    shuffled = embed(model, write(cells[order].copy(), tmp_path / "shuffled.h5ad"))
    assert distance(shuffled, whole[order]) < ROUNDING
    halves = [embed(model, write(cells[part].copy(), tmp_path / "half.h5ad")) for part in (slice(0, 61), slice(61, None))]
    assert distance(np.concatenate(halves), whole) < ROUNDING
    genes = np.random.default_rng(1).permutation(cells.n_vars)
    assert distance(embed(model, cells[:, genes].copy()), whole) < ROUNDING
    monkeypatch.setattr(embed_module, "CHUNK_CELLS", 7)
    assert distance(embed(model, cells, batch_cells=5), whole) < ROUNDING


def test_sources_of_every_kind_agree(model, cells, tmp_path):
    path = write(cells, tmp_path / "cells.h5ad")
    whole = embed(model, cells)
    assert distance(embed(model, path), whole) == 0
    assert distance(embed(model, anndata.read_h5ad(path, backed="r")), whole) == 0
    assert distance(embed(model, cells[30:60]), whole[30:60]) < ROUNDING
    assert distance(model.embed(cells), whole) == 0
    dense = cells.copy()
    dense.X = dense.X.toarray().astype(np.float32)
    assert distance(embed(model, dense), whole) == 0


@pytest.mark.parametrize("values", ["log1p_counts", "as_is"])
def test_logarithms_of_counts_are_embedded_as_the_counts(model, cells, values):
    """All genes are encoded, so that nothing is drawn: draws are keyed by counts, which as_is has none of."""
    logged = cells.copy()
    logged.X = cells.X.astype(np.float32).log1p()
    expected = embed(model, cells, max_genes=len(cells.var))
    with embed_module.opened(logged, values=values) as source:
        embedding = embed_module.embed_source(model, source, max_genes=len(cells.var))
    assert distance(embedding.values, expected) < ROUNDING
    assert embedding.provenance["layer"] == "X"


def test_the_seed_and_the_number_of_draws_decide(model, cells):
    first = embed(model, cells)
    assert distance(embed(model, cells), first) == 0
    long = np.diff(cells.X.indptr) > 30
    for other in (embed(model, cells, seed=1), embed(model, cells, draws=5)):
        assert np.abs(other[long] - first[long]).max(axis=1).min() > 1e-4
        assert distance(other[~long], first[~long]) < ROUNDING


def test_the_model_is_left_in_its_mode_and_dropout_is_off(model, cells):
    model.train()
    first = embed(model, cells)
    assert model.training
    assert distance(first, embed(model.eval(), cells)) == 0
    assert not model.training


def test_bf16_is_close_and_the_models_own_weights_are_put_back(model, cells):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact, rounded = embed(model, cells), embed(model, cells, precision="bf16")
    assert rounded.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert distance(embed(model, cells), exact) == 0


def test_empty_cells_are_embedded_from_cls_alone_and_counted(model, cells):
    with_empty = cells.copy()
    lil = with_empty.X.tolil()
    lil[[3, 8]] = 0
    with_empty.X = lil.tocsr()
    with pytest.warns(UserWarning, match="2 of 120 cells express no gene that the model knows"):
        found = embed(model, with_empty)
    with torch.inference_mode():
        expected = model.eval().encode(CellBatch.from_lists([[]], [[]]))[0].numpy()
    assert distance(found[[3, 8]], expected) < ROUNDING


def test_genes_that_are_mostly_unknown_are_an_error(model, cells):
    renamed = cells.copy()
    renamed.var_names = [f"OTHER{i}" if i >= 5 else f"GENE{i}" for i in range(80)]
    with pytest.raises(UserError, match="of the counts of AnnData are of genes in the vocabulary"):
        embed(model, renamed)


def test_normalised_values_and_bad_options_are_errors(model, cells):
    normalised = cells.copy()
    normalised.X = normalised.X * np.float32(0.37)
    with pytest.raises(UserError, match="no raw counts"):
        embed(model, normalised)
    for option in ("max_genes", "draws", "batch_cells"):
        with pytest.raises(UserError, match=f"{option} is 0"):
            embed(model, cells, **{option: 0})
    with pytest.raises(UserError, match="precision is 'fp16': it must be fp32 or bf16"):
        embed(model, cells, precision="fp16")


def test_damaged_weights_are_an_error(model, cells):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        embed(model, cells)


def test_fingerprint_is_the_models(model, tmp_path):
    model.save_pretrained(tmp_path / "model", {})
    assert fingerprint(ExpressionModel.from_pretrained(tmp_path / "model")) == fingerprint(model)
    other = ExpressionModel(model.config, model.vocabulary, seed=2)
    assert fingerprint(other) != fingerprint(model)


@pytest.fixture
def files(model, cells, tmp_path):
    model.save_pretrained(tmp_path / "model", {"steps": 7})
    write(cells, tmp_path / "in.h5ad")
    return lambda output, **options: EmbedConfig(
        model=tmp_path / "model", input=tmp_path / "in.h5ad", output=tmp_path / output, **options
    )


def test_run_embed_writes_a_copy_with_provenance(files, model, cells, tmp_path, capsys):
    result = run_embed(files("out.h5ad", seed=3, draws=2, precision="bf16"))
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(written.obsm["X_scbench"], embed(model, cells, seed=3, draws=2, precision="bf16"))
    provenance = json.loads(written.uns["scbench"])
    assert provenance == result["provenance"]
    assert provenance["seed"] == 3
    assert provenance["draws"] == 2
    assert provenance["max_genes"] == 30
    assert provenance["precision"] == "bf16"
    assert provenance["layer"] == "X"
    assert provenance["matched_count_share"] == 1
    assert provenance["model_fingerprint"] == fingerprint(model)
    assert provenance["model_provenance"] == {"steps": 7}
    assert "120 cells × 16 numbers" in capsys.readouterr().out


def test_run_embed_alone(files, model, cells, tmp_path):
    run_embed(files("out.npz", only_embedding=True, json=True))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["X_scbench"], embed(model, cells))
        assert file["cell"].tolist() == cells.obs_names.tolist()


def test_a_zarr_store_is_embedded_as_the_file_but_not_copied(files, model, cells, tmp_path):
    cells.write_zarr(tmp_path / "in.zarr")
    np.testing.assert_array_equal(embed(model, tmp_path / "in.zarr"), embed(model, cells))
    config = dataclasses.replace(files("out.h5ad"), input=tmp_path / "in.zarr")
    with pytest.raises(UserError, match=r"only of an h5ad file a copy is written: for in\.zarr, give --only-embedding"):
        run_embed(config)
    assert not (tmp_path / "out.h5ad").exists()


def test_run_embed_refuses(files, tmp_path):
    with pytest.raises(UserError, match=r"'out\.csv'"):
        run_embed(files("out.csv", only_embedding=True))
    (tmp_path / "there.h5ad").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run_embed(files("there.h5ad"))
    assert (tmp_path / "there.h5ad").read_text() == "mine"
    (tmp_path / "in.h5ad").rename(tmp_path / "moved.h5ad")
    with pytest.raises(UserError, match="there is no file"):
        run_embed(files("out.h5ad"))
    with pytest.raises(UserError, match="--draws is 0"):
        files("out.h5ad", draws=0)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(UserError, match="not a model directory"):
        run_embed(files("out.h5ad"))
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.ENOSPC, "No space left on device"), "scbench: the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", "out.h5ad"), r"cannot be written or read \(out.h5ad\)"),
])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(files, tmp_path, monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("scbench.evaluation.embedding_files.anndata.io.write_elem", fail)
    config = files("out.h5ad")
    with pytest.raises(SystemExit) as exit_:
        main(["embed", str(config.model), str(config.input), str(config.output)])
    assert exit_.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "model"]
