"""Shortlist: the few target tokens that a given source may call for, so that a step need not project to all.

Learned from training pairs (`training/shortlist.py`), a property of a loaded model. A list is made for each request
from its own source alone, and its answer is normalised over that list: logits of other tokens count as -inf.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from seqmodels.config import ModelConfig, TextEncoderConfig
from seqmodels.errors import ConfigError, ModelDirectoryError

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

    def save(self, directory: Path) -> None:
        (directory / FILE).write_bytes(save({"translations": self.translations, "always": self.always}))

    @classmethod
    def load(cls, directory: Path, config: ModelConfig) -> "Shortlist":
        """Raises ConfigError where the model has none, ModelDirectoryError for a file that does not fit it."""
        if not has_shortlist(directory):
            raise ConfigError(
                f"{directory} has no {FILE}; learn one with `python -m training shortlist {directory}`, or leave "
                "shortlist out"
            )
        try:
            tensors = load_file(directory / FILE)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
            raise ModelDirectoryError(f"{FILE} is cut short, broken or no safetensors file") from None
        translations, always = tensors.get("translations"), tensors.get("always")
        if translations is None or always is None or not _fits(config, translations, always):
            raise ModelDirectoryError(f"{FILE} does not fit the model; learn it again")
        return cls(translations, always)


def has_shortlist(directory: str | Path) -> bool:
    return (Path(directory) / FILE).is_file()


def _fits(config: ModelConfig, translations: Tensor, always: Tensor) -> bool:
    if not isinstance(config.encoder, TextEncoderConfig) or config.decoder is None:
        return False
    shapes = translations.dim() == 2 and always.dim() == 1 and len(translations) == config.encoder.vocab_size
    if not shapes or translations.dtype != torch.int32 or always.dtype != torch.int32:
        return False
    inside = (always >= 0) & (always < config.decoder.vocab_size)
    translated = (translations >= NONE) & (translations < config.decoder.vocab_size)
    return bool(inside.all() and translated.all() and config.decoder.eos_token_id in always)
