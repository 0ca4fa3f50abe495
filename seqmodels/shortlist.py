"""Shortlist: the few target tokens that a given source may call for, so that a step need not project to all.

Learned from training pairs (`training/shortlist.py`), a property of a loaded model. A list is made for each request
from its own source alone, and its answer is normalised over that list: logits of other tokens count as -inf.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from seqmodels.config import ModelConfig, TextEncoderConfig
from seqmodels.errors import ConfigError, ModelDirectoryError
from seqmodels.pretrained import Pretrained, load_tensors
from seqmodels.tokenizer import SPECIAL_TOKENS

FILE = "shortlist.safetensors"
NONE = -1  # fills a row that has fewer


@dataclass(frozen=True)
class Shortlist:
    """translations: (S, T) the likely target tokens of each source token, NONE where there are fewer; always: (A,)
    those on every list. Both of int32."""

    translations: Tensor
    always: Tensor

    def of(self, source: Tensor, further: Iterable[int] = ()) -> Tensor:
        """The list of one source (S,): token ids (L,), each once, in order. further: others that it must hold."""
        likely = self.translations[source].flatten()
        listed = torch.cat([likely[likely != NONE], self.always, torch.tensor([*further], dtype=torch.int32)])
        ids: Tensor = torch.unique(listed)  # sorted
        return ids

    @property
    def fingerprint(self) -> str:
        """Short, of all that it says."""
        digest = hashlib.sha256(str(tuple(self.translations.shape)).encode())
        for tensor in (self.translations, self.always):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:12]

    def save(self, directory: Path, pretrained: Pretrained) -> None:
        """Into the directory of the model that it was learned for."""
        tensors = {"translations": self.translations, "always": self.always}
        (directory / FILE).write_bytes(save(tensors, _tokenizers_of(pretrained)))

    @classmethod
    def load(cls, directory: Path, pretrained: Pretrained) -> "Shortlist":
        """pretrained: the model in that directory. Raises ConfigError where it has no shortlist or no use for one,
        ModelDirectoryError for a file that does not fit it."""
        if not _translates(pretrained.config):
            raise ConfigError(
                f"{directory} does not translate text into text, so it has no use for a shortlist; leave shortlist out"
            )
        if not has_shortlist(directory):
            raise ConfigError(
                f"{directory} has no {FILE}; learn one with `python -m training shortlist {directory}`, or leave "
                "shortlist out"
            )
        try:
            tensors = load_tensors(directory / FILE)
            with safetensors.safe_open(directory / FILE, "pt") as file:
                made_for = file.metadata() or {}
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
            raise ModelDirectoryError(f"{FILE} is cut short, broken or no safetensors file") from None
        if made_for != _tokenizers_of(pretrained):
            raise ModelDirectoryError(
                f"{FILE} is of another model; learn it again with `python -m training shortlist {directory}`"
            )
        translations, always = tensors.get("translations"), tensors.get("always")
        if translations is None or always is None or not _fits(pretrained.config, translations, always):
            raise ModelDirectoryError(
                f"{FILE} does not fit the model; learn it again with `python -m training shortlist {directory}`"
            )
        return cls(translations, always)


def has_shortlist(directory: str | Path) -> bool:
    return (Path(directory) / FILE).is_file()


def _translates(config: ModelConfig) -> bool:
    """Whether it reads text and writes text."""
    return isinstance(config.encoder, TextEncoderConfig) and config.decoder is not None


def _tokenizers_of(pretrained: Pretrained) -> dict[str, str]:
    """For the metadata of the file: its numbers mean nothing to other tokenizers."""
    assert pretrained.source_tokenizer is not None and pretrained.target_tokenizer is not None
    return {
        "source_tokenizer": pretrained.source_tokenizer.fingerprint,
        "target_tokenizer": pretrained.target_tokenizer.fingerprint,
    }


def _fits(config: ModelConfig, translations: Tensor, always: Tensor) -> bool:
    assert isinstance(config.encoder, TextEncoderConfig) and config.decoder is not None
    shapes = translations.dim() == 2 and always.dim() == 1 and len(translations) == config.encoder.vocab_size
    if not shapes or translations.dtype != torch.int32 or always.dtype != torch.int32:
        return False
    inside = (always >= 0) & (always < config.decoder.vocab_size)
    translated = (translations >= NONE) & (translations < config.decoder.vocab_size)
    # Without a word on every list a source of unknown tokens could leave a search with nothing that it may write.
    enough = config.decoder.eos_token_id in always and bool((always >= len(SPECIAL_TOKENS)).any())
    return enough and bool(inside.all() and translated.all())
