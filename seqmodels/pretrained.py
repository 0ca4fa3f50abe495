"""save_pretrained and load_pretrained: a model directory, out and in.

    config.json                what the model is               (ModelConfig)
    model.safetensors          its weights
    tokenizer.json             or source_tokenizer.json and target_tokenizer.json where two
    preprocessor_config.json   for images and frames           (Preprocessor)
    generation_config.json     a generator's search defaults   (SearchParams)
    README.md                  the model card

No file here is ever unpickled. safetensors cannot run code, but it can lie: names, shapes, dtypes, finiteness and
size are checked before a weight is used.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from seqmodels.config import ModelConfig, explain
from seqmodels.decoding.params import SearchParams
from seqmodels.errors import ConfigError, ModelDirectoryError
from seqmodels.models import Model, build_model
from seqmodels.preprocessing import Preprocessor
from seqmodels.tokenizer import Tokenizer

T = TypeVar("T", bound=BaseModel)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
TOKENIZER, SOURCE_TOKENIZER, TARGET_TOKENIZER = "tokenizer.json", "source_tokenizer.json", "target_tokenizer.json"
PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
RECIPE = "recipe.yaml"  # a training run writes it first, and config.json last
CHECKSUM = "sha256"  # of the weights, in the metadata of their file


@dataclass(frozen=True)
class Pretrained:
    """A loaded model directory. `revision` names its content: config, weights, tokenizers and preprocessing."""

    model: Model
    config: ModelConfig
    revision: str
    source_tokenizer: Tokenizer | None = None
    target_tokenizer: Tokenizer | None = None
    preprocessor: Preprocessor | None = None
    generation: SearchParams = field(default_factory=SearchParams)

    def save(self, directory: str | Path, card: str = "") -> None:
        """Write it all, with whatever was changed since it was loaded."""
        save_pretrained(
            self.model,
            directory,
            source_tokenizer=self.source_tokenizer,
            target_tokenizer=self.target_tokenizer,
            preprocessor=self.preprocessor,
            generation=self.generation,
            card=card,
        )


def save_pretrained(
    model: Model,
    directory: str | Path,
    *,
    source_tokenizer: Tokenizer | None = None,
    target_tokenizer: Tokenizer | None = None,
    preprocessor: Preprocessor | None = None,
    generation: SearchParams | None = None,
    card: str = "",
) -> None:
    """Write a model directory. A reader of an older one in the same place never sees half of a file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with _replacing(directory / WEIGHTS) as path:
        # `save_file` would let only this user read the file; a service often runs as another one.
        path.write_bytes(_file(weights, {"format": "pt", CHECKSUM: _checksum(weights)}))
    names = tokenizer_names(model.config)
    for name, tokenizer in zip(names, (source_tokenizer, target_tokenizer), strict=True):
        if name and tokenizer:
            with _replacing(directory / name) as path:
                tokenizer.save(path)
    texts: dict[str, str] = {CARD: card or "# A model saved without a card\n"}
    if preprocessor:
        texts[PREPROCESSOR] = preprocessor.model_dump_json(indent=2) + "\n"
    if model.config.decoder:
        texts[GENERATION] = (generation or SearchParams()).model_dump_json(indent=2, exclude_defaults=True) + "\n"
    texts[CONFIG] = model.config.model_dump_json(indent=2) + "\n"
    for name, text in texts.items():
        with _replacing(directory / name) as path:
            path.write_text(text, encoding="utf-8")


def load_pretrained(directory: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """Read a model directory, in evaluation mode.

    Raises ModelDirectoryError that names the directory, the file and the field, ConfigError for a device that is not
    there.
    """
    directory, device = Path(directory), checked_device(device)
    if not (directory / CONFIG).is_file():
        reason = f"{directory} is no model directory: it has no {CONFIG}"
        if (directory / RECIPE).is_file():
            reason += "; a training run was interrupted here, and the same command makes it go on to the end"
        raise ModelDirectoryError(reason)
    try:
        return _load(directory, device)
    except ModelDirectoryError as error:  # which begins with a file's name, and there may be several directories
        raise ModelDirectoryError(f"{directory}/{error}") from None


def _load(directory: Path, device: torch.device) -> Pretrained:
    try:
        config = ModelConfig.load(directory / CONFIG)
    except ConfigError as error:
        raise ModelDirectoryError(str(error)) from None
    model = _load_weights(config, directory / WEIGHTS)
    source_name, target_name = tokenizer_names(config)
    source = _load_tokenizer(directory, source_name, getattr(config.encoder, "vocab_size", None))
    target = _load_tokenizer(directory, target_name, getattr(config.decoder, "vocab_size", None))
    preprocessor = None
    if config.input in ("image", "frames"):
        preprocessor = _load_json(directory / PREPROCESSOR, Preprocessor)
        _check_picture(config, preprocessor)
    generation = _load_json(directory / GENERATION, SearchParams) if config.decoder else SearchParams()
    return Pretrained(model.to(device).eval(), config, _revision(directory), source, target, preprocessor, generation)


def checked_device(name: str | torch.device) -> torch.device:
    """The device of that name, cpu or cuda, if torch can use it here."""
    try:
        device = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device is {str(name)!r}, which torch cannot use here; use cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(name)!r}, on which no model here runs; use cpu or cuda")
    return device


def tokenizer_names(config: ModelConfig) -> tuple[str | None, str | None]:
    """The file names of the source's and the target's tokenizer, None where there is none."""
    source, target = config.input == "text", config.decoder is not None
    if source and target:
        return SOURCE_TOKENIZER, TARGET_TOKENIZER
    return (TOKENIZER if source else None), (TOKENIZER if target else None)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file, in memory of their own: torch's are mapped from the file, and change, or end the process,
    when it is written over. Raises what `safetensors.torch.load_file` raises."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ModelDirectoryError where it is missing, cut short or broken.

    A file of ours names the checksum of its tensors, which is held against them; one made elsewhere need not.
    """
    try:
        weights = load_tensors(path)
        with safetensors.safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(CHECKSUM)
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path.name} is missing from the model directory") from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise ModelDirectoryError(f"{path.name} is cut short, broken or no safetensors file") from None
    if expected not in (None, _checksum(weights)):
        raise ModelDirectoryError(f"{path.name} does not match its own checksum; it was damaged after it was saved")
    return weights


def _file(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file: length of the header, header, tensors. The library would write the metadata in an order that
    changes from call to call, and the same weights must be the same bytes."""
    data = save(weights)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors are aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def _checksum(weights: Mapping[str, Tensor]) -> str:
    """sha256 hex over the names and bytes of contiguous tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_weights(config: ModelConfig, path: Path) -> Model:
    try:
        with torch.device("meta"):  # no memory yet: a hostile config must not make us allocate what the file lacks
            model = build_model(config)
    except (RuntimeError, TypeError, OverflowError):
        raise ModelDirectoryError(f"{CONFIG} asks for a size that no tensor can have") from None
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    found = read_weights(path)
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelDirectoryError(f"{path.name} lacks {missing[0]!r}, which {CONFIG} calls for")
    if extra := sorted(found.keys() - expected.keys()):
        raise ModelDirectoryError(f"{path.name} holds {extra[0]!r}, which {CONFIG} does not call for")
    for name, tensor in found.items():
        shape, dtype = expected[name]
        if tensor.shape != shape:
            raise ModelDirectoryError(
                f"{path.name}: {name!r} has shape {tuple(tensor.shape)}, but {CONFIG} calls for {tuple(shape)}"
            )
        if tensor.dtype != dtype:
            raise ModelDirectoryError(f"{path.name}: {name!r} is of {tensor.dtype}, but must be {dtype}")
        if not tensor.isfinite().all():
            raise ModelDirectoryError(f"{path.name}: {name!r} holds NaN or infinity")
    model.load_state_dict(found, assign=True)
    return model


def _load_tokenizer(directory: Path, name: str | None, vocab_size: int | None) -> Tokenizer | None:
    if name is None:
        return None
    tokenizer = Tokenizer.load(directory / name)
    if tokenizer.vocab_size != vocab_size:
        raise ModelDirectoryError(
            f"{name} has {tokenizer.vocab_size} tokens, but {CONFIG} says vocab_size is {vocab_size}"
        )
    return tokenizer


def _load_json(path: Path, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path.name} is missing from the model directory") from None
    except ValidationError as error:
        raise ModelDirectoryError(f"{path.name}: {explain(error)}") from None


def _check_picture(config: ModelConfig, preprocessor: Preprocessor) -> None:
    backbone = getattr(config.encoder, "backbone")  # noqa: B009 - both picture encoders have one
    if preprocessor.size != backbone.image_size or preprocessor.channels != backbone.in_channels:
        raise ModelDirectoryError(
            f"{PREPROCESSOR} makes {preprocessor.channels} x {preprocessor.size}, but {CONFIG} says the backbone takes "
            f"{backbone.in_channels} x {backbone.image_size}"
        )


def _revision(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, TOKENIZER, SOURCE_TOKENIZER, TARGET_TOKENIZER, PREPROCESSOR, GENERATION):
        path = directory / name
        if path.is_file():
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
