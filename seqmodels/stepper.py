"""Stepper: a generator decoding one token at a time, which is all that the engine calls in its loop.

The same equations as `Decoder` and `Recurrent`, on weights packed once for single steps; tests hold the two together.
One kernel serves prefix and generation, so a token gives a state the same bits in either; where layers read what
attention saw, if the request has one row, for a prefix is read by one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.attention import padding_bias
from seqmodels.cells import SHARES, UPDATES, CellWeights, MinimalWeights, zoneout
from seqmodels.config import Average, Cell, ModelConfig, Weights
from seqmodels.ensemble import mean_of
from seqmodels.errors import ConfigError
from seqmodels.kernels import LINEAR, Linear, PackedLayer, PackedLinear, packed
from seqmodels.models import SequenceGenerator
from seqmodels.record import Record
from seqmodels.recurrent import Recurrent
from seqmodels.state import Memory, MemoryGroup, State

# For each group its logits (R, K, V), or (R, K, L) of the tokens on its shortlist; State; for each memory, where the
# rows looked (R, K, S).
Stepped = tuple[list[Tensor], State, list[Tensor]]
Features = tuple[Tensor, State, list[Tensor]]  # the same with what all logits are made of (N, E) in their place

Read = Callable[[Tensor], Tensor]
LayerStep = Callable[..., tuple[Tensor, ...]]

# Numbers (256 MiB) that may be kept of what the first layer makes of each token, to be looked up at each step.
LARGEST_TABLE = 2**26


@dataclass(frozen=True)
class Shortlisted(Record):
    """The rows of the output layer that requests need, so that no step has to look for them.

    words: (R, L) the tokens that each may write, in order. weight: (R, L, E). bias: (R, L), -inf where a request has
    fewer.
    """

    words: Tensor
    weight: Tensor
    bias: Tensor

    def spread(self, listed: Tensor, vocab_size: int) -> Tensor:
        """Numbers of the tokens on the lists (R, K, L) -> of all (R, K, V), -inf of the others."""
        everyone = listed.new_full((*listed.shape[:2], vocab_size), float("-inf"))
        return everyone.scatter_(2, self.words[:, None].expand_as(listed), listed)

    def listed(self, everyone: Tensor) -> Tensor:
        """Numbers of all tokens (R, K, V) -> of those on the lists (R, K, L)."""
        return everyone.gather(2, self.words[:, None].expand(-1, everyone.shape[1], -1))


@dataclass(frozen=True)
class Group:
    """Requests that stand side by side in a step: R of them with K rows each, request by request.

    memory: what their rows look at, a row for each request; None without attention. shortlist: what `shorten` made of
    the tokens that each may write; None where they may write all.
    """

    num_requests: int
    width: int
    memory: Any = None
    shortlist: Shortlisted | None = None


Groups = Sequence[Group]


class Decodes(Protocol):
    """What the engine asks of a model. A memory is whatever `encode` returns; the logits of a step are the engine's to
    write over."""

    config: ModelConfig
    device: torch.device
    attends: bool  # whether steps look at a memory
    reads_memory: bool  # whether `read` does too, since states depend on what was seen
    output_attentions: bool  # and can say where
    state_width: int
    vocab_size: int
    output_size: int  # of what the logits are made of

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> Any: ...
    def start(self, memory: Any, rows: int) -> State: ...
    def shorten(self, words: Tensor) -> Shortlisted: ...
    def read(self, tokens: Tensor, lengths: Tensor, state: State, groups: Groups = ()) -> State: ...
    def step(self, tokens: Tensor, state: State, groups: Groups) -> Stepped: ...


class Stepper:
    """Made from a model in evaluation mode, whose weights must not change afterwards."""

    def __init__(self, model: SequenceGenerator, weights: Weights = "float32") -> None:
        """weights: in which the step computes; the encoder and what attention projects stay as they are. Raises
        ConfigError for int8 on a GPU, for float16 and bfloat16 on a CPU, and for any other name."""
        if weights not in LINEAR:
            raise ConfigError(f"decoder_weights is {weights!r}; choose one of {', '.join(LINEAR)}")
        decoder, linear = model.decoder, LINEAR[weights]
        self.config = model.config
        self.vocab_size, self.output_size = decoder.output_matrix.shape
        self.device = decoder.output_bias.device
        self.attends = self.output_attentions = decoder.attention is not None
        self.reads_memory = decoder.above is not None
        self.state_width = decoder.state_width
        self._model = model
        self._encoder = model.encoder and packed(model.encoder)
        self._decoder = decoder
        embedding = decoder.embedding.weight.detach()
        first = decoder.recurrent.weights()[0]
        self._looks_up = len(embedding) * len(first.input) <= LARGEST_TABLE
        self._below = _Stack(decoder.recurrent, linear, embedding if self._looks_up else None)
        self._above = _Stack(decoder.above, linear) if decoder.above else None
        self._combine = decoder.combine and linear(decoder.combine.weight, decoder.combine.bias)
        self._project = linear(decoder.output_matrix, decoder.output_bias)
        # Packed too, though seldom called: other kernels need more rows before a row's bits are its own.
        self._keys = _packed(getattr(decoder.attention, "project_keys", None))
        self._query = _packed(getattr(decoder.attention, "project_query", None))
        self._gate = decoder.gate and PackedLinear(decoder.gate.weight / 2, decoder.gate.bias / 2)
        self._bridge = _packed(decoder.bridge)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> Memory:
        """inputs as the encoder takes them -> Memory with the attention's keys in place."""
        assert self._encoder is not None, "a language model has nothing to encode"
        memory: Memory = self._encoder(inputs, lengths, None)[0]
        if not self.attends:
            return memory
        return memory.changed(keys=self._keys(memory.values), bias=padding_bias(memory.mask, memory.values.dtype))

    def start(self, memory: Memory | None, rows: int) -> State:
        """The state of each row before its first token."""
        if memory is None:
            return self._model.start(None, rows)
        return State(self._bridge(memory.summary).tanh_())

    def shorten(self, words: Tensor) -> Shortlisted:
        """words (R, L): the tokens that each request may write, the padding token where it has fewer."""
        assert self.config.decoder is not None
        bias = self._decoder.output_bias[words].masked_fill(words == self.config.decoder.pad_token_id, float("-inf"))
        return Shortlisted(words, F.embedding(words, self._decoder.output_matrix), bias)

    def read(self, tokens: Tensor, lengths: Tensor, state: State, groups: Groups = ()) -> State:
        """The state after prefixes (B, T) whose tokens are given, each of its own length (B,), 0 included. groups: of
        the rows, where states depend on memories."""
        for t, step in enumerate(tokens.unbind(1)):
            *_, after = self._pass(step, state, groups)
            state = State(torch.where((t < lengths)[:, None], after.values, state.values))
        return state

    def step(self, tokens: Tensor, state: State, groups: Groups) -> Stepped:
        """One token for all live rows. tokens (N,), rows group by group -> (logits of each group, of float32, State,
        and for each group the weights (R, K, S) of the attention; none where the model has none).

        Rows beyond those of the groups are padding, and what they get is nobody's.
        """
        outputs, state, weights = self.features(tokens, state, groups)
        return self.logits(outputs, groups), state, weights

    def features(self, tokens: Tensor, state: State, groups: Groups) -> Features:
        """All of a step but its logits, which are made of the features (N, E). Looks at no shortlist."""
        outputs, context, weights, state = self._pass(tokens, state, groups)
        if context is not None:
            outputs = torch.cat([outputs, context], dim=1)
        if self._combine is not None:
            outputs = self._combine(outputs).tanh_()
        return outputs, state, weights

    def _pass(self, tokens: Tensor, state: State, groups: Groups) -> tuple[Tensor, Tensor | None, list[Tensor], State]:
        """tokens (N,) through embedding and recurrence: outputs (N, H), what attention saw (N, D), where it looked."""
        x = tokens if self._looks_up else self._decoder.embedding(tokens)
        outputs, after = self._below(x, state.values[:, : self._below.state_width])
        context, weights = self._attend(outputs, groups) if self.attends and groups else (None, [])
        if self._above is not None:
            assert context is not None, "layers above read what the first one saw, so there must be a memory"
            outputs, more = self._above(
                torch.cat([outputs, context], dim=1), state.values[:, self._below.state_width :]
            )
            after = torch.cat([after, more], dim=1)
        return outputs, context, weights, State(after)

    def logits(self, outputs: Tensor, groups: Groups) -> list[Tensor]:
        """outputs (N, E) -> of each group (R, K, V), or (R, K, L) of the tokens on its shortlist."""
        everyone = None
        if any(group.shortlist is None for group in groups):
            everyone = self._project(outputs).float()  # of all rows, since few might get other bits
        logits, first = [], 0
        for group in groups:
            rows = slice(first, first + group.num_requests * group.width)
            if group.shortlist is None:
                assert everyone is not None
                logits.append(everyone[rows].view(group.num_requests, group.width, -1))
            else:
                asked = outputs[rows].view(group.num_requests, group.width, -1)
                logits.append(torch.baddbmm(group.shortlist.bias[:, None], asked, group.shortlist.weight.mT))
            first = rows.stop
        return logits

    def _attend(self, outputs: Tensor, groups: Groups) -> tuple[Tensor, list[Tensor]]:
        """outputs (N, H) -> context (N, D), weights (R, K, S) of each group: the K beams of a request are K queries of
        its one memory row."""
        attention = self._decoder.attention
        assert attention is not None
        queries, contexts, weights, first = self._query(outputs), [], [], 0
        for group in groups:
            rows = group.num_requests * group.width
            lane = queries[first : first + rows].view(group.num_requests, group.width, -1)
            context, looked = attention(lane, group.memory)
            contexts.append(context.flatten(0, 1))
            weights.append(looked)
            first += rows
        if first < len(outputs):
            contexts.append(contexts[0][:1].expand(len(outputs) - first, -1))
        context = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
        return context if self._gate is None else context * _sigmoid_of_half(self._gate(outputs)), weights


class Ensemble:
    """Several steppers that decode as one: their states stand side by side, and their predictions are averaged.

    `probability` averages probabilities; `logprob` averages log-probabilities, which counts a member's doubt for more
    (the search normalises what it gets). Where they looked is the mean over those that attend. Members read the same
    inputs and write the same vocabulary.
    """

    def __init__(self, members: Sequence[Decodes], average: Average = "probability") -> None:
        """Raises ConfigError where the members' vocabularies differ in size, or their inputs in kind."""
        first = members[0].config
        for member in members[1:]:
            if member.vocab_size != members[0].vocab_size:
                raise ConfigError(f"an ensemble's members write {members[0].vocab_size} and {member.vocab_size} tokens")
            if member.config.input != first.input:
                raise ConfigError(f"an ensemble's members read {first.input} and {member.config.input}")
        self.config, self.device = first, members[0].device
        self.vocab_size, self.output_size = members[0].vocab_size, sum(member.output_size for member in members)
        self.attends = any(member.attends for member in members)
        self.reads_memory = any(member.reads_memory for member in members)
        # Positions of pictures are the cells of each member's own grid; there is no mean over different ones.
        self.output_attentions = self.attends and len({member.config.grid for member in members}) == 1
        self.state_width = sum(member.state_width for member in members)
        self._members, self._average = members, average

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> MemoryGroup:
        return MemoryGroup(tuple(member.encode(inputs, lengths) for member in self._members))

    def start(self, memory: MemoryGroup | None, rows: int) -> State:
        own = memory.members if memory else [None] * len(self._members)
        return _side_by_side([m.start(one, rows) for m, one in zip(self._members, own, strict=True)])

    def shorten(self, words: Tensor) -> Shortlisted:
        """The members' weights side by side along E, their biases along a further axis."""
        own = [member.shorten(words) for member in self._members]
        weight, bias = torch.cat([one.weight for one in own], dim=2), torch.stack([one.bias for one in own], dim=2)
        return Shortlisted(words, weight, bias)

    def read(self, tokens: Tensor, lengths: Tensor, state: State, groups: Groups = ()) -> State:
        after = [
            member.read(tokens, lengths, own, [self._own_group(group, index) for group in groups])
            for index, (member, own) in enumerate(zip(self._members, self._own(state), strict=True))
        ]
        return _side_by_side(after)

    def step(self, tokens: Tensor, state: State, groups: Groups) -> Stepped:
        predictions, states, looks = [], [], []
        for index, (member, own) in enumerate(zip(self._members, self._own(state), strict=True)):
            logits, after, weights = member.step(tokens, own, [self._own_group(group, index) for group in groups])
            predictions.append(logits)
            states.append(after)
            if member.attends and self.output_attentions:
                looks.append(weights)
        means = [self._mean(lane) for lane in zip(*predictions, strict=True)]
        return means, _side_by_side(states), [mean_of(lane) for lane in zip(*looks, strict=True)]

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        """Each member's logits (R, K, V) -> logits of their mean, as high as theirs are in the mean: a repetition
        penalty depends on the height, which the search's softmax does not."""
        logprobs = [one.log_softmax(-1) for one in logits]
        if self._average == "logprob":
            mean = mean_of(logprobs)
        else:
            mean = reduce(lambda one, two: torch.stack([one, two]).logsumexp(0), logprobs) - math.log(len(logits))
        # The first of a shortlist is never its padding.
        return mean + mean_of([high[..., :1] - low[..., :1] for high, low in zip(logits, logprobs, strict=True)])

    def _own_group(self, group: Group, index: int) -> Group:
        """What one member sees of a group."""
        shortlist = group.shortlist
        if shortlist is not None:
            sizes = [member.output_size for member in self._members]
            weight = torch.split(shortlist.weight, sizes, dim=2)[index]
            shortlist = Shortlisted(shortlist.words, weight, shortlist.bias[..., index])
        return replace(group, memory=group.memory and group.memory.members[index], shortlist=shortlist)

    def _own(self, state: State) -> list[State]:
        """Each member's columns."""
        widths = [member.state_width for member in self._members]
        return [State(values.contiguous()) for values in torch.split(state.values, widths, dim=1)]


def _packed(layer: nn.Linear | None) -> Callable[[Tensor], Tensor]:
    """The layer on packed weights, for inputs of any shape (..., D); what is given where there is none."""
    if layer is None:
        return lambda x: x
    return PackedLayer(layer)


def _side_by_side(states: Sequence[State]) -> State:
    return State(torch.cat([state.values for state in states], dim=1))


class _Stack:
    """One step of a stack: (x (N, D), or token ids (N,), and its columns of a State) -> (outputs (N, H), the columns
    after)."""

    def __init__(self, recurrent: Recurrent, linear: Callable[..., Linear], embedding: Tensor | None = None) -> None:
        """embedding (V, D): given where the first layer is to look up what it makes of each token."""
        first, *others = recurrent.weights()
        self._layers = [_step(recurrent, first, linear, embedding)]
        self._layers += [_step(recurrent, layer, linear) for layer in others]
        self._hidden_size, self._residual = recurrent.hidden_size, recurrent.residual
        self.state_width = recurrent.state_width

    def __call__(self, x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.split(columns, self._hidden_size, dim=1)  # hidden of every layer, then cell of every layer
        after = []
        for index, layer in enumerate(self._layers):
            new = layer(x, *parts[index :: len(self._layers)])
            x = new[0] + x if self._residual and index > 0 else new[0]
            after.append(new)
        return x, torch.cat([part for kind in zip(*after, strict=True) for part in kind], dim=1)


class _Sums:
    """What gates and candidates are made of: (x (N, D), hidden (N, H)) -> W_x x + W_h h + b (N, G·H), one product."""

    def __init__(self, weights: CellWeights, linear: Callable[..., Linear]) -> None:
        weight = torch.cat([weights.input, weights.recurrent], 1)
        self._linear = linear(weight, weights.input_bias + weights.recurrent_bias)

    def __call__(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self._linear(torch.cat([x, hidden], 1))


class _SumsOfTokens:
    """The same of token ids (N,): W_x x + b is one of V vectors, which are computed once and looked up."""

    def __init__(self, weights: CellWeights, linear: Callable[..., Linear], embedding: Tensor) -> None:
        self._table = F.linear(embedding, weights.input, weights.input_bias + weights.recurrent_bias).detach()
        self._linear = linear(weights.recurrent)

    def __call__(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        return self._linear(hidden, F.embedding(tokens, self._table))


def _sums(weights: CellWeights, linear: Callable[..., Linear], embedding: Tensor | None) -> _Sums | _SumsOfTokens:
    return _Sums(weights, linear) if embedding is None else _SumsOfTokens(weights, linear, embedding)


def _read(weight: Tensor, bias: Tensor | None, linear: Callable[..., Linear], embedding: Tensor | None) -> Read:
    """x (N, D) -> W x + b (N, O), or the same of token ids (N,)."""
    if embedding is None:
        return linear(weight, bias)
    return partial(F.embedding, weight=F.linear(embedding, weight, bias).detach())


class _VanillaStep:
    """One step of one layer: (x (N, D), hidden (N, H)) -> (hidden,). The equations stand in cells.py.

    embedding (V, D): given to a layer that reads token ids (N,) in place of x.
    """

    def __init__(
        self, weights: CellWeights, cell: Cell, linear: Callable[..., Linear], embedding: Tensor | None = None
    ) -> None:
        self._activate = torch.relu_ if cell == "rnn_relu" else torch.tanh_
        self._sums = _sums(weights, linear, embedding)

    def __call__(self, x: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return (self._activate(self._sums(x, hidden)),)


class _GruStep:
    """(x (N, D), hidden (N, H)) -> (hidden,). The candidate needs its two products apart, so they are not packed."""

    def __init__(
        self, weights: CellWeights, cell: Cell, linear: Callable[..., Linear], embedding: Tensor | None = None
    ) -> None:
        halves = _halves(weights, gates=3, sigmoids=(0, 1))  # torch's order: reset, update, candidate
        self._from_input = _read(halves.input, halves.input_bias, linear, embedding)
        self._from_hidden = linear(halves.recurrent, halves.recurrent_bias)

    def __call__(self, x: Tensor, hidden: Tensor) -> tuple[Tensor]:
        both = 2 * hidden.shape[1]
        from_input, from_hidden = self._from_input(x), self._from_hidden(hidden)
        reset, update = _sigmoid_of_half(from_input[:, :both] + from_hidden[:, :both]).chunk(2, dim=1)
        candidate = torch.addcmul(from_input[:, both:], reset, from_hidden[:, both:]).tanh_()
        return (candidate.lerp(hidden, update),)


class _LstmStep:
    """(x (N, D), hidden (N, H), cell (N, H)) -> (hidden, cell). One product gives all gates of a step."""

    def __init__(
        self, weights: CellWeights, cell: Cell, linear: Callable[..., Linear], embedding: Tensor | None = None
    ) -> None:
        halves = _halves(weights, gates=4, sigmoids=(0, 1, 3))
        # torch's order is i f g o; the three sigmoids stand together here, the candidate last.
        parts = (halves.input, halves.recurrent, halves.input_bias, halves.recurrent_bias)
        order = [torch.cat([i, f, o, g]) for i, f, g, o in (part.chunk(4) for part in parts)]
        self._sums = _sums(CellWeights(*order), linear, embedding)

    def __call__(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        size = hidden.shape[1]
        gates, candidate = torch.split(self._sums(x, hidden).tanh_(), [3 * size, size], dim=1)
        i, f, o = torch.split(gates.add_(1).mul_(0.5), size, dim=1)
        new_cell = torch.addcmul(f * cell, i, candidate)
        return new_cell.tanh().mul_(o), new_cell


class _NormalisedStep:
    """(x (N, D), hidden (N, H), an LSTM's cell (N, H)?) -> (hidden, cell?), by the very equations of cells.py."""

    def __init__(
        self, weights: CellWeights, cell: Cell, linear: Callable[..., Linear], embedding: Tensor | None = None
    ) -> None:
        self._update, self._weights = UPDATES[cell], weights
        self._from_input = _read(weights.input, None, linear, embedding)
        self._from_hidden = linear(weights.recurrent)

    def __call__(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return self._update(self._from_input(x), self._from_hidden(parts[0]), parts, self._weights).parts


class _MinimalStep:
    """(x (N, D), hidden (N, H)) -> (hidden,). With a table of tokens, without any product."""

    def __init__(
        self, weights: MinimalWeights, cell: Cell, linear: Callable[..., Linear], embedding: Tensor | None = None
    ) -> None:
        self._shares, self._weights = SHARES[cell], weights
        self._from_input = _read(weights.input, None, linear, embedding)

    def __call__(self, x: Tensor, hidden: Tensor) -> tuple[Tensor]:
        keep, candidate = self._shares(self._from_input(x), self._weights)
        return (keep * hidden + (1 - keep) * candidate,)


class _ZonedStep:
    """The expectation under zoneout of what a step leaves behind."""

    def __init__(self, step: LayerStep, rates: Sequence[float]) -> None:
        self._step, self._rates = step, rates

    def __call__(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        after = self._step(x, *parts)
        return tuple(zoneout(old, new, rate, None) for old, new, rate in zip(parts, after, self._rates, strict=True))


def _step(
    recurrent: Recurrent,
    weights: CellWeights | MinimalWeights,
    linear: Callable[..., Linear],
    embedding: Tensor | None = None,
) -> LayerStep:
    """One step of one layer: (x (N, D), the parts of its state (N, H)) -> those parts. embedding: see _VanillaStep."""
    step: LayerStep
    if isinstance(weights, MinimalWeights):
        step = _MinimalStep(weights, recurrent.cell, linear, embedding)
    elif weights.input_gain is not None:
        step = _NormalisedStep(weights, recurrent.cell, linear, embedding)
    else:
        step = _STEPS[recurrent.cell](weights, recurrent.cell, linear, embedding)
    return _ZonedStep(step, recurrent.zoneouts) if any(recurrent.zoneouts) else step


def _halves(weights: CellWeights, gates: int, sigmoids: tuple[int, ...]) -> CellWeights:
    """Weights with the rows of some gates halved, since sigmoid(x) = (tanh(x / 2) + 1) / 2.

    Halving is exact. One tanh for all gates is faster, and torch's sigmoid gives an element other last bits when it
    stands at the end of a tensor, so that a row's would depend on the number of rows.
    """
    scale = torch.ones(gates, 1, device=weights.input.device)
    scale[list(sigmoids)] = 0.5
    scale = scale.expand(-1, weights.recurrent.shape[1]).reshape(-1, 1)
    return CellWeights(
        weights.input * scale,
        weights.recurrent * scale,
        weights.input_bias * scale[:, 0],
        weights.recurrent_bias * scale[:, 0],
    )


def _sigmoid_of_half(x: Tensor) -> Tensor:
    """sigmoid(2 x), in place."""
    return x.tanh_().add_(1).mul_(0.5)


_STEPS: dict[Cell, type[_VanillaStep | _GruStep | _LstmStep]] = {
    "rnn_tanh": _VanillaStep,
    "rnn_relu": _VanillaStep,
    "gru": _GruStep,
    "lstm": _LstmStep,
}
