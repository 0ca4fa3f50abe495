"""The runner's thread, with fake pipelines: what goes in comes out once, or fails in a way that says why."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from seqmodels.decoding.request import Event, Failed, Finished, Progress
from seqmodels.errors import InputError, QueueFullError
from serving.errors import ClosingError, EngineError
from serving.runner import FAILURES_IN_A_ROW, Model, Order, Runner

from .fakes import FakePipeline


def order(pipeline: FakePipeline, text: str = "one two three") -> Order[Model]:
    return Order(pipeline.model, pipeline.prepare(text, {}))


class Outbox:
    """Collects what the runner delivers, a list per call."""

    def __init__(self) -> None:
        self.calls: list[list[Event]] = []

    def __call__(self, events: list[Event]) -> None:
        self.calls.append(events)

    def of(self, wanted: Order[Model]) -> list[Event]:
        return [event for call in list(self.calls) for event in call if event.request_id == wanted.job.id]

    def end_of(self, wanted: Order[Model]) -> Finished | Failed:
        def find() -> list[Event]:
            return [event for event in self.of(wanted) if isinstance(event, Finished | Failed)]

        until(lambda: bool(find()))
        (end,) = find()
        assert isinstance(end, Finished | Failed)
        return end


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)


@contextmanager
def turning(
    *pipelines: FakePipeline, max_requests: int = 100, stall_after_s: float = 5.0
) -> Iterator[tuple[Runner[Model], Outbox]]:
    outbox = Outbox()
    runner = Runner([p.model for p in pipelines], max_requests=max_requests, stall_after_s=stall_after_s)
    runner.start(outbox)
    try:
        yield runner, outbox
    finally:
        for pipeline in pipelines:
            pipeline.gate.set()
        runner.stop()


def test_every_request_ends_once_and_in_order_of_its_own_events() -> None:
    pipelines = [FakePipeline("translate", "a"), FakePipeline("classify", "b")]
    with turning(*pipelines) as (runner, outbox):
        jobs = [order(pipelines[i % 2]) for i in range(20)]
        for one in jobs:
            runner.submit([one])
        for one in jobs:
            assert isinstance(outbox.end_of(one), Finished)
        translated = outbox.of(jobs[0])
        assert [type(event) for event in translated] == [Progress] * 3 + [Finished]
        assert runner.num_open == 0


def test_one_delivery_per_turn_carries_all_events() -> None:
    pipelines = [FakePipeline("translate", "a"), FakePipeline("translate", "b")]
    runner: Runner[Model] = Runner([p.model for p in pipelines])
    jobs = [order(pipelines[i % 2]) for i in range(6)]
    runner.submit(jobs)
    assert {event.request_id for event in runner.turn()} == {one.job.id for one in jobs}


def test_full_queue_refuses_all_of_a_list_or_none() -> None:
    pipeline = FakePipeline("translate")
    pipeline.gate.clear()
    with turning(pipeline, max_requests=4) as (runner, outbox):
        first = [order(pipeline) for _ in range(3)]
        runner.submit(first)
        with pytest.raises(QueueFullError, match="3 of 4 places are taken and this request needs 2"):
            runner.submit([order(pipeline), order(pipeline)])
        with runner.place(), pytest.raises(QueueFullError, match="4 of 4"), runner.place():
            pass
        last = order(pipeline)
        runner.submit([last])
        pipeline.gate.set()
        assert all(isinstance(outbox.end_of(one), Finished) for one in [*first, last])
        assert runner.num_open == 0
        assert len(pipeline.submitted) == 4


def test_what_cannot_be_answered_in_time_is_refused_at_once() -> None:
    pipeline = FakePipeline("translate", step_s=0.05, rows=2)

    def wanted(seconds: float, **turn: Any) -> Order[Model]:
        deadline = time.monotonic() + seconds
        return Order(pipeline.model, pipeline.prepare("one two three", {}, deadline=deadline, **turn))

    with turning(pipeline) as (runner, outbox):
        known = wanted(60)
        runner.submit([known])  # takes four turns; before it, nothing is known
        assert isinstance(outbox.end_of(known), Finished)
        running = [Order(pipeline.model, pipeline.prepare("a " * 30, {}))]
        running += [wanted(2.5) for _ in range(30)]
        runner.submit(running)
        until(lambda: sum(map(len, pipeline.waiting().values())) > 20 and bool(outbox.of(running[0])))
        with pytest.raises(
            QueueFullError, match=r"an answer would take about \d\.\d s now, and this .* 0\.\d s"
        ) as full:
            runner.submit([wanted(0.3)] * 20)
        assert full.value.retry_after_s > 0
        with pytest.raises(QueueFullError):
            runner.check_time([pipeline.model], wanted(2.6).job, 0.0)
        runner.check_time([pipeline.model], wanted(60).job, 0.0)
        runner.submit([wanted(1.2, priority=1)])  # goes first
        runner.submit([wanted(1.2)])  # has the earliest deadline
        for one in running:
            runner.cancel([one.job.id])
        until(lambda: not pipeline.live)
        until(lambda: not pipeline.model.pace.seconds(0, "", None))


def test_a_call_on_its_way_counts_where_it_can_only_be_for_one_model() -> None:
    one, other = FakePipeline("translate", name="one"), FakePipeline("translate", name="other")
    runner: Runner[Model] = Runner([one.model, other.model])
    job = one.prepare("a b", {})

    def coming() -> list[int]:
        return [sum(map(len, pipeline.model.pace._coming.values())) for pipeline in (one, other)]

    with runner.on_the_way([one.model], job):
        assert coming() == [1, 0]
    with runner.on_the_way([one.model, other.model], job), runner.on_the_way([], job):
        assert coming() == [0, 0]
    with pytest.raises(asyncio.CancelledError), runner.on_the_way([one.model], job):
        raise asyncio.CancelledError
    assert coming() == [0, 0]


def test_who_arrives_in_a_turn_counts_until_it_is_over() -> None:
    pipeline = FakePipeline("translate")
    runner: Runner[Model] = Runner([pipeline.model])
    seen: list[int] = []
    step = pipeline.step

    def watched(*args: Any) -> Any:
        seen.append(sum(map(len, pipeline.model.pace._coming.values())))
        return step(*args)

    pipeline.step = watched  # type: ignore[method-assign]
    runner.submit([order(pipeline, "a b"), order(pipeline, "c d")])
    runner.turn()
    runner.turn()
    assert seen == [2, 0]


def test_who_is_given_up_has_waited_in_vain() -> None:
    pipeline = FakePipeline("translate")
    runner: Runner[Model] = Runner([pipeline.model])
    told: list[bool] = []
    pipeline.model.pace.given_up = told.append  # type: ignore[method-assign]
    promised, not_promised, wrong = (order(pipeline, "a b") for _ in range(3))
    runner.submit([promised, not_promised, wrong])
    promised.was_estimated = True
    failed = {promised: QueueFullError(""), not_promised: QueueFullError(""), wrong: InputError("")}
    pipeline.step = lambda *_: [Failed(one.job.id, error) for one, error in failed.items()]  # type: ignore[method-assign]
    runner.turn()
    assert told == [True, False]


def test_a_step_keeps_within_what_the_pace_says() -> None:
    pipeline = FakePipeline("translate")
    runner: Runner[Model] = Runner([pipeline.model])
    runner.submit([Order(pipeline.model, pipeline.prepare("a b", {}))])
    pipeline.model.pace.share = 0.25
    runner.turn()
    assert pipeline.bounds.share == 0.25


def test_a_runner_that_closes_says_so_and_not_that_it_is_busy() -> None:
    pipeline = FakePipeline("translate")
    runner: Runner[Model] = Runner([pipeline.model])
    runner.start(Outbox())
    runner.stop()
    pipeline.model.pace.seconds = lambda *wanted: 99.0  # type: ignore[method-assign]
    late = Order(pipeline.model, pipeline.prepare("one", {}, deadline=time.monotonic() + 60))
    with pytest.raises(ClosingError):
        runner.submit([late])
    with pytest.raises(ClosingError):
        runner.check_time([pipeline.model], late.job, 0.0)
    with pytest.raises(ClosingError), runner.place():
        pass


def test_who_expires_in_a_turn_did_not_run_in_it() -> None:
    pipeline = FakePipeline("translate", rows=2)
    runner: Runner[Model] = Runner([pipeline.model])
    soon = time.monotonic() + 0.05
    jobs = [pipeline.prepare("a " * 30, {}, deadline=None if i < 2 else soon) for i in range(40)]
    runner.submit([Order(pipeline.model, job) for job in jobs])
    runner.turn()
    assert pipeline.model.last_turn(40, 2).running == 2
    pipeline.rows = 40  # so that the step meets those whose time is over
    time.sleep(0.06)
    runner.turn()
    assert pipeline.model.pace._now.running == 2


def test_cancel_frees_rows_at_the_next_turn_without_an_event() -> None:
    pipeline = FakePipeline("translate", step_s=0.01)
    with turning(pipeline) as (runner, outbox):
        kept, dropped = order(pipeline, "a " * 20), order(pipeline, "b " * 30)
        runner.submit([kept, dropped])
        until(lambda: bool(outbox.of(dropped)))
        runner.cancel([dropped.job.id, "never heard of"])
        steps = pipeline.steps
        until(lambda: dropped.job.id not in pipeline.live)
        assert pipeline.steps <= steps + 2
        assert isinstance(outbox.end_of(kept), Finished)
        assert not any(isinstance(event, Finished | Failed) for event in outbox.of(dropped))
        assert runner.num_open == 0


def test_cancel_of_what_has_not_begun() -> None:
    pipeline = FakePipeline("translate")
    runner: Runner[Model] = Runner([pipeline.model])
    one = order(pipeline)
    runner.submit([one])
    runner.cancel([one.job.id])
    assert runner.turn() == []
    assert runner.num_open == 0 and not pipeline.live


def test_failing_step_fails_that_pipeline_alone_and_the_runner_lives_on() -> None:
    bad, good = FakePipeline("translate", "bad", failing_steps=1), FakePipeline("translate", "good")
    with turning(bad, good) as (runner, outbox):
        jobs = [order(bad), order(bad), order(good)]
        runner.submit(jobs)
        for one in jobs[:2]:
            end = outbox.end_of(one)
            assert isinstance(end, Failed) and isinstance(end.error, EngineError)
            assert "secret" not in str(end.error)
        assert isinstance(outbox.end_of(jobs[2]), Finished)
        again = order(bad)
        runner.submit([again])
        assert isinstance(outbox.end_of(again), Finished)
        assert runner.is_turning and runner.broken_models == []


def test_a_model_that_always_fails_is_reported() -> None:
    bad = FakePipeline("translate", "bad", failing_steps=10**6)
    with turning(bad) as (runner, outbox):
        for _ in range(FAILURES_IN_A_ROW):
            one = order(bad)
            runner.submit([one])
            assert isinstance(outbox.end_of(one), Failed)
        assert runner.broken_models == ["bad"] and runner.is_turning


def test_refusal_at_submit_reaches_its_sender() -> None:
    pipeline = FakePipeline("translate")
    with turning(pipeline) as (runner, outbox):
        refused = order(pipeline, "refuse at submit")
        runner.submit([refused])
        end = outbox.end_of(refused)
        assert isinstance(end, Failed) and isinstance(end.error, InputError)


def test_stop_drains_what_runs_and_accepts_nothing_more() -> None:
    pipeline = FakePipeline("translate", step_s=0.01)
    with turning(pipeline) as (runner, outbox):
        running = [order(pipeline, "a " * 10) for _ in range(3)]
        runner.submit(running)
        stopping = threading.Thread(target=runner.stop, args=(10.0,))
        stopping.start()
        until(lambda: runner._closing)
        with pytest.raises(ClosingError):
            runner.submit([order(pipeline)])
        stopping.join()
        assert all(isinstance(outbox.end_of(one), Finished) for one in running)
        assert not runner.is_turning


def test_stop_without_time_fails_what_is_left() -> None:
    pipeline = FakePipeline("translate", step_s=0.05)
    with turning(pipeline) as (runner, outbox):
        left = order(pipeline, "a " * 30)
        runner.submit([left])
        until(lambda: bool(outbox.of(left)))
        runner.stop(drain_s=0.0)
        end = outbox.end_of(left)
        assert isinstance(end, Failed) and isinstance(end.error, ClosingError)
        assert not pipeline.live and runner.num_open == 0


def test_a_stalled_engine_is_noticed_and_a_resting_one_is_not() -> None:
    pipeline = FakePipeline("translate")
    with turning(pipeline, stall_after_s=0.8) as (runner, outbox):
        time.sleep(1.2)  # resting
        assert runner.is_turning
        pipeline.gate.clear()
        one = order(pipeline)
        runner.submit([one])
        until(lambda: not runner.is_turning, seconds=3)
        pipeline.gate.set()
        outbox.end_of(one)
        assert runner.is_turning


def test_many_threads_submit_and_cancel() -> None:
    pipeline = FakePipeline("translate")
    with turning(pipeline, max_requests=10**6) as (runner, outbox):
        kept: list[Order[Model]] = []

        def client(number: int) -> None:
            for i in range(100):
                one = order(pipeline, "a b c")
                runner.submit([one])
                if i % 2:
                    runner.cancel([one.job.id])
                else:
                    kept.append(one)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: runner.num_open == 0)
        ends = [event.request_id for call in outbox.calls for event in call if isinstance(event, Finished | Failed)]
        assert len(ends) == len(set(ends)) >= 200 == len(kept)
        assert {one.job.id for one in kept} <= set(ends)


class LateAnswers(FakePipeline):
    """Goes on with requests that were cancelled, as a pipeline may that has its answer ready."""

    def cancel(self, request_id: str) -> None:
        pass


def test_nothing_follows_an_end() -> None:
    pipeline = LateAnswers("translate", failing_steps=1)
    with turning(pipeline) as (runner, outbox):
        failed = order(pipeline, "a " * 20)
        runner.submit([failed])
        assert isinstance(outbox.end_of(failed), Failed)
        until(lambda: pipeline.steps == 22 and not pipeline.live)
        assert len(outbox.of(failed)) == 1


def test_a_model_that_is_replaced_answers_what_it_was_asked() -> None:
    old, new = FakePipeline("translate", "a"), FakePipeline("translate", "a")
    old.gate.clear()
    with turning(old) as (runner, outbox):
        running, waiting = order(old), order(old)
        runner.submit([running])
        until(lambda: bool(old.live))
        runner.submit([waiting])
        runner.serve(new.model)
        late, fresh = order(old), order(new)  # the first was prepared before the change
        runner.submit([late, fresh])
        old.gate.set()
        assert all(isinstance(outbox.end_of(one), Finished) for one in (running, waiting, late, fresh))
        assert [len(old.submitted), len(new.submitted)] == [3, 1]
        until(lambda: not runner._leaving)
        steps = old.steps
        runner.submit([again := order(new)])
        assert isinstance(outbox.end_of(again), Finished) and old.steps == steps


def test_who_was_prepared_for_a_model_that_has_gone_since_is_answered_by_it() -> None:
    old, new = FakePipeline("translate", "a"), FakePipeline("translate", "a")
    with turning(old) as (runner, outbox):
        late = order(old)
        runner.serve(new.model)
        runner.submit([first := order(new)])
        assert isinstance(outbox.end_of(first), Finished)
        until(lambda: not runner._leaving)
        runner.submit([late])
        assert isinstance(outbox.end_of(late), Finished) and len(new.submitted) == 1
        until(lambda: not runner._leaving)


def test_a_model_that_is_let_go_answers_what_it_was_asked() -> None:
    gone, kept = FakePipeline("translate", "gone", step_s=0.01), FakePipeline("translate", "kept")
    with turning(gone, kept) as (runner, outbox):
        runner.submit([one := order(gone)])
        runner.let_go("gone")
        assert list(runner.models) == ["kept"]
        assert isinstance(outbox.end_of(one), Finished)
        until(lambda: not runner._leaving)


class NeverDone(LateAnswers):
    @property
    def has_work(self) -> bool:
        return True


def test_a_replaced_model_that_is_broken_is_not_turned_for_ever() -> None:
    bad = NeverDone("translate", "a", failing_steps=10**6)
    with turning(bad) as (runner, _):
        runner.serve(FakePipeline("translate", "a").model)
        until(lambda: bad.steps >= FAILURES_IN_A_ROW and not runner._leaving)
        assert runner.broken_models == []
