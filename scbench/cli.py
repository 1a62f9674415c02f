"""The command line: one verb, one config dataclass, one function, imported only when its verb runs."""

import errno
import importlib
import json
import os
import re
import sys
import traceback

from tyro.extras import SubcommandApp

from scbench import __version__, config
from scbench.errors import UserError

VERBS = {  # config of the verb → the function that runs it
    config.PrepareConfig: "scbench.data.prepare:run_prepare",
    config.MergeConfig: "scbench.data.merge:run_merge",
    config.InfoConfig: "scbench.data.inspect:run_info",
    config.VerifyConfig: "scbench.data.inspect:run_verify",
    config.PretrainConfig: "scbench.training.pretrain:run_pretrain",
    config.EmbedConfig: "scbench.evaluation.embed:run_embed",
    config.FinetuneConfig: "scbench.evaluation.finetuning.finetune:run_finetune",
    config.PredictConfig: "scbench.evaluation.finetuning.predict:run_predict",
    config.ClassificationConfig: "scbench.evaluation.classification.benchmark:run_classification",
    config.PerturbationConfig: "scbench.evaluation.perturbation.benchmark:run_perturbation",
    config.SuiteConfig: "scbench.evaluation.suite.suite:run_suite",
    config.CountsConfig: "scbench.evaluation.counts.benchmark:run_counts",
    config.ThinConfig: "scbench.evaluation.counts.thinning:run_thin",
    config.EvaluateConfig: "scbench.evaluation.masked.evaluate:run_evaluate",
    config.DemoConfig: "scbench.evaluation.demo.demo:run_demo",
    config.CompareConfig: "scbench.evaluation.compare.compare:run_compare",
    config.PlanConfig: "scbench.training.plan:run_plan",
    config.ExportConfig: "scbench.training.export:run_export",
    config.ImportReferenceConfig: "scbench.models.import_reference:run_import_reference",
}


def parse(arguments: list[str]) -> config.Common:
    """The config of the verb that `arguments` name; exits with code 2 and a usage line if they make no sense."""
    benchmark = SubcommandApp()
    benchmark.command(config.ClassificationConfig, name="classification")
    benchmark.command(config.PerturbationConfig, name="perturbation")
    benchmark.command(config.CountsConfig, name="counts")
    benchmark.command(config.ThinConfig, name="thin")
    benchmark.command(config.SuiteConfig, name="suite")
    app = SubcommandApp()
    app.command(config.DemoConfig, name="demo")
    app.command(config.PrepareConfig, name="prepare")
    app.command(config.MergeConfig, name="merge")
    app.command(config.InfoConfig, name="info")
    app.command(config.VerifyConfig, name="verify")
    app.command(config.PretrainConfig, name="pretrain")
    app.command(config.EvaluateConfig, name="evaluate")
    app.command(config.EmbedConfig, name="embed")
    app.command(config.FinetuneConfig, name="finetune")
    app.command(config.PredictConfig, name="predict")
    app.command(benchmark, name="benchmark")
    app.command(config.CompareConfig, name="compare")
    app.command(config.PlanConfig, name="plan")
    app.command(config.ExportConfig, name="export")
    app.command(config.ImportReferenceConfig, name="import-reference")
    description = "Pretrain and benchmark foundation models of single-cell transcriptomes."
    return app.cli(prog="scbench", description=description, args=arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. Exit codes: 0 done, 1 another rank died, 2 the user's input is wrong, 75 saved in time and to be gone on
    with (training/stopping.py), 130 interrupted, 141 nobody reads the output, 143 stopped by SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and re.fullmatch(r"--local[-_]rank=\d+", arguments[0]):
        arguments = arguments[1:]  # the deepspeed launcher puts it before the verb; LOCAL_RANK says the same
    if arguments == ["--version"]:
        print(f"scbench {__version__}")
        return
    try:
        options = parse(arguments)
        module, function = VERBS[type(options)].split(":")
        result = getattr(importlib.import_module(module), function)(options)
        if options.json and os.environ.get("RANK", "0") == "0":
            print(json.dumps(result, indent=2, default=str))
    except UserError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"scbench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever read the output, `| head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush would fail again
        raise SystemExit(141) from None
    except OSError as error:  # a verb that can say more (prepare, pretrain) has said it
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS) or "--debug" in arguments:
            raise
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "a file cannot be written or read"
        place = f" ({error.filename})" if error.filename else ""
        print(f"scbench: {reason}{place}: make room or change its permissions, and run the command again.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("scbench: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run() -> None:
    """`main` as the whole life of a process: what the command `scbench` and `python -m scbench` start."""
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    if "deepspeed" in sys.modules and (code is None or isinstance(code, int)):
        # gloo's threads may still release tensors, and Python ends a thread that asks for the interpreter's lock while it
        # shuts down: now and then a finished run would abort. Everything is written: leave without shutting down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    raise SystemExit(code)
