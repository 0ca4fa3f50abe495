"""The parallel scan against the loop that it stands for, in values and gradients, at every length."""

import pytest
import torch
from torch import Tensor

from seqmodels import scan as module
from seqmodels.scan import linear_recurrence, scan, walk

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 100)


def make(steps: int, rows: int = 3, size: int = 4) -> list[Tensor]:
    """a in (0, 1), b, first."""
    sizes = ((rows, steps, size), (rows, steps, size), (rows, size))
    a, b, first = (torch.randn(*size, dtype=torch.double) for size in sizes)
    return [one.requires_grad_() for one in (a.sigmoid(), b, first)]


def plainly(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """As the equation says, with torch's own gradients."""
    steps = []
    for t in range(a.shape[1]):
        first = a[:, t] * first + b[:, t]
        steps.append(first)
    return torch.stack(steps, 1)


@pytest.mark.parametrize("solve", [scan, walk])
@pytest.mark.parametrize("steps", LENGTHS)
def test_both_ways_solve_it(solve, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "_solve", solve)
    given = make(steps)
    found, expected = linear_recurrence(*given), plainly(*given)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.randn_like(found)
    gradients = (torch.autograd.grad((h * weight).sum(), given) for h in (found, expected))
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-11)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(linear_recurrence, make(6))


@pytest.mark.parametrize("solve", [scan, walk])
def test_what_is_given_stays_as_it_is(solve) -> None:  # type: ignore[no-untyped-def]
    given = [one.detach() for one in make(9)]
    before = [one.clone() for one in given]
    solve(*given)
    assert all(torch.equal(one, two) for one, two in zip(given, before, strict=True))


def test_the_scan_is_as_exact_as_the_loop_over_many_steps() -> None:
    """Products of shares only shrink, so nothing grows on the way."""
    a, b, first = (one.detach() for one in make(5000, rows=2))
    exact = walk(a, b, first)
    one, two = (solve(a.float(), b.float(), first.float()) for solve in (scan, walk))
    assert (one - exact).abs().max() < 4 * (two - exact).abs().max() < 1e-5
    kept, nothing = torch.ones_like(a), torch.zeros_like(a)
    assert torch.equal(scan(kept, nothing, first), first[:, None].expand_as(a))
    assert torch.equal(scan(nothing, b, first), b)


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_on_a_cpu_a_cut_changes_no_bit(cut: int) -> None:
    a, b, first = (one.detach().float() for one in make(13, rows=5, size=7))
    whole = linear_recurrence(a, b, first)
    start = linear_recurrence(a[:, :cut], b[:, :cut], first)
    end = linear_recurrence(a[:, cut:], b[:, cut:], start[:, -1])
    assert torch.equal(torch.cat([start, end], 1), whole)
