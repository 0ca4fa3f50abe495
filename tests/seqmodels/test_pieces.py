"""Input in pieces: what classifiers and taggers say is, bit for bit, what they say of the whole; what is refused."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from seqmodels.config import Average, Pooling
from seqmodels.decoding.request import Finished, Scores
from seqmodels.decoding.saved import Maker, input_state_from_bytes, input_state_to_bytes
from seqmodels.errors import InputError, UnsupportedError
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.models import Labeller, Model, SequenceTagger
from seqmodels.pipeline import Pipeline
from seqmodels.pooling import POOLS, Attention
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import save_pretrained
from seqmodels.selftest import find_row_floor
from seqmodels.state import Memory, State
from seqmodels.tokenizer import Kind, Tokenizer
from tests.seqmodels.builders import RECURRENCES, make_model
from tests.seqmodels.conftest import CORPUS, png

MAKER = Maker(revision="1f3a", decoder_weights=None)
HEADS: dict[str, dict[str, Any]] = {
    "tagger": {"architecture": "tagger", "labels": ["a", "b", "c"]},
    "last": {"architecture": "classifier", "labels": ["a", "b", "c"], "pooling": "last"},
    "mean": {"architecture": "classifier", "labels": ["a", "b", "c"], "pooling": "mean"},
    "max": {"architecture": "classifier", "labels": ["a", "b", "c"], "pooling": "max"},
    "attention": {"architecture": "classifier", "labels": ["a", "b", "c"], "pooling": "attention"},
    "several labels": {
        "architecture": "classifier",
        "labels": ["a", "b"],
        "pooling": "mean",
        "problem_type": "multi_label_classification",
    },
    "numbers": {
        "architecture": "classifier",
        "labels": ["x", "y"],
        "pooling": "max",
        "problem_type": "regression",
        "target_mean": [3.0, -200.0],
        "target_std": [2.0, 50.0],
    },
}
FARTHEST = 5e-6  # of probabilities with attention; 1.6e-6 was the most that was found


def model_of(head: str, seed: int = 0, scale: float = 1.5, **recurrent: Any) -> Model:
    encoder = {"input": "features", "feature_size": 3, "recurrent": {"hidden_size": 13, **recurrent}}
    return make_model(seed, scale, encoder=encoder, **HEADS[head])


def forward_of(*models: Model, average: Average = "probability") -> Forward:
    floor = find_row_floor(models, average=average)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    return Forward(models, row_floor=floor, average=average)


def asked(forward: Forward, requests: Sequence[ForwardRequest]) -> dict[str, Scores]:
    for request in requests:
        forward.submit(request)
    found: dict[str, Scores] = {}
    while forward.has_work:
        for event in forward.step():
            assert isinstance(event, Finished) and isinstance(event.result, Scores)
            found[event.request_id] = event.result
    return found


def cut(choose: random.Random, inputs: Any, longest: int = 20) -> list[Any]:
    pieces = []
    while len(inputs):
        length = choose.randint(1, longest)
        pieces.append(inputs[:length])
        inputs = inputs[length:]
    return pieces


def in_pieces(
    forward: Forward, inputs: dict[str, list[Tensor]], company: Sequence[ForwardRequest] = ()
) -> dict[str, list[Scores]]:
    """What is said of each input's pieces: the first pieces of all in one batch, then the second, and so on, each with
    the state that came as bytes from the one before; together with the company, which has none."""
    width, states, found = forward.start().width, dict[str, State](), {name: list[Scores]() for name in inputs}
    for turn in range(max(map(len, inputs.values()))):
        requests = [
            ForwardRequest(name, pieces[turn], state=states.get(name), return_state=True)
            for name, pieces in inputs.items()
            if turn < len(pieces)
        ]
        answers = asked(forward, [*requests, *company])
        for request in requests:
            answer = answers[request.id]
            assert answer.state is not None and answer.state.values.shape == (1, width)
            states[request.id] = input_state_from_bytes(input_state_to_bytes(answer.state, MAKER), MAKER, width)
            found[request.id].append(answer)
        for request in company:
            assert answers[request.id].state is None
    return found


def check(head: str, *models: Model, average: Average = "probability", farthest: float = 0.0) -> None:
    """After each piece of inputs cut at random: what is said, and the state, are those of all pieces at once."""
    forward, choose = forward_of(*models, average=average), random.Random(0)
    inputs = {str(n): torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 13, 29, 50)}
    pieces = {name: cut(choose, whole) for name, whole in inputs.items()}
    company = [ForwardRequest(f"whole {name}", whole) for name, whole in inputs.items()]
    together = in_pieces(forward, pieces, company)
    for name, whole in inputs.items():
        read = 0
        for one, other, piece in zip(
            in_pieces(forward, {name: pieces[name]})[name], together[name], pieces[name], strict=True
        ):
            read += len(piece)
            assert equal(one, other)
            (so_far,) = asked(forward, [ForwardRequest(name, whole[:read], return_state=True)]).values()
            (stateless,) = asked(forward, [ForwardRequest(name, whole[:read])]).values()
            assert torch.equal(stateless.values, so_far.values)
            if head == "tagger":
                so_far = replace(so_far, values=so_far.values[read - len(piece) :])
            assert equal(one, so_far) if farthest == 0 else near(one, so_far, farthest)


def equal(one: Scores, other: Scores) -> bool:
    assert one.state and other.state
    return torch.equal(one.values, other.values) and torch.equal(one.state.values, other.state.values)


def near(one: Scores, other: Scores, farthest: float) -> bool:
    return bool((one.values - other.values).abs().max() <= farthest)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", RECURRENCES)
@pytest.mark.parametrize("head", ["tagger", "mean"])
def test_pieces_equal_the_whole(head: str, kind: str, num_layers: int) -> None:
    check(head, model_of(head, num_layers=num_layers, residual=num_layers > 1, **RECURRENCES[kind]))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("head", [name for name in HEADS if name not in ("tagger", "mean", "attention")])
def test_so_do_other_answers(head: str, cell: str) -> None:
    check(head, model_of(head, cell=cell))


@pytest.mark.parametrize("kind", RECURRENCES)
def test_with_attention_they_are_as_near_as_it_says(kind: str) -> None:
    """How the pieces are weighed against each other depends on where they end, in the last bits."""
    check("attention", model_of("attention", scale=2.5, **RECURRENCES[kind]), farthest=FARTHEST)


@pytest.mark.parametrize("average", get_args(Average))
@pytest.mark.parametrize("head", ["tagger", "mean", "several labels", "numbers"])
def test_members_of_an_ensemble_go_on_side_by_side(head: str, average: Average) -> None:
    """Of other cells and sizes, so that a member that got another's columns would say something else."""
    members = [model_of(head, seed, cell=cell) for seed, cell in enumerate(("gru", "lstm", "rnn_tanh"))]
    check(head, *members, average=average)


@pytest.mark.parametrize("pooling", POOLS)
def test_pooling_by_its_definition(pooling: Pooling) -> None:
    """Of all steps, in two pieces, whatever stands in the padding."""
    torch.manual_seed(0)
    values, pool = torch.randn(6, 11, 4), POOLS[pooling](4)
    lengths = torch.tensor([[1, 1], [5, 6], [3, 2], [5, 1], [1, 6], [4, 4]])  # of both pieces
    carried, features = pool.start(6), torch.empty(0)
    for piece, start in ((0, 0), (1, 5)):
        mask = torch.arange(11 - 5) < lengths[:, piece, None]
        steps = values[:, start : start + 6].masked_fill(~mask[:, :, None], 1e4)
        ends = values[torch.arange(6), start + lengths[:, piece] - 1]
        features, carried = pool(Memory(steps, mask, ends), carried)
    for row, (first, second) in enumerate(lengths.tolist()):
        real = torch.cat([values[row, :first], values[row, 5 : 5 + second]])
        weights = (real @ pool.weight[0] + pool.bias).softmax(0) if isinstance(pool, Attention) else real.new_zeros(0)
        expected = {
            "last": lambda real=real: real[-1],
            "max": lambda real=real: real.amax(0),
            "mean": lambda real=real: real.mean(0),
            "attention": lambda real=real, weights=weights: weights @ real,
        }[pooling]()
        assert torch.allclose(features[row], expected, atol=1e-6)


@pytest.mark.parametrize("size", [8, 13, 37])
@pytest.mark.parametrize("pooling", POOLS)
def test_what_pooling_says_of_a_row_does_not_depend_on_its_neighbours(pooling: Pooling, size: int) -> None:
    torch.manual_seed(0)
    pool, memory = POOLS[pooling](size), Memory(torch.randn(33, 12, size), torch.rand(33, 12) < 0.7, torch.ones(33, 1))
    memory.mask[:, 0] = True
    together, before = pool(memory, pool.start(33)), pool.start(5)
    for first in (0, 3, 28):
        features, after = pool(memory.select(torch.arange(first, first + 5)), before)
        assert torch.equal(features, together[0][first : first + 5])
        assert torch.equal(after, together[1][first : first + 5])


def pipeline_of(directory: Path, head: str, tokenizer: Tokenizer | None = None, **encoder: Any) -> Pipeline:
    size = {"vocab_size": tokenizer.vocab_size, "embedding_size": 8} if tokenizer else {}
    fields = {"encoder": {"recurrent": {"hidden_size": 16}, **size, **encoder}, "max_source_length": 40, **HEADS[head]}
    save_pretrained(
        make_model(1, 2.0, **fields), directory, source_tokenizer=tokenizer, preprocessor=Preprocessor(size=(8, 8))
    )
    pipeline = Pipeline.from_pretrained(directory)
    if not pipeline.batch_invariant:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    return pipeline


def say(pipeline: Pipeline, pieces: Sequence[Any]) -> list[dict[str, Any]]:
    """The answer to each piece, given the state of the one before."""
    answers: list[dict[str, Any]] = []
    for piece in pieces:
        state = answers[-1]["state"] if answers else None
        answers += pipeline.run([pipeline.prepare(piece, state=state, return_state=True)])
    return answers


def labels(answers: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(tag["label"], tag["score"]) for answer in answers for tag in answer["tags"]]


TEXT = "the quick brown  fox jumps over\nthe lazy dog, Ein Hund läuft 🙂 "


@pytest.mark.parametrize("head", ["mean", "several labels", "numbers"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_texts_joined_as_they_are_make_the_whole(tmp_path: Path, kind: Kind, head: str) -> None:
    """Cut anywhere where a token is a character or a byte, even into spaces alone; elsewhere in front of a space."""
    pipeline = pipeline_of(tmp_path / "model", head, Tokenizer.train(CORPUS * 3, kind, vocab_size=320), input="text")
    text = TEXT[:31]
    places = range(1, 31) if kind in ("byte", "character") else (3, 9, 15, 20, 26)
    choose = random.Random(0)
    for _ in range(20):
        cuts = sorted(choose.sample(places, 3))
        pieces = [text[start:end] for start, end in pairwise([0, *cuts, 31])]
        *_, last = say(pipeline, pieces)
        (whole,) = say(pipeline, [text])
        assert last == whole
    assert say(pipeline, pieces)[0] != whole


def test_a_tagger_goes_on_with_words(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(CORPUS * 3, "bpe", vocab_size=320)
    encoder = {"input": "text", "characters": {"embedding_size": 4, "hidden_size": 4}}
    pipeline = pipeline_of(tmp_path / "model", "tagger", tokenizer, **encoder)
    words = TEXT.replace(",", "").split()
    choose, whole = random.Random(0), labels(say(pipeline, [{"words": words}]))
    for _ in range(20):
        assert labels(say(pipeline, [{"words": piece} for piece in cut(choose, words, 4)])) == whole
    answers = say(pipeline, [" ".join(words[:4]), " ".join(words[4:])])
    assert labels(answers) == whole and answers[1]["tags"][0]["start"] == 0  # offsets count in the piece


def test_frames_and_steps_go_on(tmp_path: Path) -> None:
    pipeline = pipeline_of(
        tmp_path / "frames", "tagger", input="frames", backbone={"image_size": [8, 8], "channels": [4]}
    )
    frames, choose = [png(size=(8, 8 + n)) for n in range(9)], random.Random(0)
    whole = labels(say(pipeline, [{"frames": frames}]))
    for _ in range(5):
        assert labels(say(pipeline, [{"frames": piece} for piece in cut(choose, frames, 4)])) == whole
    pipeline = pipeline_of(tmp_path / "steps", "mean", input="features", feature_size=2)
    steps = torch.randn(200, 2).tolist()
    *_, last = say(pipeline, [{"features": piece} for piece in cut(choose, steps, 30)])
    *_, again = say(pipeline, [{"features": piece} for piece in cut(choose, steps, 30)])
    assert last == again  # of an input longer than max_source_length
    with pytest.raises(InputError, match="41 positions"):
        pipeline.prepare({"features": steps[:41]}, return_state=True)


def test_no_state_unless_asked_for(pipelines: dict[str, Pipeline]) -> None:
    for name in ("classifier", "tagger"):
        pipeline = pipelines[name]
        (asked_for,) = say(pipeline, ["the fox"])
        (plain,) = pipeline(["the fox"])
        assert plain == {key: value for key, value in asked_for.items() if key != "state"} != asked_for
        job = pipeline.prepare("jumps", state=asked_for["state"])
        assert "state" not in pipeline.run([job])[0]


REFUSED: dict[str, dict[str, Any]] = {
    "bidirectional": {"architecture": "tagger", "recurrent": {"hidden_size": 8, "bidirectional": True}},
    "CRF": {"architecture": "tagger", "recurrent": {"hidden_size": 8}, "crf": True},
    "image": {"architecture": "classifier"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_reads_the_whole_refuses_pieces(tmp_path: Path, reason: str) -> None:
    fields = dict(REFUSED[reason])
    encoder: dict[str, Any] = {"input": "features", "feature_size": 2, "recurrent": fields.pop("recurrent", {})}
    item: dict[str, Any] = {"features": [[1.0, 2.0]]}
    if reason == "image":
        encoder, item = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [4]}}, {"image": png()}
    model = make_model(0, encoder=encoder, labels=["a", "b"], **fields)
    save_pretrained(model, tmp_path / "model", preprocessor=Preprocessor(size=(8, 8)))
    pipeline = Pipeline.from_pretrained(tmp_path / "model")
    assert pipeline.run([pipeline.prepare(item)])
    for name, option in {"state": b"", "return_state": True}.items():
        with pytest.raises(InputError, match=f"{name} is for input .*{reason}.*; send the whole input") as error:
            pipeline.prepare(item, **{name: option})  # type: ignore[arg-type]
        assert (error.value.param, error.value.code) == (name, "state_not_supported")
    assert isinstance(model, Labeller)
    with pytest.raises(UnsupportedError, match=reason):
        model.start(1)
    with pytest.raises(UnsupportedError, match=reason):
        model.predict(torch.zeros(4, 3, 2), torch.full((4,), 3), State(torch.zeros(4, 16)))


def test_one_member_that_reads_the_whole_is_enough_to_refuse(tmp_path: Path) -> None:
    for name, both in (("one", False), ("two", True)):
        encoder = {"input": "features", "feature_size": 2, "recurrent": {"hidden_size": 8, "bidirectional": both}}
        save_pretrained(make_model(0, encoder=encoder, **HEADS["tagger"]), tmp_path / name)
    pipeline = Pipeline.from_pretrained([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(InputError, match="bidirectional"):
        pipeline.prepare({"features": [[1.0, 2.0]]}, return_state=True)


def test_states_of_others_are_refused(pipelines: dict[str, Pipeline], tmp_path: Path) -> None:
    states = {name: say(pipelines[name], ["the fox"])[0]["state"] for name in ("classifier", "tagger")}
    written = pipelines["language model"].prepare("the fox", return_state=True)
    states["language model"] = pipelines["language model"].run([written])[0]["sequences"][0]["state"]
    for name, pipeline in pipelines.items():
        for maker, state in states.items():
            if name in states and maker != name:
                with pytest.raises(InputError, match=r"was made by a model .* but this one is .*; go on with") as error:
                    pipeline.prepare("a", state=state)
                assert error.value.param == "state"
    with pytest.raises(InputError, match=r"that answers with labels, but this one is .* in float32"):
        pipelines["language model"].prepare("a", state=states["tagger"])
    with pytest.raises(InputError, match="num_beams is an option of generators"):
        pipelines["tagger"].prepare("a", {"num_beams": 2}, state=states["tagger"])
    save_pretrained(make_model(1, **HEADS["tagger"], encoder={"input": "features", "feature_size": 1}), tmp_path / "m")
    lone = Pipeline.from_pretrained(tmp_path / "m", decoder_weights="int8")  # which has nothing to do with labels
    state = say(lone, [{"features": [[1.0]]}])[0]["state"]
    assert say(Pipeline.from_pretrained(tmp_path / "m"), [{"features": [[1.0]]}])[0]["state"] == state


def test_bytes_that_are_no_state_are_refused() -> None:
    state = State(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)))
    data, choose = input_state_to_bytes(state, MAKER), random.Random(0)
    assert torch.equal(input_state_from_bytes(data, MAKER, 8).values, state.values)
    with pytest.raises(InputError, match="9 finite numbers"):
        input_state_from_bytes(data, MAKER, 9)
    with pytest.raises(InputError, match="8 finite numbers"):
        input_state_from_bytes(input_state_to_bytes(State(state.values / 0), MAKER), MAKER, 8)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(data)
        damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        try:
            assert torch.equal(input_state_from_bytes(bytes(damaged), MAKER, 8).values, state.values)
        except InputError as error:
            assert error.param == "state"
            refused += 1
    assert refused > 900


def test_a_state_of_numbers_that_are_none_is_not_given(tmp_path: Path) -> None:
    """An answer may be finite where the state no longer is."""
    pipeline = pipeline_of(tmp_path / "model", "last", input="features", feature_size=2)
    job = pipeline.prepare({"features": [[1.0, 2.0]]}, return_state=True)
    result = Scores(torch.tensor([0.5, 0.25, 0.25]), State(torch.tensor([[1.0, float("nan")]])))
    with pytest.raises(InputError, match="not finite"):
        pipeline.render(job, result)


def test_the_self_test_asks_for_states() -> None:
    """A model whose state depends on its neighbours, though no answer does."""
    model = model_of("tagger")
    assert isinstance(model, SequenceTagger) and find_row_floor(model) is not None
    predict = model.predict

    def leak(inputs: Tensor, lengths: Tensor | None = None, state: State | None = None, labelled: Any = None) -> Any:
        values, after = predict(inputs, lengths, state, labelled)
        return values, after and State(after.values + 1e-6 * len(inputs))

    model.predict = leak  # type: ignore[method-assign]
    assert find_row_floor(model) is None
