"""Our engine under the peers' clock: all sentences submitted at once, `batch` of them running at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peers.exchange import MAX_NEW_TOKENS, Decode, Exported, Sentences, main
from benchmarks.workload import load_generator, make_requests
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.shortlist import Shortlist
from seqmodels.stepper import Stepper


def load(exported: Exported, system: str) -> Decode:
    """system: `ours`, with `-int8` and `-shortlist` behind it where the step is to use them."""
    model, pretrained = load_generator(Path(exported.model_directory))
    stepper = Stepper(model, "int8" if "int8" in system else "float32")
    shortlist = None
    if "shortlist" in system:
        shortlist = Shortlist.load(Path(exported.model_directory), pretrained)

    def decode(sources: Sentences, batch: int, num_beams: int) -> list[list[int]]:
        requests = make_requests([torch.tensor(source) for source in sources], search_params(num_beams))
        if shortlist:
            lists = [shortlist.of(torch.tensor(source)) for source in sources]
            requests = [replace(request, shortlist=own) for request, own in zip(requests, lists, strict=True)]
        # One at a time is just that: nobody waits whose source could be read together with another's.
        together = [requests] if batch > 1 else [[request] for request in requests]
        return [best[0].tokens for some in together for best in generate(stepper, some, max_rows=batch * num_beams)]

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
        and not decoder.attention_gate
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
