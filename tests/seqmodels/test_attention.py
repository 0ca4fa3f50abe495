"""Attention: a query's bits are its own."""

import pytest
import torch

from seqmodels.attention import Attention
from seqmodels.config import AttentionKind
from seqmodels.state import Memory


@torch.inference_mode()
@pytest.mark.parametrize("positions", [32, 49])
@pytest.mark.parametrize("kind", ["dot", "general", "additive"])
def test_where_a_query_looks_does_not_depend_on_how_many_others_ask(kind: AttentionKind, positions: int) -> None:
    """To the last bit, at sizes at which products of a matrix and a vector do depend on that."""
    torch.manual_seed(0)
    attention = Attention(kind, 512, 512)
    memory = Memory(torch.randn(8, positions, 512), torch.ones(8, positions, dtype=torch.bool), torch.zeros(8, 1))
    memory = attention.prepare(memory)
    queries = torch.randn(8, 5, 512)
    context, weights = attention(attention.query(queries), memory)
    for rows in (1, 2, 3):
        alone = Memory(*(getattr(memory, name)[:rows] for name in ("values", "mask", "summary", "keys", "bias")))
        one = attention(attention.query(queries)[:rows], alone)
        assert torch.equal(one[0], context[:rows]) and torch.equal(one[1], weights[:rows])
