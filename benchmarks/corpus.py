"""Are there shortcuts in the corpus, and how far is it from other speech?

    python benchmarks/corpus.py data/annotations [--real real.jsonl] > corpus.json

Every figure is macro-F1 of the overall stance, cross-validated over whole settings (5 folds) with logistic
regression: on words and word pairs of speaker and text (a bag of words), of the text alone, of the speaker alone,
and on counts of the words for peace and war alone. Of each, the share of contrast groups and of same-text groups
wholly right. Then the phrases of 3 to 5 words that predict a label best, and what statistics the rows share with
the annotated speech of another file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import textstat
from scipy.stats import binomtest
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold

from stance.annotations import Statement, load_statements
from stance.labels import DEFAULT_TASKS, overall_stance

KEYWORDS = """
peace talks talk dialogue negotiate negotiations negotiation mediation mediator truce ceasefire agreement accord
compromise settlement diplomacy diplomatic table meet meeting treaty reconciliation envoy
war force military army troops strike strikes attack attacks weapons arms missiles sanctions blockade threat threaten
fight fighting bomb bombing invasion aggression punish crush destroy retaliate defend not no never nor without
""".split()
REPORTED = re.compile(r"\b(said|says|told|asked|urged|urges|warned|warns|vows|according to|called)\b", re.I)
FIRST = re.compile(r"\b(i|we|our|ours|us|my|me)\b", re.I)


def stance(statement: Statement) -> str:
    return overall_stance(statement.labels["dialogue"], statement.labels["conflict"])


def shortcuts(statements: Sequence[Statement], setting: Sequence[str]) -> dict[str, Any]:
    y = np.array([stance(s) for s in statements])
    words: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "token_pattern": r"\w+|[^\w\s]"}
    views: dict[str, tuple[Any, Callable[[Statement], str]]] = {
        "majority": (None, lambda s: s.text),
        "speaker and text, TF-IDF": (
            TfidfVectorizer(**words),
            lambda s: f"{s.speaker}: {s.context} {s.text}",
        ),
        "text alone, TF-IDF": (TfidfVectorizer(**words), lambda s: s.text),
        "speaker alone, TF-IDF": (TfidfVectorizer(**words), lambda s: s.speaker),
        "keywords alone, counts": (CountVectorizer(vocabulary=KEYWORDS), lambda s: s.text.lower()),
    }
    groups: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(statements):
        if s.group:
            groups[s.group].append(i)
    result = {}
    for name, (vectorizer, view) in views.items():
        lines = [view(s) for s in statements]
        pred = np.empty(len(y), dtype=y.dtype)
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, setting):
            if vectorizer is None:
                pred[test] = DummyClassifier().fit(train, y[train]).predict(test)
                continue
            fitted = vectorizer.fit_transform([lines[i] for i in train])
            model = LogisticRegression(C=10, max_iter=500, class_weight="balanced").fit(fitted, y[train])
            pred[test] = model.predict(vectorizer.transform([lines[i] for i in test]))
        right = pred == y
        several = [rows for rows in groups.values() if len(rows) > 1]
        same = [rows for rows in several if len({statements[i].text for i in rows}) == 1]
        in_groups = sorted(i for rows in several for i in rows)
        result[name] = {
            "macro_f1": float(f1_score(y, pred, average="macro", zero_division=0.0)),
            "macro_f1_contrast_rows": float(
                f1_score(y[in_groups], pred[in_groups], average="macro", zero_division=0.0)
            ),
            "contrast_groups_right": float(np.mean([right[rows].all() for rows in several])),
            "same_text_groups_right": float(np.mean([right[rows].all() for rows in same])),
        }
        shown = ", ".join(f"{k} {v:.3f}" for k, v in result[name].items())
        print(f"{name}: {shown}", file=sys.stderr)
    return result


def phrases(statements: Sequence[Statement], least: int = 8, top: int = 40) -> list[dict[str, Any]]:
    """Phrases of 3 to 5 words whose rows have one label far beyond its share (exact binomial test)."""
    vectorizer = CountVectorizer(ngram_range=(3, 5), binary=True, token_pattern=r"\w+", min_df=least)
    # One row a contrast group: its members share their words on purpose.
    first: dict[str, Statement] = {}
    for i, s in enumerate(statements):
        first.setdefault(s.group or str(i), s)
    kept = list(first.values())
    counts = vectorizer.fit_transform([s.text for s in kept]).tocsc()
    found = []
    for task in DEFAULT_TASKS:
        labels = np.array([s.labels[task.name] for s in kept])
        base = Counter(labels.tolist())
        for column, phrase in enumerate(vectorizer.get_feature_names_out()):
            rows = counts.indices[counts.indptr[column] : counts.indptr[column + 1]]
            for label, n in Counter(labels[rows].tolist()).items():
                share = base[label] / len(kept)
                p = binomtest(n, len(rows), share, alternative="greater").pvalue
                if p < 1e-4:
                    found.append(
                        {"phrase": str(phrase), "task": task.name, "label": label, "rows": len(rows)}
                        | {"with_label": n, "share": n / len(rows), "base": share, "p": float(p)}
                    )
    return sorted(found, key=lambda f: f["p"])[:top]


def describe(statements: Sequence[Statement]) -> dict[str, Any]:
    lengths = [len(s.text.split()) for s in statements]
    deciles = statistics.quantiles(lengths, n=10)
    share = {
        "first_person": lambda s: FIRST.search(s.text),
        "reported_speech": lambda s: REPORTED.search(s.text),
        "question": lambda s: s.text.rstrip().endswith("?"),
        "empty_speaker": lambda s: not s.speaker,
        "several_sentences": lambda s: len(re.findall(r"[.!?](?:\s|$)", s.text)) > 1,
    }
    return {
        "n": len(statements),
        "words_median": statistics.median(lengths),
        "words_10_90": [deciles[0], deciles[-1]],
        "readability_ari_median": statistics.median(
            textstat.automated_readability_index(s.text) for s in statements
        ),
        **{name: sum(bool(test(s)) for s in statements) / len(statements) for name, test in share.items()},
        "stance": {k: v / len(statements) for k, v in sorted(Counter(map(stance, statements)).items())},
    }


def vocabulary(statements: Sequence[Statement]) -> Counter[str]:
    return Counter(word for s in statements for word in re.findall(r"[a-z']+", s.text.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--real")
    options = parser.parse_args()
    statements = load_statements(options.files, DEFAULT_TASKS)
    setting = [str(s.fields["setting"]) for s in statements]
    result: dict[str, Any] = {
        "corpus": describe(statements),
        "by_register": {
            name: describe([s for s in statements if s.fields["register"] == name])
            for name in sorted({str(s.fields["register"]) for s in statements})
        },
        "phrases": phrases(statements),
        "shortcuts": shortcuts(statements, setting),
    }
    if options.real:
        real = load_statements([options.real], DEFAULT_TASKS)
        known, seen = vocabulary(statements), vocabulary(real)
        result["real"] = describe(real) | {
            "words_known": sum(n for word, n in seen.items() if word in known) / seen.total(),
            "types_known": sum(word in known for word in seen) / len(seen),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
