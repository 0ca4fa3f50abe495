"""The measures, each a plain function of answers and references. Shares are of 1, BLEU and chrF of 100."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from seqmodels.rendering import bio_spans

_SENTENCE_BLEU, _SENTENCE_CHRF = BLEU(effective_order=True), CHRF()


def accuracy(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """The share of equal pairs."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def macro_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """The mean over labels of F1, over all labels that occur in either."""
    return mean_f1(counts_by_label([{p} for p in predicted], [{e} for e in expected]))


def confusion(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, dict[str, int]]:
    """Expected label -> given label -> how often."""
    table: dict[str, Counter[str]] = {}
    for p, e in zip(predicted, expected, strict=True):
        table.setdefault(e, Counter())[p] += 1
    return {label: dict(row) for label, row in table.items()}


def counts_by_label(predicted: Sequence[set[str]], expected: Sequence[set[str]]) -> list[tuple[int, int, int]]:
    """Of each label that occurs in either: how often it is right, how often predicted, how often expected."""
    both: Counter[str] = Counter()
    for p, e in zip(predicted, expected, strict=True):
        both.update(p & e)
    found, there = (Counter(label for labels in side for label in labels) for side in (predicted, expected))
    return [(both[label], found[label], there[label]) for label in sorted({*found, *there})]


def mean_f1(counts: Sequence[tuple[int, int, int]]) -> float:
    """The mean of each label's F1; 0 where no label occurs."""
    return sum(_f1(*count) for count in counts) / max(1, len(counts))


def micro_f1(counts: Sequence[tuple[int, int, int]]) -> float:
    """F1 of all labels counted together; 0 where no label occurs."""
    return _f1(*map(sum, zip(*counts, strict=True))) if counts else 0.0


def mean_square_error(predicted: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Over all numbers (N, K), in their own units."""
    return float(np.square(np.subtract(predicted, expected)).mean())


def mean_absolute_error(predicted: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    return float(np.abs(np.subtract(predicted, expected)).mean())


def r2(predicted: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """The coefficient of determination: 1 is right everywhere, 0 as good as the mean. Of several numbers their mean."""
    residual = np.square(np.subtract(predicted, expected)).sum(axis=0)
    spread = np.square(np.subtract(expected, np.mean(expected, axis=0))).sum(axis=0)
    return float(np.mean(np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1.0), 0.0)))


def span_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """F1 of BIO spans as conlleval counts them: right only where kind, beginning and end are all right."""
    return micro_f1(list(_spans_by_kind(predicted, expected).values()))


def scores_by_kind(
    predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each kind of span, and how often it is expected, the most frequent first."""
    scores = {}
    for kind, (both, found, there) in sorted(_spans_by_kind(predicted, expected).items(), key=lambda item: -item[1][2]):
        precision, recall = both / max(1, found), both / max(1, there)
        scores[kind] = {"precision": precision, "recall": recall, "F1": _f1(both, found, there), "expected": there}
    return scores


def _spans_by_kind(
    predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]
) -> dict[str, tuple[int, int, int]]:
    """How many spans of each kind are right, predicted, expected."""
    both, found, there = Counter[str](), Counter[str](), Counter[str]()
    for p, e in zip(predicted, expected, strict=True):
        spans_found, spans_there = set(bio_spans(p)), set(bio_spans(e))
        for counter, spans in ((both, spans_found & spans_there), (found, spans_found), (there, spans_there)):
            counter.update(kind for kind, _, _ in spans)
    return {kind: (both[kind], found[kind], there[kind]) for kind in sorted({*found, *there})}


def bleu(predicted: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = False) -> tuple[float, str]:
    """Corpus BLEU of sacrebleu, and its signature. references: one or more texts for each prediction."""
    # force: texts may well end in " ."; it is said on every call otherwise, and changes nothing.
    return _corpus_score(BLEU(lowercase=lowercase, force=True), predicted, references)


def chrf(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus chrF of sacrebleu, and its signature."""
    return _corpus_score(CHRF(), predicted, references)


def sentence_bleu(text: str, references: Sequence[str]) -> float:
    """sacrebleu's BLEU of one text, of 1; orders of n-grams that the text is too short for do not count."""
    return float(_SENTENCE_BLEU.sentence_score(text, references).score) / 100


def sentence_chrf(text: str, references: Sequence[str]) -> float:
    """sacrebleu's chrF of one text, of 1."""
    return float(_SENTENCE_CHRF.sentence_score(text, references).score) / 100


def exact_match(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of predictions that are one of their references, white space at the ends aside."""
    hits = (p.strip() in {r.strip() for r in refs} for p, refs in zip(predicted, references, strict=True))
    return sum(hits) / len(predicted)


def perplexity(nll: float) -> float:
    """nll: mean nats per token."""
    return math.exp(min(nll, 700.0))  # beyond that a float has no number for it


def bits_per_character(total_nll: float, num_characters: int) -> float:
    """total_nll: nats of the whole text."""
    return total_nll / math.log(2) / num_characters


def _f1(both: int, found: int, there: int) -> float:
    return 2 * both / (found + there) if found + there else 0.0


def _corpus_score(metric: Any, predicted: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    columns: list[list[str | None]] = [list(column) for column in zip_longest(*references)]  # None: has no more
    score = metric.corpus_score(list(predicted), columns)
    return float(score.score), str(metric.get_signature())
