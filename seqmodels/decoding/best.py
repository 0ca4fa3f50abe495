"""The best of many candidates, with ties in a fixed order. R requests, K hypotheses each, V vocabulary."""

import torch
from torch import Tensor

NEG_INF = float("-inf")
BLOCK = 64  # candidates whose maximum is looked at first; measured best from 16 to 256 at 7,700 tokens
FEW = 8192  # numbers of which `topk` is faster than the operations that save it


def best_candidates(scores: Tensor, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` continuations of each request, best first: scores (R, K) plus logprobs (R, K, V).

    Returns their sums and where they stand in (K, V), flat: each (R, count), or all K V where there are no more. Equals
    keep the order of their index: `topk` keeps none among equals, and among those equal to the last one it keeps any.
    One value more than needed tells whether there are equals, and whether one was left out.
    """
    if logprobs[0].numel() <= count:
        return _sums(scores, logprobs).sort(dim=1, descending=True, stable=True)
    more, index = _top(scores, logprobs, count + 1)
    values, index = more[:, :count], index[:, :count]
    equal = more[:, 1:] == values
    if not equal.any():
        return values, index
    left_out = equal[:, -1] & (values[:, -1] > NEG_INF)  # candidates at -inf never live, so any of them will do
    if left_out.any():
        requests = left_out.nonzero()[:, 0]
        first = _first_of_equals(_sums(scores[requests], logprobs[requests]), values[requests])
        values, index = (x.index_copy(0, requests, new) for x, new in zip((values, index), first, strict=True))
    index, order = index.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def _sums(scores: Tensor, logprobs: Tensor) -> Tensor:
    return (scores[:, :, None] + logprobs).flatten(1)


def _first_of_equals(totals: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """totals (R, X), their best values (R, C) -> the same values where of those equal to the last the first are taken,
    in the order of their index; and where they stand."""
    count, last = values.shape[1], values[:, -1:]
    above, equal = totals > last, totals == last
    room = count - above.sum(1, keepdim=True)
    index = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, count)
    return totals.gather(1, index), index


def _top(scores: Tensor, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` of each request by way of blocks: its best `count` sums lie in the blocks with the best maxima.

    Maxima are cheap to compute, and few; `topk` of everything takes several times as long. A rounded sum keeps the
    order of its parts, so the maximum of a block's sums is the sum with the block's maximum.
    """
    requests, width, vocab_size = logprobs.shape
    blocks = vocab_size // BLOCK
    if width * blocks <= 2 * count or logprobs.numel() <= FEW:
        return _sums(scores, logprobs).topk(count, dim=1)
    whole, device = blocks * BLOCK, scores.device
    maxima = logprobs[..., :whole].view(requests, width, blocks, BLOCK).amax(3) + scores[:, :, None]
    best = maxima.flatten(1).topk(count, dim=1, sorted=False).indices
    hypothesis = best // blocks
    first = hypothesis * vocab_size + best % blocks * BLOCK
    index = (first[:, :, None] + torch.arange(BLOCK, device=device)).flatten(1)
    before = scores.gather(1, hypothesis).repeat_interleave(BLOCK, dim=1)
    if whole < vocab_size:  # the rest is less than a block, and always looked at
        rest = torch.arange(width, device=device)[:, None] * vocab_size + torch.arange(whole, vocab_size, device=device)
        index = torch.cat([index, rest.flatten().expand(requests, -1)], dim=1)
        before = torch.cat([before, scores.repeat_interleave(vocab_size - whole, dim=1)], dim=1)
    values, where = (logprobs.flatten(1).gather(1, index) + before).topk(count, dim=1)
    return values, index.gather(1, where)
