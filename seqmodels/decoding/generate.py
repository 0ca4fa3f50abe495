"""Offline generation: the engine, run until it has no work."""

from collections.abc import Sequence

from seqmodels.decoding.constraints import WordEdges
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.padding import ROW_FLOOR
from seqmodels.decoding.request import Failed, Finished, Request
from seqmodels.decoding.search import Hypothesis
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Decodes


def generate(
    model: SequenceGenerator | Decodes,
    requests: Sequence[Request],
    max_rows: int = 256,
    row_floor: int = ROW_FLOOR,
    edges: WordEdges | None = None,
) -> list[list[Hypothesis]]:
    """The hypotheses of each request, in order. Raises what a request failed with."""
    engine = Engine(model, max_rows, row_floor=row_floor, edges=edges)
    for request in requests:
        engine.submit(request)
    results: dict[str, list[Hypothesis]] = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and isinstance(event.result, list):
                results[event.request_id] = event.result
    return [results[request.id] for request in requests]
