"""Our engine under the peers' clock: all sentences submitted at once, `batch` of them running at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peers.exchange import MAX_NEW_TOKENS, Decode, Exported, Sentences, main
from benchmarks.workload import load_generator, make_requests
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams


def load(exported: Exported) -> Decode:
    model, _ = load_generator(Path(exported.model_directory))

    def decode(sources: Sentences, batch: int, num_beams: int) -> list[list[int]]:
        requests = make_requests([torch.tensor(source) for source in sources], search_params(num_beams))
        return [best[0].tokens for best in generate(model, requests, max_rows=batch * num_beams)]

    return decode


def search_params(num_beams: int) -> SearchParams:
    """The peers' objective, the sum of log-probabilities, searched to the end."""
    return SearchParams(
        num_beams=num_beams,
        num_return_sequences=1,
        max_new_tokens=MAX_NEW_TOKENS,
        early_stopping=False,
        length_penalty=0.0,
    )


def exported_weights(directory: Path, sources: Sequence[Sequence[int]]) -> Exported:
    """One set of weights for all. Stops where the model is not one that the peers can be."""
    model, _ = load_generator(directory)
    config = model.config
    assert config.encoder is not None and config.decoder is not None
    encoder, decoder = config.encoder, config.decoder
    fits = (
        encoder.input == "text"
        and encoder.recurrent.bidirectional
        and {encoder.recurrent.cell, decoder.recurrent.cell} == {"lstm"}
        and encoder.recurrent.num_layers == decoder.recurrent.num_layers == 1
        and decoder.attention == "general"
        and not decoder.tie_embeddings
        and encoder.output_size == decoder.recurrent.hidden_size
    )
    if not fits:
        raise SystemExit(
            "the peers need a one-layer bidirectional LSTM of half the size of the decoder's one layer, general "
            "attention and untied embeddings: train with model.decoder.tie_embeddings=false"
        )
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return Exported(str(directory.resolve()), weights, [list(source) for source in sources])


if __name__ == "__main__":
    main(load)
