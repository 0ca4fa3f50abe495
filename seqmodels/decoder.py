"""Decoder: embed -> Recurrent -> attend -> logits.

Attention looks from the recurrent output (Luong et al. 2015, without input feeding), so training is one fused call
over all T and a few batched products, with no loop over time. A search goes step by step, through `Stepper`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.attention import Attention
from seqmodels.config import DecoderConfig
from seqmodels.dropout import dropout, embed
from seqmodels.recurrent import Recurrent
from seqmodels.state import Memory, State


class Decoder(nn.Module):
    """(tokens (B, T), State, Memory?) -> (logits (B, T, V), State)."""

    def __init__(self, config: DecoderConfig, memory_size: int | None, summary_size: int | None) -> None:
        super().__init__()
        self.dropout, self.locked_dropout = config.dropout, config.locked_dropout
        self.input_dropout, self.embedding_dropout = config.rate_on_inputs, config.embedding_dropout
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)
        self.recurrent = Recurrent.from_config(config.recurrent, config.embedding_size, config.locked_dropout)
        self.bridge = nn.Linear(summary_size, self.recurrent.state_width) if summary_size else None
        feature_size = self.recurrent.output_size
        self.attention = None
        if config.attention != "none" and memory_size:
            self.attention = Attention(config.attention, feature_size, memory_size)
            feature_size += memory_size
        # Luong's attentional vector; with tied embeddings it has the embedding's size, so that both can be compared.
        output_size = config.embedding_size if config.tie_embeddings else self.recurrent.output_size
        self.combine = nn.Linear(feature_size, output_size) if self.attention or config.tie_embeddings else None
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.output_weight = None
        if not config.tie_embeddings:
            self.output_weight = nn.Parameter(torch.empty(config.vocab_size, output_size))
            nn.init.xavier_uniform_(self.output_weight)

    def start(self, memory: Memory | None, rows: int) -> State:
        """The state before the first token: from the memory's summary, or zeros where there is no encoder."""
        if memory is None or self.bridge is None:
            return self.recurrent.initial_state(rows)
        return State(torch.tanh(self.bridge(memory.summary)))

    def prepare(self, memory: Memory) -> Memory:
        return self.attention.prepare(memory) if self.attention else memory

    def read(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Tokens (B, T) through the recurrence alone: (outputs (B, T, H), State after T)."""
        embedded = embed(tokens, self.embedding, self.embedding_dropout, self.training)
        embedded = dropout(embedded, self.input_dropout, self.training, self.locked_dropout)
        outputs, state = self.recurrent(embedded, None, state)
        return outputs, state

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

    def attend(self, outputs: Tensor, memory: Memory | None) -> Tensor | None:
        """outputs (B, T, H) -> context (B, T, D), or None without attention."""
        if self.attention is None or memory is None:
            return None
        context: Tensor = self.attention(self.attention.query(outputs), memory)[0]
        return context

    def forward(self, tokens: Tensor, state: State, memory: Memory | None = None) -> tuple[Tensor, State]:
        outputs, state = self.read(tokens, state)
        return self.project(self.features(outputs, self.attend(outputs, memory))), state
