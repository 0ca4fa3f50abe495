"""What is served under which name, and how it changes: a bad new model is kept out and the old one goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from seqmodels.errors import ModelDirectoryError
from serving.config import ModelSet
from serving.errors import HttpError
from serving.models import Models, ServedModel
from serving.runner import Runner

from .conftest import error_of, in_process
from .fakes import FakePipeline, all_fakes


class Shelf:
    """Directories, and what lies in them."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.pipelines: dict[str, Any] = {
            "mood-1": FakePipeline("classify", revision="1" * 12),
            "mood-2": FakePipeline("classify", revision="2" * 12),
            "names-1": FakePipeline("tag", revision="3" * 12),
            "broken": ModelDirectoryError("broken/model.safetensors is damaged"),
            "crash": ZeroDivisionError("a bug"),
        }

    def load(self, directories: list[str]) -> Any:
        (directory,) = directories
        self.loads.append(directory)
        found = self.pipelines[directory]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def models(shelf: Shelf) -> Models:
    runner: Runner[ServedModel] = Runner()
    models = Models(runner, shelf.load)
    models.apply(wanted(mood="mood-1", names="names-1"))
    return models


def wanted(*, aliases: dict[str, str] | None = None, revisions: dict[str, str] | None = None, **given: str) -> ModelSet:
    return ModelSet.parse({"models": given, "aliases": aliases or {}, "revisions": revisions or {}})


def test_only_what_differs_is_loaded_and_what_is_no_longer_wanted_goes(models: Models, shelf: Shelf) -> None:
    assert shelf.loads == ["mood-1", "names-1"]
    models.apply(wanted(mood="mood-2", names="names-1"))
    assert shelf.loads == ["mood-1", "names-1", "mood-2"]
    assert models.served["mood"].revision == "2" * 12
    models.apply(wanted(mood="mood-2"))
    assert list(models.served) == ["mood"] and len(shelf.loads) == 3


def test_another_revision_in_the_same_directory_is_loaded_again(models: Models, shelf: Shelf) -> None:
    shelf.pipelines["mood-1"] = FakePipeline("classify", revision="9" * 12)
    models.apply(wanted(mood="mood-1", names="names-1"))
    assert models.served["mood"].revision == "1" * 12  # nobody said that it has changed
    models.apply(wanted(mood="mood-1", names="names-1", revisions={"mood": "9" * 12}))
    assert models.served["mood"].revision == "9" * 12 and not models.refused
    models.apply(wanted(mood="mood-1", names="names-1", revisions={"names": "3" * 12}))
    assert shelf.loads == ["mood-1", "names-1", "mood-1"]  # that one is served already


@pytest.mark.parametrize(
    ("directory", "reason"), [("broken", "model.safetensors is damaged"), ("crash", "ZeroDivisionError")]
)
def test_a_bad_new_model_is_kept_out_and_the_old_goes_on(models: Models, directory: str, reason: str) -> None:
    models.apply(wanted(mood=directory, names="names-1", other="mood-2"))
    assert reason in models.refused["mood"]
    assert {name: model.revision[0] for name, model in models.served.items()} == {
        "mood": "1",
        "names": "3",
        "other": "2",
    }
    models.apply(wanted(mood="mood-2", names="names-1"))
    assert not models.refused and models.served["mood"].revision == "2" * 12


def test_a_wrong_revision_is_kept_out(models: Models) -> None:
    models.apply(wanted(mood="mood-2", names="names-1", revisions={"mood": "7" * 12}))
    assert models.refused["mood"].startswith(f"mood-2: the revision is {'2' * 12}, but {'7' * 12} is wanted")
    assert models.served["mood"].revision == "1" * 12


def test_a_replica_does_not_begin_without_its_models(shelf: Shelf) -> None:
    models = Models(Runner(), shelf.load)
    with pytest.raises(ModelDirectoryError):
        models.apply(wanted(mood="broken"))


def test_aliases_are_found_and_follow_a_change(models: Models) -> None:
    models.apply(wanted(aliases={"feelings": "mood"}, mood="mood-1", names="names-1"))
    assert models.find("feelings", ("classify",)).name == "mood"
    models.apply(wanted(aliases={"feelings": "names"}, mood="mood-1", names="names-1"))
    with pytest.raises(HttpError, match="that model has another task, tag"):
        models.find("feelings", ("classify",))
    models.apply(wanted(mood="mood-1", names="names-1"))
    with pytest.raises(HttpError, match="no model of that name"):
        models.find("feelings", ("classify",))


def test_a_mistake_takes_nothing_away_that_is_served(models: Models) -> None:
    models.apply(wanted(aliases={"feelings": "mood", "places": "names"}, mood="mood-1", names="names-1"))
    models.apply(wanted(aliases={"feelings": "new", "moods": "mood"}, mood="mood-2", new="broken"))
    assert list(models.refused) == ["new"]
    assert models.find("mood", ("classify",)).revision == "2" * 12
    assert models.find("names", ("tag",)).revision == "3" * 12  # which is no longer wanted
    assert models.find("feelings", ("classify",)).name == models.find("moods", ("classify",)).name == "mood"
    assert models.find("places", ("tag",)).name == "names"
    models.apply(wanted(new="broken"))
    assert set(models.served) == {"mood", "names"}
    models.apply(wanted(aliases={"feelings": "new"}, new="mood-1"))
    assert set(models.served) == {"new"} and models.aliases == {"feelings": "new"} and not models.refused


def test_an_alias_gives_way_to_a_model_of_its_name(models: Models) -> None:
    models.apply(wanted(aliases={"new": "mood"}, mood="mood-1", names="names-1"))
    models.apply(wanted(mood="mood-1", new="names-1", other="broken"))
    assert models.find("new", ("tag",)).revision == "3" * 12


def test_a_name_that_is_still_served_is_no_alias_of_another(models: Models) -> None:
    models.apply(wanted(aliases={"mood": "names"}, names="names-1", other="broken"))
    assert models.find("mood", ("classify",)).revision == "1" * 12 and not models.aliases
    models.apply(wanted(aliases={"mood": "names"}, names="names-1"))
    assert models.find("mood", ("tag",)).name == "names"


@contextmanager
def asking(ask: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Two threads that ask all the time, until the end."""
    failures: list[BaseException] = []
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            try:
                ask()
            except BaseException as failure:
                failures.append(failure)
                return

    threads = [threading.Thread(target=go_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_no_answer_is_lost_while_models_change(shelf: Shelf) -> None:
    given = {**all_fakes(), **{k: v for k, v in shelf.pipelines.items() if isinstance(v, FakePipeline)}}
    seen: set[str] = set()
    with in_process(given) as server:

        def ask() -> None:
            response = server.post("/v1/classify", {"model": "mood", "inputs": ["good", "bad"]})
            assert response.status_code == 200, response.text
            assert [result["label"] for result in response.json()["results"]] == ["yes", "no"]
            seen.add(response.json()["revision"])

        with asking(ask) as failures:
            for number in range(60):
                server.models.apply(ModelSet.parse({"models": {"mood": f"mood-{1 + number % 2}", "en-de": "en-de"}}))
                time.sleep(0.005)
        assert not failures and seen >= {"1" * 12, "2" * 12}
        assert error_of(server.post("/v1/tag", {"inputs": "a"}), 404)["code"] == "no_model"


def test_a_refusal_is_told_and_the_service_stays_ready() -> None:
    with in_process() as server:
        server.models.apply(ModelSet.parse({"models": {"mood": "nowhere"}, "aliases": {"feelings": "mood"}}))
        ready = server.get("/readyz")
        assert ready.status_code == 200 and ready.json()["refused"] == ["mood"]
        listed = server.get("/v1/models").json()
        assert listed["refused"] == ["mood"] and listed["data"][0]["aliases"] == ["feelings"]
        assert server.get("/v1/models/feelings").json()["id"] == "mood"
        answer = server.post("/v1/classify", {"model": "feelings", "inputs": "good"}).json()
        assert (answer["model"], answer["revision"]) == ("mood", "0123456789ab")
