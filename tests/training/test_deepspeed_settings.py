"""The literal DeepSpeed files: parsed, stepped, overridden aloud; and the state that offload leaves in the host's memory."""

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scbench.config import PretrainConfig
from scbench.errors import UserError
from scbench.training.deepspeed_settings import SHIPPED, offloads, read_deepspeed_config

OFFLOAD = [name for name in SHIPPED if "offload" in name]
SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32", "--keep-last", "9"]


def config(**options) -> PretrainConfig:
    return PretrainConfig(store=Path("s"), output=Path("o"), **options)


def written(tmp_path: Path, content: dict | list | str) -> str:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_literal_deepspeed_files_of_their_stage(name, precision):
    from deepspeed.runtime.config import DeepSpeedConfig

    file = resources.files("scbench.ds_configs") / f"{name}_{precision}.json"
    settings = json.loads(file.read_text())
    parsed = DeepSpeedConfig(settings)  # as it is, by DeepSpeed's own reader
    assert parsed.zero_optimization_stage == int(name[4])
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    assert offloads(settings) == ("offload" in name)
    assert (parsed.optimizer_name == "adamw") == ("offload" in name)
    buckets = [value for key, value in settings["zero_optimization"].items() if "bucket" in key]
    assert all(value == 5_000_000 for value in buckets), "20 MB of fp32: these models have 1 to 100 million parameters"
    ours, notes = read_deepspeed_config(config(deepspeed=name, precision=precision), micro_steps=4)
    assert ours["gradient_accumulation_steps"] == 4
    assert ours["gradient_clipping"] == 1.0
    assert notes == []  # nothing of a shipped file is overridden


def test_every_shipped_file_has_a_name_that_the_option_takes():
    files = {p.name for p in resources.files("scbench.ds_configs").iterdir() if p.name.endswith(".json")}
    assert files == {f"{name}_{precision}.json" for name in SHIPPED for precision in ("bf16", "fp32")}


def test_every_overridden_setting_is_said(tmp_path):
    path = written(tmp_path, {
        "train_batch_size": 7, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 5.0,
        "bf16": {"enabled": False, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "bf16"},
        "zero_allow_untested_optimizer": False, "steps_per_print": 10, "zero_optimization": {"stage": 1},
        "wall_clock_breakdown": True,
    })
    settings, notes = read_deepspeed_config(config(deepspeed=path, clip=0.5, batch_cells=96), micro_steps=3)
    assert "train_batch_size" not in settings
    assert settings["wall_clock_breakdown"] is True, "what is not ours stays"
    said = [note.removeprefix(f"--deepspeed {path}: ") for note in notes]
    assert sorted(said) == sorted([
        "train_batch_size 7 is overridden by --batch-cells 96",
        "train_micro_batch_size_per_gpu 4 is overridden by 1",
        "gradient_accumulation_steps 2 is overridden by 3",
        "gradient_clipping 5.0 is overridden by 0.5",
        "bf16: enabled false is overridden by true",
        "bf16: immediate_grad_update true is left out",
        'data_types: grad_accum_dtype "bf16" is overridden by "fp32"',
        "zero_allow_untested_optimizer false is overridden by true",
        "steps_per_print 10 is overridden by 2147483648",
    ])
    for name, value in json.loads(Path(path).read_text()).items():  # the oracle: what differs is named
        assert (settings.get(name) == value) or any(name in note for note in notes)


def test_what_an_offload_file_says_of_the_optimizer_is_overridden_aloud(tmp_path):
    ours, notes = read_deepspeed_config(config(deepspeed="zero2_offload", lr=1e-3), micro_steps=1)
    assert ours["optimizer"]["params"]["lr"] == 1e-3
    assert notes == ["--deepspeed zero2_offload: optimizer: params: lr 0.0002 is overridden by 0.001"]
    ours, notes = read_deepspeed_config(config(deepspeed="zero2_offload", optimizer="adam"), micro_steps=1)
    assert ours["optimizer"] == {"type": "Adam", "params": {
        "lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "adam_w_mode": False}}
    assert len(notes) == 2
    mine = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    ours, notes = read_deepspeed_config(config(deepspeed=written(tmp_path, mine)), micro_steps=1)
    assert ours["optimizer"]["type"] == "AdamW" and notes == []


@pytest.mark.parametrize(("content", "options", "said"), [
    (None, {}, "neither zero0"),
    ("{", {}, "not JSON"),
    ([], {}, "JSON object"),
    ({"optimizer": {"type": "Adam"}}, {}, "sets an optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler"),
    ({"fp16": {"enabled": True}}, {}, "fp16"),
    ({"bf16": True}, {}, "bf16 is no JSON object"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {"optimizer": "sgd"}, "--optimizer sgd"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "Lamb"}}, {}, "Lamb"),
])
def test_files_that_make_no_sense_are_refused(tmp_path, content, options, said):
    path = str(tmp_path / "nothing") if content is None else written(tmp_path, content)
    with pytest.raises(UserError, match=said):
        read_deepspeed_config(config(deepspeed=path, **options), micro_steps=1)


def pretrain(store: Path, run: Path, stage: str, steps: int, *more: str) -> None:
    command = [sys.executable, "-m", "scbench", "pretrain", str(store), "-o", str(run), *SMALL, "--deepspeed", stage,
               "--steps", str(steps), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="session")
def compiler():
    """Offload needs DeepSpeed's CPU Adam, compiled at its first use."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("offload compiles C++, and g++ or ninja is missing")


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", OFFLOAD)
def test_a_run_with_offload_is_the_run_without(small_store, tmp_path, compiler, stage, precision):
    """Same losses as the file without offload, and the portable checkpoint goes there and back in the middle."""
    more = ("--precision", precision, "--checkpoint-every", "4")
    plain = stage.removesuffix("_offload")
    pretrain(small_store, tmp_path / "plain", plain, 8, *more)
    pretrain(small_store, tmp_path / "offload", stage, 8, *more)
    limit = 1e-5 if precision == "fp32" else 5e-3
    expected = losses(tmp_path / "plain")
    assert losses(tmp_path / "offload") == pytest.approx(expected, rel=limit)
    for first, second in ((plain, stage), (stage, plain)):
        run = tmp_path / f"{first} to {second}"
        shutil.copytree(tmp_path / ("plain" if first == plain else "offload"), run)
        shutil.rmtree(run / "checkpoints" / "step-00000008")
        pretrain(small_store, run, second, 8, *more, "--resume")
        assert losses(run) == pytest.approx(expected, rel=limit)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            left, right = (load_file(r / "checkpoints" / "step-00000008" / f"{kind}.safetensors")
                           for r in (run, tmp_path / "plain"))
            assert left.keys() == right.keys()
            for name, tensor in right.items():
                if name.endswith("query_key_value.bias"):
                    continue  # the keys' part has no effect: its gradient is rounding, which Adam makes into whole steps
                scale = float(tensor.abs().max())
                assert float((left[name] - tensor).abs().max()) <= 20 * limit * scale + 1e-9, f"{kind} of {name}"


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in OFFLOAD])
def test_every_other_file_steps(small_store, tmp_path, name, precision):
    pretrain(small_store, tmp_path / "run", name, 2, "--precision", precision)
    assert all(torch.isfinite(torch.tensor(losses(tmp_path / "run"))))


def test_without_a_compiler_offload_is_refused_in_one_sentence(small_store, tmp_path):
    """PATH holds no compiler, and what was compiled before is out of sight."""
    command = [sys.executable, "-m", "scbench", "pretrain", str(small_store), "-o", str(tmp_path / "run"), *SMALL,
               "--steps", "1", "--deepspeed", "zero2_offload"]
    nothing = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "no-compiler"}
    environment = {**os.environ, **nothing}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "cannot be compiled here" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("scbench: ")
