"""What DeepSpeed is told: a literal configuration file, and what the run's own options override in it.

The shipped files are `ds_configs/*.json`. Nothing here imports DeepSpeed.
"""

import json
from importlib import resources
from pathlib import Path

from scbench.config import PretrainConfig
from scbench.errors import UserError

SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01  # of Adam; decay of AdamW's matrices


def read_file(config: PretrainConfig) -> dict:
    """The file that `config.deepspeed` names: a shipped one, of the run's precision, or a path. UserError if it is none."""
    if config.deepspeed in SHIPPED:
        file = resources.files("scbench.ds_configs") / f"{config.deepspeed}_{config.precision}.json"
        text = file.read_text(encoding="utf-8")
    elif Path(config.deepspeed).is_file():
        text = Path(config.deepspeed).read_text(encoding="utf-8")
    else:
        raise UserError(f"--deepspeed {config.deepspeed} is neither zero0 … zero3, zero2_offload, zero3_offload nor a file.")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UserError(f"--deepspeed {config.deepspeed} is not JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed {config.deepspeed} does not hold a JSON object.")
    for name in ("zero_optimization", "bf16", "fp16", "optimizer"):
        if not isinstance(settings.get(name, {}), dict):
            raise UserError(f"--deepspeed {config.deepspeed}: {name} is no JSON object.")
    return settings


def read_deepspeed_config(config: PretrainConfig, micro_steps: int) -> tuple[dict, list[str]]:
    """The DeepSpeed configuration of a run, and a sentence for every setting of the file that the run overrides.

    `config.deepspeed` is one of SHIPPED (the file of that stage and precision) or a path.
    """
    settings = read_file(config)
    if "scheduler" in settings or ("optimizer" in settings and not offloads(settings)):
        raise UserError(f"--deepspeed {config.deepspeed} sets an optimizer or a scheduler: remove it (use --optimizer, --lr); "
                        "only files with offload_optimizer have an optimizer.")
    if settings.get("fp16", {}).get("enabled"):
        raise UserError(f"--deepspeed {config.deepspeed} asks for fp16: use --precision bf16 or fp32.")
    bf16 = config.precision == "bf16"
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    overrides = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's unit is our micro-step; cells are counted by the loader
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"} if not bf16 or stage > 0 else {},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if offloads(settings):
        overrides["optimizer"] = _offloaded_optimizer(config, settings.get("optimizer", {}))
    notes = _differences(f"--deepspeed {config.deepspeed}:", settings, overrides)
    if "train_batch_size" in settings:
        # DeepSpeed derives it from micro-batch and accumulation
        notes.append(f"--deepspeed {config.deepspeed}: train_batch_size {settings.pop('train_batch_size')} is overridden by "
                     f"--batch-cells {config.batch_cells}")
    return settings | overrides, notes


def offloads(settings: dict) -> bool:
    """Whether the optimizer's state lies in the host's memory."""
    return settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def _offloaded_optimizer(config: PretrainConfig, given: dict) -> dict:
    """DeepSpeed's Adam for the CPU, which replaces torch's where the state is offloaded: --optimizer and --lr decide."""
    if config.optimizer == "sgd":
        raise UserError(f"--optimizer sgd does not go with --deepspeed {config.deepspeed}: DeepSpeed offloads Adam; "
                        "use --optimizer adamw, or a file without offload.")
    kind = given.get("type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        raise UserError(f"--deepspeed {config.deepspeed} sets the optimizer {kind}: with offload it can be Adam or AdamW.")
    adamw = config.optimizer == "adamw"
    parameters = {"lr": config.lr, "betas": list(BETAS), "eps": EPSILON, "weight_decay": WEIGHT_DECAY if adamw else 0.0}
    if not adamw:
        parameters["adam_w_mode"] = False  # DeepSpeed takes Adam for AdamW
    return {"type": "AdamW" if adamw else "Adam", "params": given.get("params", {}) | parameters}


def _differences(where: str, before: dict, after: dict) -> list[str]:
    """A sentence for every value of `before` that `after` changes."""
    notes = []
    for name, value in after.items():
        if name not in before or before[name] == value:
            continue
        if isinstance(value, dict) and isinstance(before[name], dict) and value:
            lost = [f"{where} {name}: {key} {json.dumps(old)} is left out" for key, old in before[name].items()
                    if key not in value]
            notes += [*_differences(f"{where} {name}:", before[name], value), *lost]
        else:
            notes.append(f"{where} {name} {json.dumps(before[name])} is overridden by {json.dumps(value)}")
    return notes
