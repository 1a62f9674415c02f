"""plan: its arithmetic against the real models, the real engine and the real command line."""

import json
import re

import numpy as np
import pytest
import torch

from scbench.cli import main, parse
from scbench.config import STRUCTURES, ModelConfig, PlanConfig, PretrainConfig
from scbench.data.batch import CellBatch
from scbench.data.store import Store
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.kernels import backend
from scbench.models.flops import training_flops
from scbench.models.model import ExpressionModel
from scbench.training.gpus import GPUS
from scbench.training.plan import cells_of, largest, micro_of, run_plan, usable_bytes
from scbench.training.plan_memory import Micro, kept_bytes, memory_of, parameters_of
from scbench.training.plan_time import cell_flops, communicated_bytes

VOCABULARY = Vocabulary.build(f"G{i}" for i in range(397))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shape(structure: str, **options) -> ModelConfig:
    options = {"width": 64, "layers": 3, "heads": 4} | options
    return ModelConfig(vocabulary_size=VOCABULARY.size, structure=structure, **options)


def cells(number: int, genes: int) -> tuple[CellBatch, Micro]:
    """A batch of equal cells, 40 % masked, and what plan is told of it."""
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.choice(VOCABULARY.size - 3, genes, replace=False)) for _ in range(number)]
    masks = [rng.permutation(genes) < round(0.4 * genes) for _ in range(number)]
    batch = CellBatch.from_lists(ids, [np.ones(genes)] * number, masks)
    return batch, Micro(number, number * (genes + 1), genes + 1, len(batch.masked), len(batch.query_genes))


def counted_bytes(model: ExpressionModel, batch: CellBatch) -> int:
    """The oracle: every storage that autograd keeps, weights and the batch left out."""
    outside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch) if isinstance(t, torch.Tensor)}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in outside:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(batch)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", [{}, {"library_size_offset": True, "layers": 8, "width": 40, "heads": 2}])
def test_the_parameters_are_those_of_the_model(structure, options):
    config = shape(structure, **options)
    model = ExpressionModel(config, VOCABULARY)
    counted = parameters_of(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.largest == max(p.numel() for p in model.parameters())
    assert counted.small == sum(p.numel() for p in model.parameters() if p.numel() < 10_000)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_kept_for_the_backward(monkeypatch, structure, precision):
    """Within 2 %, at two sizes, with dropout and without, so that every term of the law is seen. By the PyTorch paths, which
    GPUs take; the C code on a CPU keeps less."""
    monkeypatch.setattr(backend, "FORCED", "torch")
    for options, (number, genes) in [({}, (4, 63)), ({"layers": 2, "width": 128, "dropout": 0.0}, (2, 100))]:
        config = shape(structure, max_genes=genes, **options)
        batch, micro = cells(number, genes)
        model = ExpressionModel(config, VOCABULARY).to(DTYPES[precision])
        counted = counted_bytes(model, model._resolved(batch))
        if structure == "mamba":  # the scan keeps its borders' states outside of autograd's hooks
            counted += config.layers * 4 * 4 * 2 * micro.tokens * config.width / 8
        assert kept_bytes(config, precision, micro) == pytest.approx(counted, rel=0.02)


ENGINES = [(stage, precision) for stage in range(4) for precision in ("bf16", "fp32")]


@pytest.mark.parametrize(("stage", "precision"), [
    pytest.param(*case, marks=[] if case in [(1, "bf16"), (3, "fp32")] else pytest.mark.full) for case in ENGINES])
def test_weights_and_optimizer_are_those_of_the_engine(stage, precision):
    from scbench.training import engine as engines
    from scbench.training.deepspeed_settings import read_deepspeed_config
    from scbench.training.pretrain import backward

    engines.start_process_group()
    batch, micro = cells(2, 30)
    config = PretrainConfig(store="s", output="o", width=64, layers=2, heads=4, max_genes=30, precision=precision,
                            deepspeed=f"zero{stage}")
    model = ExpressionModel(config.model(VOCABULARY.size), VOCABULARY)
    engine = engines.make_engine(model, config, read_deepspeed_config(config, 1)[0])
    backward(engine, [batch], batch.denominator)
    engine.step()
    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    inner = engines._base_optimizer(engine)
    # ZeRO-3 lends its masters to the optimizer only while it steps
    tensors = list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", []))
    tensors += [p for group in inner.param_groups for p in group["params"]]
    tensors += [x for state in inner.state.values() for x in state.values() if torch.is_tensor(x) and x.numel() > 1]
    weight_storages = {w.untyped_storage().data_ptr() for w in weights}
    masters = {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().data_ptr() not in weight_storages}
    predicted = memory_of(config.model(VOCABULARY.size), precision, f"zero{stage}", 1, micro, 1)
    assert sum(w.numel() * w.element_size() for w in weights) == predicted.parameters
    state = sum(t.numel() * t.element_size() for t in masters.values())
    assert state == pytest.approx(predicted.optimizer, abs=64), "but for a partition's padding"
    engine.destroy()


def test_ranks_share_what_their_stage_shares():
    config, (_, micro) = shape("transformer"), cells(2, 30)
    number = parameters_of(config).total
    for world in (2, 8):
        by_stage = {stage: memory_of(config, "bf16", f"zero{stage}", world, micro, 1) for stage in range(4)}
        assert [m.optimizer for m in by_stage.values()] == [12 * number, *[12 * number / world] * 3]
        assert [by_stage[stage].parameters for stage in range(3)] == [2 * number] * 3
        assert by_stage[3].parameters < 2 * number / world + 2 * parameters_of(config).small + 1
    assert memory_of(config, "bf16", "zero2_offload", 2, micro, 1).optimizer == 0
    assert memory_of(config, "bf16", "zero2_offload", 2, micro, 1).host == 16 * number / 2


def test_bytes_on_the_links():
    """The textbook's volumes: all-reduce twice what reduce-scatter and all-gather move each; nothing alone."""
    assert all(communicated_bytes(1000, "bf16", stage, 1, 1) == 0 for stage in range(4))
    assert communicated_bytes(1000, "fp32", 0, 4, 1) == pytest.approx(2 * 0.75 * 4000)
    assert communicated_bytes(1000, "bf16", 3, 4, 2) == pytest.approx(2 * 2 * 0.75 * 2000)


def test_flops_are_the_formula_and_never_the_table():
    lengths = np.array([513.0, 101.0])
    config = shape("transformer", width=256, layers=6, heads=8)
    flops = cell_flops(config, lengths, 0.4, 10.0)
    assert flops == pytest.approx(np.mean([training_flops(config, np.array([n]), 0.4 * (n - 1), 10.0)[0] for n in lengths]))
    larger = ModelConfig(vocabulary_size=60_000, structure="transformer", width=256, layers=6, heads=8)
    assert cell_flops(larger, lengths, 0.4, 10.0) == flops
    # Per token and layer 8 d² + 4 d² + 4 L d, three times, heads and value MLP beside it: 12 to 14 GFLOP at this size.
    assert 1.2e10 < cell_flops(config, np.array([513.0]), 0.4, 100.0) < 1.4e10


def test_the_largest_micro_batch_is_the_largest():
    config = PlanConfig(gpus=2, gpu="l4", gpu_memory="3GB", batch_cells=256, structure="mamba")
    found, model, usable = cells_of(config), config.model(60_697), usable_bytes(config)
    choice = largest(config, model, found, "bf16", "zero2", usable, 1e10)
    assert 1 < choice.micro_cells < 128
    assert choice.memory.peak <= usable
    more = -(-128 // (choice.micro_steps - 1))
    assert memory_of(model, "bf16", "zero2", 2, micro_of(config, found, more), choice.micro_steps - 1).peak > usable


@pytest.mark.parametrize("options", [
    {}, {"gpus": 0, "gpu_memory": "16GB"},
    {"gpus": 8, "gpu": "a100", "batch_cells": 1024, "structure": "gnn_cp", "mvc": False},
    {"gpus": 1, "gpu_memory": "3GB", "width": 512, "precision": "fp32", "mask_ratio": 0.3},
])
def test_the_command_is_one_that_pretrain_takes(options, capsys):
    config = PlanConfig(**options)
    result = run_plan(config)
    words = result["command"].split()
    launcher, verb = words[: words.index("pretrain")], words[words.index("pretrain"):]
    assert launcher == (["scbench"] if config.gpus < 2 else
                        ["torchrun", "--standalone", "--nproc-per-node", str(config.gpus), "-m", "scbench"])
    taken = parse(verb)
    assert isinstance(taken, PretrainConfig)
    for name in ("structure", "width", "layers", "heads", "mvc", "max_genes", "mask_ratio", "batch_cells", "dropout"):
        assert getattr(taken, name) == getattr(config, name)
    best = result["recommended"]
    assert (taken.precision, taken.deepspeed) == (best["precision"], best["deepspeed"])
    assert (taken.micro_batch_cells or best["micro_batch_cells"]) == best["micro_batch_cells"]
    shown = capsys.readouterr().out
    assert result["command"] in shown
    assert ("never measured on a GPU" in shown) == (config.gpus > 0)


def test_json_has_both_bounds_and_every_option(capsys):
    main(["plan", "--gpus", "2", "--gpu", "a100", "--cells", "1e8", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["options"]) == 12 and result["cells"] == 1e8
    best = result["recommended"]
    lower, upper = best["hours"]
    assert 0 < lower < upper
    assert lower == pytest.approx(1e8 / 128 * best["step_seconds"][0] / 3600)
    assert best["cells_per_second"] == pytest.approx([128 / s for s in reversed(best["step_seconds"])])


def test_a_store_gives_lengths_vocabulary_and_cells(small_store):
    store = Store.open(small_store)
    genes = store.split("train").cells(["n_genes"])["n_genes"].to_numpy()
    found = cells_of(PlanConfig(store=small_store, max_genes=40))
    np.testing.assert_array_equal(found.lengths, np.minimum(genes, 40) + 1)
    assert (found.vocabulary_size, found.number) == (store.vocabulary.size, 210)
    small = {"max_genes": 40, "width": 16, "layers": 1, "heads": 2}
    result = run_plan(PlanConfig(store=small_store, gpus=0, gpu_memory="4GB", json=True, **small))
    assert str(small_store) in result["command"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--gpu-memory", "2GB", "--micro-batch-cells", "128"], "lower --micro-batch-cells"),
    (["--gpu-memory", "1100MB", "--max-genes", "20000", "--width", "1024"], "--max-genes"),
    (["--gpu-memory", "2GB", "--width", "4096", "--layers", "9", "--max-genes", "8", "--deepspeed", "zero1"],
     "zero3_offload"),
    (["--gpu-memory", "1.2GB", "--width", "4096", "--layers", "9", "--max-genes", "8", "--gpus", "0"], "--width"),
    (["--gpu-memory", "much"], "--gpu-memory 'much'"),
    (["--gpus", "-1"], "--gpus is -1"),
    (["--gpus", "4", "--batch-cells", "3"], "less than one cell"),
    (["--mean-genes", "600"], "--mean-genes 600"),
    (["--heads", "3"], "not divisible by --heads"),
    (["no such store"], "there is no store"),
])
def test_what_cannot_be_planned_names_the_knob(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(r"scbench: .*\n", message), message
    assert said in message


def test_offload_is_no_help_on_the_cpu_and_known_gpus_have_peaks():
    with pytest.raises(UserError, match="--gpus 0"):
        PlanConfig(gpus=0, deepspeed="zero2_offload")
    assert all(gpu.flops("bf16") > gpu.flops("fp32") > 0 for gpu in GPUS.values())
