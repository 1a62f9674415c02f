"""However a batch is split over ranks, micro-steps and ZeRO stages, the update is one (fp32)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scbench.config import OWN_POOLING, STRUCTURES

WORKER = Path(__file__).with_name("parallel_worker.py")


def train(store: Path, out: Path, *, structure="transformer", steps=20, world=1, stage=0, micro=32, mvc="mvc",
          plant=()) -> dict[str, np.ndarray]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, WORKER, store, out, structure, steps, stage, micro, mvc, *plant]
        ranks.append(subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE,
                                      stdout=subprocess.DEVNULL, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    with np.load(out) as results:
        return dict(results)


def differences(results: dict, reference: dict) -> dict[str, float]:
    """Largest difference of every array, as a share of the reference's largest element.

    But for what has no effect, whose true gradient is 0 and whose computed one is rounding: a key's bias on a softmax, and a
    position's bias, the same for all its channels, on a layer norm over them.
    """
    assert results.keys() == reference.keys()
    worst = {}
    for name, expected in reference.items():
        scale = np.abs(expected).max()
        if name.endswith("query_key_value.bias"):
            width = len(expected) // 3
            results[name][width : 2 * width] = expected[width : 2 * width]
        if name.endswith("position_mix.bias"):
            if name.startswith("gradient"):
                weights = name.replace("bias", "weight")
                assert scale < 1e-5 * np.abs(reference[weights]).max(), "it has an effect"
            continue
        worst[name] = float(np.abs(results[name] - expected).max() / max(scale, 1e-12))
    return worst


def assert_same_training(results: dict, reference: dict) -> None:
    for name, difference in differences(results, reference).items():
        # Gradients of the first step by the promise; later ones and parameters carry 20 steps of rounding.
        limit = 1e-5 if name.startswith("gradient 0") or name in ("losses", "norms") else 1e-4
        assert difference <= limit, f"{name} differs by {difference:.1e} of its largest element"


@pytest.fixture(scope="module")
def reference(small_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel")
    return {mvc: train(small_store, out / f"{mvc}.npz", mvc=mvc) for mvc in ("mvc", "no-mvc")}


@pytest.mark.parametrize(("world", "stage", "micro"), [
    (2, 2, 16),
    (2, 3, 8),
    *(pytest.param(2, stage, 16, marks=pytest.mark.full) for stage in (0, 1, 3)),
    *(pytest.param(2, stage, 8, marks=pytest.mark.full) for stage in (0, 1, 2)),
    *(pytest.param(1, stage, micro, marks=pytest.mark.full) for stage in (0, 1, 2, 3) for micro in (32, 8)),
    pytest.param(3, 2, 32, marks=pytest.mark.full),
    pytest.param(4, 3, 4, marks=pytest.mark.full),
])
def test_splitting_changes_nothing(small_store, tmp_path, reference, world, stage, micro):
    results = train(small_store, tmp_path / "out.npz", world=world, stage=stage, micro=micro)
    assert_same_training(results, reference["mvc"])


@pytest.mark.full
def test_splitting_changes_nothing_without_mvc(small_store, tmp_path, reference):
    results = train(small_store, tmp_path / "out.npz", world=2, stage=3, micro=8, mvc="no-mvc")
    assert_same_training(results, reference["no-mvc"])


STRUCTURE_STEPS = 4
# Each structure at every stage, on every number of ranks, each with and without accumulation and MVC somewhere: stages and
# ranks are paired differently from structure to structure, so that all sixteen pairs are met.
SPLITS = [(structure, (number + shift) % 4 + 1, number, (32, 4)[(number + shift // 2) % 2],
           ("mvc", "no-mvc")[(number // 2 + shift) % 2]) for shift, structure in enumerate(STRUCTURES) for number in range(4)]


@pytest.fixture(scope="module")
def references(small_store, tmp_path_factory):
    """One process of each structure, made when it is asked for."""
    out, made = tmp_path_factory.mktemp("structures"), {}

    def reference(structure: str, mvc: str) -> dict[str, np.ndarray]:
        if (structure, mvc) not in made:
            path = out / f"{structure}-{mvc}.npz"
            made[structure, mvc] = train(small_store, path, structure=structure, steps=STRUCTURE_STEPS, mvc=mvc)
        return made[structure, mvc]

    return reference


@pytest.mark.full
@pytest.mark.parametrize(("structure", "world", "stage", "micro", "mvc"), SPLITS)
def test_splitting_changes_nothing_for_any_structure(small_store, tmp_path, references, structure, world, stage, micro, mvc):
    if structure in OWN_POOLING:
        mvc = "mvc"  # it has no other head
    results = train(small_store, tmp_path / "out.npz", structure=structure, steps=STRUCTURE_STEPS, world=world, stage=stage,
                    micro=micro, mvc=mvc)
    assert_same_training(results, dict(references(structure, mvc)))


def test_a_gradient_wrong_by_half_is_caught(small_store, tmp_path, reference):
    name = "encoder.layers.0.linear1.bias"
    planted = train(small_store, tmp_path / "out.npz", plant=[name])
    assert differences(planted, reference["mvc"])[f"gradient 0 {name}"] == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same_training(planted, reference["mvc"])
