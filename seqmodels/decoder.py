"""Decoder: embed -> Recurrent -> attend -> logits.

Attention looks from a recurrent output (Luong et al. 2015, without input feeding), so training is a fused call over all
T and a few batched products, with no loop over time. The output is that of the last layer; or that of the first, and
the layers above read it together with what it saw, as in GNMT (Wu et al. 2016). A search goes step by step, through
`Stepper`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.attention import Attention
from seqmodels.config import DecoderConfig, RecurrentConfig
from seqmodels.dropout import dropout, embed
from seqmodels.recurrent import Recurrent
from seqmodels.state import Memory, State


class Pass(NamedTuple):
    """What the recurrence makes of T tokens. The middle two are None where nothing is looked at."""

    outputs: Tensor  # (B, T, H) of the last layer
    context: Tensor | None  # (B, T, D), what attention saw
    weights: Tensor | None  # (B, T, S), where it looked
    state: State  # after T


class Decoder(nn.Module):
    """(tokens (B, T), State, Memory?) -> (logits (B, T, V), State)."""

    def __init__(self, config: DecoderConfig, memory_size: int | None, summary_size: int | None) -> None:
        super().__init__()
        self.dropout, self.locked_dropout = config.dropout, config.locked_dropout
        self.input_dropout, self.embedding_dropout = config.rate_on_inputs, config.embedding_dropout
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)
        below, above = _split(config)
        self.recurrent = Recurrent.from_config(below, config.embedding_size, config.locked_dropout)
        hidden_size = feature_size = self.recurrent.output_size
        looked_at = (memory_size or 0) if config.attention != "none" else 0
        feature_size += looked_at
        self.above = Recurrent.from_config(above, feature_size, config.locked_dropout) if above else None
        self.state_width = self.recurrent.state_width + (self.above.state_width if self.above else 0)
        self.bridge = nn.Linear(summary_size, self.state_width) if summary_size else None
        self.attention = Attention(config.attention, hidden_size, looked_at) if looked_at else None
        self.gate = nn.Linear(hidden_size, 1) if config.attention_gate else None
        # Luong's attentional vector; with tied embeddings it has the embedding's size, so that both can be compared.
        output_size = config.embedding_size if config.tie_embeddings else hidden_size
        self.combine = nn.Linear(feature_size, output_size) if self.attention or config.tie_embeddings else None
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.output_weight = None
        if not config.tie_embeddings:
            self.output_weight = nn.Parameter(torch.empty(config.vocab_size, output_size))
            nn.init.xavier_uniform_(self.output_weight)

    def start(self, memory: Memory | None, rows: int) -> State:
        """The state before the first token: from the memory's summary, or zeros where there is no encoder."""
        if memory is None or self.bridge is None:
            return State(self.output_bias.new_zeros(rows, self.state_width))
        return State(torch.tanh(self.bridge(memory.summary)))

    def prepare(self, memory: Memory) -> Memory:
        return self.attention.prepare(memory) if self.attention else memory

    def read(self, tokens: Tensor, state: State, memory: Memory | None = None) -> Pass:
        """Tokens (B, T) through the recurrence, which looks at the memory on the way or at its end."""
        embedded = embed(tokens, self.embedding, self.embedding_dropout, self.training)
        embedded = dropout(embedded, self.input_dropout, self.training, self.locked_dropout)
        if self.above is None:
            outputs, state = self.recurrent(embedded, None, state)
            return Pass(outputs, *self.attend(outputs, memory), state)
        widths = [self.recurrent.state_width, self.above.state_width]
        first, rest = (State(part) for part in torch.split(state.values, widths, dim=1))
        outputs, first = self.recurrent(embedded, None, first)
        context, weights = self.attend(outputs, memory)
        assert context is not None, "layers above read what the first one saw, so there must be a memory"
        seen = dropout(torch.cat([outputs, context], -1), self.above.dropout, self.training, self.locked_dropout)
        outputs, rest = self.above(seen, None, rest)
        return Pass(outputs, context, weights, State(torch.cat([first.values, rest.values], dim=1)))

    def attend(self, outputs: Tensor, memory: Memory | None) -> tuple[Tensor | None, Tensor | None]:
        """outputs (B, T, H) -> context (B, T, D), weights (B, T, S); None without attention."""
        if self.attention is None or memory is None:
            return None, None
        context, weights = self.attention(self.attention.query(outputs), memory)
        return context if self.gate is None else context * torch.sigmoid(self.gate(outputs)), weights

    def features(self, outputs: Tensor, context: Tensor | None) -> Tensor:
        """What the output layer reads. outputs (B, T, H), context (B, T, D) or None -> (B, T, E)."""
        if context is not None:
            outputs = torch.cat([outputs, context], dim=-1)
        if self.combine is not None:
            outputs = torch.tanh(self.combine(outputs))
        return dropout(outputs, self.dropout, self.training, self.locked_dropout)

    def project(self, features: Tensor) -> Tensor:
        """(..., E) -> logits (..., V)."""
        return F.linear(features, self.output_matrix, self.output_bias)

    @property
    def output_matrix(self) -> Tensor:
        """(V, E)"""
        return self.embedding.weight if self.output_weight is None else self.output_weight

    def forward(self, tokens: Tensor, state: State, memory: Memory | None = None) -> tuple[Tensor, State]:
        outputs, context, _, state = self.read(tokens, state, memory)
        return self.project(self.features(outputs, context)), state


def _split(config: DecoderConfig) -> tuple[RecurrentConfig, RecurrentConfig | None]:
    """The layers up to the one that looks, and those above it, if any."""
    layers = config.recurrent
    if config.attention_from == "last":
        return layers, None
    return layers.model_copy(update={"num_layers": 1}), layers.model_copy(update={"num_layers": layers.num_layers - 1})
