"""What is counted of a request, and how many replicas the rows that are asked for call for."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from seqmodels.decoding.request import Times
from seqmodels.pipeline import Pipeline
from serving import metrics
from serving.autoscaling import ByOccupancy, occupancy
from serving.deployments import deployment_options
from serving.guard import Exchange
from serving.metrics import Metrics, seconds_per_token

from .fakes import FakePipeline
from .test_deployment import settings

COUNTERS = ("seqmodels_requests", "seqmodels_errors", "seqmodels_tokens")


class Recorder:
    """In place of each of Ray's metrics: every value with its tags."""

    told: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, description: str, *more: Any) -> None:
        self.name, self.tags = name, more[-1]

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tags), "Ray refuses a tag that was not declared"
        self.told.append((self.name, value, tags))

    set = observe

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.observe(value, tags or {})


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    monkeypatch.setattr(Recorder, "told", [], raising=False)
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics.metrics, kind, Recorder)
    return Recorder.told


def test_a_request_is_counted_whole(told: list[tuple[str, float, dict[str, str]]]) -> None:
    times = [Times(10.0, 10.5, 11.0, 13.0, 5), Times(10.0, 10.0, 10.25, 10.25, 1), Times()]
    usage = {"input_tokens": 7, "output_tokens": 6}
    exchange = Exchange("id", "POST", route="/v1/translate", status=200, model="en-de", usage=usage, times=times)
    exchange.seconds = 3.5
    Metrics().answered(exchange)
    model, path = {"model": "en-de"}, {"path": "/v1/translate"}
    assert told == [
        ("seqmodels_requests", 1.0, {**path, "status": "200"}), ("seqmodels_request_seconds", 3.5, path),
        ("seqmodels_tokens", 7, {**model, "direction": "input"}),
        ("seqmodels_tokens", 6, {**model, "direction": "output"}),
        ("seqmodels_queue_seconds", 0.5, model), ("seqmodels_first_token_seconds", 1.0, model),
        ("seqmodels_queue_seconds", 0.0, model), ("seqmodels_first_token_seconds", 0.25, model),
        ("seqmodels_token_seconds", 0.5, model),
    ]  # fmt: skip


def test_an_error_is_counted_by_its_code(told: list[tuple[str, float, dict[str, str]]]) -> None:
    Metrics().answered(Exchange("id", "POST", route="/v1/tag", status=422, code="empty"))
    assert ("seqmodels_errors", 1.0, {"path": "/v1/tag", "code": "empty"}) in told and len(told) == 3


def test_seconds_per_token() -> None:
    scored = Times(0.0, 0.0, 9.0, 9.0)
    assert (
        seconds_per_token([Times(0.0, 0.0, 1.0, 5.0, 5)])
        == seconds_per_token([Times(0.0, 0.0, 1.0, 5.0, 5), scored])
        == 1.0
    )
    assert seconds_per_token([Times(0.0, 0.0, 1.0, 5.0, 5), Times(0.0, 0.0, 1.0, 9.0, 3)]) == 2.0
    assert seconds_per_token([Times(0.0, 0.0, 1.0, 1.0, 1)]) is None
    assert seconds_per_token([Times(0.0, 0.0, 1.0, num_tokens=9)]) is None and seconds_per_token([scored]) is None


def test_outputs_that_are_written_side_by_side_take_no_longer_a_token(models: dict[str, str]) -> None:
    pipeline = Pipeline.from_pretrained(models["story"])
    sampled = {"do_sample": True, "seed": 1, "num_return_sequences": 4, "max_new_tokens": 9, "logprobs": True}
    job, scored = pipeline.prepare("on", sampled), pipeline.prepare_score("on", "ce upon a time")
    answer, _ = pipeline.run([job, scored])
    lengths = [len(sequence["logprobs"]) for sequence in answer["sequences"]]
    assert job.times.num_tokens == max(lengths) < sum(lengths) and scored.times.num_tokens == 0


def test_steps_and_gauges(told: list[tuple[str, float, dict[str, str]]]) -> None:
    ours = Metrics()
    ours.stepped("en-de", 0.02)
    ours.loaded({"en-de": {"rows_live": 3}, "mood": {"rows_live": 0}})
    assert told == [
        ("seqmodels_step_seconds", 0.02, {"model": "en-de"}), ("seqmodels_rows_live", 3, {"model": "en-de"}),
        ("seqmodels_rows_live", 0, {"model": "mood"}),
    ]  # fmt: skip


def context(told: dict[str, float]) -> AutoscalingContext:
    """Of two replicas, with what they have told."""
    names = inspect.signature(AutoscalingContext).parameters
    given: dict[str, Any] = dict.fromkeys(names) | {"target_num_replicas": 2, "aggregated_metrics": {"occupancy": told}}
    return AutoscalingContext(**given)


@pytest.mark.parametrize(
    ("told", "wanted"), [({}, 2), ({"a": 0.5, "b": 0.5}, 2.0), ({"a": 2.0, "b": 1.0}, 6.0), ({"a": 0.1, "b": 0.0}, 0.2)]
)
def test_replicas_follow_the_rows_that_are_asked_for(told: dict[str, float], wanted: float) -> None:
    assert ByOccupancy(target=0.5)(context(told))[0] == pytest.approx(wanted)


def test_occupancy_is_of_the_rows_that_may_be_in_use() -> None:
    idle = {"rows_live": 0, "rows_waiting": 0, "rows_total": 256}
    full = {"rows_live": 256, "rows_waiting": 128, "rows_total": 256}
    assert occupancy(idle) == 0 and occupancy(full) == 1.5 and occupancy(full, share=0.5) == 3.0


def test_serve_knows_the_policy() -> None:
    given = deployment_options(settings(autoscaling={"max_replicas": 5, "target_occupancy": 0.9}))["autoscaling_config"]
    config = AutoscalingConfig(**given)
    policy = config.policy.get_policy()
    policy = policy(**config.policy.policy_kwargs) if isinstance(policy, type) else policy
    assert (config.max_replicas, policy(context({"a": 1.8}))[0]) == (5, pytest.approx(2.0))


def test_the_dashboard_shows_what_is_counted_and_nothing_else(told: list[tuple[str, float, dict[str, str]]]) -> None:
    """By the names that Ray's exporter gives: `ray_` in front, `_total` behind a counter."""
    dashboard = (Path(__file__).parents[2] / "deploy" / "grafana.json").read_text()
    panels = json.loads(dashboard)["panels"]
    shown = set(re.findall(r"ray_(seqmodels_[a-z_]+)", dashboard))
    ours = vars(Metrics()).values()
    counted = {f"{one.name}_total" if one.name in COUNTERS else f"{one.name}_bucket" for one in ours if one}
    gauges = {f"seqmodels_{name}" for name in FakePipeline("translate").load()} | {
        "seqmodels_prefill_tokens_saved", "seqmodels_prefill_tokens_read",
    }  # fmt: skip
    assert shown == counted | gauges
    assert len({panel["id"] for panel in panels}) == len(panels) == 12
    for panel in panels:
        assert panel["title"] and all(
            target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"]
        )
