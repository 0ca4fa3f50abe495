"""What a body holds, made strange: each takes a valid request and damages it; some of what comes out is valid still."""

import base64
import json
import random
from typing import Any

from serving.batch import URLS
from serving.completions import CompletionRequest
from serving.schema import TranslateRequest

from .fuzz_pictures import bombs, good
from .fuzz_valid import JSON, PICTURE, VALID_OF_A_KIND, Ask, Bank, Golden, a_text, asking, on_wire

POSTED = tuple(f"/v1/{name}" for name in URLS)


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


NOISE = (b"\x00", b"\xff\xfe", b"NaN", b"\\ud800", b'"', b"{", b"[" * 500, b"1e9999", b"\xef\xbb\xbf")


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """Some cut out, put in, repeated or flipped."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        noise = chance.choice(NOISE)
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
    charsets = ["", f"; charset={name}", "; charset=nonsense", ";charset", "; charset=utf-8; charset=utf-16"]
    charset = chance.choice(charsets)
    content = text.encode(name, errors="replace")
    broken = chance.choice([b"", b"\xff", b"\xc3(", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\x00"])
    return asking(golden, content=content + broken, content_type=JSON + charset)


def duplicate_keys(chance: random.Random, bank: Bank) -> Ask:
    golden, body = _with_body(chance, bank)
    name = _field(chance, body)
    fields = [_put({}, name, json.dumps(strange_value(chance)).encode())[1:-1] for _ in range(chance.randint(2, 50))]
    return asking(golden, content=golden.content[:-1] + b"," + b",".join(fields) + b"}")


def nothing(chance: random.Random, bank: Bank) -> Ask:
    """Next to nothing."""
    golden = chance.choice(bank.posts)
    words = b"", b" ", b"\n", b"null", b"[]", b'""', b"0", b"true", b"{}", b"{", b"\xef\xbb\xbf", b"\x00", b"\n" * 1000
    return asking(golden, content=chance.choice([*words, b"\xef\xbb\xbf" + golden.content]))


def states(chance: random.Random, bank: Bank) -> Ask:
    """Tampered with, cut short, another model's, and what was never one."""
    golden = chance.choice(bank.single[-VALID_OF_A_KIND:])
    other = chance.choice(list(bank.states))
    _, state, width = chance.choice(bank.states[other])
    sealed = bank.seal.seal(state, width)
    at = chance.randrange(len(sealed))
    nonsense = bank.seal.seal(damaged_bytes(chance, state), chance.choice([0, 1, 2**32 - 1]))
    broken: list[Any] = [sealed, sealed[:at], sealed[at:], sealed[:at] + "A" + sealed[at + 1 :], sealed + sealed]
    broken += [nonsense, "", "=", "é", "A" * 100_000, [sealed] * 2, [], [sealed], [""], [1], 7, sealed + "="]
    broken += [sealed.lower(), nonsense]
    return asking(golden, content=json.dumps({**golden.body, "state": chance.choice(broken)}).encode())


ODD_OPTIONS: dict[str, list[Any]] = {
    "num_beams": [0, 17, 10**9, 3, -1, "3", 2.0, 2.5], "num_return_sequences": [0, 17, 5, 10**30], "n": [0, 100, 2],
    "max_new_tokens": [0, 17, 10**9, "x", 1.0], "min_new_tokens": [0, 5, 10**9],
    "temperature": [0, -1, 1e-300, 1e300, 3], "top_k": [0, 1, 10**12, -1], "top_p": [0, 1, 2, 1e-300],
    "typical_p": [0.5, 0, 2], "min_p": [0.5, 2, -1], "seed": [-1, 2**63, 2**64, 0],
    "length_penalty": [-5, 0, 1e300, -1e300], "repetition_penalty": [0, 1e-300, 1e300, -1],
    "no_repeat_ngram_size": [-1, 1, 10**9], "coverage_penalty": [-1, 0.2, 1e300], "num_beam_groups": [2, 0],
    "diversity_penalty": [0.5, 1e300], "top_logprobs": [0, 20, 21, 10**9],
    "stop": [[], [""], ["a"] * 9, "a", ["x" * 101], ["\x00"]], "bad_words": [[""], ["a"] * 9, [" "]],
    "force_words": [[""], ["ab"], ["日本"]], "prefix": ["", "x" * 3000, "\x00", " "], "output_attentions": [True, 1],
    "do_sample": [True, "yes"], "stream": [True, 1], "threshold": [-0.1, 1.1, 1e-300, True], "truncate": [True, None],
    "best_of": [0, 20, 1], "logprobs": [0, 20, 21, True], "echo": [True], "max_tokens": [0, 17, -1],
    "stream_options": [{}, {"include_usage": 1}, None], "logit_bias": [{"a": 1}, {}], "early_stopping": [True, "x"],
}  # fmt: skip


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
    data = damaged_picture(chance, chance.choice(good())) if chance.random() < 0.6 else chance.choice(bombs())
    if chance.random() < 0.4:
        kind = chance.choice([PICTURE, "image/jpeg", "image/gif", "image/x"])
        return asking(golden, path="/v1/caption", content_type=kind, content=data)
    encoded = base64.b64encode(data).decode()
    caption = "/v1/caption", {"inputs": {"image": encoded}, "model": "describe"}
    tag = "/v1/tag", {"inputs": {"frames": [on_wire(good()[0]), encoded]}, "model": "motion"}
    path, body = chance.choice([caption, tag])
    return asking(golden, path=path, content=json.dumps(body).encode())


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


def base64_damage(chance: random.Random, bank: Bank) -> Ask:
    encoded = on_wire(chance.choice(good()))
    at = chance.randrange(len(encoded))
    broken = ["data:image/png;base64," + encoded, encoded[:at], encoded + "="]
    broken += [encoded[:at] + "\n" + encoded[at:], encoded[:at] + "é" + encoded[at:]]
    broken += ["", "=", "====", "A", encoded.replace("+", "-").replace("/", "_"), " " + encoded, encoded * 3, "\x00"]
    item = {"image": chance.choice(broken)} if chance.random() < 0.5 else {"frames": [encoded, chance.choice(broken)]}
    path = chance.choice(["/v1/caption", "/v1/tag"])
    return asking(bank.single[0], path=path, content=json.dumps({"inputs": item}).encode())


def batches(chance: random.Random, bank: Bank) -> Ask:
    """Lines of which some are damaged: the others must have their answers all the same."""
    golden = chance.choice(bank.batches)
    lines = golden.content.split(b"\n")
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines) + 1)
        url = json.dumps(chance.choice([*POSTED, "/v1/batch", "/v1/models", "http://x", "", 7])).encode()
        number, text = chance.choice(NUMBERS), json.dumps(a_text(chance)).encode()
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
    inputs: list[Any] = ["x" * size, ["x"] * size, {"words": ["x"] * size}, [{"text": "y"}] * size]
    inputs += [{"text": "é" * size}, {"frames": ["AAAA"] * size}, {"features": [[0.5] * 3] * size}]
    inputs += [{"features": [[0.5] * size]}, {"words": ["x" * size]}]
    body |= {"inputs": chance.choice(inputs)} | chance.choice([{}, {"truncate": True}])
    content = json.dumps(body).encode()
    if chance.random() < 0.05:
        content += b" " * (1_100_000 - len(content))
    return asking(golden, content=content)


def tasks(chance: random.Random, bank: Bank) -> Ask:
    """A body that is right somewhere else."""
    golden, body = _with_body(chance, bank)
    body |= chance.choice([{}, {"model": chance.choice([*bank.pipelines, "none", "x" * 5000, "\x00", None])}])
    return asking(golden, path=chance.choice(POSTED), content=json.dumps(body).encode())
