"""Autoscaling of a real service: under load a second replica comes, when it is quiet it goes, and nothing is lost."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from benchmarks.running import Running, running, until
from seqmodels.pipeline import Pipeline

REPLICA = "ray::ServeReplica:"
ROWS = 8  # of a replica
TOKENS = 200  # of an answer: long enough for rows to be in use most of the time


class Asking:
    """One client that asks one question after another, each of its own seed and only once, while it is open."""

    def __init__(self, service: Running, first_seed: int) -> None:
        self.answers: dict[int, httpx.Response] = {}
        self._service = service
        self._first_seed = first_seed
        self._over = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._service.address, timeout=60) as client:
            for seed in itertools.count(self._first_seed, 1000):
                body = {"inputs": "on", **options(seed)}
                self.answers[seed] = client.post("/v1/generate", json=body)
                if self._over.is_set():
                    return

    def end(self) -> None:
        self._over.set()


def options(seed: int) -> dict[str, Any]:
    return {"do_sample": True, "seed": seed, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}


@contextmanager
def load(service: Running, first_seeds: range) -> Iterator[list[Asking]]:
    """So many clients, all of whom have been answered in the end."""
    clients = [Asking(service, seed) for seed in first_seeds]
    with ThreadPoolExecutor(len(clients)) as pool:
        running = [pool.submit(client.run) for client in clients]
        try:
            yield clients
        finally:
            for client in clients:
                client.end()
            for one in running:
                one.result()


@pytest.mark.slow
def test_a_replica_comes_with_load_and_goes_without(models: dict[str, str]) -> None:
    story = Pipeline.from_pretrained(models["story"])
    scaling = {"max_replicas": 2, "target_occupancy": 0.3, "upscale_delay_s": 2.0, "downscale_delay_s": 5.0}
    limits = {"num_beams": 4, "num_return_sequences": 4}
    with (
        running({"story": models["story"]}, autoscaling=scaling, max_rows=ROWS, limits=limits) as service,
        load(service, range(1)) as few,  # one row of eight, all the time
    ):
        assert len(service.processes(REPLICA)) == 1
        with load(service, range(1, ROWS)) as many:
            until(lambda: len(service.processes(REPLICA)) == 2, 120)
            time.sleep(10)
            assert len(service.processes(REPLICA)) == 2  # it stays as long as it is needed
        until(lambda: len(service.processes(REPLICA)) == 1, 180)
        time.sleep(5)
    answers = {seed: answer for client in (*few, *many) for seed, answer in client.answers.items()}
    assert len(answers) > 100
    assert {answer.status_code for answer in answers.values()} == {200}
    for seed in list(answers)[::10]:
        assert answers[seed].json()["results"] == story(["on"], **options(seed))
