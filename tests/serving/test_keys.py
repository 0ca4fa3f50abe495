"""API keys: read, hashed, found; how often and how urgently each may ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqmodels.errors import ConfigError
from serving import auth
from serving.auth import ENVIRONMENT_VARIABLE, ApiKey, find_key, hash_key, load_keys
from serving.rates import RateError, Rates

from .conftest import INPUTS, api_key, error_of, in_process

KEY = "0123456789abcdef"
BODY = {"inputs": "a good day"}


def bearer(key: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **{name.replace("_", "-"): value for name, value in headers.items()}}


def test_keys_from_a_file_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n  {KEY}2  \n")
    keys = load_keys(str(path))
    assert [key.sha256 for key in keys] == [hash_key(KEY), hash_key(KEY + "2")] and KEY not in str(keys)
    assert find_key(KEY, keys) == keys[0] and find_key(KEY + "3", keys) is None and find_key("", keys) is None
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"{KEY}, {KEY}4")
    assert [key.sha256 for key in load_keys(None)] == [hash_key(KEY), hash_key(KEY + "4")]
    for none in ("", ",", "# nothing but this"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, none)
        with pytest.raises(ConfigError, match=r"SEQMODELS_API_KEYS holds no key; write one per line, or unset it"):
            load_keys(None)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert load_keys(None) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("short", "key 1 of api_keys_file .* has 5 characters; use at least 16"),
        (f"{KEY}\nsha256:12ab", "key 2 of .*sha256"),
        (f"sha256:{hash_key(KEY)} rate=4", "rate is no setting"),
        (f"sha256:{hash_key(KEY)} requests_per_minute=0", "requests_per_minute.*0"),
        (f"sha256:{hash_key(KEY)} priority=urgent", "priority.*urgent"),
        (f"sha256:{hash_key(KEY)} name=a/b", "name.*a/b"),
    ],
)
def test_keys_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_keys(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(str(tmp_path / "none"))


def test_a_key_that_was_made_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert auth.main(["--name", "search", "--priority", "high", "--requests-per-minute", "600"]) == 0
    key, line = (said.partition(" ")[2].strip() for said in capsys.readouterr().out.splitlines())
    (tmp_path / "keys").write_text(line)
    (known,) = load_keys(str(tmp_path / "keys"))
    assert find_key(key, [known]) == ApiKey(
        sha256=hash_key(key), name="search", priority="high", requests_per_minute=600
    )
    assert key not in line
    with pytest.raises(ConfigError, match=r"name: .*a b"):
        auth.main(["--name", "a b"])


def test_each_client_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_020.0
    monkeypatch.setattr("time.time", lambda: now)
    rates = Rates(requests_per_minute=6, replicas=4)  # of which this replica allows 2
    slow, fast = api_key(KEY), api_key(KEY + "2", requests_per_minute=12)
    for key, allowed in ((slow, 2), (fast, 3)):
        for _ in range(allowed):
            rates.take(key)
        with pytest.raises(RateError, match=f"{allowed * 4 - (allowed == 2) * 2} requests a minute") as refused:
            rates.take(key)
        assert 1 <= refused.value.retry_after_s <= 60
    now += 120
    rates.take(slow)


def test_too_many_requests_are_refused_before_anything_is_read() -> None:
    with in_process(keys=(api_key(KEY), api_key(KEY + "2")), requests_per_minute=3) as server:
        for _ in range(3):
            assert server.post("/v1/classify", BODY, headers=bearer(KEY)).status_code == 200
        refused = server.request("POST", "/v1/classify", content=b"{" * 10**6, headers=bearer(KEY))
        assert error_of(refused, 429)["code"] == "rate_limited" and int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/classify", BODY, headers=bearer(KEY + "2")).status_code == 200
        assert server.get("/readyz").status_code == 200
        assert error_of(server.post("/v1/classify", BODY, headers=bearer("wrong")), 401)


@pytest.mark.parametrize(
    ("allowed", "asked", "status"),
    [("normal", "low", 200), ("normal", "normal", 200), ("normal", "high", 403), ("high", "high", 200),
     ("low", "normal", 403), ("high", "urgent", 400)],
)  # fmt: skip
def test_a_priority_is_asked_for_within_what_the_key_allows(allowed: Any, asked: str, status: int) -> None:
    with in_process(keys=(api_key(KEY, priority=allowed),)) as server:
        response = server.post("/v1/classify", BODY, headers=bearer(KEY, x_request_priority=asked))
        assert response.status_code == status
        if status != 200:
            assert error_of(response, status)["param"] == "x-request-priority"
        assert server.post("/v1/classify", BODY, headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize("path", [*INPUTS, "/v1/score", "/v1/completions"])
def test_every_pipeline_is_told_whose_request_it_is_and_how_urgent(path: str) -> None:
    bodies = {"/v1/score": {"targets": "a", "model": "story"}, "/v1/completions": {"prompt": "a", "model": "story"}}
    told: list[tuple[int, str]] = []
    with in_process(keys=(api_key(KEY, name="search", priority="high"),)) as server:
        for pipeline in server.pipelines.values():
            for name in ("prepare", "prepare_score"):
                setattr(pipeline, name, spied(getattr(pipeline, name), told))
        body = bodies.get(path) or {"inputs": INPUTS[path]}
        for urgency in ("high", "low"):
            response = server.post(path, body, headers=bearer(KEY, x_request_priority=urgency))
            assert response.status_code == 200, response.text
    assert told == [(1, "search"), (-1, "search")]


def spied(prepare: Callable[..., Any], told: list[tuple[int, str]]) -> Callable[..., Any]:
    def spying(*args: Any, **options: Any) -> Any:
        told.append((options["priority"], options["client"]))
        return prepare(*args, **options)

    return spying
