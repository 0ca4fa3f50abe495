"""Decoder: embed -> Recurrent -> attend -> logits.

Attention looks from the recurrent output (Luong et al. 2015, without input feeding), so training is one fused call
over all T and a few batched products, with no loop over time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.attention import Attention
from seqmodels.config import DecoderConfig
from seqmodels.recurrent import Recurrent
from seqmodels.state import Memory, State

Memories = Sequence[tuple[Memory, int]]  # a lane's memory (R, S, D) and its beam width K: rows R·K, request by request


class Decoder(nn.Module):
    """(tokens (B, T), State, Memory?) -> (logits (B, T, V), State)."""

    def __init__(self, config: DecoderConfig, memory_size: int | None, summary_size: int | None) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)
        self.recurrent = Recurrent.from_config(config.recurrent, config.embedding_size)
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
        outputs, state = self.recurrent(F.dropout(self.embedding(tokens), self.dropout, self.training), None, state)
        return outputs, state

    def features(self, outputs: Tensor, context: Tensor | None) -> Tensor:
        """What the output layer reads. outputs (..., H), context (..., D) or None -> (..., E)."""
        if context is not None:
            outputs = torch.cat([outputs, context], dim=-1)
        if self.combine is not None:
            outputs = torch.tanh(self.combine(outputs))
        return F.dropout(outputs, self.dropout, self.training)

    def project(self, features: Tensor) -> Tensor:
        """(..., E) -> logits (..., V)."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(features, weight, self.output_bias)

    def attend(self, outputs: Tensor, memory: Memory | None) -> Tensor | None:
        """outputs (B, T, H) -> context (B, T, D), or None without attention."""
        if self.attention is None or memory is None:
            return None
        context: Tensor = self.attention(self.attention.query(outputs), memory)[0]
        return context

    def forward(self, tokens: Tensor, state: State, memory: Memory | None = None) -> tuple[Tensor, State]:
        outputs, state = self.read(tokens, state)
        return self.project(self.features(outputs, self.attend(outputs, memory))), state

    def step(self, tokens: Tensor, state: State, memories: Memories) -> tuple[Tensor, State]:
        """One token for all live rows. tokens (N,), rows lane by lane -> (logits (N, V), State)."""
        outputs, state = self.read(tokens[:, None], state)
        context = self._attend_lanes(outputs[:, 0], memories)
        return self.project(self.features(outputs[:, 0], context)), state

    def _attend_lanes(self, outputs: Tensor, memories: Memories) -> Tensor | None:
        """outputs (N, H) -> context (N, D): the K beams of a request are K queries of its one memory row.

        Rows beyond those of the memories are padding."""
        if self.attention is None:
            return None
        queries, contexts, first = self.attention.query(outputs), [], 0
        for memory, width in memories:
            rows = memory.num_rows * width
            lane = queries[first : first + rows].view(memory.num_rows, width, -1)
            contexts.append(self.attention(lane, memory)[0].flatten(0, 1))
            first += rows
        contexts.append(contexts[0][:1].expand(len(outputs) - first, -1))  # padding rows are nobody's
        return torch.cat(contexts)
