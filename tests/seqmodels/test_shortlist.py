"""Answers from a shortlist: those of a model to which all other tokens are forbidden."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.errors import ConfigError, ModelDirectoryError
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import save_pretrained
from seqmodels.shortlist import FILE, NONE, Shortlist
from seqmodels.stepper import Ensemble, Stepper
from seqmodels.tokenizer import EOS, Tokenizer
from tests.seqmodels.builders import make_model, make_translator

TOKENIZER = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, "word", vocab_size=20)
SIZE = TOKENIZER.vocab_size
PARAMS = (
    SearchParams(num_beams=4, num_return_sequences=4, max_new_tokens=6, logprobs=True),
    SearchParams(max_new_tokens=6),
    SearchParams(do_sample=True, num_return_sequences=3, max_new_tokens=6),
)


@pytest.mark.parametrize("params", PARAMS, ids=["beams", "greedy", "sampling"])
@pytest.mark.parametrize("kind", ["attention", "no attention", "int8", "ensemble"])
def test_a_shortlist_bans_all_other_tokens(kind: str, params: SearchParams) -> None:
    """Requests with lists of different lengths, and one without, in one batch."""
    models = [make_translator(seed, attention="none" if kind == "no attention" else "general") for seed in (0, 1)]
    stepper = Stepper(models[0], "int8" if kind == "int8" else "float32")
    model = Ensemble([stepper, Stepper(models[1])]) if kind == "ensemble" else stepper
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
        # int8: the list's own weights stay in float32. An ensemble's members each count over the list before the mean.
        if kind in ("attention", "no attention"):
            assert [h.tokens for h in some] == [h.tokens for h in alike]
            assert [h.score for h in some] == pytest.approx([h.score for h in alike], abs=1e-4)
    for request, answer in zip(requests[:-1], generate(model, requests), strict=False):
        assert request.shortlist is not None
        assert {token for h in answer for token in h.generated} <= set(request.shortlist.tolist())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    text = {"input": "text", "vocab_size": SIZE, "embedding_size": 8, "recurrent": {"hidden_size": 8}}
    decoder = {"vocab_size": SIZE, "embedding_size": 8, "recurrent": {"hidden_size": 8}}
    model = make_model(1, 2.0, architecture="generator", encoder=text, decoder=decoder)
    save_pretrained(model, tmp_path, source_tokenizer=TOKENIZER, target_tokenizer=TOKENIZER)
    return tmp_path


def test_a_pipeline_writes_from_the_list_and_what_is_forced(directory: Path) -> None:
    fox, dog = TOKENIZER.encode("fox")[0], TOKENIZER.encode("dog")[0]
    translations = torch.full((SIZE, 2), NONE, dtype=torch.int32)
    translations[fox, 0] = dog
    Shortlist(translations, torch.tensor([EOS], dtype=torch.int32)).save(directory)
    pipeline = Pipeline.from_pretrained(directory, shortlist=True)
    (answer,) = pipeline(["fox"], num_beams=2, num_return_sequences=2, max_new_tokens=5)
    assert {word for one in answer["sequences"] for word in one["text"].split()} == {"dog"}
    (answer,) = pipeline(["fox"], num_beams=2, max_new_tokens=5, force_words=["quick"])
    assert "quick" in answer["sequences"][0]["text"].split()
    assert set(answer["sequences"][0]["text"].split()) <= {"quick", "dog"}


def test_a_directory_without_a_list_says_how_to_learn_one(directory: Path) -> None:
    with pytest.raises(ConfigError, match="python -m training shortlist"):
        Pipeline.from_pretrained(directory, shortlist=True)


@pytest.mark.parametrize(
    "tensors",
    [
        {"always": torch.tensor([EOS], dtype=torch.int32)},
        {"translations": torch.zeros(SIZE, 2, dtype=torch.int32), "always": torch.tensor([EOS])},
        {"translations": torch.zeros(SIZE, 2, dtype=torch.int32), "always": torch.tensor([5], dtype=torch.int32)},
        {"translations": torch.zeros(3, 2, dtype=torch.int32), "always": torch.tensor([EOS], dtype=torch.int32)},
        {"translations": torch.full((SIZE, 2), SIZE, dtype=torch.int32), "always": torch.tensor([EOS]).int()},
        {"translations": torch.full((SIZE, 2), -2, dtype=torch.int32), "always": torch.tensor([EOS]).int()},
    ],
)
def test_a_list_of_another_model_is_refused(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / FILE)
    with pytest.raises(ModelDirectoryError, match=FILE):
        Pipeline.from_pretrained(directory, shortlist=True)


def test_a_broken_file_is_refused(directory: Path) -> None:
    (directory / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ModelDirectoryError, match=FILE):
        Pipeline.from_pretrained(directory, shortlist=True)
