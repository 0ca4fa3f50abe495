"""SequenceClassifier, SequenceTagger and SequenceGenerator: short combinations of the parts.

All three share one call, `out = model(**batch)`, so one task-blind loop trains everything. A generator adds `encode`
and `start`; a search goes on from there step by step, through `Stepper`.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.config import ModelConfig
from seqmodels.crf import LinearChain
from seqmodels.decoder import Decoder, Pass
from seqmodels.encoders import RecurrentEncoder, build_encoder
from seqmodels.errors import UnsupportedError
from seqmodels.losses import IGNORE, Output, labelled, measured
from seqmodels.pooling import POOLS, Pool, Steps
from seqmodels.state import Memory, State

# Logits (..., C), what each should have been (...), and the State after the batch of those that carry one.
Targeted = tuple[Tensor, Tensor, State | None]


class Labeller(nn.Module):
    """Encoder + linear: what classifier and tagger have in common. They differ in what the linear layer reads."""

    pool: Pool

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.encoder is not None
        self.config = config
        self.encoder = build_encoder(config.encoder)
        pools = config.architecture == "classifier" and config.pooling == "last"
        size = self.encoder.summary_size if pools else self.encoder.output_size
        self.head = nn.Linear(size, len(config.labels))
        self._weights = [config.class_weights.get(label, 1.0) for label in config.labels]

    def forward(self, inputs: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Output:
        """labels: (B,) of a classifier, (B, S) of a tagger, IGNORE where a position has none; (B, C) of 0 and 1 where
        several may be right; numbers (B, K) of a regression."""
        logits, targets, _ = self.target_logits(inputs, labels, lengths)
        return self._loss(logits, targets)

    def _loss(self, logits: Tensor, labels: Tensor) -> Output:
        weights = self._each_weight(logits)[labels.clamp(min=0)] if self.config.class_weights else None
        return labelled(logits, labels, self.config.label_smoothing, weights)

    def _each_weight(self, logits: Tensor) -> Tensor:
        """Of each label (C,), in float32 under autocast too."""
        return torch.tensor(self._weights, device=logits.device)

    def target_logits(self, inputs: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Targeted:
        """What `forward` compares: logits (..., C) with labels (...), numbers (B, K) with numbers."""
        return self.predict(inputs, lengths)[0], labels, None

    def start(self, rows: int) -> State:
        """What each row of an input in pieces begins from: the encoder's columns, then those that pooling carries.
        Raises UnsupportedError where an input cannot come in pieces."""
        self._check_pieces()
        assert isinstance(self.encoder, RecurrentEncoder)
        encoder = self.encoder.start(rows)
        return _joined(encoder, self.pool.start(rows).to(encoder.values.device))

    def predict(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """What `Output.logits` says, divided by the temperature; and where a State is given, that of `start` or of what
        these inputs go on from, the State after them. Raises UnsupportedError as `start` does."""
        own, before = self._parts(state, inputs)
        memory, after = self.encoder(inputs, lengths, own)
        features, carried = self.pool(memory, before)
        return self._logits(features) / self.config.temperature, None if after is None else _joined(after, carried)

    def _parts(self, state: State | None, inputs: Tensor) -> tuple[State | None, Tensor]:
        """The encoder's columns and those that pooling carries."""
        nothing = self.pool.start(len(inputs)).to(inputs.device)
        if state is None:
            return None, nothing
        self._check_pieces()
        own, carried = state.values.tensor_split([state.width - nothing.shape[1]], dim=1)
        return State(own), carried

    def _check_pieces(self) -> None:
        if reason := self.config.needs_whole:
            raise UnsupportedError(f"an input is read as a whole here, because {reason}; send it without a state")

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(features, self.config.dropout, self.training))
        return logits


class SequenceTagger(Labeller):
    """Encoder + linear per step: one label per position, each on its own or, with `crf`, by its neighbours too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pool = Steps()
        self.crf = LinearChain(len(config.labels)) if config.crf else None

    def forward(self, inputs: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Output:
        """As of every Labeller. With a CRF the loss is of each row's labels as one sequence; nll stays that of each
        label, by what `predict` gives it. A label that the model does not have is no part of the sequence here, though
        its word is one of those that a served answer labels."""
        if self.crf is None:
            return super().forward(inputs, labels, lengths)
        memory, _ = self.encoder(inputs, lengths, None)
        scores, counted = self._logits(memory.values).float(), labels != IGNORE
        costs, logprobs = self.crf(scores, labels, counted)
        out = labelled(logprobs / self.config.temperature, labels)
        return replace(out, loss=costs.sum() / out.num_targets.clamp(min=1))

    def target_logits(self, inputs: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Targeted:
        return self.predict(inputs, lengths, labelled=labels != IGNORE)[0], labels, None

    def predict(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        state: State | None = None,
        labelled: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """labelled (B, S): at which positions labels are asked for, which a CRF has to know; all where left out."""
        if self.crf is None or state is not None:
            return super().predict(inputs, lengths, state)
        memory, _ = self.encoder(inputs, lengths, None)
        scores = self._logits(memory.values).float()
        logprobs = self.crf.logprobs(scores, memory.mask if labelled is None else labelled)
        return logprobs / self.config.temperature, None


class SequenceClassifier(Labeller):
    """Encoder + pooling + linear: one label per row, or several, or numbers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pool = POOLS[config.pooling](self.encoder.output_size)

    def predict(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        logits, state = super().predict(inputs, lengths, state)
        match self.config.problem_type:
            case "multi_label_classification":  # each label is a question of its own: no or yes
                logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
            case "regression":  # what the layer computes has mean 0 and deviation 1 in the training split
                logits = logits.float()  # under autocast too: 16 bits do not hold 2,005
                mean, deviations = (logits.new_tensor(x) for x in (self.config.target_mean, self.config.target_std))
                logits = mean + logits * deviations
        return logits, state

    def _loss(self, logits: Tensor, labels: Tensor) -> Output:
        match self.config.problem_type:
            case "multi_label_classification":
                weights = torch.where(labels == 1, self._each_weight(logits), 1.0)
                return labelled(logits, labels, self.config.label_smoothing, weights)
            case "regression":
                return measured(logits, labels, logits.new_tensor(self.config.target_std))
        return super()._loss(logits, labels)


class SequenceGenerator(nn.Module):
    """Optional encoder + decoder: text out. Without an encoder it is a language model."""

    share_done = 0.0  # of its training; a training run moves it, for scheduled sampling

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.decoder is not None
        self.config = config
        self.encoder = build_encoder(config.encoder) if config.encoder else None
        sizes = (self.encoder.output_size, self.encoder.summary_size) if self.encoder else (None, None)
        self.decoder = Decoder(config.decoder, *sizes)

    def forward(
        self,
        labels: Tensor,
        label_lengths: Tensor,
        inputs: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
    ) -> Output:
        """labels (B, T+1): BOS w1 ... wn EOS and padding; each token but the first is a target.

        For truncated back-propagation of a language model, `state` is where the last chunk ended, and labels begin
        with that chunk's last token. Only real targets are projected to the vocabulary.
        """
        real = _targets(labels, label_lengths)
        places = _places(real)
        memory = None if inputs is None else self.encode(inputs, lengths)
        passed, features = self._read(self._sampled(labels, real, places, memory, state), memory, state)
        features = _at(features, places)  # (M, E) for the M real targets
        out = labelled(self.decoder.project(features), _at(labels[:, 1:], places), self.config.label_smoothing)
        penalty = self._penalty(passed, features, real, memory)
        return replace(out, loss=out.loss + penalty, state=passed.state)

    def target_logits(
        self,
        labels: Tensor,
        label_lengths: Tensor,
        inputs: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
    ) -> Targeted:
        """What `forward` compares: logits (M, V) with the M real targets (M,); and the State after them."""
        places = _places(_targets(labels, label_lengths))
        memory = None if inputs is None else self.encode(inputs, lengths)
        passed, features = self._read(labels, memory, state)
        return self.decoder.project(_at(features, places)), _at(labels[:, 1:], places), passed.state

    def logprobs(
        self, labels: Tensor, label_lengths: Tensor, inputs: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """The log-probability in nats of each target given those before it: (B, T), 0 beyond a row's end."""
        return chosen(self.predict(labels, inputs, lengths), labels, label_lengths)

    def predict(self, labels: Tensor, inputs: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The log-probability of every token at each place of labels (B, T+1), given what stands before: (B, T, V)."""
        memory = None if inputs is None else self.encode(inputs, lengths)
        _, features = self._read(labels, memory, None)
        return self.decoder.project(features).float().log_softmax(-1)

    def _read(self, labels: Tensor, memory: Memory | None, state: State | None) -> tuple[Pass, Tensor]:
        """What the recurrence makes of labels (B, T+1), and what the output layer reads (B, T, E)."""
        state = state if state is not None else self.start(memory, len(labels))
        passed = self.decoder.read(labels[:, :-1], state, memory)
        return passed, self.decoder.features(passed.outputs, passed.context)

    def _sampled(
        self, labels: Tensor, real: Tensor, places: Tensor, memory: Memory | None, state: State | None
    ) -> Tensor:
        """Labels (B, T+1) to read, where a share of those that are given is replaced by what the model would have
        chosen at that place. A first pass reads what is given, so that no recurrence has to stop at each step."""
        assert self.config.decoder is not None
        share = self.config.decoder.scheduled_sampling * self.share_done
        if not (self.training and share > 0):
            return labels
        with torch.no_grad():
            _, features = self._read(labels, memory, state)
            drawn = self.decoder.project(_at(features, places)).float().softmax(-1).multinomial(1)[:, 0]
            chosen = labels[:, 1:].flatten().index_copy(0, places, drawn).view_as(real)
            replaced = real & (torch.rand(real.shape, device=real.device) < share)
        return torch.cat([labels[:, :1], torch.where(replaced, chosen, labels[:, 1:])], dim=1)

    def _penalty(self, passed: Pass, features: Tensor, real: Tensor, memory: Memory | None) -> Tensor | float:
        """Activation regularisation, and temporal (Merity et al. 2017), as means over real positions; and the doubly
        stochastic one of attention (Xu et al. 2015), as each row's mean over its memory's real positions, which counts
        by the row's targets, as all of a loss does that is to add up over batches.

        features: (M, E), of real positions alone; real: (B, T).

        As in the authors' code, the first is of what the output layer reads, dropout included, and the second of the
        last layer's outputs before it, within the steps at hand: none between two chunks of running text.
        """
        assert self.config.decoder is not None
        alpha, beta = self.config.decoder.activation_penalty, self.config.decoder.temporal_activation_penalty
        penalty: Tensor | float = 0.0
        if alpha > 0:
            penalty = penalty + alpha * features.float().square().sum() / max(1, features.numel())
        if beta > 0:
            penalty = penalty + beta * _mean_square(passed.outputs[:, 1:] - passed.outputs[:, :-1], real[:, 1:])
        if self.config.decoder.attention_penalty > 0 and passed.weights is not None and memory is not None:
            looks = (passed.weights.float() * real[:, :, None]).sum(1)  # (B, S), 1 where each place is seen once in all
            each = ((1 - looks).square() * memory.mask).sum(1) / memory.mask.sum(1)
            targets = real.sum(1)
            penalty = penalty + self.config.decoder.attention_penalty * (each * targets).sum() / targets.sum()
        return penalty

    def encode(self, inputs: Tensor, lengths: Tensor | None = None) -> Memory:
        """inputs as the encoder takes them -> Memory with the attention's keys in place."""
        assert self.encoder is not None, "a language model has nothing to encode"
        memory, _ = self.encoder(inputs, lengths, None)
        return self.decoder.prepare(memory)

    def start(self, memory: Memory | None, rows: int) -> State:
        """The state of each row before its first token."""
        return self.decoder.start(memory, rows)


Model = SequenceClassifier | SequenceTagger | SequenceGenerator
MODELS: dict[str, type[SequenceClassifier] | type[SequenceTagger] | type[SequenceGenerator]] = {
    "classifier": SequenceClassifier,
    "tagger": SequenceTagger,
    "generator": SequenceGenerator,
}


def build_model(config: ModelConfig) -> Model:
    """A new model with initial weights drawn from torch's global generator."""
    return MODELS[config.architecture](config)


def chosen(scores: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """scores (B, T, V) of every token -> those of the targets among labels (B, T+1): (B, T), 0 beyond a row's end."""
    return scores.gather(2, labels[:, 1:, None])[:, :, 0].masked_fill(~_targets(labels, label_lengths), 0.0)


def _joined(state: State, carried: Tensor) -> State:
    return State(torch.cat([state.values, carried], dim=1))


def _targets(labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Which of the T shifted positions hold a real target: (B, T)."""
    return torch.arange(1, labels.shape[1], device=labels.device) < label_lengths[:, None]


def _places(mask: Tensor) -> Tensor:
    """The numbers (M,) of what is true in a mask (B, T), counted row by row. To count them a GPU is waited for, which
    costs least before it has anything else to do."""
    return mask.flatten().nonzero()[:, 0]


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, T, ...) -> (M, ...)"""
    return x.flatten(0, 1).index_select(0, places)


def _mean_square(x: Tensor, mask: Tensor) -> Tensor:
    """Of x (B, T, H) where mask (B, T); 0 of no numbers at all. In float32, whatever the numbers are of."""
    sums = x.float().square().masked_fill(~mask[:, :, None], 0.0).sum()
    return sums / (mask.sum() * x.shape[2]).clamp(min=1)
