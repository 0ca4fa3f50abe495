"""What passes between the systems: one set of weights, one list of sentences, and how each system is timed.

Runs in every environment, so it imports torch and safetensors, and nothing of ours. Sentences are token ids of our
vocabulary, the source's end mark included; answers come back as token ids up to and with the end mark.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.memory import peak_memory_mib

PAD, UNK, BOS, EOS = range(4)
MAX_NEW_TOKENS = 60
WARM_UP = 8  # sentences

Sentences = Sequence[Sequence[int]]
Decode = Callable[[Sentences, int, int], list[list[int]]]  # (sources, batch, num_beams) -> answers in order
Load = Callable[["Exported", str], Decode]  # the system's name, where a module is several


@dataclass(frozen=True)
class Exported:
    """A folder that holds the model's weights under our names, and the sources of the test set."""

    model_directory: str
    weights: dict[str, Tensor]
    sources: list[list[int]]

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """Of source and target."""
        return len(self.weights["encoder.embedding.weight"]), len(self.weights["decoder.embedding.weight"])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, folder / "weights.safetensors")
        plain = {"model_directory": self.model_directory, "sources": self.sources}
        (folder / "sentences.json").write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Exported":
        plain = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
        return cls(plain["model_directory"], load_file(folder / "weights.safetensors"), plain["sources"])


def main(load: Load) -> None:
    """The command line of one system: decode the first --limit sentences once warm, write what came and how long."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", required=True)
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--num-beams", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    exported = Exported.load(options.exported)
    sources = exported.sources[: options.limit]
    decode = load(exported, options.system)
    decode(sources[:WARM_UP], options.batch, options.num_beams)
    started = time.perf_counter()
    answers = decode(sources, options.batch, options.num_beams)
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "answers": answers, "peak_memory_mib": peak_memory_mib()}
    options.output.write_text(json.dumps(result), encoding="utf-8")
    print(f"{options.system}: {len(sources) / seconds:.1f} sentences/s", file=sys.stderr)


def until_end(tokens: Sequence[int]) -> list[int]:
    """An answer without what a peer puts after its end mark."""
    tokens = list(tokens)
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else [token for token in tokens if token != PAD]


def lstm_weights(weights: dict[str, Tensor], ours: str, theirs: str, suffix: str = "") -> dict[str, Tensor]:
    """The four tensors of one LSTM layer under a peer's names."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {f"{theirs}.{kind}_l0{suffix}": weights[f"{ours}.{kind}_l0"] for kind in kinds}


def encoder_weights(weights: dict[str, Tensor], theirs: str) -> dict[str, Tensor]:
    """Both directions of the encoder as one bidirectional LSTM."""
    ahead = lstm_weights(weights, "encoder.recurrent.forward_layers.0", theirs)
    return ahead | lstm_weights(weights, "encoder.recurrent.backward_layers.0", theirs, "_reverse")


def start_state(weights: dict[str, Tensor], summary: Tensor) -> tuple[Tensor, Tensor]:
    """Our bridge: encoder summary (B, D) -> the decoder's first hidden and cell (B, H)."""
    state = torch.tanh(F.linear(summary, weights["decoder.bridge.weight"], weights["decoder.bridge.bias"]))
    hidden, cell = state.chunk(2, dim=1)
    return hidden, cell
