"""Spellings: laid out by hand, read one word at a time, and worth something where a word is unknown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.characters import CharacterEncoder, with_spellings
from seqmodels.config import CharacterConfig, ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.models import SequenceTagger
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import load_pretrained, save_pretrained
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import make_model

TEXTS = ["the cat sat", "the dog sat", "a cat ran"]
TAGS = ["D", "N", "V"]


def tagger_fields(tokenizer: Tokenizer, **encoder: Any) -> dict[str, Any]:
    text = {"input": "text", "vocab_size": tokenizer.vocab_size, "embedding_size": 12}
    recurrent = {"hidden_size": 10, "bidirectional": True}
    characters = {"embedding_size": 8, "hidden_size": 6, "max_length": 10}
    encoder = {**text, "recurrent": recurrent, "characters": characters, **encoder}
    return {"architecture": "tagger", "labels": TAGS, "encoder": encoder}


def tagger_directory(path: Path, kind: Any = "word", **encoder: Any) -> Path:
    tokenizer = Tokenizer.train(TEXTS, kind, 300)
    model = make_model(scale=2.0, **tagger_fields(tokenizer, **encoder))
    save_pretrained(model, path, source_tokenizer=tokenizer)
    return path


def test_a_table_of_spellings_by_hand() -> None:
    # Two words: "ab" of one piece, "café" of two; five bytes, of which four are kept: the first two and the last two.
    table = with_spellings([7, 8, 9], [0, 2], ["ab", "café"], max_length=4)
    e_acute = list("é".encode())
    expected = [[7, 98, 99, 0, 0], *([i, 100, 98, e_acute[0] + 1, e_acute[1] + 1] for i in (8, 9))]
    assert table.tolist() == expected
    # Cut after the second word's first piece, which keeps its whole word's spelling.
    assert with_spellings([7, 8], [0], ["ab", "café"], max_length=4).tolist() == expected[:2]


def test_each_word_is_read_as_if_it_stood_alone() -> None:
    torch.manual_seed(0)
    encoder = CharacterEncoder(CharacterConfig(embedding_size=8, hidden_size=6, max_length=10)).eval()
    words = ["a", "tree", "antidisestablishmentarianism", "x" * 10]
    together = encoder(torch.stack([with_spellings(range(4), range(4), words, 10)[:, 1:]] * 2))
    for place, word in enumerate(words):
        spelt = (word[:5] + word[-5:] if len(word) > 10 else word).encode()
        values, _ = encoder.recurrent(encoder.embedding(torch.tensor([[byte + 1 for byte in spelt]])))
        alone = torch.cat([values[0, -1, :6], values[0, 0, 6:]])
        assert torch.allclose(together[:, place], alone.expand(2, -1), atol=1e-6)


def test_training_reads_a_word_once_and_takes_it_for_all_its_places() -> None:
    torch.manual_seed(0)
    encoder = CharacterEncoder(CharacterConfig(embedding_size=8, hidden_size=6, max_length=10))
    words = ["the", "cat", "the", "cats", "the"]
    spellings = torch.stack([with_spellings(range(5), range(5), order, 10)[:, 1:] for order in (words, words[::-1])])
    rows: list[int] = []
    encoder.recurrent.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    in_training, after = encoder.train()(spellings), encoder.eval()(spellings)
    assert rows == [3, 10]
    assert torch.allclose(in_training, after, atol=1e-6)


def test_gradients_are_the_same_bits_however_many_threads_add_them_up() -> None:
    """As many numbers as one gradient of torch's own indexing would be added up by several threads in any order."""
    torch.manual_seed(0)
    encoder = CharacterEncoder(CharacterConfig(embedding_size=8, hidden_size=64, max_length=4))
    words = ["the", "cat", "sat", "on"] * 200
    spellings = with_spellings(range(800), range(800), words, 4)[:, 1:][None]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(20):
            encoder.zero_grad()
            (encoder(spellings) * torch.linspace(0.1, 1.7, 800)[None, :, None]).sum().backward()
            found.append(
                torch.cat(
                    [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_unknown_words_are_told_apart_by_their_form(tmp_path: Path) -> None:
    spelt = Pipeline.from_pretrained(tagger_directory(tmp_path / "spelt"))
    plain = Pipeline.from_pretrained(tagger_directory(tmp_path / "plain", characters=None))
    scores = {}
    for name, pipeline in (("spelt", spelt), ("plain", plain)):
        jobs = [pipeline.prepare({"words": ["the", word, "sat"]}) for word in ("blicked", "blicking")]
        scores[name] = [answer["tags"][1]["score"] for answer in pipeline.run(jobs)]
    assert scores["spelt"][0] != scores["spelt"][1]
    assert scores["plain"][0] == scores["plain"][1], "both are <unk>"


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_an_answer_is_the_same_alone_and_in_company(tmp_path: Path, kind: str) -> None:
    pipeline = Pipeline.from_pretrained(tagger_directory(tmp_path, kind))
    assert pipeline.batch_invariant
    texts = ["the cat", "a dog ran", "Supercalifragilistic cats sat", "the", "a " * 30]
    alone = [pipeline.run([pipeline.prepare(text)])[0] for text in texts]
    assert pipeline.run([pipeline.prepare(text) for text in texts]) == alone


def test_reading_is_that_of_training_and_a_saved_model_keeps_it(tmp_path: Path) -> None:
    from training.data.examples import Codec
    from training.data.rows import Row

    loaded = load_pretrained(tagger_directory(tmp_path, "bpe"))
    codec = Codec(loaded.config, loaded.source_tokenizer, None, None, 0)
    words = ("the", "Katzenklo", "sat")
    (example,) = codec.encode([Row(words, ("D", "N", "V"))])
    job = Pipeline(loaded).prepare({"words": list(words)})
    assert isinstance(example.inputs, Tensor) and job.request.inputs is not None
    assert torch.equal(example.inputs, job.request.inputs)
    assert example.inputs.shape[1] == 11 and example.input_length == len(example.inputs) > 3


def test_padding_changes_nothing_and_gradients_reach_the_bytes() -> None:
    tokenizer = Tokenizer.train(TEXTS, "word", 300)
    model = make_model(**tagger_fields(tokenizer))
    assert isinstance(model, SequenceTagger)
    short = with_spellings([4, 5], [0, 1], ["the", "cat"], 10)
    padded = torch.zeros(2, 5, 11, dtype=torch.int64)
    padded[0, :2], padded[1] = short, with_spellings([4] * 5, range(5), ["the"] * 5, 10)
    labels = torch.tensor([[0, 1, -100, -100, -100], [0, 0, 0, 0, 0]])
    alone = model.predict(short[None], torch.tensor([2]))[0]
    together = model.predict(padded, torch.tensor([2, 5]))[0]
    assert torch.allclose(alone[0], together[0, :2], atol=1e-6)
    model(inputs=padded, labels=labels, lengths=torch.tensor([2, 5])).loss.backward()
    gradient = model.encoder.characters.embedding.weight.grad
    assert gradient is not None
    used = gradient.abs().sum(1) > 0
    assert {index - 1 for index in used.nonzero().flatten().tolist() if index} == set(b"thecat")


@pytest.mark.parametrize("architecture", ["classifier", "generator"])
def test_only_taggers_are_given_words(architecture: str) -> None:
    fields = tagger_fields(Tokenizer.train(TEXTS, "word", 300)) | {"architecture": architecture}
    if architecture == "generator":
        fields = {**fields, "labels": [], "decoder": {"vocab_size": 9}}
    with pytest.raises(ConfigError, match=r"encoder\.characters"):
        ModelConfig.parse(fields)


def test_members_that_read_spellings_otherwise_are_refused(tmp_path: Path) -> None:
    directories = [
        tagger_directory(tmp_path / str(length), characters={"max_length": length} if length else None)
        for length in (10, 6, 0)
    ]
    for other in directories[1:]:
        with pytest.raises(ConfigError, match="lengths of spellings differ"):
            Pipeline.from_pretrained([directories[0], other])
