"""The standard captioning evaluation (Chen et al. 2015): BLEU-1 to 4, ROUGE-L, CIDEr and CIDEr-D of tokens.

Equal to the COCO evaluation's code where that departs from the papers: CIDEr-D's penalty compares numbers of bigrams,
ROUGE-L weighs recall by 1.2 squared, BLEU has no smoothing to speak of. What is called CIDEr there is CIDEr-D here.

Its tokenizer is that of the Penn Treebank, in Java, less punctuation. `tokens` is alike on captions: lower case, words
of letters, digits and what stands between them ("t-shirt", "3.5"), clitics apart ("dog 's", "do n't"), no punctuation.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

ORDERS = range(1, 5)
TINY, SMALL = 1e-15, 1e-9  # of the evaluation's BLEU, against division by 0
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0

Tokens = Sequence[str]
NGram = tuple[str, ...]
T = TypeVar("T")

_WORD = re.compile(r"\w+(?:[-.,/&]\w+)*", re.UNICODE)
_CLITIC = re.compile(r"(?<=\w)('s|'re|'ve|'ll|'d|'m|n't)\b")


def tokens(text: str) -> list[str]:
    """What the measures below compare."""
    found: list[str] = []
    for word in _CLITIC.sub(r" \1", text.lower().replace("’", "'")).split():
        found += [word] if re.fullmatch(r"'\w+|n't", word) else _WORD.findall(word)
    return found


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al. 2002), of 100; of several references the nearest in length, and
    of equally near ones the shorter."""
    right, given, length, wanted = [0] * 4, [0] * 4, 0, 0
    for candidate, ours in zip(candidates, references, strict=True):
        length += len(candidate)
        wanted += min((abs(len(one) - len(candidate)), len(one)) for one in ours)[1]
        most = _joined([_counts(one) for one in ours])
        for ngram, count in _counts(candidate).items():
            right[len(ngram) - 1] += min(count, most[ngram])
            given[len(ngram) - 1] += count
    brevity = min(1.0, math.exp(1 - wanted / max(length, TINY)))
    product, scores = 1.0, []
    for order in ORDERS:
        product *= (right[order - 1] + TINY) / (given[order - 1] + SMALL)
        scores.append(100 * brevity * product ** (1 / order))
    return scores


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """The mean of ROUGE-L (Lin 2004), of 100: F of the best precision and the best recall over the references."""
    return 100 * _mean([_rouge_l(one, ours) for one, ours in zip(candidates, references, strict=True)])


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr (Vedantam et al. 2015), as it is reported: a hundred times what the evaluation's code gives."""
    return 100 * _mean(Cider(references, is_d=False).scores(candidates, references))


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D, the same with counts clipped and lengths compared."""
    return 100 * _mean(Cider(references).scores(candidates, references))


class Cider:
    """CIDEr-D, or CIDEr, with the weights of n-grams by how many of the corpus's pictures they describe."""

    def __init__(self, corpus: Sequence[Sequence[Tokens]], is_d: bool = True) -> None:
        """corpus: the references of each picture."""
        self._is_d = is_d
        self._log_pictures = math.log(max(1, len(corpus)))
        self._pictures = Counter(ngram for ours in corpus for ngram in _joined([_counts(one) for one in ours]))

    def scores(self, candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
        """Of each candidate, as the evaluation's code gives it: 10 is as alike as can be."""
        return [self.score(one, ours) for one, ours in zip(candidates, references, strict=True)]

    def score(self, candidate: Tokens, references: Sequence[Tokens]) -> float:
        mine = self._vectors(candidate)
        return 10 * _mean([self._alike(mine, len(candidate), self._vectors(one), len(one)) for one in references])

    def _vectors(self, text: Tokens) -> list[dict[NGram, float]]:
        """TF-IDF by order of n-grams."""
        vectors: list[dict[NGram, float]] = [{} for _ in ORDERS]
        for ngram, count in _counts(text).items():
            weight = self._log_pictures - math.log(max(1, self._pictures[ngram]))
            vectors[len(ngram) - 1][ngram] = count * weight
        return vectors

    def _alike(
        self, mine: list[dict[NGram, float]], length: int, other: list[dict[NGram, float]], other_length: int
    ) -> float:
        penalty = 1.0
        if self._is_d:
            bigrams, other_bigrams = max(0, length - 1), max(0, other_length - 1)
            penalty = math.exp(-((bigrams - other_bigrams) ** 2) / (2 * CIDER_SIGMA**2))
        return penalty * _mean([self._cosine(a, b) for a, b in zip(mine, other, strict=True)])

    def _cosine(self, mine: dict[NGram, float], other: dict[NGram, float]) -> float:
        norm = _norm(mine) * _norm(other)
        if not norm:
            return 0.0
        shared = ((weight, other[ngram]) for ngram, weight in mine.items() if ngram in other)
        return sum((min(a, b) if self._is_d else a) * b for a, b in shared) / norm


def _counts(text: Tokens) -> Counter[NGram]:
    """Of all n-grams of up to four tokens."""
    return Counter(tuple(text[place : place + order]) for order in ORDERS for place in range(len(text) - order + 1))


def _joined(counters: Sequence[Counter[NGram]]) -> Counter[NGram]:
    """The largest count of each n-gram."""
    joined: Counter[NGram] = Counter()
    for counter in counters:
        joined |= counter
    return joined


def _rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    lengths = [_common(candidate, one) for one in references]
    precision = max(length / max(1, len(candidate)) for length in lengths)
    recall = max(length / max(1, len(one)) for length, one in zip(lengths, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common(one: Tokens, other: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        before = 0  # of the row above, one place to the left
        for place, against in enumerate(other, start=1):
            above = row[place]
            row[place] = before + 1 if token == against else max(above, row[place - 1])
            before = above
    return row[-1]


def _norm(vector: dict[NGram, float]) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
