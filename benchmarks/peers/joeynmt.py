"""JoeyNMT with our weights: its own model, batches and beam search, called as its `predict` calls them.

Batches stand in the order of the file, as its `translate` makes them. Two things that JoeyNMT has no place for are put
into the model after it is built, so that it computes the same function as ours: a bias on the output layer, and a first
state whose hidden and cell differ (it starts both from one projection). Neither costs time that one could measure.
"""

from types import MethodType, SimpleNamespace
from typing import Any

import torch
from joeynmt.batch import Batch
from joeynmt.model import Model, build_model
from joeynmt.search import search
from joeynmt.vocabulary import Vocabulary
from torch import Tensor, nn

from benchmarks.peers.exchange import (
    BOS,
    EOS,
    MAX_NEW_TOKENS,
    PAD,
    UNK,
    Decode,
    Exported,
    Sentences,
    encoder_weights,
    lstm_weights,
    main,
    start_state,
    until_end,
)


def load(exported: Exported, system: str) -> Decode:
    model = make_model(exported)

    def decode(sources: Sentences, batch: int, num_beams: int) -> list[list[int]]:
        answers: list[list[int]] = []
        for first in range(0, len(sources), batch):
            answers += decode_batch(model, sources[first : first + batch], num_beams)
        return answers

    return decode


def decode_batch(model: Model, sources: Sentences, num_beams: int) -> list[list[int]]:
    rows = [torch.tensor(source) for source in sources]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(source) for source in sources])
    batch = Batch(
        src=padded,
        src_length=lengths,
        src_prompt_mask=None,
        trg=None,
        trg_prompt_mask=None,
        indices=torch.arange(len(sources)),
        device=torch.device("cpu"),
        pad_index=PAD,
        eos_index=EOS,
        is_train=False,
    )
    back = batch.sort_by_src_length()
    outputs, _, _ = search(
        model=model, batch=batch, max_output_length=MAX_NEW_TOKENS, beam_size=num_beams, beam_alpha=0.0, n_best=1
    )
    return [until_end([int(token) for token in outputs[row]]) for row in back]


def make_model(exported: Exported) -> Model:
    weights = exported.weights
    embedding_size, encoder_size = weights["encoder.recurrent.forward_layers.0.weight_ih_l0"].shape[1], 0
    encoder_size = weights["encoder.recurrent.forward_layers.0.weight_hh_l0"].shape[1]
    hidden_size = weights["decoder.recurrent.forward_layers.0.weight_hh_l0"].shape[1]
    part: dict[str, Any] = {"type": "recurrent", "rnn_type": "lstm", "num_layers": 1}
    embeddings = {"embedding_dim": embedding_size, "scale": False}
    encoder = {**part, "bidirectional": True, "hidden_size": encoder_size, "embeddings": embeddings}
    decoder = {**part, "hidden_size": hidden_size, "embeddings": embeddings, "attention": "luong"}
    decoder |= {"input_feeding": False, "init_hidden": "zeros"}
    source_vocab, target_vocab = (make_vocabulary(size) for size in exported.vocab_sizes)
    model = build_model({"encoder": encoder, "decoder": decoder}, source_vocab, target_vocab)
    model.decoder.output_layer = nn.Linear(hidden_size, exported.vocab_sizes[1])  # with a bias, which JoeyNMT has not

    def first_state(_: nn.Module, summary: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = start_state(weights, summary)
        return hidden[None], cell[None]

    model.decoder._init_hidden = MethodType(first_state, model.decoder)
    model.load_state_dict(peer_weights(weights))
    return model.eval()


def peer_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **encoder_weights(weights, "encoder.rnn"),
        **lstm_weights(weights, "decoder.recurrent.forward_layers.0", "decoder.rnn"),
        "src_embed.lut.weight": weights["encoder.embedding.weight"],
        "trg_embed.lut.weight": weights["decoder.embedding.weight"],
        "decoder.attention.key_layer.weight": weights["decoder.attention.project_keys.weight"],
        "decoder.att_vector_layer.weight": weights["decoder.combine.weight"],
        "decoder.att_vector_layer.bias": weights["decoder.combine.bias"],
        "decoder.output_layer.weight": weights["decoder.output_weight"],
        "decoder.output_layer.bias": weights["decoder.output_bias"],
    }


def make_vocabulary(size: int) -> Vocabulary:
    """One of the right size; names of tokens do not matter, since ids go in and come out."""
    names = {"unk": UNK, "pad": PAD, "bos": BOS, "eos": EOS}
    settings = SimpleNamespace(lang_tags=[], sep_token=None, sep_id=None)
    # It wants <unk> before <pad>, so it is built that way and told better afterwards.
    for index, name in enumerate(("unk", "pad", "bos", "eos")):
        setattr(settings, f"{name}_token", f"<{name}>")
        setattr(settings, f"{name}_id", index)
    vocabulary = Vocabulary([str(index) for index in range(len(names), size)], settings)
    for name, index in names.items():
        setattr(vocabulary, f"{name}_index", index)
    return vocabulary


if __name__ == "__main__":
    main(load)
