"""Running text: contiguous streams, chunks that overlap by one, lengths that vary, a state that goes on."""

import statistics
from collections import Counter

import pytest

from seqmodels.models import build_model
from seqmodels.state import State
from seqmodels.tokenizer import BOS, PAD
from tests.training.recipes import LANGUAGE_MODEL, WORDS, recipe
from training.data.examples import Codec, Example
from training.data.generated import generate
from training.data.streams import Streams


def stream_of(num_tokens: int, rows: int, chunk: int, seed: int | None = None, vary: bool = False) -> Streams:
    tokens = [BOS, *range(10, 10 + num_tokens)]
    return Streams([Example(None, tokens, 0, len(tokens))], rows, chunk, seed, vary)


def test_streams_are_contiguous_and_chunks_overlap_by_one() -> None:
    streams = stream_of(23, rows=3, chunk=4)
    assert len(streams) == 2
    first, second = (streams.batch(0, index) for index in (0, 1))
    assert first["labels"].tolist() == [[BOS, 10, 11, 12, 13], [BOS, 18, 19, 20, 21], [BOS, 26, 27, 28, 29]]
    assert second["labels"].tolist() == [[13, 14, 15, 16, 17], [21, 22, 23, 24, 25], [29, 30, 31, 32, PAD]]
    assert first["label_lengths"].tolist() == [5, 5, 5] and second["label_lengths"].tolist() == [5, 5, 4]


@pytest.mark.parametrize("vary", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "rows", "chunk"),
    [(23, 3, 4), (100, 8, 7), (5, 4, 64), (1, 3, 3), (64, 8, 8), (25, 1, 1), (25, 2, 2), (16, 7, 4), (130, 64, 64)],
)
def test_every_token_is_a_target_once(num_tokens: int, rows: int, chunk: int, vary: bool) -> None:
    streams = stream_of(num_tokens, rows, chunk, 5, vary)
    for epoch in range(30):
        seen: Counter[int] = Counter()
        for index in range(len(streams)):
            batch = streams.batch(epoch, index)
            assert batch["labels"].shape[1] > 1
            for row, length in zip(batch["labels"].tolist(), batch["label_lengths"].tolist(), strict=True):
                seen.update(row[1:length])
        assert seen == Counter(range(10, 10 + num_tokens))


def test_lengths_of_chunks_vary_as_in_the_paper() -> None:
    """Around the given one, some about half as long, others in each epoch; and long ones count for more."""
    streams = stream_of(200_000, rows=4, chunk=70, seed=5, vary=True)
    lengths = [
        [streams.batch(epoch, index)["labels"].shape[1] - 1 for index in range(len(streams))] for epoch in (0, 1)
    ]
    assert lengths[0] != lengths[1] and lengths[0] == [
        stream_of(200_000, 4, 70, 5, vary=True).batch(0, index)["labels"].shape[1] - 1 for index in range(len(streams))
    ]
    for of_epoch in lengths:
        assert sum(of_epoch) == 50_000 and len(of_epoch) == -(-50_000 // 70)
        short = [length for length in of_epoch if length < 52]
        assert 0.02 < len(short) / len(of_epoch) < 0.09
        usual = [length for length in of_epoch if length >= 52]
        assert 69 < statistics.fmean(usual) < 74 and 4 < statistics.stdev(usual) < 6
    assert [streams.rate_scale(1, index) * 70 for index in range(len(streams))] == pytest.approx(lengths[1])
    assert stream_of(100, 4, 7, 5).rate_scale(0, 3) == 1.0


def test_chunks_with_carried_state_are_the_whole_text() -> None:
    """Loss over chunks, the state handed on, equals the loss of reading all at once."""
    rows = generate("language-model")["train"][:20]
    data = {"generated": "language-model", "tokenizer": WORDS}
    codec = Codec.train(recipe("generate", data=data, model=LANGUAGE_MODEL), rows)
    model = build_model(codec.config).eval()
    examples = codec.encode(rows)

    def total(chunk: int) -> float:
        streams, state, nll = Streams(examples, 2, chunk), None, 0.0
        for index in range(len(streams)):
            out = model(**streams.batch(0, index), state=state)
            state = State(out.state.values.detach())
            nll += float(out.nll) * int(out.num_targets)
        return nll

    assert total(5) == pytest.approx(total(10_000), rel=1e-5)
