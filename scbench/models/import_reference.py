"""Checkpoints of the reference implementation as scbench models, and the verb `scbench import-reference`.

A checkpoint is a state dict; what else a model is must be inferred from the shapes or given. The imported model is one of the
recipe aaai2025: its embeddings are the reference's, pads, batch statistics and all (evaluation mode).
"""

import dataclasses
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from scbench.config import BLIND_CLS, ImportReferenceConfig, ModelConfig
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.files import refuse_existing, sha256
from scbench.models.model import ExpressionModel

MAX_GENES = {"cnn": 511, "cnn_sorted": 511}  # the reference's convolutions fail on 512 genes and <cls>; else 512
SIGNATURES = {  # a key that only checkpoints of the structure have
    "transformer": "encoder.layers.0.self_attn.in_proj_weight",
    "cnn": "encoder.layers.0.conv.weight",
    "cnn_sorted": "encoder.layers.0.conv.weight",
    "linear": "encoder.ffns.0.fc1.weight",
    "linear_mixer": "encoder.layers.0.linear_seq.weight",
    "gnn": "encoder.layers.0.linear_trans.0.weight",
}
UNUSED = r"layer_norm\..*|.*\.num_batches_tracked"  # in a checkpoint, but not in what the reference computes
UNUSED_WITHOUT_TOKENS = r"|decoder\..*"  # structures that end in one state a cell have no tokens to decode

SHARED_NAMES = {  # our name → the reference's; # is a layer's number, * stands for weight, bias or a running statistic
    "embedding.table": "embedding.weight",
    "embedding.projection.*": "emb_trans.*",
    "embedding.value_*1": "value_encoder.0.*",
    "embedding.value_*2": "value_encoder.2.*",
    "regression_head.linear1.*": "decoder.0.*",
    "regression_head.linear2.*": "decoder.2.*",
    "regression_head.linear3.*": "decoder.4.*",
    "mvc_head.linear1.*": "gene2query.0.*",
    "mvc_head.linear2.*": "gene2query.2.*",
    "mvc_head.linear3.*": "gene2query.4.*",
}
CNN_NAMES = {
    "encoder.layers.#.convolution.*": "encoder.layers.#.conv.*",
    "encoder.layers.#.norm.*": "encoder.layers.#.bn.*",
}
ENCODER_NAMES = {
    "transformer": {  # torch's nn.TransformerEncoder: rows of in_proj are query, key, value; a head's rows are neighbours
        "encoder.layers.#.query_key_value.*": "encoder.layers.#.self_attn.in_proj_*",
        "encoder.layers.#.attention_output.*": "encoder.layers.#.self_attn.out_proj.*",
        "encoder.layers.#.attention_norm.*": "encoder.layers.#.norm1.*",
        "encoder.layers.#.linear1.*": "encoder.layers.#.linear1.*",
        "encoder.layers.#.linear2.*": "encoder.layers.#.linear2.*",
        "encoder.layers.#.feed_forward_norm.*": "encoder.layers.#.norm2.*",
    },
    "cnn": CNN_NAMES,
    "cnn_sorted": CNN_NAMES,
    "linear": {
        "encoder.layers.#.linear1.*": "encoder.ffns.#.fc1.*",
        "encoder.layers.#.linear2.*": "encoder.ffns.#.fc2.*",
        "encoder.layers.#.norm.*": "encoder.layer_norms.#.*",
    },
    "linear_mixer": {
        "encoder.layers.#.channel_mix.*": "encoder.layers.#.linear_channel.*",
        "encoder.layers.#.position_mix.*": "encoder.layers.#.linear_seq.*",
        "encoder.layers.#.norm.*": "encoder.layers.#.bn.*",
    },
    "gnn": {
        "encoder.layers.#.factor_linear_table": "encoder.layers.#.factor_linear",
        "encoder.layers.#.factor_table": "encoder.layers.#.factor",
        "encoder.layers.#.factor_mlp1.*": "encoder.layers.#.linear_trans.0.*",
        "encoder.layers.#.factor_mlp2.*": "encoder.layers.#.linear_trans.2.*",
        "encoder.layers.#.linear.*": "encoder.layers.#.linear.*",
        "encoder.layers.#.norm.*": "encoder.layer_norms.#.*",
    },
}


def run_import_reference(config: ImportReferenceConfig) -> dict:
    """`scbench import-reference`: write the model directory, and return where it is and what it holds."""
    refuse_existing(config.output)
    model = import_reference(
        config.checkpoint, Vocabulary.load(config.vocabulary), config.structure, pooling=config.pooling,
        preprocess=config.preprocess, max_genes=config.max_genes, heads=config.heads,
    )
    model.save_pretrained(config.output, model.provenance)
    c = model.config
    if c.structure in BLIND_CLS and c.pooling == "cls":
        print(f"warning: every cell has the same embedding, as in the reference: {BLIND_CLS[c.structure]}.", file=sys.stderr)
    if not config.json:
        shape = f"{c.layers} layers × width {c.width}, {c.max_genes} genes a cell, pooling {c.pooling}"
        print(f"{c.structure}, {shape}: {config.output}")
    return {"output": str(config.output), "model": dataclasses.asdict(c), "provenance": model.provenance}


def import_reference(
    checkpoint: Path,
    vocabulary: Vocabulary,
    structure: str,
    *,
    pooling: str | None = None,
    preprocess: str = "log1p",
    max_genes: int | None = None,
    heads: int = 8,
) -> ExpressionModel:
    """The model of a reference checkpoint, in fp32 and evaluation mode. Its provenance says what was inferred.

    Parameters
    ----------
    checkpoint
        A state dict written by torch.save, keys with or without `module.`; nothing in it is executed.
    vocabulary
        What it was trained with.
    structure
        scbench's name of it.
    pooling, preprocess, max_genes, heads
        What the weights do not tell; see ImportReferenceConfig.

    Raises
    ------
    UserError
        If the file is no such checkpoint, or the rest does not go with it.
    """
    if structure not in SIGNATURES:
        raise UserError(f"--structure {structure} has no known reference checkpoints: its layers were never published.")
    state = read_state(checkpoint)
    _check_structure(state, structure, checkpoint)
    rows, width = state["embedding.weight"].shape[0], state["value_encoder.0.weight"].shape[0]
    if rows != vocabulary.size:
        raise UserError(f"the vocabulary holds {vocabulary.size} tokens, the gene table of {checkpoint} {rows}: "
                        "give the vocabulary.json that it was trained with.")
    if structure == "transformer" and (heads < 1 or width % heads):
        raise UserError(f"the width of {checkpoint}, {width}, is not divisible by --heads {heads}: "
                        "give the number of heads that it was trained with.")
    config = ModelConfig(
        vocabulary_size=rows, structure=structure, recipe="aaai2025", width=width, layers=_count_layers(state), heads=heads,
        mvc=any(name.startswith("gene2query.") for name in state), pooling=pooling, preprocess=preprocess,
        max_genes=_length(state, structure, max_genes, checkpoint),
    )
    model = ExpressionModel(config, vocabulary)
    unused = _load(model, state, checkpoint)
    inferred = ["vocabulary_size", "width", "layers", "mvc", *(["max_genes"] if structure == "linear_mixer" else [])]
    model.provenance = {
        "imported_from": {"file": Path(checkpoint).name, "sha256": sha256(checkpoint), "format": "reference checkpoint"},
        "inferred_from_the_weights": inferred,
        "unused_tensors": unused,
        "training_cells": "not recorded in a reference checkpoint: overlap with it cannot be checked",
    }
    return model.eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without `module.`, mapped from the file where its format allows."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or error}.") from error
    except UnpicklingError as error:
        raise UserError(f"the checkpoint {path} is more than a dict of tensors, and scbench executes no pickle: "
                        "save the model's state_dict() alone with torch.save.") from error
    except Exception as error:  # on a file of another kind torch.load raises whatever its parser stumbles over
        raise UserError(f"{path} is not a checkpoint written by torch.save, or it is damaged: copy it again.") from error
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state = content if isinstance(content, dict) else {}
    state = {name: x for name, x in state.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    return state


def _check_structure(state: dict[str, Tensor], structure: str, checkpoint: Path) -> None:
    """UserError unless the checkpoint has what tells the reference's models, and this structure among them."""
    matrices = {name for name, x in state.items() if x.ndim >= 2}
    for name in ("embedding.weight", "value_encoder.0.weight"):
        if name not in matrices:
            raise UserError(f"{checkpoint} is not a checkpoint of the reference implementation: it lacks the matrix {name}.")
    if SIGNATURES[structure] not in matrices:
        others = [other for other, signature in SIGNATURES.items() if signature in matrices]
        hint = f"give --structure {' or '.join(others)}" if others else "it looks like none of the reference's structures"
        raise UserError(f"{checkpoint} does not hold a {structure} model (it lacks {SIGNATURES[structure]}): {hint}.")


def _count_layers(state: dict[str, Tensor]) -> int:
    return len({match[1] for name in state if (match := re.match(r"encoder\.(?:layers|ffns)\.(\d+)\.", name))})


def _length(state: dict[str, Tensor], structure: str, max_genes: int | None, checkpoint: Path) -> int:
    """Genes of a cell that the model was trained on, `<cls>` not counted."""
    if structure != "linear_mixer":
        return MAX_GENES.get(structure, 512) if max_genes is None else max_genes
    trained = state[SIGNATURES[structure]].shape[-1] - 1
    if max_genes not in (None, trained):
        raise UserError(f"{checkpoint} was trained on {trained} genes a cell, not {max_genes}: leave --max-genes out.")
    return trained


def reference_name(name: str, structure: str) -> str:
    """What the reference calls our tensor."""
    for ours, theirs in {**SHARED_NAMES, **ENCODER_NAMES[structure]}.items():
        pattern = re.escape(ours).replace(r"\#", r"(?P<layer>\d+)").replace(r"\*", r"(?P<leaf>weight|bias|running_\w+)")
        if match := re.fullmatch(pattern, name):
            found = match.groupdict()
            return theirs.replace("#", found.get("layer", "")).replace("*", found.get("leaf", ""))
    raise KeyError(name)


@torch.no_grad()
def _load(model: ExpressionModel, state: dict[str, Tensor], checkpoint: Path) -> list[str]:
    """Copy the weights into the model; the names of those that it has no use for. UserError unless everything fits."""
    structure = model.config.structure
    unused_pattern = UNUSED if model.config.regression else UNUSED + UNUSED_WITHOUT_TOKENS
    unused = [name for name in state if re.fullmatch(unused_pattern, name)]
    ours = model.state_dict()
    theirs = {name: reference_name(name, structure) for name in ours}
    theirs |= {name: f"{key}.weight" for name, key in theirs.items() if f"{key}.weight" in state}  # a table of nn.Embedding
    missing = [key for key in theirs.values() if key not in state]
    unexpected = sorted(state.keys() - set(theirs.values()) - set(unused))
    shared = {key: (state[key], ours[name]) for name, key in theirs.items() if key in state}
    reshaped = [key for key, (x, y) in shared.items() if x.shape != y.shape or not x.is_floating_point()]
    problems = [f"{what} {_some(names)}" for what, names in
                [("it lacks", missing), ("it has", unexpected), ("of another shape or type are", reshaped)] if names]
    if problems:
        raise UserError(f"{checkpoint} is not the reference's {structure} model of width {model.config.width} with "
                        f"{model.config.layers} layers: {'; '.join(problems)}.")
    for key, (x, y) in shared.items():
        if not x.isfinite().all():
            raise UserError(f"the weights of {checkpoint} are damaged: {key} holds numbers that are not finite.")
        y.copy_(x)
    return unused


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
