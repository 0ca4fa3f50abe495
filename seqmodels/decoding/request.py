"""Request: what is asked of an engine; and the events that answer it. Tensors and numbers, no text and no HTTP."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.saved import SavedState
from seqmodels.decoding.search import Hypothesis
from seqmodels.errors import SeqModelsError
from seqmodels.state import State


@dataclass
class Times:
    """When a request came, got rows, had its first token and was answered, in `time.monotonic` seconds; None till then.
    Of a forward pass, the first token is the answer."""

    submitted: float | None = None
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_tokens: int = 0  # of the longest output; 0 of a forward pass


@dataclass(frozen=True, eq=False)
class Request:
    """One request for output. All that its answer depends on is here.

    inputs: (S,) token ids, (S, D) features, (C, H, W) image or (S, C, H, W) frames; None for a language model.
    watch: called with (output index, its generated tokens so far) after each step; true ends that output ("stop").
    shortlist: (L,) the tokens that it may write; None for all. More than 1,024 cost more than all, and are not heeded.
    deadline: a time.monotonic() after which the answer is of no use. priority: higher goes first. client: for whom;
    of equal priority, those with the fewest rows in use go first.
    state: what it goes on from, with the same inputs; the prefix then begins with all tokens of that state.
    return_state: whether its hypotheses come with theirs. times: filled in by who works on it.
    """

    id: str
    inputs: Tensor | None
    params: SearchParams
    prefix: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    force_words: tuple[tuple[int, ...], ...] = ()
    shortlist: Tensor | None = None
    seed: int = 0
    stream: bool = False
    watch: Callable[[int, Sequence[int]], bool] | None = None
    deadline: float | None = None
    priority: int = 0
    client: str = ""
    state: SavedState | None = None
    return_state: bool = False
    times: Times = field(default_factory=Times)

    @property
    def num_continued(self) -> int:
        """How many of the prefix's last tokens are output of what it goes on from, with no text given since."""
        if self.state is None or len(self.prefix) > len(self.state.tokens):
            return 0
        return self.state.position.num_generated

    @property
    def first_draw(self) -> tuple[int, int]:
        """The step and the output index at which its draws begin."""
        return (self.state.position.step, self.state.position.output) if self.state else (0, 0)

    @property
    def room(self) -> int:
        """Positions that its tokens may fill, prefix included."""
        return len(self.prefix) + self.params.max_new_tokens


@dataclass(frozen=True)
class Progress:
    """New tokens of one output, which can no longer change. Without beams, and where they were asked for, also what a
    Hypothesis will tell of each: logprobs and top_logprobs."""

    request_id: str
    index: int
    tokens: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def then(self, more: "Progress") -> "Progress":
        """Both as one, of the same output."""
        return replace(
            self,
            tokens=self.tokens + more.tokens,
            logprobs=None if self.logprobs is None else self.logprobs + (more.logprobs or []),
            top_logprobs=None if self.top_logprobs is None else self.top_logprobs + (more.top_logprobs or []),
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """What a forward pass says of labels or targets, as `ForwardRequest` tells; state: where that leaves the input, one
    row, for a later request to go on from. likeliest: of a text that is scored, the likeliest tokens at each place and
    their log-probabilities (T, K), best first."""

    values: Tensor
    state: State | None = None
    likeliest: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Finished:
    """The whole answer: hypotheses of a generator, or what a forward pass says."""

    request_id: str
    result: list[Hypothesis] | Scores


@dataclass(frozen=True)
class Failed:
    request_id: str
    error: SeqModelsError


Event = Progress | Finished | Failed
