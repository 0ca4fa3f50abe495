"""Valid requests of every kind, with the answers that the library alone gave beforehand.

Knows what goes over the wire; knows no app.
"""

import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seqmodels.pipeline import Pipeline
from serving.states import Seal

from .events import events
from .fuzz_pictures import good

KEY = "a key that only the fuzz knows"
JSON, LINES, PICTURE = "application/json", "application/x-ndjson", "image/png"
TEXTS = ("a good day", "größer", "日本", "a\u0000b", "😀", "x" * 50, " ", "one two", "\u202ex", "e\u0301", '"\\')
VALID_OF_A_KIND = 60  # in the bank


@dataclass(frozen=True)
class Reply:
    """What came back: every message until the end, and what the app raised."""

    status: int
    content_type: str
    content: bytes
    seconds: float
    error: BaseException | None = None


@dataclass(frozen=True)
class Golden:
    """A valid request, and what `read` must find in its answer."""

    method: str
    path: str
    content: bytes
    content_type: str
    expected: Any
    read: Callable[[Reply], Any]
    body: Any = None  # of JSON
    query: bytes = b""


@dataclass(frozen=True)
class Ask:
    """One request. kind: how it was made. leaves_after: messages of its body after which the client is gone."""

    kind: str
    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    content: bytes
    golden: Golden | None = None
    leaves_after: int | None = None

    @property
    def reproduction(self) -> str:
        content = repr(self.content[:4000]) + (f"... {len(self.content)} bytes" if len(self.content) > 4000 else "")
        return f"{self.method} {self.path!r} ?{self.query!r}\n{self.headers}\n{content}"


class Bank:
    """Valid requests of every kind, answered by the library alone."""

    def __init__(self, pipelines: dict[str, Pipeline], seal: Seal, seed: int) -> None:
        self.pipelines = pipelines
        self.seal = seal
        chance = random.Random(seed)
        makers: dict[Callable[[random.Random], Golden], int] = dict.fromkeys(
            (self._labels, self._tags, self._texts, self._scores, self._completions), VALID_OF_A_KIND
        )
        makers |= {self._captions: VALID_OF_A_KIND // 3, self._raw: VALID_OF_A_KIND // 3}  # they cost most
        self.single = [make(chance) for make, count in makers.items() for _ in range(count)]
        self.states = self._states(chance)
        self.single += [self._resumed(chance) for _ in range(VALID_OF_A_KIND)]
        self.batches = [self._batch(chance) for _ in range(VALID_OF_A_KIND)]
        self.looks = self._looks()
        self.posts = self.single + self.batches

    def choose(self, chance: random.Random) -> Golden:
        return chance.choice(self.looks if chance.random() < 0.05 else self.posts)

    def _labels(self, chance: random.Random) -> Golden:
        name = chance.choice(["mood", "topics", "rating", "series"])
        items = [
            {"features": [[round(chance.uniform(-3, 3), 3) for _ in range(3)] for _ in range(chance.randint(1, 5))]}
            if name == "series"
            else _text_item(chance)
            for _ in range(chance.randint(1, 3))
        ]
        threshold = None if name == "rating" else chance.choice([None, 0.0, 0.5, 0.9, 1])
        return self._asked("/v1/classify", name, items, threshold=threshold)

    def _tags(self, chance: random.Random) -> Golden:
        if chance.random() < 0.3:
            return self._asked("/v1/tag", "motion", [{"frames": chance.sample(good(), 2)}])
        items = [
            chance.choice([a_text(chance), {"words": [_word(chance) for _ in range(chance.randint(1, 4))]}])
            for _ in range(chance.randint(1, 3))
        ]
        return self._asked("/v1/tag", "names", items, threshold=chance.choice([None, 0.4]))

    def _texts(self, chance: random.Random) -> Golden:
        task, name = chance.choice([("translate", "en-de"), ("generate", "story")])
        stream = chance.random() < 0.3
        items = [a_text(chance)[:20] for _ in range(chance.randint(1, 3))]
        return self._asked(f"/v1/{task}", name, items, search_options(chance), stream=stream)

    def _captions(self, chance: random.Random) -> Golden:
        item = {"image": chance.choice(good())}
        return self._asked("/v1/caption", "describe", [item], search_options(chance), stream=chance.random() < 0.3)

    def _raw(self, chance: random.Random) -> Golden:
        """A picture as the body, options in the query."""
        picture, length = chance.choice(good()), chance.randint(1, 8)
        golden = self._asked("/v1/caption", "describe", [{"image": picture}], {"max_new_tokens": length})
        query = f"max_new_tokens={length}".encode()
        return replace(golden, content=picture, content_type=PICTURE, query=query, body=None)

    def _scores(self, chance: random.Random) -> Golden:
        targets = [a_text(chance)[:20] for _ in range(chance.randint(1, 3))]
        if chance.random() < 0.5:
            inputs = [a_text(chance)[:20] for _ in targets]
            body = {"model": "en-de", "inputs": inputs, "targets": targets}
            return _json_golden("/v1/score", body, self.pipelines["en-de"].score(inputs, targets), self._results)
        story = self.pipelines["story"]
        expected = story.run([story.prepare_score(None, target) for target in targets])
        return _json_golden("/v1/score", {"model": "story", "targets": targets}, expected, self._results)

    def _completions(self, chance: random.Random) -> Golden:
        prompts = [a_text(chance)[:20] for _ in range(chance.randint(1, 2))]
        n, length = chance.randint(1, 3), chance.randint(1, 8)
        sampling = chance.choice([{}, {"temperature": 0.7, "seed": chance.randrange(2**63)}])
        asked: dict[str, Any] = {"model": "story", "prompt": prompts, "max_tokens": length, "n": n}
        asked |= {"logprobs": 0, "stream": chance.random() < 0.3, **(sampling or {"temperature": 0})}
        options = {"num_beams": 1, "max_new_tokens": length, "length_penalty": 1.0, "logprobs": True}
        options |= {"do_sample": True, "num_return_sequences": n, **sampling} if sampling else {}
        found = self.pipelines["story"](prompts, **options)
        sequences = [one for result in found for one in result["sequences"] * (1 if sampling else n)]
        return _json_golden("/v1/completions", asked, [[one["text"], one["logprobs"]] for one in sequences], _choices)

    def _states(self, chance: random.Random) -> dict[str, list[tuple[Any, bytes, int]]]:
        """Of each model that gives states: an input, the state after it, and how many rows wide the search was."""
        states: dict[str, list[tuple[Any, bytes, int]]] = {}
        for name in ("mood", "names", "en-de", "story"):
            pipeline, labels = self.pipelines[name], name in ("mood", "names")
            for _ in range(10):
                item = a_text(chance)[:20]
                job = pipeline.prepare(item, {} if labels else {"max_new_tokens": 3}, return_state=True)
                (answer,) = pipeline.run([job])
                state = answer["state"] if labels else answer["sequences"][0]["state"]
                states.setdefault(name, []).append((item, state, job.width))
        return states

    def _resumed(self, chance: random.Random) -> Golden:
        """A request that goes on from a state, or brings one."""
        name, path = chance.choice(
            [("mood", "classify"), ("names", "tag"), ("en-de", "translate"), ("story", "generate")]
        )
        options = {} if path in ("classify", "tag") else {"max_new_tokens": 4, "seed": 1}  # a state tells the seed
        item, state, width = chance.choice(self.states[name])
        item = item if name == "en-de" else a_text(chance)[:20]
        state_with_width = (state, width) if chance.random() < 0.7 else None
        return self._asked(f"/v1/{path}", name, [item], options, came_with=state_with_width, return_state=True)

    def _asked(
        self,
        path: str,
        name: str,
        items: Sequence[Any],
        options: dict[str, Any] | None = None,
        threshold: float | None = None,
        stream: bool = False,
        came_with: tuple[bytes, int] | None = None,
        return_state: bool = False,
    ) -> Golden:
        """came_with: the state that one item goes on from, and how wide its search was."""
        pipeline, options = self.pipelines[name], options or {}
        more = {"threshold": threshold, "return_state": return_state, "state": came_with[0] if came_with else None}
        jobs = [pipeline.prepare(item, options, **more) for item in items]
        results = pipeline.run(jobs)
        body: dict[str, Any] = {"model": name, "inputs": [on_wire(item) for item in items], **options}
        body |= {"threshold": threshold} if threshold is not None else {}
        body |= {"return_state": True} if return_state else {}
        if came_with:
            body["state"] = self.seal.seal(*came_with)
            results[0]["state_exact"] = pipeline.goes_on_exactly(jobs[0], came_with[1])
        if not stream:
            return _json_golden(path, body, _with_states(results, bytes.hex), self._results)
        return _json_golden(path, {**body, "stream": True}, [results, _texts_of(results, options)], _streamed)

    def _results(self, reply: Reply) -> Any:
        """The states in it as they were before they were sealed."""
        return _with_states(json.loads(reply.content)["results"], lambda state: self.seal.open(state, "").state.hex())

    def _batch(self, chance: random.Random) -> Golden:
        whole = [one for one in self.single if one.body is not None and not one.body.get("stream")]
        lines = [chance.choice(whole) for _ in range(chance.randint(1, 4))]
        asked = [
            {"custom_id": f"line {index} ü", "url": line.path, "body": line.body} for index, line in enumerate(lines)
        ]
        content = b"\n".join(json.dumps(line).encode() for line in asked)

        def read(reply: Reply) -> Any:
            answers = [json.loads(line) for line in reply.content.splitlines()]
            replies = [replace(reply, content=json.dumps(one["response"]["body"]).encode()) for one in answers]
            return [
                [one["custom_id"], line.read(part)] for one, line, part in zip(answers, lines, replies, strict=True)
            ]

        expected = [[one["custom_id"], line.expected] for one, line in zip(asked, lines, strict=True)]
        return Golden("POST", "/v1/batch", content, LINES, expected, read)

    def _looks(self) -> list[Golden]:
        revisions = {name: pipeline.revision for name, pipeline in self.pipelines.items()}
        mood = revisions["mood"]
        return [
            _look("/v1/models", revisions, lambda body: {card["id"]: card["revision"] for card in body["data"]}),
            _look("/readyz", [True, mood], lambda body: [body["ready"], body["models"]["mood"]["revision"]]),
            _look("/v1/models/mood", mood, lambda body: body["revision"]),
            _look("/healthz", True, lambda body: body["alive"]),
        ]


def search_options(chance: random.Random) -> dict[str, Any]:
    """Of every kind of search, in few tokens."""
    options: dict[str, Any] = {"max_new_tokens": chance.randint(1, 8)}
    kind = chance.randrange(4)
    if kind == 0:
        options |= {"num_beams": chance.randint(2, 4), "num_return_sequences": 2, "length_penalty": 0.8}
    elif kind == 1:
        options |= {"do_sample": True, "seed": chance.randrange(2**63), "top_k": 5, "num_return_sequences": 2}
    elif kind == 2:
        options |= {"repetition_penalty": 1.2, "stop": ["a"], "bad_words": ["b"]}
    return options | chance.choice([{}, {"logprobs": True}, {"top_logprobs": 2}])


def _json_golden(path: str, body: Any, expected: Any, read: Callable[[Reply], Any]) -> Golden:
    content = json.dumps(body, ensure_ascii=False)
    if len(content) % 2:  # some clients escape all that is not ASCII
        content = json.dumps(body)
    return Golden("POST", path, content.encode(), JSON, json.loads(json.dumps(expected)), read, body)


def _look(path: str, expected: Any, read: Callable[[Any], Any]) -> Golden:
    return Golden("GET", path, b"", "", expected, lambda reply: read(json.loads(reply.content)))


def _with_states(results: list[Any], change: Callable[[Any], str]) -> list[Any]:
    for result in results:
        for holder in (result, *result.get("sequences", ())):
            if "state" in holder:
                holder["state"] = change(holder["state"])
    return results


def _texts_of(results: list[Any], options: dict[str, Any]) -> list[list[str]]:
    """What is streamed: with beams the best sequence alone."""
    best = 1 if options.get("num_beams", 1) > 1 else None
    texts = [[sequence["text"] for sequence in result["sequences"]] for result in results]
    return [found[:best] + [""] * len(found[best:] if best else ()) for found in texts]


def _streamed(reply: Reply) -> Any:
    """The whole answer at the end of a stream, and the pieces before it put together."""
    *deltas, (name, answer) = events(reply.content)
    assert name == "answer", answer
    texts = [["" for _ in result["sequences"]] for result in answer["results"]]
    for _, piece in deltas:
        texts[piece["index"]][piece["sequence"]] += piece["delta"]
    return [answer["results"], texts]


def _choices(reply: Reply) -> Any:
    """Text and log-probabilities of each choice, from one answer or from the pieces of a stream."""
    streamed = reply.content_type.startswith("text/event-stream")
    bodies = [data for _, data in events(reply.content)[:-1]] if streamed else [json.loads(reply.content)]
    found: dict[int, list[Any]] = {}
    for choice in (choice for body in bodies for choice in body["choices"]):
        text, logprobs = found.setdefault(choice["index"], ["", []])
        told = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        found[choice["index"]] = [text + choice["text"], logprobs + told]
    return [found[index] for index in sorted(found)]


def on_wire(item: Any) -> Any:
    """With pictures in base64."""
    if isinstance(item, bytes):
        return base64.b64encode(item).decode()
    if isinstance(item, list):
        return [on_wire(one) for one in item]
    return {name: on_wire(value) for name, value in item.items()} if isinstance(item, dict) else item


def _word(chance: random.Random) -> str:
    return chance.choice(TEXTS).strip().replace(" ", "-") or "word"


def a_text(chance: random.Random) -> str:
    return " ".join([_word(chance), *(chance.choice(TEXTS) for _ in range(chance.randint(0, 2)))])


def _text_item(chance: random.Random) -> Any:
    return chance.choice([a_text(chance), {"text": a_text(chance)}])


def asking(golden: Golden, **changes: Any) -> Ask:
    """A request like a valid one, with changes: to `content_type`, to `more` headers, or to fields of an Ask."""
    content_type = changes.pop("content_type", golden.content_type)
    headers = {b"host": b"127.0.0.1", b"authorization": b"Bearer " + KEY.encode()}
    if content_type:
        headers[b"content-type"] = content_type.encode("latin-1")
    more = changes.pop("more", ())
    replaced = {name for name, _ in more}
    all_headers = (*((name, value) for name, value in headers.items() if name not in replaced), *more)
    return replace(Ask("", golden.method, golden.path, golden.query, all_headers, golden.content), **changes)
