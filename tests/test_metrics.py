"""Scores against scikit-learn and figures by hand, as ``evaluate`` metrics, and the baselines."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef

from conftest import build_tokenizer, corpus_rows
from stance.annotations import Statement, parse_statement
from stance.baselines import BASELINES, predict_baseline
from stance.dataset import label_ids
from stance.labels import (
    CONFLICT,
    DEFAULT_TASKS,
    DIALOGUE,
    NOT_ANNOTATED,
    SENTIMENT,
    STANCE_TASK,
    STANCES,
    Task,
    overall_stance,
)
from stance.metrics import evaluate_metric, f_avg, mean_macro_f1, scores, scores_of_all, stance_ids
from stance.records import Record

A, N, F = range(3)  # ids in DIALOGUE and CONFLICT: against, none, favor
MISSING = NOT_ANNOTATED

pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


# scores


@settings(deadline=None)
@given(pairs)
def test_scores_are_those_of_scikit_learn(rows):
    true, pred = map(list, zip(*rows, strict=True))
    result = scores(true, pred, DIALOGUE.labels)
    assert result["n"] == len(true)
    assert result["accuracy"] == pytest.approx(accuracy_score(true, pred))
    assert result["macro_f1"] == pytest.approx(f1_score(true, pred, average="macro", zero_division=0.0))
    assert result["mcc"] == pytest.approx(matthews_corrcoef(true, pred))
    assert result["f_avg"] == pytest.approx(
        f1_score(true, pred, labels=[F, A], average="macro", zero_division=0.0)
    )
    assert result["confusion"] == confusion_matrix(true, pred, labels=[A, N, F]).tolist()
    per_class = f1_score(true, pred, labels=[A, N, F], average=None, zero_division=0.0)
    assert [c["f1"] for c in result["per_class"].values()] == pytest.approx(per_class.tolist())
    assert list(result["per_class"]) == list(DIALOGUE.labels)


TRUE = [F, F, F, A, A, N, N, N]
PRED = [F, F, A, A, N, N, N, F]


def test_scores_by_hand():
    """favor: 2 of 3 found, 2 of 3 right. against: 1 of 2, 1 of 2. none: 2 of 3, 2 of 3."""
    result = scores(TRUE, PRED, DIALOGUE.labels)
    assert result["per_class"]["favor"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert result["per_class"]["against"] == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    )
    assert result["f_avg"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert result["accuracy"] == 5 / 8
    assert result["confusion"] == [[1, 1, 0], [0, 2, 1], [1, 0, 2]]  # true labels are rows


def test_f_avg_passes_over_none_but_not_its_confusions():
    assert f_avg([N, N, F, A], [N, N, F, A], DIALOGUE.labels) == 1
    assert f_avg([N, N, F, A], [A, F, F, A], DIALOGUE.labels) == pytest.approx(2 / 3)
    assert f_avg([N, N], [N, N], DIALOGUE.labels) == 0


@pytest.mark.parametrize("labels", [("favor", "against"), ("none", "against", "other", "favor")])
def test_f_avg_finds_its_labels_by_name(labels):
    ids = {label: i for i, label in enumerate(labels)}
    true = [ids["favor"]] * 3 + [ids["against"]]
    pred = [ids["favor"]] * 2 + [ids["against"]] * 2
    assert f_avg(true, pred, labels) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_rows_without_a_label_do_not_count():
    true, pred = [F, MISSING, A, MISSING, N], [F, A, A, F, F]
    assert scores(true, pred, DIALOGUE.labels) == scores([F, A, N], [F, A, F], DIALOGUE.labels)
    assert scores(true, pred, DIALOGUE.labels)["n"] == 3


def test_rows_without_a_label_do_not_count_for_f_avg():
    assert f_avg([F, A, MISSING], [F, A, F], DIALOGUE.labels) == 1


@pytest.mark.parametrize("true", [[], [MISSING, MISSING]])
def test_no_rows_have_no_figures(true):
    result = scores(true, [F] * len(true), DIALOGUE.labels)
    assert (result["n"], result["accuracy"], result["macro_f1"], result["mcc"]) == (0, None, None, None)
    assert result["confusion"] == [[0] * 3] * 3


def test_only_labels_that_occur_count_for_macro_f1():
    assert scores([F, A], [F, A], DIALOGUE.labels)["macro_f1"] == 1
    assert scores([F, A], [F, N], DIALOGUE.labels)["macro_f1"] == pytest.approx(1 / 3)


def test_figures_are_plain_numbers():
    result = scores(np.array(TRUE), np.array(PRED), DIALOGUE.labels)
    assert {type(v) for k, v in result.items() if k not in ("per_class", "confusion")} == {int, float}
    assert {type(v) for c in result["per_class"].values() for v in c.values()} == {int, float}
    assert {type(v) for row in result["confusion"] for v in row} == {int}
    assert "f_avg" not in scores([0, 1], [0, 1], SENTIMENT.labels)


@pytest.mark.parametrize(("true", "pred"), [([0, 1], [0]), ([[0, 1]], [[0, 1]])])
def test_shapes_must_match(true, pred):
    with pytest.raises(ValueError, match=r"must be of one shape \[rows\]"):
        scores(true, pred, DIALOGUE.labels)


# the derived stance


def test_stance_ids_follow_the_codebook_in_any_order_of_tasks():
    cells = list(itertools.product(range(3), repeat=2))
    wanted = [STANCES.index(overall_stance(DIALOGUE.labels[d], CONFLICT.labels[c])) for d, c in cells]
    ids = np.array([(s, c, d) for (d, c), s in zip(cells, itertools.cycle(range(3)), strict=False)])
    assert stance_ids(ids, (SENTIMENT, CONFLICT, DIALOGUE)).tolist() == wanted
    assert stance_ids(ids[:, [2, 1]], (DIALOGUE, CONFLICT)).tolist() == wanted


def test_the_stance_needs_both_targets():
    ids = np.array([[F, MISSING], [MISSING, A], [MISSING, MISSING], [F, N]])
    assert stance_ids(ids, (DIALOGUE, CONFLICT)).tolist() == [MISSING] * 3 + [STANCES.index("dialogue")]


def test_scores_of_all_tasks_and_the_stance():
    true = np.array([[F, A, 2], [A, F, 0], [N, N, MISSING], [F, MISSING, 1]])
    pred = np.array([[F, N, 2], [A, F, 1], [F, F, 0], [F, F, 1]])
    result = scores_of_all(true, pred, DEFAULT_TASKS)
    assert list(result) == ["dialogue", "conflict", "sentiment", "stance"]
    assert {name: r["n"] for name, r in result.items()} == {
        "dialogue": 4, "conflict": 3, "sentiment": 3, "stance": 3,
    }  # fmt: skip
    assert {name: r["accuracy"] for name, r in result.items()} == pytest.approx(
        {"dialogue": 3 / 4, "conflict": 1 / 3, "sentiment": 2 / 3, "stance": 2 / 3}
    )
    # True stances dialogue, conflict, neutral; predicted dialogue, conflict, mixed.
    assert [result["stance"]["per_class"][s]["f1"] for s in STANCES] == [1, 0, 0, 1]
    assert "stance" not in scores_of_all(true[:, :1], pred[:, :1], (DIALOGUE,))


def test_mean_macro_f1_is_over_the_tasks_with_rows():
    true = np.array([[F, A, MISSING], [A, F, MISSING]])
    pred = np.array([[F, A, 0], [A, A, 0]])
    result = scores_of_all(true, pred, DEFAULT_TASKS)
    assert mean_macro_f1(result, DEFAULT_TASKS) == pytest.approx((1 + (2 / 3 + 0) / 2) / 2)
    empty = scores_of_all(np.full((2, 3), MISSING), pred, DEFAULT_TASKS)
    assert mean_macro_f1(empty, DEFAULT_TASKS) == 0


# evaluate


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Any connection is an error."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def flat(task: Task, true: list[int], pred: list[int]) -> dict[str, float]:
    result = scores(true, pred, task.labels)
    figures = {k: result[k] for k in ("macro_f1", "accuracy", "mcc", "f_avg") if k in result}
    return figures | {f"f1_{label}": result["per_class"][label]["f1"] for label in task.labels}


@pytest.mark.parametrize("container", [list, np.array])
def test_the_metric_gives_the_scores_flat(container):
    metric = evaluate_metric(DIALOGUE)
    result = metric.compute(predictions=container(PRED), references=container(TRUE))
    assert result == pytest.approx(flat(DIALOGUE, TRUE, PRED))
    assert set(result) == {"macro_f1", "accuracy", "mcc", "f_avg", "f1_against", "f1_none", "f1_favor"}


def test_the_metric_takes_batches_and_missing_labels():
    metric = evaluate_metric(SENTIMENT)
    metric.add_batch(predictions=[0, 1], references=[0, MISSING])
    metric.add(prediction=2, reference=1)
    assert metric.compute() == pytest.approx(flat(SENTIMENT, [0, 1], [0, 2]))


def test_the_metric_bears_the_tasks_name():
    assert evaluate_metric(DIALOGUE).name == "stance_dialogue"
    assert evaluate_metric(Task("my topic", ("a", "b"))).name.startswith("stance_my")


def test_metrics_combine_under_names_of_their_own():
    import evaluate

    both = evaluate.combine({"dialogue": evaluate_metric(DIALOGUE), "tone": evaluate_metric(SENTIMENT)})
    result = both.compute(predictions=PRED, references=TRUE)
    assert result["dialogue_macro_f1"] == result["tone_macro_f1"] == pytest.approx(11 / 18)
    assert result["f1_favor"] == result["f1_positive"] == pytest.approx(2 / 3)


def test_metrics_combine_as_a_list_under_their_tasks_names():
    import evaluate

    both = evaluate.combine([evaluate_metric(DIALOGUE), evaluate_metric(SENTIMENT)], force_prefix=True)
    result = both.compute(predictions=PRED, references=TRUE)
    assert result["stance_dialogue_macro_f1"] == result["stance_sentiment_macro_f1"]
    assert "stance_dialogue_f_avg" in result
    assert "stance_sentiment_f_avg" not in result


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A stock random BERT that says favor, against or none, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = build_tokenizer(tmp_path_factory.mktemp("classifier"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.5,
        id2label=dict(enumerate(DIALOGUE.labels)), label2id={v: i for i, v in enumerate(DIALOGUE.labels)},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval(), tokenizer


def test_the_metric_works_with_evaluates_evaluator(classifier):
    """With a model: given a pipeline, evaluate 0.4.6 asks transformers 5 for a class that is gone."""
    import datasets
    from transformers import pipeline

    import evaluate

    model, tokenizer = classifier
    rows = corpus_rows(30)
    texts, true = [r["text"] for r in rows], [DIALOGUE.labels.index(r["dialogue"]) for r in rows]
    result = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=datasets.Dataset.from_dict({"text": texts, "label": true}),
        metric=evaluate_metric(DIALOGUE),
        label_mapping=model.config.label2id,
    )
    said = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(texts)
    pred = [DIALOGUE.labels.index(answer["label"]) for answer in said]
    assert len(set(pred)) > 1
    for name, value in flat(DIALOGUE, true, pred).items():
        assert result[name] == pytest.approx(value), name


# baselines


def statements_of(number: int = 120) -> list[Statement]:
    parsed = [
        parse_statement(Record("f", i, row), DEFAULT_TASKS) for i, row in enumerate(corpus_rows(number))
    ]
    return [statement for statement, _ in parsed if statement]


@pytest.fixture(scope="module")
def divided():
    rows = statements_of()
    return rows[:81], rows[81:]  # 27 cells, three times each, then 39 rows


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_beat_or_equal_the_majority(name, divided, tiny_encoder):
    train, test = divided
    true = label_ids(test, DEFAULT_TASKS)
    results = {
        n: scores_of_all(true, predict_baseline(n, train, test, DEFAULT_TASKS, tiny_encoder), DEFAULT_TASKS)
        for n in ("majority", name)
    }
    for task in (*DEFAULT_TASKS, STANCE_TASK):
        mine, majority = (results[n][task.name]["macro_f1"] for n in (name, "majority"))
        assert mine >= majority
        if name != "majority":
            assert mine > 0.6 > majority


def test_the_majority_is_the_most_frequent_label_of_each_task():
    train = [
        Statement("a", labels={"dialogue": "favor", "sentiment": "neutral"}),
        Statement("b", labels={"dialogue": "favor", "conflict": "against", "sentiment": "neutral"}),
        Statement("c", labels={"dialogue": "none", "sentiment": "positive"}),
        *[Statement("d")] * 5,
    ]
    test = [Statement("x"), Statement("y", labels={"dialogue": "none"})]
    assert predict_baseline("majority", train, test, DEFAULT_TASKS).tolist() == [[F, A, 1]] * 2


@pytest.mark.parametrize("name", BASELINES)
def test_a_task_with_one_label_is_answered_with_it(name, tiny_encoder):
    train = [Statement("war now", labels={"dialogue": "none"}), Statement("peace now", labels={})]
    test = [Statement("peace")]
    assert predict_baseline(name, train, test, (DIALOGUE,), tiny_encoder).tolist() == [[N]]


@pytest.mark.parametrize("name", BASELINES)
def test_a_task_without_annotated_rows_does_not_stop_the_others(name, divided, tiny_encoder):
    topic = Task("topic", ("war", "trade"))
    train, test = divided
    result = predict_baseline(name, train, test, (DIALOGUE, topic), tiny_encoder)
    assert (
        result[:, 0].tolist() == predict_baseline(name, train, test, (DIALOGUE,), tiny_encoder)[:, 0].tolist()
    )
    assert result.shape == (len(test), 2)


@pytest.mark.parametrize("name", BASELINES)
def test_predictions_do_not_depend_on_the_other_rows_to_predict(name, divided, tiny_encoder):
    """Nothing may be fitted on test rows, not even a scaler."""
    train, test = divided
    far = [Statement("!!! @@@ ### " * 5)] * 400
    alone = predict_baseline(name, train, test, DEFAULT_TASKS, tiny_encoder)
    among = predict_baseline(name, train, [*test, *far], DEFAULT_TASKS, tiny_encoder)
    assert among[: len(test)].tolist() == alone.tolist()


def test_baselines_read_the_speaker_too():
    """The same words by another speaker: the label hangs on who speaks."""
    train = [Statement("we will talk", speaker=s, labels={"dialogue": d}) for s, d in
             [("envoy", "favor"), ("general", "against")] * 4]  # fmt: skip
    test = [Statement("we will talk", speaker="general"), Statement("we will talk", speaker="envoy")]
    assert predict_baseline("tfidf_lr", train, test, (DIALOGUE,)).tolist() == [[A], [F]]


def test_an_unknown_baseline_is_refused(divided, tiny_encoder):
    with pytest.raises(Exception, match="tfidf_rl"):
        predict_baseline("tfidf_rl", *divided, DEFAULT_TASKS, tiny_encoder)


def test_scores_of_a_perfect_model_are_perfect():
    true = label_ids(statements_of(54), DEFAULT_TASKS)
    for result in scores_of_all(true, true, DEFAULT_TASKS).values():
        assert (result["accuracy"], result["macro_f1"]) == (1, 1)
        assert math.isclose(result["mcc"], 1)
