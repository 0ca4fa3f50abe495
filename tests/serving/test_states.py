"""States that clients hold: what comes back is what went out, or is refused; going on is as if one had not stopped."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seqmodels.errors import ConfigError, InputError
from seqmodels.pipeline import Pipeline
from serving.states import Opened, Seal, load_state_key, this_place

from .conftest import STATE_KEY, InProcess, error_of, events_of, in_process
from .fakes import png
from .model_directories import save_all

HERE, ELSEWHERE = b"here....", b"elsewher"


def test_what_was_sealed_comes_out() -> None:
    seal = Seal(b"key", 60, HERE)
    sealed = seal.seal(b"state", 3)
    assert seal.open(sealed, "state") == Opened("state", b"state", width=3, from_here=True)
    assert not Seal(b"key", 60, ELSEWHERE).open(sealed, "state").from_here


def test_nothing_else_comes_out() -> None:
    seal = Seal(b"key", 60, HERE)
    data = bytearray(base64.urlsafe_b64decode(seal.seal(b"some state", 3) + "=="))
    for place in range(len(data)):
        changed = bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :])
        refuse(seal, base64.urlsafe_b64encode(changed).decode(), "state_invalid")
        refuse(seal, base64.urlsafe_b64encode(bytes(data[:place])).decode(), "state_invalid")
    for text in ("", "=", "a", "ä", "+/", "A" * 10_000, "\x00", seal.seal(b"x", 1) + "A"):
        refuse(seal, text, "state_invalid")
    refuse(Seal(b"another key", 60, HERE), seal.seal(b"state", 3), "state_invalid")


def test_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Seal(b"key", 60, HERE)
    sealed = seal.seal(b"state", 3)
    now = __import__("time").time()
    monkeypatch.setattr("time.time", lambda: now + 59)
    assert seal.open(sealed, "state").state == b"state"
    monkeypatch.setattr("time.time", lambda: now + 61)
    refuse(seal, sealed, "state_expired")


def refuse(seal: Seal, sealed: str, code: str) -> None:
    with pytest.raises(InputError) as refused:
        seal.open(sealed, "state[2]")
    assert (refused.value.code, refused.value.param) == (code, "state[2]")


def test_the_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("x" * 32 + "\n")
    assert load_state_key(str(path)) == b"x" * 32
    assert load_state_key(None) != load_state_key(None)
    path.write_text("short")
    for wrong, message in ((path, "holds 5 characters"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            load_state_key(str(wrong))
    assert len(this_place("cpu")) == 8


@pytest.fixture(scope="module")
def server(models: dict[str, str]) -> Iterator[InProcess]:
    with in_process({name: Pipeline.from_pretrained(directory) for name, directory in models.items()}) as running:
        yield running


def ask(server: InProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.post(f"/v1/{path}", body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()["results"][0]
    return result


@pytest.mark.parametrize(
    ("path", "inputs", "search"),
    [
        ("generate", "once", {}), ("generate", "once", {"do_sample": True, "seed": 3}),
        ("translate", "a good day", {}), ("translate", "a good day", {"do_sample": True, "seed": 3}),
    ],
)  # fmt: skip
def test_a_generation_in_pieces_is_one_generation(
    server: InProcess, path: str, inputs: str, search: dict[str, Any]
) -> None:
    search = {"logprobs": True, **search}
    whole = ask(server, path, {"inputs": inputs, "max_new_tokens": 12, **search})["sequences"][0]
    tokens, logprobs, state = [], [], None
    for piece in range(3):
        body = {"inputs": inputs if path == "translate" or not piece else None, "max_new_tokens": 4, **search}
        result = ask(server, path, {**body, "state": state, "return_state": True})
        (sequence,) = result["sequences"]
        assert result.get("state_exact") is (None if piece == 0 else True)
        state = sequence["state"]
        tokens += sequence["tokens"]
        logprobs += sequence["logprobs"]
    assert len(tokens) == 12 and tokens == whole["tokens"] and logprobs == whole["logprobs"]
    assert 100 < len(state or "") < 8000


def test_a_state_forks(server: InProcess) -> None:
    state = ask(server, "generate", {"inputs": "once", "max_new_tokens": 4, "return_state": True})["sequences"][0][
        "state"
    ]
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8, "state": state}
    texts = [ask(server, "generate", {**options, "seed": seed})["sequences"][0]["text"] for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_a_stream_ends_with_the_state(server: InProcess) -> None:
    body = {"inputs": "once", "max_new_tokens": 4, "return_state": True}
    events = events_of(server.post("/v1/generate", {**body, "stream": True}))
    name, answer = events[-1]
    assert name == "answer"
    going_on = {"max_new_tokens": 4, "state": answer["results"][0]["sequences"][0]["state"]}
    plain = ask(server, "generate", body)["sequences"][0]["state"]
    assert ask(server, "generate", going_on) == ask(server, "generate", {**going_on, "state": plain})


def test_a_list_needs_as_many_states(server: InProcess) -> None:
    body = {"inputs": ["once", "twice"], "max_new_tokens": 4, "return_state": True}
    results = server.post("/v1/generate", body).json()["results"]
    states = [result["sequences"][0]["state"] for result in results]
    more = {"inputs": ["", ""], "max_new_tokens": 4}
    both = server.post("/v1/generate", {**more, "state": states}).json()["results"]
    for state, result in zip(states, both, strict=True):
        assert ask(server, "generate", {**more, "inputs": "", "state": state}) == result
    error = error_of(server.post("/v1/generate", {**more, "state": states[:1]}), 400)
    assert (error["param"], error["message"]) == (
        "state", "state holds 1 states for 2 inputs; give one state for each input",
    )  # fmt: skip
    pairs = {"inputs": ["a good day", "a bad day"], "max_new_tokens": 4}
    results = server.post("/v1/translate", {**pairs, "return_state": True}).json()["results"]
    states = [result["sequences"][0]["state"] for result in results]
    for wrong, field in (([states[0]] * 2, "state[1]"), (states[::-1], "state[0]")):
        error = error_of(server.post("/v1/translate", {**pairs, "state": wrong}), 400)
        message = f"{field} was made with other inputs; send the same ones again"
        assert [error["param"], error["message"]] == [field, message]


def test_states_that_do_not_fit(server: InProcess) -> None:
    body = {"inputs": "a day", "max_new_tokens": 4, "return_state": True}
    translated = ask(server, "translate", body)["sequences"][0]["state"]
    error = error_of(server.post("/v1/generate", {"state": translated}), 400)
    assert error["param"] == "state" and "was made by a model" in error["message"]
    error = error_of(server.post("/v1/translate", {"inputs": "another day", "state": translated}), 400)
    assert error["param"] == "state" and "other inputs" in error["message"]
    error = error_of(server.post("/v1/generate", {"state": translated[:-1] + "?"}), 400)
    assert error["code"] == "state_invalid"


WORDS = ["Ada", "lives", "in", "Oslo", "now"]
FRAMES = [base64.b64encode(png(8, size)).decode() for size in range(8, 14)]
SERIES = [[0.5, 1.0, -2.0], [0.1, 0.2, 0.3], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("model", "path", "whole", "pieces"),
    [
        ("names", "tag", {"words": WORDS}, [{"words": WORDS[:2]}, {"words": WORDS[2:4]}, {"words": WORDS[4:]}]),
        ("mood", "classify", "a good day, all in all", ["a good", " day,", " all in all"]),
        ("series", "classify", {"features": SERIES}, [{"features": SERIES[:1]}, {"features": SERIES[1:]}]),
        ("motion", "tag", {"frames": FRAMES}, [{"frames": [frame]} for frame in FRAMES]),
        ("topics", "classify", "art and sport", ["art and", " sport"]), ("rating", "classify", "so so", ["so", " so"]),
    ],
)  # fmt: skip
def test_a_long_input_comes_in_pieces(server: InProcess, model: str, path: str, whole: Any, pieces: list[Any]) -> None:
    """A classifier's last answer is that for the whole; a tagger's answers are those for their own piece of it."""
    state, answers = None, []
    for piece in pieces:
        answers.append(ask(server, path, {"model": model, "inputs": piece, "state": state, "return_state": True}))
        state = answers[-1].pop("state")
    expected = ask(server, path, {"model": model, "inputs": whole})
    assert answers[-1].pop("state_exact") is True
    if path == "classify":
        assert answers[-1] == expected
    else:
        told = [(tag["label"], tag["score"]) for answer in answers for tag in answer["tags"]]
        assert told == [(tag["label"], tag["score"]) for tag in expected["tags"]]


def test_a_model_that_reads_both_ways_takes_no_pieces(tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(save_all(tmp_path, bidirectional=True)["names"])
    with in_process({"names": pipeline}) as both_ways:
        for field in ("return_state", "state"):
            body = {
                "inputs": "Ada",
                field: True if field == "return_state" else Seal(STATE_KEY, 60, HERE).seal(b"x", 1),
            }
            error = error_of(both_ways.post("/v1/tag", body), 400)
            assert (error["code"], error["param"]) == ("state_not_supported", field)


def test_where_the_last_bits_may_differ_the_answer_says_so(server: InProcess, tmp_path: Path) -> None:
    """With attention, where as many rows go on as went before; without, in any width; never with attention pooling."""
    two = {"do_sample": True, "seed": 1, "num_return_sequences": 2, "max_new_tokens": 3}
    for path, inputs, narrower in (("translate", "a day", False), ("generate", "a day", True)):
        state = ask(server, path, {"inputs": inputs, **two, "return_state": True})["sequences"][1]["state"]
        inputs = inputs if path == "translate" else ""
        assert ask(server, path, {"inputs": inputs, **two, "state": state})["state_exact"] is True
        one = {**two, "num_return_sequences": 1}
        assert ask(server, path, {"inputs": inputs, **one, "state": state})["state_exact"] is narrower
    pipeline = Pipeline.from_pretrained(save_all(tmp_path, pooling="attention")["mood"])
    with in_process({"mood": pipeline}) as weighing:
        state = ask(weighing, "classify", {"inputs": "a day", "return_state": True})["state"]
        assert ask(weighing, "classify", {"inputs": " more", "state": state})["state_exact"] is False


def test_a_replica_of_another_kind_says_so(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        with in_process({"story": Pipeline.from_pretrained(models["story"])}) as replica:
            return ask(replica, "generate", body)

    state = generate({"inputs": "on", "max_new_tokens": 3, "return_state": True})["sequences"][0]["state"]
    assert generate({"state": state})["state_exact"] is True
    monkeypatch.setattr("serving.app.this_place", lambda device: ELSEWHERE)
    assert generate({"state": state})["state_exact"] is False
