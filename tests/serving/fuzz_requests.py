"""What the fuzz asks: valid requests, with answers that the library gave beforehand, and what becomes of them when they
are damaged. A request depends on a seed and its number alone (but for when its state expires), and can be made again.

Knows what goes over the wire; knows no app.
"""

import base64
import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from PIL import Image

from seqmodels.pipeline import Pipeline
from serving.batch import URLS
from serving.completions import CompletionRequest
from serving.schema import TranslateRequest
from serving.states import Seal

KEY = "a key that only the fuzz knows"
JSON, LINES, PICTURE = "application/json", "application/x-ndjson", "image/png"
TEXTS = ("a good day", "größer", "日本", "a\u0000b", "😀", "x" * 50, " ", "one two", "\u202ex", "e\u0301", '"\\')
ONE_IN = 5  # requests are valid
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


# -- valid requests, whose answers are known


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
        self.looks = [self._models(), *self._ready()]
        self.posts = self.single + self.batches
        bombs()  # made now: the first that is asked must not wait
        self._chance = random.Random()  # seeded anew for each request, which is cheaper than a new one

    def choose(self, chance: random.Random) -> Golden:
        return chance.choice(self.looks if chance.random() < 0.05 else self.posts)

    def ask(self, seed: int, number: int) -> Ask:
        """The request of that number: one in five is valid."""
        chance = self._chance
        chance.seed(f"{seed}:{number}")
        if number % ONE_IN == 0:
            return as_it_should_be(self.choose(chance))
        (kind,) = chance.choices(KINDS, WEIGHTS)
        return replace(DAMAGES[kind](chance, self), kind=kind)

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
            return self._asked("/v1/tag", "motion", [{"frames": chance.sample(_pictures(), 2)}])
        items = [
            chance.choice([_text(chance), {"words": [_word(chance) for _ in range(chance.randint(1, 4))]}])
            for _ in range(chance.randint(1, 3))
        ]
        return self._asked("/v1/tag", "names", items, threshold=chance.choice([None, 0.4]))

    def _texts(self, chance: random.Random) -> Golden:
        task, name = chance.choice([("translate", "en-de"), ("generate", "story")])
        stream = chance.random() < 0.3
        items = [_text(chance)[:20] for _ in range(chance.randint(1, 3))]
        return self._asked(f"/v1/{task}", name, items, search_options(chance), stream=stream)

    def _captions(self, chance: random.Random) -> Golden:
        item = {"image": chance.choice(_pictures())}
        return self._asked("/v1/caption", "describe", [item], search_options(chance), stream=chance.random() < 0.3)

    def _raw(self, chance: random.Random) -> Golden:
        """A picture as the body, options in the query."""
        picture, length = chance.choice(_pictures()), chance.randint(1, 8)
        golden = self._asked("/v1/caption", "describe", [{"image": picture}], {"max_new_tokens": length})
        query = f"max_new_tokens={length}".encode()
        return replace(golden, content=picture, content_type=PICTURE, query=query, body=None)

    def _scores(self, chance: random.Random) -> Golden:
        targets = [_text(chance)[:20] for _ in range(chance.randint(1, 3))]
        if chance.random() < 0.5:
            inputs = [_text(chance)[:20] for _ in targets]
            body = {"model": "en-de", "inputs": inputs, "targets": targets}
            return _json_golden("/v1/score", body, self.pipelines["en-de"].score(inputs, targets), self._results)
        story = self.pipelines["story"]
        expected = story.run([story.prepare_score(None, target) for target in targets])
        return _json_golden("/v1/score", {"model": "story", "targets": targets}, expected, self._results)

    def _completions(self, chance: random.Random) -> Golden:
        prompts = [_text(chance)[:20] for _ in range(chance.randint(1, 2))]
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
                item = _text(chance)[:20]
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
        item = item if name == "en-de" else _text(chance)[:20]
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
        body: dict[str, Any] = {"model": name, "inputs": [_on_wire(item) for item in items], **options}
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

    def _models(self) -> Golden:
        expected = {name: pipeline.revision for name, pipeline in self.pipelines.items()}
        return _look("/v1/models", expected, lambda body: {card["id"]: card["revision"] for card in body["data"]})

    def _ready(self) -> list[Golden]:
        mood = self.pipelines["mood"].revision
        return [
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


def events(content: bytes) -> list[tuple[str | None, Any]]:
    """Name and data of each event of a stream."""
    found = []
    for block in content.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


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


def _on_wire(item: Any) -> Any:
    """With pictures in base64."""
    if isinstance(item, bytes):
        return base64.b64encode(item).decode()
    if isinstance(item, list):
        return [_on_wire(one) for one in item]
    return {name: _on_wire(value) for name, value in item.items()} if isinstance(item, dict) else item


def _word(chance: random.Random) -> str:
    return chance.choice(TEXTS).strip().replace(" ", "-") or "word"


def _text(chance: random.Random) -> str:
    return " ".join([_word(chance), *(chance.choice(TEXTS) for _ in range(chance.randint(0, 2)))])


def _text_item(chance: random.Random) -> Any:
    return chance.choice([_text(chance), {"text": _text(chance)}])


def as_it_should_be(golden: Golden) -> Ask:
    return asking(golden, "valid", golden=golden)


def asking(golden: Golden, kind: str = "", /, **changes: Any) -> Ask:
    """A request like a valid one, with changes: to `content_type`, to `more` headers, or to fields of an Ask."""
    content_type = changes.pop("content_type", golden.content_type)
    headers = {b"host": b"127.0.0.1", b"authorization": b"Bearer " + KEY.encode()}
    if content_type:
        headers[b"content-type"] = content_type.encode("latin-1")
    more = changes.pop("more", ())
    replaced = {name for name, _ in more}
    all_headers = (*((name, value) for name, value in headers.items() if name not in replaced), *more)
    return replace(Ask(kind, golden.method, golden.path, golden.query, all_headers, golden.content), **changes)


# -- damage. Each takes a valid request and makes it strange; some of what comes out is valid still


def _with_body(chance: random.Random, bank: Bank) -> tuple[Golden, dict[str, Any]]:
    """A request of JSON, and a copy of its body that may be changed."""
    golden = chance.choice(bank.single)
    while golden.body is None:
        golden = chance.choice(bank.single)
    return golden, dict(golden.body)


def values(chance: random.Random, bank: Bank) -> Ask:
    """Fields replaced, added and taken away."""
    golden, body = _with_body(chance, bank)
    for _ in range(chance.randint(1, 3)):
        if body and chance.random() < 0.2:
            body.pop(chance.choice(list(body)))
        else:
            body[_field(chance, body)] = strange_value(chance)
    return asking(golden, content=json.dumps(body).encode())  # NaN and lone surrogates, as Python writes them


def _field(chance: random.Random, body: dict[str, Any]) -> str:
    if chance.random() < 0.3:  # what all the others are about
        return chance.choice([name for name in ("inputs", "prompt", "targets") if name in body] or ["inputs"])
    known = [*body, *TranslateRequest.model_fields, *CompletionRequest.model_fields, "threshold", "targets"]
    return chance.choice([*known, "unknown", "__proto__", "", "x" * 1000])


def strange_value(chance: random.Random) -> Any:
    odd: list[Any] = [None, True, -1, 0, 1.5, 1e308, 10**25, "", " ", "\x00", "a" * 3000, [], [None], [[]], {}]
    odd += [{"text": None}, {"text": "a", "image": "b"}, {"image": "AAAA"}, {"frames": []}, {"features": [[]]}]
    odd += [{"features": [[1e39, 0, 0]]}, {"features": [[1, 2], [3]]}, {"features": [[1e30] * 3]}, {"words": [""]}]
    odd += [{"words": []}, ["a"] * 300, [{"words": ["\u2028"]}], "a\u0300" * 50, [0.5], {"text": 1}, "1", -0.0]
    return chance.choice(odd)


def nesting(chance: random.Random, bank: Bank) -> Ask:
    """Lists in lists in objects, to any depth."""
    golden, body = _with_body(chance, bank)
    depth = chance.choice([1, 10, 120, 199, 200, 201, 1000, 50_000])
    left, right = chance.choice([(b"[", b"]"), (b'{"text":', b"}"), (b'[{"a":', b"}]"), (b"[", b"")])
    deep = left * depth + b"1" + right * depth
    if chance.random() < 0.3:
        return asking(golden, content=deep)
    return asking(golden, content=_put(body, _field(chance, body), deep))


def _put(body: dict[str, Any], name: str, raw: bytes) -> bytes:
    """The body as JSON, with one field as it is written."""
    rest = json.dumps({key: value for key, value in body.items() if key != name}).encode()
    return rest.removesuffix(b"}") + (b"," if len(rest) > 2 else b"") + json.dumps(name).encode() + b":" + raw + b"}"


NUMBERS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"-0", b"-0.0", b"0x10", b"01", b"1.", b".5",
    b"+1", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"18446744073709551616", b"1e400",
    b"9" * 400, b"-" + b"9" * 400, b"9" * 4299, b"9" * 4301, b"9" * 20_000, b"0." + b"1" * 5000, b"1e" + b"9" * 500,
    b"1_000", b"5e-324", b"1.7976931348623157e308", b"3.5e38", b"2147483648", b"nan", b"inf", b"1E5", b"0.1e1",
)  # fmt: skip


def numbers(chance: random.Random, bank: Bank) -> Ask:
    """Numbers that JSON or floats have no place for, or only just."""
    golden, body = _with_body(chance, bank)
    number = chance.choice(NUMBERS)
    raw = chance.choice([number, b"[" + number + b"]", b'{"features":[[' + b",".join([number] * 3) + b"]]}"])
    if chance.random() < 0.3:  # one model takes numbers
        return asking(golden, path="/v1/classify", content=_put({"model": "series"}, "inputs", raw))
    fields = ["num_beams", "max_new_tokens", "temperature", "top_p", "seed", "threshold", "length_penalty", "n"]
    return asking(golden, content=_put(body, chance.choice([*fields, _field(chance, body)]), raw))


def surrogates(chance: random.Random, bank: Bank) -> Ask:
    """Halves of characters, in strings and names, escaped and as bytes."""
    golden, body = _with_body(chance, bank)
    half = chance.choice([b"\\ud800", b"\\udfff", b"\\ud800\\ud800", b"\xed\xa0\x80", b"\\ud83d\\u0020", b"\\uDEAD"])
    string = b'"a' + half + b' b"'
    kind = chance.randrange(4)
    if kind == 0:
        return asking(golden, content=b'{"a' + half + b'":1,' + golden.content[1:])
    if kind == 1:
        return asking(golden, content=_put(body, "model", string))
    raw = chance.choice([string, b"[" + string + b"]", b'{"text":' + string + b"}", b'{"words":[' + string + b"]}"])
    return asking(golden, content=_put(body, chance.choice(["inputs", "prompt", "targets", "stop", "prefix"]), raw))


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """Some cut out, put in, repeated or flipped."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        noise = chance.choice(
            [b"\x00", b"\xff\xfe", b"NaN", b"\\ud800", b'"', b"{", b"[" * 500, b"1e9999", b"\xef\xbb\xbf"]
        )
        flipped = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        data = chance.choice([data[:at], data[:at] + noise + data[at:], data[at:] + data[:at], data + data, flipped])
        data = data[:200_000]
    return data


def broken_bytes(chance: random.Random, bank: Bank) -> Ask:
    golden = chance.choice(bank.posts)
    return asking(golden, content=damaged_bytes(chance, golden.content))


def encodings(chance: random.Random, bank: Bank) -> Ask:
    """JSON in other encodings than UTF-8, with and without a word about it."""
    golden, body = _with_body(chance, bank)
    text = json.dumps(body | ({"inputs": "grün"} if "inputs" in body else {}), ensure_ascii=False)
    name = chance.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252", "utf-7", "utf-8"])
    charset = chance.choice(
        ["", f"; charset={name}", "; charset=nonsense", ";charset", "; charset=utf-8; charset=utf-16"]
    )
    content = text.encode(name, errors="replace")
    broken = chance.choice([b"", b"\xff", b"\xc3(", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\x00"])
    return asking(golden, content=content + broken, content_type=JSON + charset)


def duplicate_keys(chance: random.Random, bank: Bank) -> Ask:
    golden, body = _with_body(chance, bank)
    name = _field(chance, body)
    more = b",".join(
        _put({}, name, json.dumps(strange_value(chance)).encode())[1:-1] for _ in range(chance.randint(2, 50))
    )
    return asking(golden, content=golden.content[:-1] + b"," + more + b"}")


def nothing(chance: random.Random, bank: Bank) -> Ask:
    """Next to nothing."""
    golden = chance.choice(bank.posts)
    words = [
        b"",
        b" ",
        b"\n",
        b"null",
        b"[]",
        b'""',
        b"0",
        b"true",
        b"{}",
        b"{",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\n" * 1000,
    ]
    content = chance.choice([*words, b"\xef\xbb\xbf" + golden.content])
    return asking(golden, content=content)


CONTENT_TYPES = (
    "", "text/plain", PICTURE, "image/", "image/svg+xml", "multipart/form-data", "application/x-www-form-urlencoded",
    JSON, "APPLICATION/JSON", "application/json/json", ";", "application/problem+json", "\xff\xfe", "a" * 10_000,
    LINES, "*/*", "application/json\t; q=1", "multipart/form-data; boundary=", "application/jsonl",
)  # fmt: skip


def content_types(chance: random.Random, bank: Bank) -> Ask:
    golden = chance.choice(bank.posts)
    return asking(golden, content_type=chance.choice(CONTENT_TYPES))


def multipart(chance: random.Random, bank: Bank) -> Ask:
    """Forms: no route takes one, so all that is in them must be in vain."""
    golden = chance.choice(bank.posts)
    boundary = chance.choice(["x", "", "a" * 3000, '"', "x; boundary=y", "\xe9", "-- --"])
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="inputs"; filename="{chance.choice(TEXTS)}"\r\n'
    part += chance.choice(["", "Content-Type: image/png\r\n", "X: " + "y" * 9000 + "\r\n", "no colon\r\n", "\x00\r\n"])
    content = (part + "\r\n").encode() * chance.choice([1, 3, 200]) + golden.content[:1000]
    content += chance.choice([b"", f"\r\n--{boundary}--".encode(), f"\r\n--{boundary}".encode(), b"\r\n----"])
    content = content if chance.random() < 0.7 else damaged_bytes(chance, content)
    return asking(golden, content=content, content_type=f"multipart/form-data; boundary={boundary}")


def compressed(chance: random.Random, bank: Bank) -> Ask:
    """Bodies that say they are compressed: none is to be unpacked here."""
    golden = chance.choice(bank.posts)
    content = chance.choice([gzip.compress(golden.content), golden.content, _bomb(), _bomb()[: chance.randrange(4000)]])
    encoding = chance.choice([b"gzip", b"deflate", b"br", b"zstd", b"identity", b"gzip, gzip", b"\xff", b""])
    return asking(golden, content=content, more=((b"content-encoding", encoding),))


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(50_000_000))


HEADERS: dict[bytes, tuple[bytes, ...]] = {
    b"host": (
        b"", b"evil.example", b"localhost", b"127.0.0.1:99999", b"[::1]", b"[::1", b"\xff", b"a" * 5000,
        b"127.0.0.1@x",
    ),
    b"authorization": (
        b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic eDp5", b"bearer\xff\xfe", b"Bearer " + b"k" * 9000,
    ),
    b"x-request-priority": (b"low", b"normal", b"high", b"", b"HIGH", b"\xff", b"1", b"highest" * 1000),
    b"x-request-timeout-seconds": (
        b"0", b"-1", b"nan", b"inf", b"-inf", b"1e999", b"1e-9", b"0.001", b"0.05", b"5", b"", b"\xff", b"1_0",
        b"9" * 5000, b" 1 ",
    ),
    b"x-request-id": (b"", b"\xff\xfe", b"a" * 10_000, b"\xc3\xa9", b"../../etc", b"{}"),
    b"content-length": (b"0", b"-1", b"9" * 5000, b"abc", b"1", b"\xb2", b"8388609", b"1e3"),
    b"transfer-encoding": (b"chunked", b"gzip, chunked", b"nonsense"),
    b"accept": (b"text/event-stream", b"\xff", b"image/*", b"a" * 9000),
    b"origin": (b"null", b"http://evil.example", b"\xff"),
    b"cookie": (b"a=b; " * 2000, b"\xff"),
    b"expect": (b"100-continue",),
    b"range": (b"bytes=0-", b"bytes=-1,9" * 100),
    b"x-forwarded-for": (b"1.2.3.4", b"\xff"),
    b"x-http-method-override": (b"DELETE",),
    b"upgrade": (b"websocket", b"h2c"),
}  # fmt: skip


def headers(chance: random.Random, bank: Bank) -> Ask:
    golden = bank.choose(chance)
    more = []
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(list(HEADERS))
        more += [(name, chance.choice(HEADERS[name]))] * chance.choice([1, 1, 1, 2])
    more += [(b"x-many-%d" % number, b"v" * 50) for number in range(chance.choice([0, 0, 0, 500]))]
    return asking(golden, more=tuple(more))


PATHS = (
    "/", "", "//", "/v1", "/v1/", "/v1/classify/", "//v1/classify", "/v1/../v1/tag", "/v1/classify\x00",
    "/V1/CLASSIFY", "/v1/\ufffd", "/v1/models/", "/v1/models/none", "/v1/models/\x00", "/v1/models/a/b",
    "/v1/models/" + "x" * 8000, "/v1/models/mood", "/docs", "/openapi.json", "/docs/oauth2-redirect", "/redoc",
    "/static-offline-docs/../app.py", "/static-offline-docs/\x00", "/static-offline-docs/" + "x" * 5000,
    "/static-offline-docs/", "/static-offline-docs/swagger-ui.css", "/favicon.ico", "/😀", "/metrics", "/readyz",
    "/healthz", "/readyz/", "/v1/batch", "/v1/generate", "/-/routes", "/%2e%2e", "/v1/classify;x=1",
)  # fmt: skip
METHODS = (
    "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "post", "X" * 300, "PROPFIND",
)  # fmt: skip


def paths(chance: random.Random, bank: Bank) -> Ask:
    golden = bank.choose(chance)
    if chance.random() < 0.5:
        return asking(golden, path=chance.choice([*PATHS, *URLS_POSTED]))
    method, path = chance.choice(METHODS), chance.choice([golden.path, *PATHS])
    return asking(golden, method=method, path=path)


URLS_POSTED = tuple(f"/v1/{name}" for name in URLS)
QUERIES = (
    b"", b"a", b"a=b&a=b", b"=", b"&&&", b"%", b"%ff%fe", b"\xff", b"max_new_tokens=1&max_new_tokens=2",
    b"max_new_tokens=nan", b"num_beams=" + b"9" * 5000, b"stream=true", b"stream=maybe", b"model=%00",
    b"model=describe", b"temperature=nan", b"do_sample=1", b"inputs=x", b"stop=a", b"stop=a&stop=b", b"seed=-1",
    b"seed=9223372036854775808", b"top_p=inf", b"a=" + b"b" * 20_000, b"a&" * 3000,
    b"num_beams=4&num_return_sequences=2", b"%ed%a0%80=1", b"prefix=%ed%a0%80", b"prefix=a", b"state=x",
    b"return_state=true", b"truncate=1", b"num_beams=1e1", b"num_beams=0x10", b"num_beams=", b"max_new_tokens=+4",
    b"__proto__=1", b"stop[]=a", b"num_beams=%D9%A4",
)  # fmt: skip


def queries(chance: random.Random, bank: Bank) -> Ask:
    """Half of them where the query is read: beside a raw picture."""
    golden = bank.choose(chance)
    query = b"&".join(chance.sample(QUERIES, chance.randint(1, 2)))
    if chance.random() < 0.5:
        return asking(golden, query=query)
    picture = chance.choice(_pictures())
    return asking(golden, method="POST", path="/v1/caption", content_type=PICTURE, content=picture, query=query)


def states(chance: random.Random, bank: Bank) -> Ask:
    """Tampered with, cut short, another model's, and what was never one."""
    golden = chance.choice(bank.single[-VALID_OF_A_KIND:])
    other = chance.choice(list(bank.states))
    _, state, width = chance.choice(bank.states[other])
    sealed = bank.seal.seal(state, width)
    at = chance.randrange(len(sealed))
    nonsense = bank.seal.seal(damaged_bytes(chance, state), chance.choice([0, 1, 2**32 - 1]))
    broken: list[Any] = [
        sealed,
        sealed[:at],
        sealed[at:],
        sealed[:at] + "A" + sealed[at + 1 :],
        sealed + sealed,
        nonsense,
    ]
    broken += [
        "",
        "=",
        "é",
        "A" * 100_000,
        [sealed] * 2,
        [],
        [sealed],
        [""],
        [1],
        7,
        sealed + "=",
        sealed.lower(),
        nonsense,
    ]
    return asking(golden, content=json.dumps({**golden.body, "state": chance.choice(broken)}).encode())


ODD_OPTIONS: dict[str, list[Any]] = {
    "num_beams": [0, 17, 10**9, 3, -1, "3", 2.0, 2.5],
    "num_return_sequences": [0, 17, 5, 10**30],
    "n": [0, 100, 2],
    "max_new_tokens": [0, 17, 10**9, "x", 1.0],
    "min_new_tokens": [0, 5, 10**9],
    "temperature": [0, -1, 1e-300, 1e300, 3],
    "top_k": [0, 1, 10**12, -1],
    "top_p": [0, 1, 2, 1e-300],
    "typical_p": [0.5, 0, 2],
    "min_p": [0.5, 2, -1],
    "seed": [-1, 2**63, 2**64, 0],
    "length_penalty": [-5, 0, 1e300, -1e300],
    "repetition_penalty": [0, 1e-300, 1e300, -1],
    "no_repeat_ngram_size": [-1, 1, 10**9],
    "coverage_penalty": [-1, 0.2, 1e300],
    "num_beam_groups": [2, 0],
    "diversity_penalty": [0.5, 1e300],
    "top_logprobs": [0, 20, 21, 10**9],
    "stop": [[], [""], ["a"] * 9, "a", ["x" * 101], ["\x00"]],
    "bad_words": [[""], ["a"] * 9, [" "]],
    "force_words": [[""], ["ab"], ["日本"]],
    "prefix": ["", "x" * 3000, "\x00", " "],
    "output_attentions": [True, 1],
    "do_sample": [True, "yes"],
    "stream": [True, 1],
    "threshold": [-0.1, 1.1, 1e-300, True],
    "truncate": [True, None],
    "best_of": [0, 20, 1],
    "logprobs": [0, 20, 21, True],
    "echo": [True],
    "max_tokens": [0, 17, -1],
    "stream_options": [{}, {"include_usage": 1}, None],
    "logit_bias": [{"a": 1}, {}],
    "early_stopping": [True, "x"],
}


def options(chance: random.Random, bank: Bank) -> Ask:
    """Options of a search beyond what is allowed, or in company that they do not go with."""
    golden, body = _with_body(chance, bank)
    for _ in range(chance.randint(1, 4)):
        name = chance.choice(list(ODD_OPTIONS))
        body[name] = chance.choice(ODD_OPTIONS[name])
    return asking(golden, content=json.dumps(body).encode())


def pictures(chance: random.Random, bank: Bank) -> Ask:
    """Damaged, of another kind than they say, and much larger than they look."""
    golden = bank.single[0]
    data = damaged_picture(chance, chance.choice(_pictures())) if chance.random() < 0.6 else chance.choice(bombs())
    if chance.random() < 0.4:
        kind = chance.choice([PICTURE, "image/jpeg", "image/gif", "image/x"])
        return asking(golden, path="/v1/caption", content_type=kind, content=data)
    encoded = base64.b64encode(data).decode()
    item, path = chance.choice(
        [({"image": encoded}, "/v1/caption"), ({"frames": [_on_wire(_pictures()[0]), encoded]}, "/v1/tag")]
    )
    body = {"inputs": item, "model": "describe" if path == "/v1/caption" else "motion"}
    return asking(golden, path=path, content=json.dumps(body).encode())


def base64_damage(chance: random.Random, bank: Bank) -> Ask:
    encoded = _on_wire(chance.choice(_pictures()))
    at = chance.randrange(len(encoded))
    prefix = "data:image/png;base64,"
    broken = [
        prefix + encoded,
        encoded[:at],
        encoded + "=",
        encoded[:at] + "\n" + encoded[at:],
        encoded[:at] + "é" + encoded[at:],
    ]
    broken += ["", "=", "====", "A", encoded.replace("+", "-").replace("/", "_"), " " + encoded, encoded * 3, "\x00"]
    item = {"image": chance.choice(broken)} if chance.random() < 0.5 else {"frames": [encoded, chance.choice(broken)]}
    return asking(
        bank.single[0], path=chance.choice(["/v1/caption", "/v1/tag"]), content=json.dumps({"inputs": item}).encode()
    )


def batches(chance: random.Random, bank: Bank) -> Ask:
    """Lines of which some are damaged: the others must have their answers all the same."""
    golden = chance.choice(bank.batches)
    lines = golden.content.split(b"\n")
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines) + 1)
        url = json.dumps(chance.choice([*URLS_POSTED, "/v1/batch", "/v1/models", "http://x", "", 7])).encode()
        number, text = chance.choice(NUMBERS), json.dumps(_text(chance)).encode()
        line = chance.choice([
            damaged_bytes(chance, lines[at - 1]), b"", b"{}", b"null", b"\r", b"\xff",
            b"[" * 300,
            b'{"url":' + url + b',"body":{"inputs":' + text + b"}}",
            b'{"url":' + url + b',"body":{"inputs":"a","seed":' + number + b',"num_beams":' + number + b"}}",
            b'{"url":' + url + b',"body":{"inputs":' + b"[" * 180 + b"1" + b"]" * 180 + b"}}",
            b'{"url":' + url + b',"custom_id":' + number + b',"body":[]}',
            b'{"url":"/v1/classify","custom_id":"a\\ud800","body":{"inputs":"a\\ud800"}}',
            b'{"url":"/v1/generate","body":{"inputs":"a","stream":' + number + b"}}",
        ])  # fmt: skip
        lines.insert(at, line)
    ending = chance.choice([b"\n", b"\r\n", b"\n\n", b"\r"])
    return asking(golden, content=ending.join(lines))


def large(chance: random.Random, bank: Bank) -> Ask:
    """Above a limit, or just below it."""
    golden, body = _with_body(chance, bank)
    size = chance.choice([63, 64, 65, 100, 101, 300, 500, 501, 30_000])
    inputs: list[Any] = [
        "x" * size,
        ["x"] * size,
        {"words": ["x"] * size},
        [{"text": "y"}] * size,
        {"text": "é" * size},
    ]
    inputs += [
        {"frames": ["AAAA"] * size},
        {"features": [[0.5] * 3] * size},
        {"features": [[0.5] * size]},
        {"words": ["x" * size]},
    ]
    body |= {"inputs": chance.choice(inputs)} | chance.choice([{}, {"truncate": True}])
    content = json.dumps(body).encode()
    if chance.random() < 0.05:
        content += b" " * (1_100_000 - len(content))
    return asking(golden, content=content)


def leaving(chance: random.Random, bank: Bank) -> Ask:
    """Clients that are gone before the end of the body, or before that of the answer."""
    golden = bank.choose(chance)
    return asking(golden, leaves_after=chance.randint(0, 3))


def tasks(chance: random.Random, bank: Bank) -> Ask:
    """A body that is right somewhere else."""
    golden, body = _with_body(chance, bank)
    body |= chance.choice([{}, {"model": chance.choice([*bank.pipelines, "none", "x" * 5000, "\x00", None])}])
    return asking(golden, path=chance.choice(URLS_POSTED), content=json.dumps(body).encode())


DAMAGES: dict[str, Callable[[random.Random, Bank], Ask]] = {
    "values": values,
    "nesting": nesting,
    "numbers": numbers,
    "surrogates": surrogates,
    "bytes": broken_bytes,
    "encodings": encodings,
    "duplicate keys": duplicate_keys,
    "nothing": nothing,
    "content types": content_types,
    "multipart": multipart,
    "compressed": compressed,
    "headers": headers,
    "paths": paths,
    "queries": queries,
    "states": states,
    "options": options,
    "pictures": pictures,
    "base64": base64_damage,
    "batches": batches,
    "large": large,
    "leaving": leaving,
    "tasks": tasks,
}
COSTLY = ("pictures", "batches", "large", "queries")  # rarer, so that there is time for more of the others
KINDS = tuple(DAMAGES)
WEIGHTS = tuple(1 if kind in COSTLY else 2 for kind in KINDS)


# -- pictures


@cache
def _pictures() -> list[bytes]:
    """One in each format, with a block of EXIF where the format has one."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    kinds = [("RGB", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP")]
    files = []
    for mode, form in kinds:
        options = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
        files.append(_file(Image.new(mode, (13, 11), 40000 if mode == "I;16" else 7), form, **options))
    return files


def _file(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def damaged_picture(chance: random.Random, data: bytes) -> bytes:
    """Cut short, with bytes flipped (in the block of EXIF, if it has one), or with some put in or repeated."""
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return damaged_bytes(chance, data)
    block = max(data.find(b"Exif"), data.find(b"eXIf"), data.find(b"EXIF"), 0) if kind == 2 else 0
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = min(block + chance.randrange(120), len(data) - 1) if kind == 2 else chance.randrange(len(data))
        changed[at] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
    return bytes(changed)


@cache
def bombs() -> list[bytes]:
    """Small files that ask for much: pixels, frames, text."""
    many_frames = [Image.new("P", (64, 64), number % 256) for number in range(300)]
    sizes = [(13_000, 13_000), (2**31 - 1, 2**31 - 1), (0, 0), (1, 20_000_001), (60_000, 300)]
    return [
        *(_png(width, height) for width, height in sizes),
        _png(2000, 2000, zlib.compress(bytes(2001 * 2000))),  # allowed, and drawn
        _png(8, 8, zlib.compress(bytes(50_000_000))),  # much more than its size says
        _png(8, 8, text=(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        _png(8, 8, text=(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))),
        _png(8, 8, text=(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        _png(8, 8, text=(b"tEXt", b"a\0" + b"b" * 500_000)),
        _file(many_frames[0], "GIF", save_all=True, append_images=many_frames[1:]),
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        _file(Image.new("RGB", (300, 300)), "JPEG")[:400],
        b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
        _file(Image.new("L", (9, 9)), "TIFF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"PK\x03\x04", b"",
    ]  # fmt: skip


def _png(width: int, height: int, pixels: bytes = b"x\x9c", text: tuple[bytes, bytes] | None = None) -> bytes:
    """A grey PNG of any size that it says it has."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *([text] if text else [])]
    chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
