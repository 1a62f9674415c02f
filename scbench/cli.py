"""The command line: one verb, one config dataclass, one function, imported only when its verb runs."""

import importlib
import json
import sys
from typing import Annotated

import tyro

from scbench import config
from scbench.errors import UserError

Benchmark = Annotated[config.ClassificationConfig, tyro.conf.subcommand("classification")]

VERBS = {
    "prepare": (config.PrepareConfig, "scbench.data.prepare"),
    "info": (config.InfoConfig, "scbench.data.inspect"),
    "verify": (config.VerifyConfig, "scbench.data.inspect"),
    "pretrain": (config.PretrainConfig, "scbench.training.pretrain"),
    "embed": (config.EmbedConfig, "scbench.evaluation.embed"),
    "classification": (config.ClassificationConfig, "scbench.evaluation.classification"),
    "demo": (config.DemoConfig, "scbench.evaluation.demo"),
}


def _commands() -> object:
    from tyro.extras import SubcommandApp
    ...
