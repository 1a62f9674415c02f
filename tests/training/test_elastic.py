"""A checkpoint goes on at any ZeRO stage on any number of ranks, in the middle of an epoch: the same cells, the same masks,
and the losses that the run would have had.

A chain of runs of one training: each goes on from the checkpoint that the one before it left, as another stage and with
another number of ranks, and makes one step more than it saves. That step is the first of the next run, from the same state.
"""

import itertools
import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("elastic_worker.py")
OPTIONS = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32", "--lr", "1e-3",
           "--warmup-steps", "0", "--checkpoint-every", "2", "--validate-every", "1000", "--validation-cells", "1"]
# Every stage after every stage, every number of ranks after every number, all sixteen pairs, and one of them twice running.
STAGES = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0, 0]
RANKS = [4, 1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 4]
# fp32 adds the same numbers in another order. In bf16 a sum may round to the other side (2⁻⁸); the largest seen is 2e-7.
BAND = {"fp32": 1e-5, "bf16": 1e-3}


def assert_goes_on(chain: list[tuple[int, int]], precision: str, start_ranks, store: Path, folder: Path) -> None:
    run, seen = folder / "run", folder / "seen"
    options = ["-o", run, *OPTIONS, "--steps", str(2 * len(chain) + 2), "--precision", precision]
    before: dict = {}
    for number, (stage, world) in enumerate(chain):
        here = seen / str(number)
        here.mkdir(parents=True)
        arguments = ["--deepspeed", f"zero{stage}", "--micro-batch-cells", "8", *(["--resume"] if number else [])]
        codes, said = start_ranks(world, store, *options, *arguments, command=[WORKER, 3, here]).finish()
        assert set(codes) <= {0, 1}, said
        shown = zip(*([int(line) for line in (here / f"{rank}.jsonl").read_text().splitlines()] for rank in range(world)),
                    strict=False)  # ranks that rank 0 left alone may have begun another step
        rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row}
        assert sorted(rows) == list(range(1, 2 * number + 4)), said
        steps = range(2 * number + 1, 2 * number + 4)
        after = {step: (sum(parts), rows[step]) for step, parts in zip(steps, shown, strict=False)}
        if number:
            step = 2 * number + 1
            (cells, row), (cells_now, row_now) = before[step], after[step]
            assert cells == cells_now, f"step {step}: other cells, genes or masks"
            assert (row["tokens"], row["lr"]) == (row_now["tokens"], row_now["lr"])
            if (stage, world) == chain[number - 1]:
                assert (row["loss"], row["gradient_norm"]) == (row_now["loss"], row_now["gradient_norm"])
            for name in ("loss", "regression_loss", "mvc_loss"):
                assert row_now[name] == pytest.approx(row[name], rel=BAND[precision]), (step, *chain[number - 1 : number + 1])
        before = after


def test_another_stage_and_another_number_of_ranks(start_ranks, small_store, tmp_path):
    """ZeRO 3 on two ranks: the heads' last biases, of one element, are on one of them only."""
    assert_goes_on([(2, 1), (3, 2)], "fp32", start_ranks, small_store, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("precision", BAND)
def test_every_stage_after_every_stage_and_every_number_of_ranks(precision, start_ranks, small_store, tmp_path):
    chain = list(zip(STAGES, RANKS, strict=True))
    for values in (STAGES, RANKS):
        assert len(set(itertools.pairwise(values))) == 16
    assert len(set(chain)) == 16
    assert_goes_on(chain, precision, start_ranks, small_store, tmp_path)
