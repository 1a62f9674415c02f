"""Suite files: what is read of one, and one sentence for everything that is wrong with one."""

import tomllib
from importlib import resources

import pytest

from scbench.errors import UserError
from scbench.evaluation.suite.file import KEYS, TASKS, DataSet, read_suite, shipped

LABELLED = '[[dataset]]\nname = "one"\ntask = "classification"\npath = "one.h5ad"\nlabel = "type"\n'
PERTURBED = '[[dataset]]\nname = "two"\ntask = "perturbation"\npath = "two.h5ad"\nperturbation_column = "c"\ncontrol = "x"\n'
COUNTED = '[[dataset]]\nname = "three"\ntask = "counts"\npath = "three.h5ad"\n'


def read(tmp_path, text: str):
    (tmp_path / "suite.toml").write_text(text, encoding="utf-8")
    return read_suite(tmp_path / "suite.toml")


def test_all_tasks_and_their_defaults(tmp_path):
    suite = read(tmp_path, 'title = "Mine"\nseeds = 2\n' + LABELLED + PERTURBED + 'context = ["line", "day"]\n' + COUNTED)
    assert (suite.title, suite.seeds, suite.folds, suite.folder) == ("Mine", 2, 5, tmp_path)
    first, second, third = suite.datasets
    assert first == DataSet("one", "classification", ("one.h5ad",), label="type")
    assert (first.values, first.protocol, first.label_origin, first.source) == ("counts", "default", "unknown", "unknown")
    assert (second.context, second.predictor, second.study) == (("line", "day"), "ridge", None)
    assert (first.split, second.split, third.split) == (None, "unseen-perturbation", None)
    assert read(tmp_path, PERTURBED + "protocol = 'aaai2025'").datasets[0].split == "unseen-cells"
    assert third.path == ("three.h5ad",)
    assert read(tmp_path, LABELLED).title == "suite"


@pytest.mark.parametrize(("text", "said"), [
    ("", "names no data set"),
    ("dataset = 3", "names no data set"),
    ("title = 3\n" + LABELLED, "title is 3: give text"),
    ("seed = 3\n" + LABELLED, "unknown key 'seed'"),
    ("seeds = 0\n" + LABELLED, "seeds is 0: give a whole number of at least 1"),
    ("folds = true\n" + LABELLED, "folds is True"),
    ("[[dataset", "is no TOML"),
    (LABELLED + LABELLED, "two data sets of task classification are called 'one'"),
    (LABELLED + LABELLED.replace('"one"', '"ONE"'), "are called 'ONE'"),
    (LABELLED.replace("name", "nome"), "data set 1 has no name"),
    (LABELLED.replace("classification", "clustering"), "task is 'clustering': choose among classification,"),
    (LABELLED + "labels = 'x'", "(one): unknown key 'labels'"),
    (LABELLED + "group = 3", "group is 3: give text"),
    (LABELLED + "group = ''", "group is '': give text"),
    (LABELLED + "values = 'log'", "values is 'log': choose among counts, log1p_counts, lognorm, as_is"),
    (LABELLED + "label_origin = 'me'", "label_origin is 'me'"),
    (LABELLED + "control = 'x'", "control is no part of the task classification"),
    (COUNTED + "label = 'x'", "label is no part of the task counts"),
    (LABELLED.replace('label = "type"', ""), "has no label: name the column of obs to predict"),
    (LABELLED + "protocol = 'aaai2025'\ngroup = 'donor'", "group is no part of the protocol aaai2025"),
    (LABELLED.replace('"one.h5ad"', "[]"), "path is []"),
    (LABELLED.replace('"one.h5ad"', '["one.h5ad", 3]'), "path is ['one.h5ad', 3]: give text, or a list of texts"),
    (LABELLED.replace('"one"', '"../one"'), "the name is that of a folder too"),
    (PERTURBED.replace("control", "# control"), "has no perturbation_column or no control"),
    (PERTURBED + "split = 'unseen'", "split is 'unseen'"),
    (PERTURBED + "predictor = 'context'", "data set 1 (two): the predictor context"),
    (PERTURBED + "split = 'unseen-context'", "needs the columns that make a context"),
    (PERTURBED + "protocol = 'aaai2025'\ncontext = 'line'", "context is no part of the protocol aaai2025"),
    (PERTURBED + "protocol = 'aaai2025'\nsplit = 'unseen-combination'", "splits by unseen-cells"),
])
def test_one_sentence_for_what_is_wrong(tmp_path, text, said):
    with pytest.raises(UserError) as refused:
        read(tmp_path, text)
    message = str(refused.value)
    assert said in message and "suite.toml" in message
    assert "\n" not in message and message.endswith(".")


def test_a_suite_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(UserError, match="aaai2025, example"):
        read_suite(tmp_path / "nothing.toml")


def test_a_reference_file_implies_its_label(tmp_path):
    assert read(tmp_path, LABELLED.replace("h5ad", "pt").replace('label = "type"', "")).datasets[0].label is None
    assert read(tmp_path, PERTURBED.replace("h5ad", "pt").replace("control", "# control")).datasets[0].control is None


def test_the_reference_suite_is_complete():
    suite = read_suite("aaai2025")
    by_task = {task: {one.name: one for one in suite.datasets if one.task == task} for task in TASKS}
    labels = {
        "Myeloid": "cell_type", "Multiple_Sclerosis": "celltype", "pancread": "Celltype", "ircolitis": "cancer_type",
        "myasthenia": "Self_defining_Celltype", "lupus": "ct_cov", "scfoundation": "unknown", "scanorama": "unknown",
        "dengue": "unknown", "leptomeningeal": "unknown", **dict.fromkeys(("adamson", "dixit", "norman"), "single_ctrl"),
    }
    assert {name: one.label for name, one in by_task["classification"].items()} == labels
    assert list(by_task["perturbation"]) == ["adamson", "dixit", "norman"]
    for one in suite.datasets:
        assert one.protocol == "aaai2025" and one.source and one.note and f"{one.name}.pt" in one.path


def test_the_example_shows_every_key():
    text = (resources.files("scbench.suites") / "example.toml").read_text(encoding="utf-8")
    shown = {key for entry in tomllib.loads(text)["dataset"] for key in entry}
    assert shown == KEYS.keys() - {"split_file"}
    assert shipped() == ["aaai2025", "example"]
