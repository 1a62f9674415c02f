"""The classifier in a finetuned model's directory: a linear layer on the cell embedding, and when it says nothing.

    classifier.safetensors   fp32 weights, and the mean and scale of the embeddings that it was started on
    classifier.json          classes, label column, temperature, threshold and its rule, metrics, digest of the split, …
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scbench.errors import UserError

FORMAT = 1
UNASSIGNED = "unassigned"
_WEIGHTS, _ABOUT = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """Logits of the classes, linear in the standardised cell embedding. It starts at 0: all classes alike."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """float32 [B, D] → [B, classes]."""
        return self.linear((embeddings - self.mean) / self.scale)


def save(classifier: Classifier, about: dict, directory: Path) -> None:
    """Write both files into `directory`; `about`: JSON-able, with classes, temperature and threshold."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(weights, directory / _WEIGHTS)
    (directory / _ABOUT).write_text(
        json.dumps({"format": FORMAT, **about}, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def load(directory: Path, width: int) -> tuple[Classifier, dict]:
    """The classifier of a model of `width`, and what is known of it; UserError if there is none, or it is damaged."""
    if not (directory / _ABOUT).is_file():
        raise UserError(f"{directory} has no classifier ({_ABOUT}): make a model with one by `scbench finetune`.")
    try:
        about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
        if about["format"] > FORMAT:
            raise UserError(f"the classifier in {directory} has format {about['format']}, newer than this scbench reads: "
                            "upgrade scbench.")
        classifier = Classifier(width, len(about["classes"]))
        classifier.load_state_dict(load_file(directory / _WEIGHTS))
        about["temperature"], about["threshold"] = float(about["temperature"]), float(about["threshold"])
        str(about["label"])
        str(about["model_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the classifier in {directory} is damaged or not scbench's ({reason}): copy it again.") from error
    return classifier.eval(), about
