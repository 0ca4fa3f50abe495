"""Several model directories that answer as one: the mean of what their members say, taken by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.__main__ import main
from seqmodels.config import Average
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.ensemble import Averaged, Mean
from seqmodels.errors import ConfigError, InputError
from seqmodels.models import SequenceGenerator
from seqmodels.pipeline import Pipeline
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import load_pretrained, save_pretrained
from seqmodels.selftest import find_row_floor
from seqmodels.state import State
from seqmodels.stepper import Ensemble, Stepper
from seqmodels.tokenizer import BOS, EOS, Tokenizer
from tests.seqmodels.builders import make_model, make_translator

TOKENIZER = Tokenizer.train(["the quick brown fox jumps over the lazy dog", "0 1 2 3"] * 3, "bpe", vocab_size=270)
IDS = {TOKENIZER.token(i): i for i in range(TOKENIZER.vocab_size)}
PREPROCESSOR = Preprocessor(size=(8, 8))
AVERAGES: tuple[Average, ...] = ("probability", "logprob")
TEXTS = ["the fox", "jumps over the lazy dog " * 3, "a", "brown brown", "0 1 2 3 0 1 2"]
KINDS = ("classifier", "tagger", "translator", "language model")


def fields(kind: str, hidden_size: int = 16, **changes: Any) -> dict[str, Any]:
    stack = {"hidden_size": hidden_size}
    text = {"input": "text", "vocab_size": TOKENIZER.vocab_size, "embedding_size": 8, "recurrent": stack}
    decoder = {"vocab_size": TOKENIZER.vocab_size, "embedding_size": 8, "recurrent": stack}
    made: dict[str, dict[str, Any]] = {
        "classifier": {"architecture": "classifier", "encoder": text, "labels": ["bad", "good", "so so"]},
        "tagger": {"architecture": "tagger", "encoder": text, "labels": ["NOUN", "VERB", "X"]},
        "translator": {"architecture": "generator", "encoder": text, "decoder": {**decoder, "attention": "general"}},
        "language model": {"architecture": "generator", "decoder": decoder},
        "series": {
            "architecture": "classifier",
            "encoder": {"input": "features", "feature_size": 2, "recurrent": stack},
            "labels": ["up", "down"],
        },
        "frames": {
            "architecture": "tagger",
            "encoder": {"input": "frames", "backbone": {"image_size": [8, 8], "channels": [4]}, "recurrent": stack},
            "labels": ["l", "r"],
        },
    }
    return {**made[kind], **changes}


def save(directory: Path, kind: str, seed: int, tokenizer: Tokenizer = TOKENIZER, **changes: Any) -> Path:
    preprocessor = changes.pop("preprocessor", PREPROCESSOR)
    model = make_model(seed, 2.5, **fields(kind, 12 + 4 * seed, **changes))
    save_pretrained(model, directory, source_tokenizer=tokenizer, target_tokenizer=tokenizer, preprocessor=preprocessor)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three models of each kind, each of another size."""
    root = tmp_path_factory.mktemp("members")
    return {kind: [save(root / f"{kind} {seed}", kind, seed) for seed in range(3)] for kind in KINDS}


def mean(members: list[Tensor], average: Average) -> Tensor:
    """Of probabilities (..., C), as the definitions say."""
    stacked = torch.stack(members).double()
    if average == "probability":
        return stacked.mean(0)
    product = stacked.prod(0) ** (1 / len(members))  # the geometric mean
    return product / product.sum(-1, keepdim=True)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_classifiers_probabilities(directories: dict[str, list[Path]], average: Average) -> None:
    members = [Pipeline.from_pretrained(path)(TEXTS) for path in directories["classifier"]]
    answers = Pipeline.from_pretrained(directories["classifier"], average=average)(TEXTS)
    for answer, *own in zip(answers, *members, strict=True):
        want = mean([torch.tensor([*one["scores"].values()]) for one in own], average).tolist()
        assert [*answer["scores"].values()] == pytest.approx(want, abs=1e-6)
        assert answer["label"] == max(answer["scores"], key=answer["scores"].get)


@torch.no_grad()
@pytest.mark.parametrize("average", AVERAGES)
def test_a_taggers_probabilities(directories: dict[str, list[Path]], average: Average) -> None:
    words = ["the", "lazy", "dog", "jumps"]
    (answer,) = Pipeline.from_pretrained(directories["tagger"], average=average)([{"words": words}])
    ids, positions = TOKENIZER.encode_words(words)
    own = []
    for path in directories["tagger"]:
        model = load_pretrained(path).model
        assert not isinstance(model, SequenceGenerator)
        own.append(model.predict(torch.tensor([ids]), torch.tensor([len(ids)]))[0][0, positions].softmax(-1))
    want = mean(own, average)
    labels = fields("tagger")["labels"]
    assert [tag["label"] for tag in answer["tags"]] == [labels[int(row.argmax())] for row in want]
    assert [tag["score"] for tag in answer["tags"]] == pytest.approx(want.amax(-1).tolist(), abs=1e-6)


@torch.no_grad()
def distributions(path: Path, source: str | None, target: list[int]) -> Tensor:
    """One member's probabilities of every token after BOS and each of the targets: (T + 1, V)."""
    model = load_pretrained(path).model
    assert isinstance(model, SequenceGenerator)
    memory = None
    if source is not None:
        ids = TOKENIZER.encode_source(source)
        memory = model.encode(torch.tensor([ids]), torch.tensor([len(ids)]))
    logits, _ = model.decoder(torch.tensor([[BOS, *target]]), model.start(memory, 1), memory)
    return logits[0].softmax(-1)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["translator", "language model"])
def test_scores_of_given_texts(directories: dict[str, list[Path]], kind: str, average: Average) -> None:
    """Of each token the log of the mean, not the mean of whole texts."""
    source = "the lazy dog" if kind == "translator" else None
    pipeline, target = Pipeline.from_pretrained(directories[kind], average=average), TOKENIZER.encode("brown fox")
    (answer,) = pipeline.score([source], ["brown fox"])
    want = mean([distributions(path, source, target) for path in directories[kind]], average)
    chosen = want[torch.arange(len(target) + 1), torch.tensor([*target, EOS])].log()
    assert answer["logprobs"] == pytest.approx(chosen.tolist(), abs=1e-5)
    assert answer["score"] == pytest.approx(float(chosen.sum()), abs=1e-4)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["translator", "language model"])
def test_what_is_written_has_the_members_mean_probabilities(
    directories: dict[str, list[Path]], kind: str, average: Average
) -> None:
    source = "the lazy dog" if kind == "translator" else None
    pipeline = Pipeline.from_pretrained(directories[kind], average=average)
    job = pipeline.prepare(source, {"max_new_tokens": 6, "logprobs": True, "num_beams": 4, "num_return_sequences": 4})
    for sequence in pipeline.run([job])[0]["sequences"]:
        ids = [IDS[token] for token in sequence["tokens"]]
        before = ids[:-1] if sequence["finish_reason"] == "eos" else ids
        want = mean([distributions(path, source, before) for path in directories[kind]], average)
        chosen = want[torch.arange(len(ids)), torch.tensor(ids)].log()
        assert sequence["logprobs"] == pytest.approx(chosen.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_model_it_is_that_model(directories: dict[str, list[Path]], kind: str) -> None:
    """To the last bit, and of the same revision: a list of one is no ensemble."""
    path = directories[kind][0]
    alone, listed = Pipeline.from_pretrained(path), Pipeline.from_pretrained([path], average="logprob")
    assert (
        alone(TEXTS, **_short(kind)) == listed(TEXTS, **_short(kind))
        and alone.revision == listed.revision
        and alone.facts == listed.facts
    )


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4, "num_return_sequences": 3}, {"repetition_penalty": 1.5}, {"do_sample": True}]
)
def test_twice_the_same_model_writes_the_same(
    directories: dict[str, list[Path]], average: Average, options: dict[str, Any]
) -> None:
    """Under rules on logits too: their level, which a penalty depends on, is the members' own."""
    for kind in ("translator", "language model"):
        path, search = directories[kind][0], {"max_new_tokens": 8, "seed": 3, **options}
        once, twice = Pipeline.from_pretrained(path), Pipeline.from_pretrained([path, path], average=average)
        texts = [[[s["text"] for s in a["sequences"]] for a in one(TEXTS, **search)] for one in (once, twice)]
        assert texts[0] == texts[1]
        assert once.revision != twice.revision


def test_answers_do_not_depend_on_the_company(directories: dict[str, list[Path]]) -> None:
    for kind in KINDS:
        for average in AVERAGES:
            pipeline = Pipeline.from_pretrained(directories[kind], average=average)
            assert pipeline.facts["average"] == average and len(pipeline.facts["members"]) == 3
            if not pipeline.batch_invariant:
                pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
            assert pipeline(TEXTS, **_short(kind)) == [pipeline([text], **_short(kind))[0] for text in TEXTS]
            if kind in ("translator", "language model"):
                together = pipeline.score(TEXTS, TEXTS[::-1])
                assert together == [pipeline.score([a], [b])[0] for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]


def _short(kind: str) -> dict[str, Any]:
    return {"max_new_tokens": 6, "num_beams": 3} if kind in ("translator", "language model") else {}


def test_the_self_test_asks_every_member() -> None:
    sound, leaky = (make_model(seed, **fields("classifier")) for seed in (0, 1))
    assert not isinstance(leaky, SequenceGenerator)
    predict = leaky.predict

    def leak(inputs: Tensor, lengths: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State | None]:
        logits, after = predict(inputs, lengths, state)
        return logits * (1 + 1e-6 * len(inputs)), after

    leaky.predict = leak  # type: ignore[method-assign, assignment]
    assert find_row_floor([sound, sound]) is not None
    assert find_row_floor([sound, leaky]) is None


def test_the_revision_is_of_the_members_and_the_average(directories: dict[str, list[Path]], tmp_path: Path) -> None:
    one, two, three = directories["translator"]
    makers = [
        ([one, two], "probability"),
        ([two, one], "probability"),
        ([one, two], "logprob"),
        ([one, three], "logprob"),
    ]
    revisions = [Pipeline.from_pretrained(paths, average=average).revision for paths, average in makers]  # type: ignore[arg-type]
    assert len(set(revisions)) == 4 and all(len(revision) == 12 for revision in revisions)
    pipeline = Pipeline.from_pretrained([one, two])
    assert pipeline.revision == revisions[0]
    assert pipeline.members == (load_pretrained(one).revision, load_pretrained(two).revision)


def test_an_ensemble_goes_on_exactly_where_all_its_members_do(tmp_path: Path) -> None:
    """Attention's pooling adds up pieces in another order than all at once, whichever member has it."""
    for pooling in ("last", "attention"):
        model = make_model(scale=3.0, **fields("classifier", pooling=pooling))
        save_pretrained(model, tmp_path / pooling, source_tokenizer=TOKENIZER)
    for members, exactly in (("last", "last"), True), (("last", "attention"), False), (("attention", "last"), False):
        pipeline = Pipeline.from_pretrained([tmp_path / member for member in members])
        (first,) = pipeline.run([pipeline.prepare("the quick", return_state=True)])
        job = pipeline.prepare(" brown fox", state=first["state"])
        assert pipeline.goes_on_exactly(job, 1) == exactly


@pytest.mark.parametrize("average", AVERAGES)
def test_a_state_goes_on_and_fits_no_other_ensemble(directories: dict[str, list[Path]], average: Average) -> None:
    one, two, _ = directories["language model"]
    pipeline = Pipeline.from_pretrained([one, two], average=average)
    (whole,) = pipeline(["the"], max_new_tokens=6, min_new_tokens=6)
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    (begun,) = pipeline.run([pipeline.prepare("the", options, return_state=True)])
    state = begun["sequences"][0]["state"]
    (rest,) = pipeline.run([pipeline.prepare(None, options, state=state)])
    texts = begun["sequences"][0]["text"], rest["sequences"][0]["text"]
    assert "".join(texts) == whole["sequences"][0]["text"]
    other: Average = "logprob" if average == "probability" else "probability"
    for stranger in ([one], [two, one]):
        with pytest.raises(InputError, match="was made by a model"):
            Pipeline.from_pretrained(stranger, average=average).prepare(None, options, state=state)
    with pytest.raises(InputError, match="was made by a model"):
        Pipeline.from_pretrained([one, two], average=other).prepare(None, options, state=state)


@pytest.mark.parametrize(
    ("kind", "other", "changes", "words"),
    [
        ("classifier", "tagger", {}, r"tasks differ \(classify and tag\)"),
        ("classifier", "series", {}, r"inputs differ \(text and features\)"),
        (
            "classifier",
            "classifier",
            {"labels": ["good", "bad", "so so"]},
            r"labels differ \(bad, good, so so and good, ",
        ),
        ("translator", "language model", {}, r"tasks differ \(translate and generate\)"),
        (
            "frames",
            "frames",
            {"preprocessor": Preprocessor(size=(8, 8), mean=(0.1, 0.1, 0.1))},
            "preprocessing of pict",
        ),
    ],
)
def test_members_that_do_not_fit(tmp_path: Path, kind: str, other: str, changes: dict[str, Any], words: str) -> None:
    first, second = save(tmp_path / "first", kind, 0), save(tmp_path / "second", other, 1, **changes)
    with pytest.raises(ConfigError, match=f"first and .*second cannot answer as one: their {words}.*; give models of"):
        Pipeline.from_pretrained([first, second])


def test_members_of_other_tokens_or_steps_do_not_fit(tmp_path: Path) -> None:
    """As many tokens, but others: their numbers mean something else."""
    words = Tokenizer.train(["a jolly vixen quacks 0 1 2 3"] * 3, "bpe", vocab_size=TOKENIZER.vocab_size)
    assert words.vocab_size == TOKENIZER.vocab_size
    for kind, side in (("classifier", "source"), ("language model", "target")):
        paths = [save(tmp_path / f"{kind} {i}", kind, 0, one) for i, one in enumerate((TOKENIZER, words))]
        with pytest.raises(ConfigError, match=f"their {side} tokenizers differ .*sha256 .* and .*sha256 "):
            Pipeline.from_pretrained(paths)
    wider = fields("series", 12)["encoder"] | {"feature_size": 3}
    paths = [save(tmp_path / "two", "series", 0), save(tmp_path / "three", "series", 0, encoder=wider)]
    with pytest.raises(ConfigError, match=r"feature sizes differ \(2 and 3\)"):
        Pipeline.from_pretrained(paths)


def test_the_shortest_of_the_longest_inputs(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}", "classifier", n % 3, max_source_length=n) for n in (9, 5)]
    pipeline = Pipeline.from_pretrained(paths)
    with pytest.raises(InputError, match="takes at most 5"):
        pipeline(["the lazy dog jumps over the quick brown fox"])
    assert load_pretrained(paths[0]).config.max_source_length == 9


def test_a_shortlist_that_holds_padding_is_as_without_it() -> None:
    ensemble = Ensemble([Stepper(make_translator(seed)) for seed in range(2)])
    answers = []
    for shortlist in ([3, 5, 6], [0, 3, 5, 6]):
        request = Request(
            "a", torch.tensor([5, 6, 3]), SearchParams(max_new_tokens=3), shortlist=torch.tensor(shortlist)
        )
        answers.append(generate(ensemble, [request])[0])
    assert answers[0] == answers[1]


def test_an_ensemble_of_nobody() -> None:
    with pytest.raises(ConfigError, match="give at least one model directory"):
        Pipeline.from_pretrained([])


@pytest.mark.parametrize("average", AVERAGES)
def test_the_mean_of_one_is_itself_and_of_many_sums_to_one(average: Average) -> None:
    logprobs = torch.randn(4, 5, 7).log_softmax(-1)
    taken = Mean(average)
    taken.add(logprobs[0])
    assert torch.equal(taken.logprobs, logprobs[0])
    for one in logprobs[1:]:
        taken.add(one)
    assert torch.allclose(taken.logprobs.exp(), mean([*logprobs.exp()], average).float(), atol=1e-6)
    assert torch.allclose(taken.logprobs.exp().sum(-1), torch.ones(5), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("average", AVERAGES)
def test_the_nll_of_a_batch(directories: dict[str, list[Path]], average: Average) -> None:
    """That of scores, token by token, whether a text is read whole or in two pieces with the state carried."""
    models = [load_pretrained(path).model for path in directories["language model"]]
    target = TOKENIZER.encode("brown fox jumps")
    averaged, labels = Averaged(models, average), torch.tensor([[BOS, *target, EOS]])
    out = averaged(labels=labels, label_lengths=torch.tensor([labels.shape[1]]))
    want = mean([distributions(path, None, target) for path in directories["language model"]], average)
    nats = -want[torch.arange(len(target) + 1), labels[0, 1:]].log()
    assert int(out.num_targets) == len(target) + 1
    assert float(out.nll) == pytest.approx(float(nats.mean()), abs=1e-5)
    total, state = 0.0, None
    for piece in (labels[:, :3], labels[:, 2:]):
        out = averaged(labels=piece, label_lengths=torch.tensor([piece.shape[1]]), state=state)
        total, state = total + float(out.nll) * int(out.num_targets), out.state
    assert total == pytest.approx(float(nats.sum()), abs=1e-4)


def test_command_line(directories: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Directories, then the file; options may stand before, between and after."""
    lines = tmp_path / "lines.txt"
    lines.write_text("the fox\na dog\n")
    one, two, three = map(str, directories["translator"])
    pipeline = Pipeline.from_pretrained([one, two, three], average="logprob")
    want = pipeline(["the fox", "a dog"], num_beams=3, max_new_tokens=5)
    options = ["--average", "logprob", "--num-beams", "3", "--max-new-tokens", "5"]
    for arguments in (
        [one, two, three, str(lines), *options],
        [*options, one, two, three, str(lines)],
        [one, *options[:2], two, three, *options[2:], str(lines)],
    ):
        assert main(["generate", *arguments]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == want
    assert main(["generate", one, "--max-new-tokens", "5", str(lines)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == Pipeline.from_pretrained(one)(["the fox", "a dog"], max_new_tokens=5)
    lines.write_text('{"text": "the fox", "target": "a dog"}\n')
    assert main(["score", one, two, str(lines)]) == 0
    assert json.loads(capsys.readouterr().out) == Pipeline.from_pretrained([one, two]).score(["the fox"], ["a dog"])[0]


def test_mistakes_on_the_command_line(
    directories: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, _ = map(str, directories["translator"])
    (tmp_path / "lines.txt").write_text("the fox\n")
    file, nothing = str(tmp_path / "lines.txt"), str(tmp_path / "nothing")
    mistakes = {
        (one, nothing, file): "nothing is no directory; give model directories, then at most one file",
        (one, file, two): "lines.txt is no directory; give model directories, then",
        (one, two, nothing): "cannot read",
        (one, str(tmp_path), file): "is no model directory",
        (one, str(directories["tagger"][0]), file): "cannot answer as one: their tasks differ",
        (one, file, "--average", "logprob"): "--average is 'logprob', but one model has nothing to average",
    }
    for arguments, message in mistakes.items():
        assert main(["generate", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["generate", one, "--num-beans", "3", file])
    assert "unrecognized arguments: --num-beans" in capsys.readouterr().err
