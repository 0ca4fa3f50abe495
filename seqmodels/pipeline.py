"""Pipeline: raw input -> result. With `reading` and `rendering`, the only place that knows text and bytes.

A request goes through four calls: `prepare` (tokenize or preprocess, check), `submit`, `step` until its event comes,
`render` (text, labels, offsets). The command line, evaluation and serving all use these, so what is evaluated is what
is served. `prepare` and `render` may be called from any thread; the others belong to one.
"""

import math
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from seqmodels.captured import captured
from seqmodels.config import Average, Weights, explain
from seqmodels.decoding.constraints import Phrases, WordEdges, missing
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.padding import ROW_FLOOR
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Event, Failed, Finished, Request, Scores, Times
from seqmodels.decoding.saved import Maker, SavedState, fingerprint, input_state_from_bytes, input_state_to_bytes
from seqmodels.decoding.search import Hypothesis
from seqmodels.decoding.waiting import UNBOUNDED, Bounds
from seqmodels.ensemble import Directories, as_paths, common_reader, load_members, revision_of
from seqmodels.errors import InputError, NotFiniteError, SeqModelsError
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.models import Model, SequenceGenerator
from seqmodels.pretrained import Pretrained
from seqmodels.reading import Reader, Reading
from seqmodels.rendering import CLASSIFIED, Text, TextStream, render_score, render_sequence, render_tags
from seqmodels.selftest import find_row_floor
from seqmodels.shortlist import Shortlist, has_shortlist
from seqmodels.state import State
from seqmodels.stepper import Decodes, Ensemble, Stepper
from seqmodels.tokenizer import BOS, EOS, UNK, Tokenizer


@dataclass(frozen=True, eq=False)
class Job:
    """A prepared request, and what rendering its result will refer to."""

    request: Request | ForwardRequest
    reading: Reading
    threshold: float | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def deadline(self) -> float | None:
        return self.request.deadline

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def client(self) -> str:
        return self.request.client

    @property
    def times(self) -> Times:
        return self.request.times

    @property
    def width(self) -> int:
        """Decoder rows that it fills; 1 of a forward pass."""
        return self.request.params.width if isinstance(self.request, Request) else 1

    @property
    def num_input_tokens(self) -> int:
        """Tokens, frames or steps read, and those of a text to score."""
        scored = len(self.request.labels[1:-1]) if isinstance(self.request, ForwardRequest) else 0
        if self.reading.inputs is None:
            return scored or self.reading.num_tokens  # a text to score begins with the prompt
        return self.reading.num_tokens + scored


class Pipeline:
    """A loaded model directory, or several that answer as one, ready to answer."""

    def __init__(
        self,
        pretrained: Pretrained | Sequence[Pretrained],
        max_rows: int = 256,
        decoder_weights: Weights = "float32",
        shortlist: Shortlist | None = None,
        prefix_cache_states: int = 1024,
        average: Average = "probability",
    ) -> None:
        """pretrained: one, or the members of an ensemble as `load_members` gives them: it is asked like one model, and
        has the search defaults of its first. average: of what members predict for labels and for each next token, their
        probabilities or their log-probabilities, which counts a member's doubt for more.

        decoder_weights: in which a generator's search computes. shortlist: what it chooses its tokens from, whose own
        logits are float32 whatever decoder_weights is. Scores of given texts stay in float32, over all tokens.
        max_rows, prefix_cache_states: of the engine."""
        members = pretrained if isinstance(pretrained, Sequence) else [pretrained]
        self._pretrained = common_reader(members)
        self.config = self._pretrained.config
        self.revision = revision_of(members, average)
        self.members = tuple(member.revision for member in members)
        self.average = average
        self.decoder_weights = decoder_weights
        self._max_rows = max_rows
        self._reader = Reader(self._pretrained)
        self._shortlist = shortlist
        models = [member.model for member in members]
        stepper = _stepper(models, decoder_weights, average)
        self._maker = Maker(
            revision=self.revision,
            decoder_weights=decoder_weights if stepper else None,
            shortlist=shortlist.fingerprint if shortlist else "",
        )
        floor = find_row_floor(models, stepper, average)
        self.batch_invariant = floor is not None
        self._forward = Forward(models, row_floor=floor or ROW_FLOOR, average=average)
        self._needs_whole = next(filter(None, (member.config.needs_whole for member in members)), "")
        self._looks_back = any(member.config.pooling == "attention" for member in members)
        self._engine, self._stepper = None, stepper
        if stepper:
            self._edges = WordEdges(*(torch.tensor(f, device=stepper.device) for f in self._tokenizer.word_edges()))
            self._engine = Engine(
                stepper,
                max_rows,
                row_floor=floor or ROW_FLOOR,
                edges=self._edges,
                prefix_cache_states=prefix_cache_states,
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: Directories,
        device: str | torch.device = "cpu",
        max_rows: int = 256,
        decoder_weights: Weights = "float32",
        shortlist: bool = False,
        prefix_cache_states: int = 1024,
        average: Average = "probability",
    ) -> "Pipeline":
        """directory: one, or a list of those whose models are to answer as one, by `average` of what they predict.
        shortlist: whether to use the directory's; of several, that of the first that has one. Raises
        ModelDirectoryError, and ConfigError, also where models of a list do not fit together."""
        members = load_members(directory, device)
        chosen = load_shortlist(as_paths(directory), members[0]) if shortlist else None
        return cls(members, max_rows, decoder_weights, chosen, prefix_cache_states, average)

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def facts(self) -> dict[str, Any]:
        """How it was loaded: whether answers are the same bits in any company, what a generator computes with, and the
        revisions of an ensemble's members."""
        facts: dict[str, Any] = {"batch_invariant": self.batch_invariant}
        if len(self.members) > 1:
            facts |= {"members": list(self.members), "average": self.average}
        if self._engine:
            facts |= {"decoder_weights": self.decoder_weights, "shortlist": self._shortlist is not None}
        return facts

    # -- prepare -------------------------------------------------------------------------------------------------

    def prepare(
        self,
        item: Any,
        params: Mapping[str, Any] | None = None,
        *,
        field: str = "inputs",
        truncate: bool = False,
        stream: bool = False,
        deadline: float | None = None,
        state: bytes | None = None,
        return_state: bool = False,
        threshold: float | None = None,
        priority: int = 0,
        client: str = "",
    ) -> Job:
        """Check one input and turn it into tensors.

        item: a string, {"text"}, {"words"}, {"image": bytes}, {"frames": [bytes]} (or, as bytes, one animated file)
        or {"features": [[...]]}, as the model takes; None or a prompt for a language model. params: options of
        SearchParams over the model's defaults. deadline: a time.monotonic(). priority, client: higher goes first; of
        equal priority, clients take turns.
        return_state: whether the answer, or each sequence of it, comes with a `state`.
        state: one of those, to go on from it. A classifier or tagger reads the item as the next piece of its input: a
        label is for all pieces so far, tags are those of this one. A language model reads the item as more text after
        all tokens that the state holds, and another generator is given the same item again. What a generator answers,
        its limits and its score are of what is new; greedy and sampled, it is what one longer run would have written.
        From a sequence that ended with EOS it goes on before that; from one that a stop string ended, behind the token
        that completed it, of which the text tells nothing. Beams begin a new search there.
        threshold: a probability below which a label, or a tag's, is None. Raises InputError, whose `param` is `field`
        or the option at fault.
        """
        if self._engine is None:
            if name := next((name for name, value in (params or {}).items() if value is not None), None):
                raise InputError(f"{name} is an option of generators, and this model answers with labels", param=name)
            before = self._before(state, return_state)
            reading = self._reader.read(item, field, truncate, inside=state is not None)
            positions = reading.positions if self.config.architecture == "tagger" else None
            labelling = ForwardRequest(
                _new_id(),
                reading.inputs,
                deadline=deadline,
                positions=positions,
                state=before,
                return_state=return_state,
                priority=priority,
                client=client,
            )
            return Job(labelling, reading, self._checked_threshold(threshold))
        if threshold is not None:
            raise InputError("threshold is an option of models that answer with labels", param="threshold")
        search = self._search_params(params or {})
        saved = None if state is None else self._saved(state)
        reading = self._reader.read(item, field, truncate, inside=bool(saved and saved.tokens))
        if saved and saved.position.inputs != fingerprint(reading.inputs):
            raise InputError("state was made with other inputs; send the same ones again", param="state")
        prompt = (saved.tokens if saved else ()) + reading.prompt
        request = Request(
            _new_id(),
            reading.inputs,
            search,
            prompt + self._reader.prefix(search.prefix, prompt),
            bad_words=self._bad_words(search),
            force_words=(force_words := self._force_words(search)),
            shortlist=self._shortlisted(reading, force_words),
            seed=self._seed(search, params or {}, saved),
            stream=stream,
            deadline=deadline,
            state=saved,
            return_state=return_state,
            priority=priority,
            client=client,
        )
        if search.stop:
            request = replace(request, watch=self._text(request, reading).has_stop)
        self._engine.check(request)
        return Job(request, reading)

    def prepare_score(
        self,
        item: Any,
        target: Any,
        *,
        field: str = "inputs",
        target_field: str = "targets",
        truncate: bool = False,
        deadline: float | None = None,
        priority: int = 0,
        client: str = "",
        top_logprobs: int = 0,
    ) -> Job:
        """A request for the log-probability of `target`, given the input (or the prompt). top_logprobs: how many of
        the likeliest tokens the answer also names at each place. deadline, priority, client: as of `prepare`. Raises
        InputError."""
        if self._engine is None:
            raise InputError("this model answers with labels; only a generator can score a text", param=field)
        reading = self._reader.read(item, field, truncate)
        written = self._reader.written(target, reading.prompt, target_field, truncate)
        labels = (BOS, *reading.prompt, *written, EOS)
        spans = self._tokenizer.spans(target, inside=bool(reading.prompt))[: len(written)]
        request = ForwardRequest(
            _new_id(), reading.inputs, labels, deadline, top_logprobs=top_logprobs, priority=priority, client=client
        )
        return Job(request, replace(reading, text=target, spans=tuple(spans)))

    def goes_on_exactly(self, job: Job, width: int) -> bool:
        """Whether a job that goes on from a state gets the bits of one that never stopped, on one kind of processor.
        width: of the job that gave the state; with attention, another one may give other last bits, and where layers
        read what it saw, any but 1, since a state is computed for one row."""
        if self._stepper is None:
            return self.batch_invariant and not self._looks_back
        alike = job.width == width and (width == 1 or not self._stepper.reads_memory)
        return self.batch_invariant and (alike or not self._stepper.attends)

    def _checked_threshold(self, threshold: float | None) -> float | None:
        if threshold is not None and self.config.problem_type == "regression":
            raise InputError("threshold is of probabilities, and this model answers with numbers", param="threshold")
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}, but a probability is between 0 and 1", param="threshold")
        return threshold

    @property
    def max_new_tokens(self) -> int:
        """Of a request that asks for no other number."""
        return self._search_params({}).max_new_tokens

    def _search_params(self, given: Mapping[str, Any]) -> SearchParams:
        try:
            return SearchParams.over(self._pretrained.generation, given)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            fields = fault["loc"] or fault.get("ctx", {}).get("fields", ())
            raise InputError(explain(error), param=str(fields[0]) if fields else None) from None

    def _saved(self, state: bytes) -> SavedState:
        assert self._stepper is not None
        width, vocab_size = self._stepper.state_width, self._stepper.vocab_size
        return SavedState.from_bytes(state, self._maker, width, vocab_size)

    def _before(self, state: bytes | None, return_state: bool) -> State | None:
        """Where a classifier or tagger stands in its input. Raises InputError, also where it reads no pieces."""
        if self._needs_whole and (state is not None or return_state):
            name = "return_state" if state is None else "state"
            raise InputError(
                f"{name} is for input that comes in pieces, which this model cannot read, because {self._needs_whole}; "
                f"send the whole input without {name}",
                param=name,
                code="state_not_supported",
            )
        return None if state is None else input_state_from_bytes(state, self._maker, self._forward.start().width)

    def _seed(self, search: SearchParams, given: Mapping[str, Any], saved: SavedState | None) -> int:
        """The one given with the request, that of what it goes on from, the model's own, or a new one."""
        if saved and given.get("seed") is None:
            return saved.position.seed
        return secrets.randbits(63) if search.seed is None else search.seed

    def _bad_words(self, search: SearchParams) -> tuple[tuple[int, ...], ...]:
        """Each as it is spelt at the start of a word, and inside one; what there are no tokens for is never written."""
        spellings = [
            tuple(encode(word))
            for word in search.bad_words
            for encode in (self._tokenizer.encode, self._tokenizer.encode_inside)
        ]
        return tuple(dict.fromkeys(ids for ids in spellings if ids and UNK not in ids))

    def _force_words(self, search: SearchParams) -> tuple[tuple[int, ...], ...]:
        """Each as it is spelt at the start of a word. Raises InputError for one that can never be written."""
        spellings = [tuple(self._tokenizer.encode(word)) for word in search.force_words]
        banned = self._bad_words(search)
        for number, (word, spelling) in enumerate(zip(search.force_words, spellings, strict=True)):
            if not word.strip() or not spelling or UNK in spelling:
                raise InputError(f"force_words[{number}] is what this model has no tokens for", param="force_words")
            if any(bad == spelling[i : i + len(bad)] for bad in banned for i in range(len(spelling))):
                raise InputError(f"force_words[{number}] is what bad_words forbids; leave one out", param="force_words")
        return tuple(spellings)

    def _shortlisted(self, reading: Reading, force_words: Phrases) -> Tensor | None:
        if self._shortlist is None or reading.inputs is None:
            return None
        return self._shortlist.of(reading.inputs, further=[token for phrase in force_words for token in phrase])

    # -- submit and step -----------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a prepared request; exactly one Finished or Failed event will name it, unless it is cancelled."""
        if isinstance(job.request, ForwardRequest):
            self._forward.submit(job.request)
        else:
            assert self._engine is not None
            self._engine.submit(job.request)

    def step(self, bounds: Bounds = UNBOUNDED) -> list[Event]:
        """Turn once: a forward pass for those who wait for one, a token for those who generate."""
        events = self._forward.step() if self._forward.has_work else []
        if self._engine and self._engine.has_work:
            events += self._engine.step(bounds)
        return events

    def cancel(self, request_id: str) -> None:
        self._forward.cancel(request_id)
        if self._engine:
            self._engine.cancel(request_id)

    @property
    def has_work(self) -> bool:
        return self._forward.has_work or bool(self._engine and self._engine.has_work)

    def waiting(self) -> Mapping[tuple[int, str], list[float]]:
        """The deadlines of those that wait for their turn, by priority and client; infinity where there is none."""
        passes, texts = self._forward.waiting(), self._engine.waiting() if self._engine else {}
        return {key: passes.get(key, []) + texts.get(key, []) for key in passes | texts}

    def load(self) -> dict[str, int]:
        """How busy it is: requests waiting, decoder rows in use, asked for by those who wait, and in all (an input for
        a forward pass is one row); and of the tokens in front of outputs, how many were read so far, and how many were
        not since another output began alike."""
        passes, engine = self._forward.num_waiting, self._engine
        read, saved = engine.prefill_tokens if engine else (0, 0)
        return {
            "waiting": passes + (engine.num_waiting if engine else 0),
            "rows_live": engine.num_rows if engine else 0,
            "rows_waiting": passes + (engine.num_rows_waiting if engine else 0),
            "rows_total": self._max_rows,
            "prefill_tokens_read": read,
            "prefill_tokens_saved": saved,
        }

    # -- render --------------------------------------------------------------------------------------------------

    def render(self, job: Job, result: list[Hypothesis] | Scores) -> dict[str, Any]:
        """The answer as plain data: a label, tags, sequences, or log-probabilities. Raises
        NotFiniteError."""
        if isinstance(job.request, Request):
            assert isinstance(result, list)
            return self._render_sequences(job, job.request, result)
        assert isinstance(result, Scores)
        if not all(x.isfinite().all() for x in (result.values, result.state.values if result.state else result.values)):
            raise NotFiniteError()
        if self._engine:
            return render_score(self._tokenizer, job.reading, job.request.labels, result)
        answer = self._render_labels(job, result.values)
        return answer | {"state": input_state_to_bytes(result.state, self._maker)} if result.state else answer

    def _render_labels(self, job: Job, scores: Tensor) -> dict[str, Any]:
        if self.config.architecture == "tagger":
            return render_tags(self.config.labels, job.reading, scores, job.threshold)
        return CLASSIFIED[self.config.problem_type](self.config.labels, scores, job.threshold)

    def num_output_tokens(self, job: Job, result: list[Hypothesis] | Scores) -> int:
        """Tokens written, or labels given."""
        if isinstance(result, list):
            return sum(len(hypothesis.logprobs) for hypothesis in result)
        if self._engine:
            return 0
        return 1 if self.config.architecture == "classifier" else len(job.reading.positions)

    def num_details(self, job: Job) -> int:
        """The most numbers that an answer may hold beside its tokens and their log-probabilities: of alternatives, of
        attention and of states."""
        if not isinstance(job.request, Request):
            width = self._forward.start().width if job.request.return_state else 0
            return 2 * job.request.top_logprobs * len(job.request.labels) + width
        assert self._engine is not None and self._stepper is not None
        search, width = job.request.params, self._stepper.state_width if job.request.return_state else 0
        return (self._engine.num_details(job.request) * search.max_new_tokens + width) * search.num_return_sequences

    def text_stream(self, job: Job) -> TextStream:
        """Turns the job's Progress events into text."""
        assert isinstance(job.request, Request)
        return TextStream(self._tokenizer, self._text(job.request, job.reading), job.request)

    def _render_sequences(self, job: Job, request: Request, result: Sequence[Hypothesis]) -> dict[str, Any]:
        # A search finds nothing where no token's score is a number.
        if not result or not all(math.isfinite(found.score) for found in result):
            raise NotFiniteError()
        text = self._text(request, job.reading)
        sequences = [render_sequence(text, hypothesis, self._tokenizer, request.params) for hypothesis in result]
        for sequence, hypothesis in zip(sequences, result, strict=True):
            if hypothesis.state:
                sequence["state"] = hypothesis.state.to_bytes(self._maker)
        if request.force_words:
            for sequence, hypothesis in zip(sequences, result, strict=True):
                sequence["missing_words"] = self._missing_words(request, hypothesis)
        answer: dict[str, Any] = {"sequences": sequences}
        if request.params.output_attentions:
            answer |= self._positions(job.reading)
        return answer | {"seed": request.seed} if request.params.do_sample else answer

    def _positions(self, reading: Reading) -> dict[str, Any]:
        """What attention's weights are over, where that is not plain: frames and steps are as they were given."""
        assert reading.inputs is not None
        if self.config.input == "text":
            assert self._pretrained.source_tokenizer is not None
            return {"source_tokens": [self._pretrained.source_tokenizer.token(i) for i in reading.inputs.tolist()]}
        return {"source_grid": list(self.config.grid)} if self.config.grid else {}

    def _missing_words(self, request: Request, hypothesis: Hypothesis) -> list[str]:
        """Those of force_words that could not be written within max_new_tokens, or at all."""
        absent = missing(hypothesis.tokens, len(request.prefix), request.force_words, self._edges)
        return [request.params.force_words[c] for c in absent]

    def _text(self, request: Request, reading: Reading) -> Text:
        prompt = (request.state.tokens if request.state else ()) + reading.prompt
        return Text(self._tokenizer, prompt, request.prefix, request.params.stop, request.num_continued)

    # -- offline -------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Sequence[Any], **params: Any) -> list[dict[str, Any]]:
        """Answers in order. Raises InputError, which names the item as inputs[i]."""
        _check_list(inputs, "inputs")
        return self.run([self.prepare(item, params, field=f"inputs[{i}]") for i, item in enumerate(inputs)])

    def score(self, inputs: Sequence[Any], targets: Sequence[str]) -> list[dict[str, Any]]:
        """The log-probability of each target given its input (None for a language model)."""
        _check_list(inputs, "inputs")
        _check_list(targets, "targets")
        if len(inputs) != len(targets):
            raise InputError(
                f"targets holds {len(targets)} texts for {len(inputs)} inputs; give one for each", param="targets"
            )
        pairs = enumerate(zip(inputs, targets, strict=True))
        return self.run([self.prepare_score(item, target, field=f"inputs[{i}]") for i, (item, target) in pairs])

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Answers in order. Raises what the first job that failed failed with."""
        answers = []
        for outcome in self.outcomes(jobs):
            if isinstance(outcome, SeqModelsError):
                raise outcome
            answers.append(outcome)
        return answers

    def outcomes(self, jobs: Sequence[Job]) -> list[dict[str, Any] | SeqModelsError]:
        """Submit, turn until there is no work, render: the answer of each job, or what it failed with.

        Raises InputError where a job could never fit this pipeline's engine.
        """
        by_id = {job.id: job for job in jobs}
        outcomes: dict[str, dict[str, Any] | SeqModelsError] = {}
        try:
            for job in jobs:
                self.submit(job)
            while self.has_work:
                for event in self.step():
                    if isinstance(event, Failed):
                        outcomes[event.request_id] = event.error
                    if isinstance(event, Finished):
                        outcomes[event.request_id] = self._rendered(by_id[event.request_id], event)
        finally:  # an error, or Ctrl-C, leaves nobody behind for the next call to meet
            for job in jobs:
                self.cancel(job.id)
        return [outcomes[job.id] for job in jobs]

    def _rendered(self, job: Job, event: Finished) -> dict[str, Any] | SeqModelsError:
        try:
            return self.render(job, event.result)
        except SeqModelsError as error:
            return error

    @property
    def _tokenizer(self) -> Tokenizer:
        """A generator's, for what it writes."""
        assert self._pretrained.target_tokenizer is not None
        return self._pretrained.target_tokenizer


def _check_list(items: Any, name: str) -> None:
    """A text is a sequence too, of its letters."""
    if isinstance(items, str | bytes | Mapping):
        raise InputError(f"{name} must be a list, of one item too: [...]", param=name, code="invalid_type")


def _stepper(models: Sequence[Model], decoder_weights: Weights, average: Average) -> Decodes | None:
    """With which generators search, as one; None for other models."""
    steppers = [captured(Stepper(one, decoder_weights)) for one in models if isinstance(one, SequenceGenerator)]
    if len(steppers) < 2:
        return steppers[0] if steppers else None
    return Ensemble(steppers, average)


def load_shortlist(directories: Sequence[Path], pretrained: Pretrained) -> Shortlist:
    """That of the first directory that has one: members have the same tokenizers, so each member's fits them all."""
    return Shortlist.load(next(filter(has_shortlist, directories), directories[0]), pretrained)


def _new_id() -> str:
    return uuid.uuid4().hex
