"""OpenNMT-py with our weights: its own encoder, decoder and beam search, called as its `translate` calls them.

Sentences are sorted by length before they are cut into batches, as its own reader does for a whole file. Its stopping
rule is its own (a sentence ends when the hypothesis on top has ended). Two things that it has no place for are put into
the model after it is built, so that it computes the same function as ours: a bias in the layer that combines query and
context, and our first state (it starts from the encoder's own). Neither costs time that one could measure.
"""

import sys
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# All transforms of text are imported at its start, and two of them want packages that decoding has no use for.
for absent in ("spacy", "fasttext"):
    sys.modules.setdefault(absent, ModuleType(absent))

from onmt.decoders.decoder import StdRNNDecoder  # noqa: E402
from onmt.encoders.rnn_encoder import RNNEncoder  # noqa: E402
from onmt.inputters.inputter import dict_to_vocabs  # noqa: E402
from onmt.models.model import NMTModel  # noqa: E402
from onmt.modules import Embeddings  # noqa: E402
from onmt.translate import GNMTGlobalScorer, Translator  # noqa: E402

from benchmarks.peers.exchange import (  # noqa: E402
    MAX_NEW_TOKENS,
    PAD,
    Decode,
    Exported,
    Sentences,
    encoder_weights,
    lstm_weights,
    main,
    start_state,
    until_end,
)

SPECIAL_TOKENS = ["<blank>", "<unk>", "<s>", "</s>"]  # its names for our first four


def load(exported: Exported, system: str) -> Decode:
    model, vocabularies = make_model(exported), make_vocabularies(exported)

    def decode(sources: Sentences, batch: int, num_beams: int) -> list[list[int]]:
        translator = make_translator(model, vocabularies, num_beams)
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
        answers: dict[int, list[int]] = {}
        for first in range(0, len(order), batch):
            some = order[first : first + batch][::-1]  # longest first within a batch
            answers |= zip(some, decode_batch(translator, [sources[index] for index in some]), strict=True)
        return [answers[index] for index in range(len(sources))]

    return decode


def decode_batch(translator: Translator, sources: Sentences) -> list[list[int]]:
    rows = [torch.tensor(source) for source in sources]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    batch = {"src": padded[:, :, None], "srclen": torch.tensor([len(source) for source in sources])}
    results = translator.translate_batch(batch, attn_debug=False)
    return [until_end(best[0].tolist()) for best in results["predictions"]]


def make_translator(model: NMTModel, vocabularies: dict[str, Any], num_beams: int) -> Translator:
    scorer = GNMTGlobalScorer(alpha=0.0, beta=0.0, length_penalty="none", coverage_penalty="none")
    return Translator(
        model,
        vocabularies,
        n_best=1,
        beam_size=num_beams,
        max_length=MAX_NEW_TOKENS,
        max_length_ratio=0,
        global_scorer=scorer,
        report_score=False,
    )


def make_model(exported: Exported) -> NMTModel:
    weights = exported.weights
    hidden_size = weights["decoder.recurrent.forward_layers.0.weight_hh_l0"].shape[1]
    source_size, target_size = exported.vocab_sizes
    source, target = (
        Embeddings(weights[f"{part}.embedding.weight"].shape[1], size, PAD)
        for part, size in (("encoder", source_size), ("decoder", target_size))
    )
    encoder = RNNEncoder("LSTM", True, 1, hidden_size, 0.0, source)
    decoder = StdRNNDecoder("LSTM", True, 1, hidden_size, attn_type="general", embeddings=target)
    decoder.attn.linear_out = nn.Linear(2 * hidden_size, hidden_size)  # with a bias, which OpenNMT-py has not
    model = NMTModel(encoder, decoder)
    model.generator = nn.Linear(hidden_size, target_size)
    own_init_state = decoder.init_state

    def init_state(self: Any, src: Tensor, memory: Tensor, final: tuple[Tensor, Tensor]) -> None:
        own_init_state(src, memory, final)
        summary = torch.cat([final[0][0], final[0][1]], dim=1)  # both directions at their ends
        self.state["hidden"] = tuple(part[None] for part in start_state(weights, summary))

    decoder.init_state = MethodType(init_state, decoder)
    nn.Module.load_state_dict(model, peer_weights(weights))
    return model.eval()


def peer_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    # It projects the query, we project the keys: the same product with the matrix turned round.
    query, context = weights["decoder.combine.weight"].chunk(2, dim=1)
    embedding = "embeddings.make_embedding.emb_luts.0.weight"
    return {
        **encoder_weights(weights, "encoder.rnn"),
        **lstm_weights(weights, "decoder.recurrent.forward_layers.0", "decoder.rnn"),
        f"encoder.{embedding}": weights["encoder.embedding.weight"],
        f"decoder.{embedding}": weights["decoder.embedding.weight"],
        "decoder.attn.linear_in.weight": weights["decoder.attention.project_keys.weight"].T.contiguous(),
        "decoder.attn.linear_out.weight": torch.cat([context, query], dim=1),
        "decoder.attn.linear_out.bias": weights["decoder.combine.bias"],
        "generator.weight": weights["decoder.output_weight"],
        "generator.bias": weights["decoder.output_bias"],
    }


def make_vocabularies(exported: Exported) -> dict[str, Any]:
    """Of the right sizes; names of tokens do not matter, since ids go in and come out."""
    source, target = ([*SPECIAL_TOKENS, *map(str, range(4, size))] for size in exported.vocab_sizes)
    vocabularies: dict[str, Any] = dict_to_vocabs({"src": source, "tgt": target, "data_task": "seq2seq"})
    assert [vocabularies["tgt"].lookup_token(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    return vocabularies


if __name__ == "__main__":
    main(load)
