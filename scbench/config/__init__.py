"""The options of every verb, as dataclasses: the command line, the Python functions and the files of a run share them.

Nothing here imports torch, so `scbench --help` answers at once.
"""

from scbench.config.common import Common, Values
from scbench.config.comparison import CompareConfig
from scbench.config.counts import CountsConfig, ThinConfig
from scbench.config.data import Fractional, InfoConfig, MergeConfig, PrepareConfig, VerifyConfig
from scbench.config.evaluation import ClassificationConfig, DemoConfig, EmbedConfig, EvaluateConfig
from scbench.config.export import ExportConfig
from scbench.config.finetune import FinetuneConfig, PredictConfig
from scbench.config.model import (
    ALIASES,
    BLIND_CLS,
    DEFAULT_POOLING,
    OWN_POOLING,
    STRUCTURES,
    ImportReferenceConfig,
    InputLaw,
    ModelConfig,
)
from scbench.config.perturbation import PerturbationConfig
from scbench.config.plan import PlanConfig
from scbench.config.suite import SuiteConfig
from scbench.config.training import PretrainConfig

__all__ = [
    "ALIASES",
    "BLIND_CLS",
    "DEFAULT_POOLING",
    "OWN_POOLING",
    "STRUCTURES",
    "ClassificationConfig",
    "Common",
    "CompareConfig",
    "CountsConfig",
    "DemoConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "Fractional",
    "ImportReferenceConfig",
    "InfoConfig",
    "InputLaw",
    "MergeConfig",
    "ModelConfig",
    "PerturbationConfig",
    "PlanConfig",
    "PredictConfig",
    "PrepareConfig",
    "PretrainConfig",
    "SuiteConfig",
    "ThinConfig",
    "Values",
    "VerifyConfig",
]
