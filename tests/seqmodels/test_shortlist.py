"""Answers from a shortlist: those of a model to which all other tokens are forbidden."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.errors import ConfigError, InputError, ModelDirectoryError
from seqmodels.models import SequenceGenerator
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import load_pretrained, save_pretrained
from seqmodels.selftest import find_row_floor
from seqmodels.shortlist import FILE, NONE, Shortlist
from seqmodels.stepper import Ensemble, Group, Groups, Stepper
from seqmodels.tokenizer import BOS, EOS, UNK, Tokenizer
from tests.seqmodels.builders import make_language_model, make_model, make_translator

TOKENIZER = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, "word", vocab_size=20)
SIZE = TOKENIZER.vocab_size
PARAMS = (
    SearchParams(num_beams=4, num_return_sequences=4, max_new_tokens=6, logprobs=True),
    SearchParams(max_new_tokens=6),
    SearchParams(do_sample=True, num_return_sequences=3, max_new_tokens=6),
)


@torch.no_grad()
@pytest.mark.parametrize("params", PARAMS, ids=["beams", "greedy", "sampling"])
@pytest.mark.parametrize("kind", ["attention", "no attention", "int8", "ensemble"])
def test_a_shortlist_bans_all_other_tokens(kind: str, params: SearchParams) -> None:
    """Requests with lists of different lengths, and one without, in one batch."""
    models = [make_translator(seed, attention="none" if kind == "no attention" else "general") for seed in (0, 1)]
    models = models if kind == "ensemble" else models[:1]
    steppers = [Stepper(one, "int8" if kind == "int8" else "float32") for one in models]
    model = Ensemble(steppers) if kind == "ensemble" else steppers[0]
    generator = torch.Generator().manual_seed(0)
    requests, expected = [], []
    for i, length in enumerate((5, 30, 8, 12)):
        words = torch.cat([torch.tensor([EOS]), torch.randperm(36, generator=generator)[:length] + 4]).sort().values
        source = torch.randint(0, 40, (3 + 4 * i,), generator=generator)
        requests.append(Request(str(i), source, params, shortlist=words, seed=i))
        others = tuple((token,) for token in set(range(40)) - set(words.tolist()))
        expected.append(Request(str(i), source, params, bad_words=others, seed=i))
    requests.append(Request("all", source, params, seed=9))
    expected.append(requests[-1])
    for some, alike in zip(generate(model, requests), generate(model, expected), strict=True):
        # Not int8, whose list stays in float32, nor ensembles, whose members each count over the list before the mean.
        if kind in ("attention", "no attention"):
            assert [h.tokens for h in some] == [h.tokens for h in alike]
            assert [h.score for h in some] == pytest.approx([h.score for h in alike], abs=1e-4)
    for request, answer in zip(requests[:-1], generate(model, requests), strict=False):
        assert request.shortlist is not None
        assert {token for h in answer for token in h.generated} <= set(request.shortlist.tolist())
        for hypothesis in answer:
            expected_logprobs = by_hand(models, steppers, request, hypothesis.tokens)
            assert hypothesis.logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def by_hand(
    models: Sequence[SequenceGenerator], steppers: Sequence[Stepper], request: Request, tokens: Sequence[int]
) -> list[float]:
    """The log-probability of each token given those before it: members' probabilities over the list, then their mean.

    Of steppers are the features, which int8 has in 8 bits; of models the rows of the output layer, in float32.
    """
    assert request.inputs is not None and request.shortlist is not None
    probabilities = []
    for model, stepper in zip(models, steppers, strict=True):
        memory = stepper.encode(request.inputs[None], torch.tensor([len(request.inputs)]))
        state, own = stepper.start(memory, 1), []
        for token in (BOS, *tokens[:-1]):
            groups = [Group(1, 1, memory if stepper.attends else None)]
            features, state, _ = stepper.features(torch.tensor([token]), state, groups)
            logits = model.decoder.output_matrix @ features[0] + model.decoder.output_bias
            own.append(logits[request.shortlist].softmax(0))
        probabilities.append(torch.stack(own))
    places = torch.searchsorted(request.shortlist, torch.tensor(tokens))
    mean = torch.stack(probabilities).mean(0).gather(1, places[:, None])[:, 0]
    logprobs: list[float] = mean.log().tolist()
    return logprobs


def test_a_list_that_cannot_end_a_text_is_refused() -> None:
    engine = Engine(make_translator(0))
    with pytest.raises(InputError, match=f"shortlist lacks token {EOS}"):
        engine.submit(Request("a", torch.tensor([5, 6]), SearchParams(), shortlist=torch.tensor([5, 6])))


class Leaky(Stepper):
    """Gives requests with a list other logits when they have company."""

    def logits(self, outputs: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
        logits = super().logits(outputs, groups)
        company = max((group.num_requests for group in groups if group.shortlist is not None), default=0)
        return [lane * (1 + company / 1000) for lane in logits]


def test_the_self_test_asks_for_lists() -> None:
    model = make_translator(0)
    assert find_row_floor(model, Leaky(model)) is None


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    text = {"input": "text", "vocab_size": SIZE, "embedding_size": 8, "recurrent": {"hidden_size": 8}}
    decoder = {"vocab_size": SIZE, "embedding_size": 8, "recurrent": {"hidden_size": 8}}
    model = make_model(1, 2.0, architecture="generator", encoder=text, decoder=decoder)
    save_pretrained(model, tmp_path, source_tokenizer=TOKENIZER, target_tokenizer=TOKENIZER)
    return tmp_path


FOX, DOG, QUICK = (TOKENIZER.encode(word)[0] for word in ("fox", "dog", "quick"))


def add_shortlist(directory: Path, always: Sequence[int] = (DOG, EOS)) -> None:
    """One that knows no translations."""
    shortlist = Shortlist(torch.full((SIZE, 2), NONE).int(), torch.tensor(always).int())
    shortlist.save(directory, load_pretrained(directory))


def test_a_pipeline_writes_from_the_list_and_what_is_forced(directory: Path) -> None:
    translations = torch.full((SIZE, 2), NONE, dtype=torch.int32)
    translations[FOX, 0] = QUICK
    Shortlist(translations, torch.tensor([DOG, EOS]).int()).save(directory, load_pretrained(directory))
    pipeline = Pipeline.from_pretrained(directory, shortlist=True)
    (answer,) = pipeline(["fox"], num_beams=3, num_return_sequences=3, max_new_tokens=5)
    assert {word for one in answer["sequences"] for word in one["text"].split()} == {"dog", "quick"}
    (answer,) = pipeline(["dog"], num_beams=2, num_return_sequences=2, max_new_tokens=5)
    assert {word for one in answer["sequences"] for word in one["text"].split()} == {"dog"}
    (answer,) = pipeline(["dog"], num_beams=2, max_new_tokens=5, force_words=["lazy"])
    assert "lazy" in answer["sequences"][0]["text"].split()
    assert set(answer["sequences"][0]["text"].split()) <= {"lazy", "dog"}


def test_a_directory_without_a_list_says_how_to_learn_one(directory: Path) -> None:
    with pytest.raises(ConfigError, match="python -m training shortlist"):
        Pipeline.from_pretrained(directory, shortlist=True)


def test_a_model_that_does_not_translate_has_no_use_for_one(tmp_path: Path) -> None:
    encoder = {"input": "text", "vocab_size": SIZE, "embedding_size": 8, "recurrent": {"hidden_size": 8}}
    classifier = make_model(architecture="classifier", encoder=encoder, labels=["bad", "good"])
    save_pretrained(classifier, tmp_path / "classifier", source_tokenizer=TOKENIZER)
    save_pretrained(make_language_model(vocab_size=SIZE), tmp_path / "language model", target_tokenizer=TOKENIZER)
    for name in ("classifier", "language model"):
        with pytest.raises(ConfigError, match="no use for a shortlist; leave shortlist out"):
            Pipeline.from_pretrained(tmp_path / name, shortlist=True)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers).int()


@pytest.mark.parametrize(
    "changes",
    [
        {"translations": None},
        {"always": torch.tensor([DOG, EOS])},
        {"always": int32(DOG)},
        {"always": int32(EOS)},
        {"always": int32(UNK, BOS, EOS)},  # nothing to write
        {"always": int32(EOS, DOG, SIZE)},
        {"translations": torch.zeros(3, 2).int()},
        {"translations": torch.full((SIZE, 2), SIZE).int()},
        {"translations": torch.full((SIZE, 2), -2).int()},
    ],
)
def test_a_list_that_does_not_fit_is_refused(directory: Path, changes: dict[str, Any]) -> None:
    add_shortlist(directory)
    Pipeline.from_pretrained(directory, shortlist=True)
    with safe_open(directory / FILE, "pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(directory / FILE), **changes}
    save_file({name: one for name, one in tensors.items() if one is not None}, directory / FILE, metadata)
    with pytest.raises(ModelDirectoryError, match=f"{FILE} does not fit"):
        Pipeline.from_pretrained(directory, shortlist=True)


@pytest.mark.parametrize("side", ["source_tokenizer", "target_tokenizer"])
def test_a_list_of_other_tokenizers_is_refused(directory: Path, side: str) -> None:
    """Of the same size, so that its numbers alone would fit."""
    words = Tokenizer.train([" ".join(str(n) for n in range(SIZE - 4))] * 3, "word", vocab_size=SIZE)
    assert words.vocab_size == SIZE
    pretrained = load_pretrained(directory)
    Shortlist(torch.full((SIZE, 2), NONE).int(), int32(EOS, DOG)).save(directory, replace(pretrained, **{side: words}))
    with pytest.raises(ModelDirectoryError, match="of another model; learn it again"):
        Pipeline.from_pretrained(directory, shortlist=True)


def test_a_list_that_names_no_tokenizers_is_refused(directory: Path) -> None:
    save_file({"translations": torch.full((SIZE, 2), NONE).int(), "always": int32(EOS, DOG)}, directory / FILE)
    with pytest.raises(ModelDirectoryError, match="of another model; learn it again"):
        Pipeline.from_pretrained(directory, shortlist=True)


def test_a_state_goes_on_with_the_same_list_only(directory: Path) -> None:
    add_shortlist(directory)
    plain, shortened = (Pipeline.from_pretrained(directory, shortlist=chosen) for chosen in (False, True))
    add_shortlist(directory, always=[QUICK, EOS])
    other = Pipeline.from_pretrained(directory, shortlist=True)
    options = {"max_new_tokens": 2, "min_new_tokens": 2}
    pipelines = (plain, shortened, other)
    for made in pipelines:
        (answer,) = made.run([made.prepare("fox", options, return_state=True)])
        state = answer["sequences"][0]["state"]
        for here in pipelines:
            if here is made:
                here.prepare("fox", options, state=state)
            else:
                with pytest.raises(InputError, match="shortlist"):
                    here.prepare("fox", options, state=state)


def test_a_broken_file_is_refused(directory: Path) -> None:
    (directory / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ModelDirectoryError, match=FILE):
        Pipeline.from_pretrained(directory, shortlist=True)
