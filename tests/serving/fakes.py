"""A pipeline without a model: its answers can be worked out by hand, and it stalls, fails and waits on demand.

A generator answers with the words of its input in capitals, one word a step; a second sequence ends in "#1", a third
in "#2". A classifier says whether the text holds "good". A tagger tags every word by its first letter.
"""

import io
import itertools
import math
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from seqmodels.decoding.request import Event, Failed, Finished, Progress, Times
from seqmodels.decoding.waiting import UNBOUNDED, Bounds
from seqmodels.errors import DeadlineError, InputError, TooLongError, UnsupportedError
from seqmodels.rendering import Piece
from serving.runner import Model

MAX_WORDS = 30
_numbers = itertools.count()


@dataclass(frozen=True)
class FakeRequest:
    times: Times = field(default_factory=Times)


@dataclass(frozen=True)
class FakeJob:
    id: str
    kind: str
    source: str
    outputs: list[list[str]]  # words of each sequence
    params: dict[str, Any]
    num_input_tokens: int
    deadline: float | None
    priority: int = 0
    client: str = ""
    request: FakeRequest = field(default_factory=lambda: FakeRequest())

    @property
    def times(self) -> Times:
        return self.request.times


@dataclass
class FakeConfig:
    input: str


class FakeTexts:
    """Deltas of one request: a word at a time, with the blank before it."""

    def __init__(self, job: FakeJob) -> None:
        self.job = job
        self.sent = [0] * len(job.outputs)

    def push(self, event: Progress) -> list[Piece]:
        return self._pieces(event.index, len(event.tokens))

    def finish(self, result: list[list[str]]) -> list[Piece]:
        return [piece for index, words in enumerate(result) for piece in self._pieces(index, len(words))]

    def _pieces(self, index: int, count: int) -> list[Piece]:
        first, words = self.sent[index], self.job.outputs[index]
        new = words[first : first + count]
        self.sent[index] += len(new)
        told = {name: values[first : first + count] for name, values in told_of(words, self.job.params).items()}
        return [Piece(index, " " * (first > 0) + " ".join(new), told or None)] if new else []


def offsets_of(words: list[str]) -> list[int]:
    """As many characters as the words before, with blanks between."""
    return [len(" ".join(words[:i])) for i in range(len(words))]


def told_of(words: list[str], params: dict[str, Any], logprob: float = -0.5) -> dict[str, list[Any]]:
    """What was asked for of each word; other words were likelier."""
    if not params.get("logprobs"):
        return {}
    told: dict[str, list[Any]] = {"tokens": words, "offsets": offsets_of(words), "logprobs": [logprob] * len(words)}
    if count := params.get("top_logprobs"):
        likelier = [{"token": f"likely {k}", "logprob": -0.1 * (k + 1)} for k in range(count)]
        told["top_logprobs"] = [likelier] * len(words)
    return told


@dataclass
class FakePipeline:
    task: str
    name: str = "fake"
    facts: dict[str, bool] = field(default_factory=lambda: {"batch_invariant": True})
    revision: str = "0123456789ab"
    max_new_tokens: int = 64
    rows: int = 256  # requests that run at a time
    step_s: float = 0.0
    failing_steps: int = 0
    live: dict[str, tuple[FakeJob, int]] = field(default_factory=dict)
    submitted: list[FakeJob] = field(default_factory=list)
    steps: int = 0
    bounds: Bounds = UNBOUNDED  # of the last step
    gate: threading.Event = field(default_factory=threading.Event)  # cleared: a step waits

    def __post_init__(self) -> None:
        self.gate.set()
        self.config = FakeConfig(
            {"translate": "text", "caption": "image", "generate": "nothing"}.get(self.task, "text")
        )

    @cached_property
    def model(self) -> Model:
        """As the runner knows it."""
        return Model(self.name, self)

    def prepare(
        self,
        item: Any,
        params: dict[str, Any],
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
    ) -> FakeJob:
        if state is not None or return_state:
            raise InputError("this model has no state", param="state", code="state_not_supported")
        words = self._words(item, field, truncate)
        if params.get("temperature") is not None and not params.get("do_sample"):
            raise InputError("temperature needs do_sample=true", param="temperature")
        if params.get("num_return_sequences", 1) > params.get("num_beams", 1) and not params.get("do_sample"):
            raise InputError("num_return_sequences is more than num_beams", param="num_return_sequences")
        length = params.get("max_new_tokens", 64)
        spoken = [word.upper() for word in words][:length]
        outputs = [spoken + ([f"#{k}"] if k else []) for k in range(params.get("num_return_sequences", 1))]
        return self._request(" ".join(words), outputs, params, self.task, deadline, priority, client)

    def prepare_score(
        self,
        item: Any,
        target: str,
        *,
        field: str = "inputs",
        target_field: str = "targets",
        truncate: bool = False,
        deadline: float | None = None,
        priority: int = 0,
        client: str = "",
        top_logprobs: int = 0,
    ) -> FakeJob:
        if item is not None:
            self._words(item, field, truncate)
        params = {"logprobs": True, "top_logprobs": top_logprobs}
        outputs = [self._words(target, target_field, truncate)]
        return self._request(target, outputs, params, "score", deadline, priority, client)

    def _request(
        self,
        source: str,
        outputs: list[list[str]],
        params: dict[str, Any],
        kind: str,
        deadline: float | None,
        priority: int,
        client: str,
    ) -> FakeJob:
        name, length = f"request-{next(_numbers)}", len(source.split())
        return FakeJob(name, kind, source, outputs, params, length, deadline, priority, client)

    def _words(self, item: Any, field: str, truncate: bool) -> list[str]:
        if self.task == "caption":
            if not isinstance(item, dict) or "image" not in item:
                raise UnsupportedError("this model takes an image", param=field)
            try:
                picture = Image.open(io.BytesIO(item["image"]), formats=["PNG"])
            except OSError:
                raise UnsupportedError("not a PNG", param=field) from None
            return ["picture", str(picture.width), "by", str(picture.height)]
        if item is None and self.task == "generate":
            return ["freely"]
        if isinstance(item, dict) and "text" in item:
            item = item["text"]
        if isinstance(item, dict) and "words" in item:
            item = " ".join(item["words"])
        if not isinstance(item, str):
            raise UnsupportedError("this model takes text", param=field)
        words = item.split()
        if not words:
            raise InputError(f"{field} is empty", param=field, code="empty")
        if len(words) > MAX_WORDS and not truncate:
            raise TooLongError(f"{field} has {len(words)} words, at most {MAX_WORDS}", param=field)
        return words[:MAX_WORDS]

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def submit(self, job: FakeJob) -> None:
        self.submitted.append(job)
        if job.source == "refuse at submit":
            raise InputError("refused", param="inputs")
        job.times.submitted = time.monotonic()
        self.live[job.id] = (job, 0)

    def cancel(self, request_id: str) -> None:
        self.live.pop(request_id, None)

    def step(self, bounds: Bounds = UNBOUNDED) -> list[Event]:
        self.bounds = bounds
        self.gate.wait(30)
        if self.step_s:
            time.sleep(self.step_s)
        self.steps += 1
        if self.failing_steps:
            self.failing_steps -= 1
            raise RuntimeError("secret detail of the failure")
        events: list[Event] = []
        for request_id, (job, done) in list(self.live.items())[: self.rows]:
            job.times.admitted = job.times.admitted or time.monotonic()
            events += self._advance(request_id, job, done)
        return events

    def _advance(self, request_id: str, job: FakeJob, done: int) -> list[Event]:
        if job.deadline is not None and job.deadline <= time.monotonic():
            del self.live[request_id]
            return [Failed(request_id, DeadlineError("too late"))]
        if "poison" in job.source.split():
            del self.live[request_id]
            return [Failed(request_id, InputError("poison", param="inputs"))]
        longest = max(map(len, job.outputs))
        if job.kind in ("classify", "tag", "score") or done == longest:
            del self.live[request_id]
            job.times.finished = time.monotonic()
            return [Finished(request_id, job.outputs)]  # type: ignore[arg-type]
        self.live[request_id] = (job, done + 1)
        return [
            Progress(request_id, index, [words[done]])  # type: ignore[list-item]
            for index, words in enumerate(job.outputs)
            if done < len(words)
        ]

    def load(self) -> dict[str, int]:
        live = min(len(self.live), self.rows)
        return {"rows_live": live, "rows_waiting": 0, "rows_total": self.rows, "waiting": len(self.live) - live}

    def waiting(self) -> dict[tuple[int, str], list[float]]:
        queue: dict[tuple[int, str], list[float]] = {}
        for job, _ in list(self.live.values())[self.rows :]:
            deadline = math.inf if job.deadline is None else job.deadline
            queue.setdefault((job.priority, job.client), []).append(deadline)
        return queue

    def num_details(self, job: FakeJob) -> int:
        return int(job.params.get("top_logprobs", 0)) * sum(map(len, job.outputs))

    def num_output_tokens(self, job: FakeJob, result: list[list[str]]) -> int:
        return 0 if job.kind == "score" else sum(map(len, result))

    def text_stream(self, job: FakeJob) -> FakeTexts:
        return FakeTexts(job)

    def render(self, job: FakeJob, result: list[list[str]]) -> dict[str, Any]:
        if job.kind == "classify":
            return classification(job.source)
        if job.kind == "tag":
            return {"tags": tags(job.source)}
        if job.kind == "score":
            words = [*result[0], "<eos>"]
            told = told_of(words, job.params, -1.5)
            return {"score": -1.5 * len(result[0]), **told, "logprobs": [*told["logprobs"][:-1], 0.0]}
        sequences = [self._sequence(job, words) for words in result]
        seeded = {"seed": job.params.get("seed", 11)} if job.params.get("do_sample") else {}
        return {"sequences": sequences, **seeded}

    def _sequence(self, job: FakeJob, words: list[str]) -> dict[str, Any]:
        cut = len(words) >= job.params.get("max_new_tokens", 64)
        return {
            "text": " ".join(words),
            "score": -0.5 * math.sqrt(len(words)),
            "finish_reason": "length" if cut else "eos",
            **told_of(words, job.params),
        }


def classification(text: str) -> dict[str, Any]:
    p = 0.9 if "good" in text.split() else 0.2
    return {"label": "yes" if p > 0.5 else "no", "score": max(p, 1 - p), "scores": {"yes": p, "no": 1 - p}}


def tags(text: str) -> list[dict[str, Any]]:
    spans, start = [], 0
    for word in text.split():
        spans.append({"label": word[0].upper(), "score": 1.0, "start": start, "end": start + len(word), "text": word})
        start += len(word) + 1
    return spans


def all_fakes() -> dict[str, FakePipeline]:
    tasks = {"mood": "classify", "names": "tag", "en-de": "translate", "describe": "caption", "story": "generate"}
    return {name: FakePipeline(task, name) for name, task in tasks.items()}


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def gif(frames: int, width: int = 4, height: int = 3) -> bytes:
    """Each frame another shade of grey."""
    buffer = io.BytesIO()
    first, *rest = (Image.new("L", (width, height), shade) for shade in range(frames))
    first.save(buffer, "GIF", save_all=True, append_images=rest)
    return buffer.getvalue()
