"""The measures, each a plain function of answers and references. Shares are of 1, BLEU and chrF of 100."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from seqmodels.rendering import bio_spans


def accuracy(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """The share of equal pairs."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def macro_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """The mean over labels of F1, over all labels that occur in either."""
    scores = []
    for label in sorted({*predicted, *expected}):
        both = sum(p == e == label for p, e in zip(predicted, expected, strict=True))
        scores.append(_f1(both, predicted.count(label), expected.count(label)))
    return sum(scores) / len(scores)


def span_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """F1 of BIO spans as conlleval counts them: right only where kind, beginning and end are all right."""
    both = found = there = 0
    for p, e in zip(predicted, expected, strict=True):
        spans_found, spans_there = set(bio_spans(p)), set(bio_spans(e))
        both += len(spans_found & spans_there)
        found += len(spans_found)
        there += len(spans_there)
    return _f1(both, found, there)


def bleu(predicted: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = False) -> tuple[float, str]:
    """Corpus BLEU of sacrebleu, and its signature. references: one or more texts for each prediction."""
    return _corpus_score(BLEU(lowercase=lowercase), predicted, references)


def chrf(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus chrF of sacrebleu, and its signature."""
    return _corpus_score(CHRF(), predicted, references)


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
