"""Configs: strict at every depth, all problems in one report, and nothing but ConfigError."""

from __future__ import annotations

from pathlib import Path

import pytest

from stance.config import Config, load_config
from stance.errors import ConfigError
from stance.labels import DEFAULT_TASKS, Task

BASE = "output_dir: run\ndata: {files: [a.csv]}\n"


@pytest.fixture
def load(tmp_path):
    """Load a config given as text."""

    def read(text: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return read


@pytest.fixture
def problems(load):
    """The problems that a config given as text has."""

    def read(text: str, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        assert str(caught.value) == "\n".join(caught.value.problems)
        assert caught.value.exit_code == 2
        return caught.value.problems

    return read


def test_a_minimal_config_takes_every_default(load):
    config = load(BASE)
    assert config.data.files == ["a.csv"]
    assert config.task_list == DEFAULT_TASKS
    assert config.training.metric_for_best_model == "stance_macro_f1"
    assert (config.data.split.group_by, config.model.pooling) == ("setting", "mean")


def test_every_problem_is_in_one_report(problems, tmp_path):
    found = problems(
        "output_dir: 3\n"
        "data: {max_length: 4}\n"
        "modell: {}\n"
        "training: {lerning_rate: 0.1, seed: 1.5, warmup_ratio: 1.0}\n"
    )
    prefix = f"{tmp_path / 'c.yaml'}: "
    assert all(p.startswith(prefix) for p in found)
    assert sorted(p.removeprefix(prefix) for p in found) == [
        "data.files: must be given - see configs/default.yaml",
        "data.max_length: must be greater than or equal to 8; got 4",
        "modell: unknown key; did you mean 'model'?",
        "output_dir: must be a valid string; got 3",
        "training.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "training.seed: must be a valid integer; got 1.5",
        "training.warmup_ratio: must be less than 1; got 1.0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "trainig: {}\n", "trainig: unknown key; did you mean 'training'?"),
        (BASE + "model: {poling: mean}\n", "model.poling: unknown key; did you mean 'pooling'?"),
        (
            "output_dir: x\ndata: {files: [a.csv], column: {}}\n",
            "data.column: unknown key; did you mean 'columns'?",
        ),
        (
            "output_dir: x\ndata: {files: [a.csv], split: {groupby: a}}\n",
            "data.split.groupby: unknown key; did you mean 'group_by'?",
        ),
        (
            "output_dir: x\ndata: {files: [a.csv], columns: {zz: a}}\n",
            "data.columns.zz: unknown key - known keys here: id, text, speaker, context, group",
        ),
        (
            BASE + "tasks: [{name: a, labels: [x, y]}, {name: b, labels: [x, y], label: z}]\n",
            "tasks.1.label: unknown key; did you mean 'labels'?",
        ),
    ],
)
def test_unknown_keys_are_named_at_every_depth(problems, text, message):
    (problem,) = problems(text)
    assert problem.endswith(": " + message)


@pytest.mark.parametrize(
    ("written", "advised", "value"),
    [("2e-5", "2.0e-5", 2e-5), ("2E5", "2.0e+5", 2e5), ("2.5e3", "2.5e+3", 2500.0), ("1.e5", "1.0e+5", 1e5)],
)
def test_numbers_that_yaml_reads_as_text_get_the_spelling_that_works(problems, load, written, advised, value):
    (problem,) = problems(BASE + f"training: {{learning_rate: {written}}}\n")
    assert problem.endswith(f"got '{written}' - YAML reads this as text; write {advised}")
    assert load(BASE + f"training: {{learning_rate: {advised}}}\n").training.learning_rate == value


def test_other_texts_get_no_hint_about_numbers(problems):
    (problem,) = problems(BASE + "training: {learning_rate: fast}\n")
    assert problem.endswith("training.learning_rate: must be a valid number; got 'fast'")


@pytest.mark.parametrize("value", [".inf", ".nan", "0.0", "-0.1"])
@pytest.mark.parametrize("key", ["learning_rate", "num_train_epochs"])
def test_rates_and_epochs_must_be_positive_finite_numbers(problems, key, value):
    (problem,) = problems(BASE + f"training: {{{key}: {value}}}\n")
    assert f"training.{key}: must be" in problem


@pytest.mark.parametrize(
    "setting",
    ["seed: '7'", "seed: true", "use_cpu: 1", "use_cpu: 'yes'", "report_to: wandb", "save_steps: 0"],
)
def test_values_are_never_converted(problems, setting):
    (problem,) = problems(BASE + f"training: {{{setting}}}\n")
    assert f"training.{setting.split(':')[0]}: must be" in problem


def test_test_and_validation_must_leave_rows_to_train_on(problems):
    (problem,) = problems(
        "output_dir: x\ndata: {files: [a.csv], split: {test_size: 0.6, validation_size: 0.4}}\n"
    )
    assert "test_size" in problem
    assert "validation_size" in problem


def test_a_section_without_a_value_is_explained_in_the_users_terms(problems):
    """``training:`` with every key commented out is null in YAML."""
    (problem,) = problems(BASE + "training:\n")
    assert "training: must be" in problem
    assert "TrainingConfig" not in problem


# --set


def test_overrides_are_yaml_and_the_last_one_wins(load):
    config = load(
        BASE + "training: {seed: 1, use_cpu: true}\n",
        [
            "training.seed=2",
            "training.seed=3",
            "data.split.group_by=null",
            "data.split.column=a=b",
            "training.report_to=[tensorboard]",
            "model.pooling=first",
        ],
    )
    assert (config.training.seed, config.training.use_cpu) == (3, True)
    assert (config.data.split.group_by, config.data.split.column) == (None, "a=b")
    assert (config.training.report_to, config.model.pooling) == (["tensorboard"], "first")


def test_an_override_can_give_a_key_that_the_file_lacks(load):
    assert load("data: {files: [a.csv]}\n", ["output_dir=there"]).output_dir == "there"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "--set training.seed: must be key.path=value - write for example training.seed=7"),
        ("=3", "--set =3: must be key.path=value - write for example training.seed=7"),
        ("output_dir.x=3", "--set output_dir.x=3: 'output_dir' is not a section"),
        ("training.seed=[3", "--set training.seed=[3: the value is not valid YAML"),
        ("training.sed=3", "training.sed: unknown key; did you mean 'seed'?"),
        ("trainin.seed=3", "trainin: unknown key; did you mean 'training'?"),
        ("training.seed=x", "training.seed: must be a valid integer; got 'x'"),
        ("training.learning_rate=2e-5", "write 2.0e-5"),
    ],
)
def test_wrong_overrides_are_named(problems, override, message):
    (problem,) = problems(BASE, [override])
    assert message in problem


def test_every_wrong_override_is_reported(problems):
    found = problems(BASE, ["training.seed", "output_dir.x=3"])
    assert [p.split(":")[0] for p in found] == ["--set training.seed", "--set output_dir.x=3"]


def test_an_override_can_fill_an_empty_section(load):
    assert load(BASE + "training:\n", ["training.seed=7"]).training.seed == 7


# YAML


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (BASE + "output_dir: y\n", "output_dir", 3),
        (BASE + "training:\n  seed: 1\n  use_cpu: true\n  seed: 2\n", "seed", 6),
    ],
)
def test_a_key_written_twice_is_refused(problems, text, key, line):
    (problem,) = problems(text)
    assert f"key {key!r} stands twice" in problem
    assert f"line {line}," in problem


def test_one_key_in_two_sections_is_fine(load):
    assert load(BASE + "training: {seed: 1}\n").training.seed == 1
    config = load("output_dir: x\ndata: {files: [a.csv], split: {seed: 5}}\ntraining: {seed: 6}\n")
    assert (config.data.split.seed, config.training.seed) == (5, 6)


@pytest.mark.parametrize("text", ["a: [", "\tx: 1", "model: !!python/object:os.system {}", "\x01: 2"])
def test_what_is_not_yaml_is_refused(problems, text):
    (problem,) = problems(text)
    assert "not valid YAML" in problem


@pytest.mark.parametrize("key", ["[a, b]", "{a: 1}"])
def test_keys_that_are_no_names_are_refused(problems, key):
    problems(BASE + f"? {key}\n: 1\n")


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("just text\n", "str"), ("", "")])
def test_a_config_must_be_a_mapping(problems, text, kind):
    (problem,) = problems(text)
    assert f"a config must be a mapping of keys; got {kind}" in problem


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "small.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=r"smal\.yaml: no such config file; did you mean '.*small\.yaml'\?"):
        load_config(tmp_path / "smal.yaml")
    with pytest.raises(ConfigError, match=r"no such config file - give the path"):
        load_config(tmp_path / "no" / "folder.yaml")


def test_a_folder_and_a_file_in_another_encoding_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"cannot be read.*UTF-8"):
        load_config(tmp_path / "latin.yaml")


# tasks


def test_other_task_lists_are_read_and_choose_by_the_mean(load):
    config = load(BASE + "tasks: [{name: topic, labels: [war, trade]}, {name: tone, labels: [a, b, c]}]\n")
    assert config.task_list == (Task("topic", ("war", "trade")), Task("tone", ("a", "b", "c")))
    assert config.training.metric_for_best_model == "macro_f1"


def test_the_metric_must_be_one_that_the_tasks_have(problems, load):
    topic = "tasks: [{name: topic, labels: [war, trade]}]\n"
    assert load(
        BASE + topic + "training: {metric_for_best_model: topic_mcc}\n"
    ).training.metric_for_best_model == ("topic_mcc")
    (problem,) = problems(BASE + topic + "training: {metric_for_best_model: stance_macro_f1}\n")
    assert (
        "training.metric_for_best_model must be one of macro_f1, topic_macro_f1, topic_accuracy, topic_mcc; "
        "got 'stance_macro_f1'"
    ) in problem
    (problem,) = problems(BASE + "training: {metric_for_best_model: stance_macro_f}\n")
    assert "did you mean 'stance_macro_f1'?" in problem


DERIVED = (
    "tasks: [{name: dialogue, labels: [against, none, favor]}, "
    "{name: conflict, labels: [against, none, favor]}, {name: stance, labels: [a, b]}]\n"
)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("tasks: []\n", "tasks: "),
        ("tasks: [{name: a, labels: [x]}]\n", "tasks.0.labels: "),
        ("tasks: [{name: a, labels: [x, x]}]\n", "tasks.0.labels: labels must be different names"),
        ("tasks: [{name: '', labels: [x, y]}]\n", "tasks.0.name: "),
        ("tasks: [{labels: [x, y]}]\n", "tasks.0.name: must be given"),
        ("tasks: [{name: a, labels: [yes, no]}]\n", "tasks.0.labels.0: must be a valid string; got True"),
        ("tasks: [{name: a, labels: [x, y]}, {name: a, labels: [x, y]}]\n", "must have different names"),
        (DERIVED, "must not name 'stance'"),
    ],
)
def test_wrong_task_lists_are_refused(problems, tasks, message):
    assert message in problems(BASE + tasks)[0]


@pytest.mark.parametrize("name", ["text", "id", "speaker", "who"])
def test_a_task_cannot_share_a_column_with_the_statement(problems, name):
    """The cell would be read as the label and as the text, speaker or id as well."""
    text = "output_dir: x\ndata: {files: [a.csv], columns: {context: who}}\n"
    (problem,) = problems(text + f"tasks: [{{name: {name}, labels: [x, y]}}]\n")
    assert repr(name) in problem


# to_yaml


def test_to_yaml_writes_out_what_load_reads_back(load, tmp_path):
    config = load(
        "output_dir: 'é: #x'\n"
        "data: {files: ['*.jsonl', '-'], columns: {text: Äußerung}, "
        "split: {column: 'null', group_by: null}}\n"
        "tasks: [{name: topic, labels: ['no', '1']}]\n"
        "training: {learning_rate: 0.00002, classifier_learning_rate: 1.0e-9, save_steps: 3}\n"
    )
    text = config.to_yaml()
    again = load(text)
    assert again == config
    assert again.to_yaml() == text
    assert again.training.learning_rate == 2e-5
    assert "é" in text
    assert Path(tmp_path / "c.yaml").read_text(encoding="utf-8") == text


def test_to_yaml_holds_every_default(load):
    text = load(BASE).to_yaml()
    assert load(text) == load(BASE)
    for key in ("near_duplicate: 0.7", "pooling: mean", "seed: 42", "metric_for_best_model: stance_macro_f1"):
        assert key in text


def test_a_config_cannot_be_changed_after_the_check(load):
    with pytest.raises(ValueError, match="frozen"):
        load(BASE).output_dir = "elsewhere"
