"""A model directory: what is saved comes back, and a wrong one is refused with a reason."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqmodels.decoding.params import SearchParams
from seqmodels.errors import ModelDirectoryError
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import load_pretrained, save_pretrained
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import RECURRENCES, make_model

SOURCE = Tokenizer.train(["a dog runs", "two cats sleep"], "word", vocab_size=20)
TARGET = Tokenizer.train(["ein hund läuft", "zwei katzen schlafen"], "word", vocab_size=20)
PICTURE = {"image_size": [8, 8], "channels": [4]}


def save(directory: Path, kind: str = "translator") -> torch.nn.Module:
    stack = {"hidden_size": 8}
    text = {"input": "text", "vocab_size": SOURCE.vocab_size, "embedding_size": 4, "recurrent": stack}
    decoder = {"vocab_size": TARGET.vocab_size, "embedding_size": 4, "recurrent": stack, "attention": "general"}
    fields = {
        "translator": {"architecture": "generator", "encoder": text, "decoder": decoder},
        "language model": {"architecture": "generator", "decoder": {**decoder, "attention": "none"}},
        "tagger": {"architecture": "tagger", "encoder": text, "labels": ["a", "b"]},
        "captioner": {
            "architecture": "generator",
            "encoder": {"input": "image", "backbone": PICTURE},
            "decoder": decoder,
        },
    }[kind]
    model = make_model(**fields)
    save_pretrained(
        model,
        directory,
        source_tokenizer=SOURCE,
        target_tokenizer=TARGET,
        preprocessor=Preprocessor(size=(8, 8)) if kind == "captioner" else None,
        generation=SearchParams(num_beams=3),
        card="# A test model\n",
    )
    return model


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """And so the same revision, and the same end of a run that was killed and one that was not."""
    model = make_model(architecture="classifier", encoder={"input": "features", "feature_size": 1}, labels=["a", "b"])
    files = set()
    for _ in range(8):
        save_pretrained(model, tmp_path)
        files.add((tmp_path / "model.safetensors").read_bytes())
    (file,) = files
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert (8 + int.from_bytes(file[:8], "little")) % 8 == 0


@pytest.mark.parametrize("kind", RECURRENCES)
def test_each_kind_of_recurrence_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    recurrent = {**RECURRENCES[kind], "hidden_size": 8, "num_layers": 2}
    decoder = {"vocab_size": TARGET.vocab_size, "embedding_size": 4, "recurrent": recurrent}
    model = make_model(architecture="generator", decoder=decoder, scale=1.5)
    save_pretrained(model, tmp_path, target_tokenizer=TARGET)
    loaded, labels, lengths = load_pretrained(tmp_path), torch.randint(0, 6, (4, 5)), torch.full((4,), 5)
    assert loaded.config == model.config
    assert torch.equal(loaded.model.logprobs(labels, lengths), model.logprobs(labels, lengths))  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("kind", ["translator", "language model", "tagger", "captioner"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = save(tmp_path, kind)
    loaded = load_pretrained(tmp_path)
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    if kind != "tagger":
        assert loaded.generation.num_beams == 3
        assert loaded.target_tokenizer and loaded.target_tokenizer.vocab_size == TARGET.vocab_size
    if kind == "translator":
        inputs, labels = torch.randint(0, 6, (4, 5)), torch.randint(0, 6, (4, 5))
        five = torch.full((4,), 5)
        assert torch.equal(
            loaded.model.logprobs(labels, five, inputs, five), model.logprobs(labels, five, inputs, five)
        )  # type: ignore[union-attr, operator]
    assert (tmp_path / "README.md").read_text() == "# A test model\n"
    assert not list(tmp_path.glob(".*"))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # whoever may read the config may read the weights
    assert load_pretrained(tmp_path).revision == loaded.revision


def edit_config(**fields: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **fields}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")

    return edit


def flip_one_bit_of_a_weight(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-4] ^= 1  # the lowest bit of the last weight's mantissa, so that it stays finite
    (directory / "model.safetensors").write_bytes(content)


def edit_tokenizer(**fields: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "target_tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None  # type: ignore[return-value]


NAME = "decoder.bridge.bias"
HUGE = {"vocab_size": 2_000_000_000, "embedding_size": 100_000}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (write("config.json", b"{"), "config.json: Invalid JSON"),
        (write("config.json", b"\xff\xfe"), "config.json"),
        (edit_config(colour="red"), "config.json: colour: Extra inputs are not permitted"),
        (edit_config(format_version=2), "config.json: format_version"),
        (edit_config(architecture="transformer"), "config.json: architecture"),
        (edit_config(decoder=HUGE), "model.safetensors"),
        (edit_config(decoder={**HUGE, "embedding_size": 10**30}), "config.json asks for a size"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: [(d / "config.json").unlink(), (d / "recipe.yaml").touch()], "was interrupted here"),
        (flip_one_bit_of_a_weight, "model.safetensors does not match its own checksum"),
        (write("model.safetensors", b""), "model.safetensors is cut short"),
        (write("model.safetensors", b"\xff" * 100), "model.safetensors is cut short"),
        (write("model.safetensors", pickle.dumps({"a": 1})), "model.safetensors is cut short"),
        (edit_weights(lambda w: w.pop(NAME)), f"lacks '{NAME}'"),
        (edit_weights(lambda w: w.update(evil=torch.zeros(1))), "holds 'evil'"),
        (edit_weights(lambda w: w.update({NAME: torch.zeros(3)})), rf"'{NAME}' has shape \(3,\), but"),
        (edit_weights(lambda w: w.update({NAME: w[NAME].double()})), f"'{NAME}' is of torch.float64"),
        (edit_weights(lambda w: w[NAME].fill_(float("nan"))), f"'{NAME}' holds NaN or infinity"),
        (lambda d: (d / "source_tokenizer.json").unlink(), "source_tokenizer.json is missing"),
        (write("target_tokenizer.json", b"{}"), "target_tokenizer.json is not a tokenizer"),
        (edit_tokenizer(pre_tokenizer=None), "target_tokenizer.json is not a tokenizer"),
        (lambda d: Tokenizer.train(["x"], "word").save(d / "target_tokenizer.json"), "has 5 tokens"),
        (write("generation_config.json", b'{"num_beams": 0}'), "generation_config.json: num_beams"),
    ],
)  # fmt: skip
def test_a_wrong_directory_is_refused_by_name(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelDirectoryError, match=message) as error:
        load_pretrained(tmp_path)
    assert str(error.value).startswith((f"{tmp_path}/", f"{tmp_path} is no model directory"))


def test_every_truncation_and_many_flipped_bytes_are_noticed_or_harmless(tmp_path: Path) -> None:
    """A cut file never loads. A flipped byte gives an error of ours, or finite weights of the right shape."""
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    choose = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *choose.sample(range(len(whole)), 60)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelDirectoryError):
            load_pretrained(tmp_path)
    for _ in range(150):
        place = choose.randrange(min(len(whole), 1500))  # mostly the header, where a lie could do harm
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << choose.randrange(8))]) + whole[place + 1 :])
        try:
            loaded = load_pretrained(tmp_path)
        except ModelDirectoryError:
            continue
        assert all(tensor.isfinite().all() for tensor in loaded.model.state_dict().values())


def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    save(tmp_path)
    load_pretrained(tmp_path)


def test_files_that_are_written_over_change_no_model_that_was_loaded(tmp_path: Path) -> None:
    model = save(tmp_path)
    loaded = load_pretrained(tmp_path).model
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as whole:
        whole.write(bytes(file.stat().st_size))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
