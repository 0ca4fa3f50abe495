"""`python -m serving swap`: what it makes of its arguments, and that a refusal anywhere leaves all as it was."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from benchmarks.running import ROOT, Running, running, until
from seqmodels.pretrained import load_pretrained
from serving import cluster
from serving.__main__ import main
from serving.config import ModelSet, ServeConfig

from .test_main import one_line_error

REPLICA = "ray::ServeReplica:"


class FakeCluster:
    """Two replicas that serve what they are told, but for models that the second refuses."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.history = [ModelSet.parse(models)]
        self.refusing: dict[str, str] = {}
        self.too_late = self.overtaken = self.no_way_back = False
        self.served = {name: f"{name} of before" for name in self.history[0].models}

    def model_set(self) -> ModelSet:
        return self.history[-1]

    def reports(self) -> list[dict[str, Any]]:
        return [{"revisions": self.served}, {"revisions": self.served}]

    def change_models(self, wanted: ModelSet, timeout_s: float) -> list[dict[str, Any]]:
        self.history.append(wanted)
        if self.overtaken:
            raise cluster.OvertakenError("the service was told to serve other models meanwhile")
        if wanted == self.history[0]:
            if self.no_way_back:
                raise cluster.DeploymentError(f"not within {timeout_s:g} s")
            return self.reports()
        if self.too_late and len(self.history) == 2:
            raise cluster.DeploymentError(f"not within {timeout_s:g} s")
        report = {"revisions": wanted.revisions, "aliases": wanted.aliases, "refused": {}}
        return [report, {**report, "refused": self.refusing}]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, models: dict[str, str]) -> FakeCluster:
    fields = {"models": {"mood": models["mood"], "names": models["names"]}, "aliases": {"feelings": "mood"}}
    cluster_of_two = FakeCluster(fields)
    monkeypatch.setattr(cluster, "connect", lambda address: None)
    monkeypatch.setattr(cluster, "alone", nullcontext)
    monkeypatch.setattr(cluster, "model_set", cluster_of_two.model_set)
    monkeypatch.setattr(cluster, "served", cluster_of_two.reports)
    monkeypatch.setattr(cluster, "change_models", cluster_of_two.change_models)
    return cluster_of_two


def test_one_model_changes_and_the_others_stay(
    fake: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["swap", f"mood={models['topics']}", f"story={models['story']}", "--alias", "tale=story"]) == 0
    after = fake.history[-1]
    assert after.models == {name: str(Path(models[source]).resolve()) for name, source in
                            (("mood", "topics"), ("names", "names"), ("story", "story"))}  # fmt: skip
    assert after.aliases == {"feelings": "mood", "tale": "story"}
    assert after.revisions == {
        "mood": load_pretrained(models["topics"]).revision,
        "names": "names of before",  # whatever lies in its directory by now
        "story": load_pretrained(models["story"]).revision,
    }
    assert f"2 replicas serve mood at {after.revisions['mood']}" in capsys.readouterr().out


def test_unload_takes_the_aliases_along(fake: FakeCluster) -> None:
    assert main(["swap", "--unload", "mood"]) == 0
    assert list(fake.history[-1].models) == ["names"] and not fake.history[-1].aliases


def test_an_alias_may_go_alone(fake: FakeCluster) -> None:
    assert main(["swap", "--unload", "feelings"]) == 0
    assert list(fake.history[-1].models) == ["mood", "names"] and not fake.history[-1].aliases


def test_a_file_says_all(fake: FakeCluster, models: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"models: {{story: [{models['story']}]}}\naliases: {{tale: story}}\nport: 1234\n")
    assert main(["swap", str(path)]) == 0
    assert fake.history[-1].models == {"story": [models["story"]]} and fake.history[-1].aliases == {"tale": "story"}


def test_a_refusal_takes_everything_back(
    fake: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.refusing = {"mood": "there is no room for it"}
    assert main(["swap", f"mood={models['topics']}"]) == 1
    assert fake.history[-1] == fake.history[0] and len(fake.history) == 3
    error = capsys.readouterr().err
    assert "refused: mood: there is no room for it" in error and "nothing has changed" in error


def test_what_somebody_else_has_changed_meanwhile_is_not_taken_back(
    fake: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.overtaken = True
    assert "other models meanwhile" in one_line_error(capsys, "swap", f"mood={models['topics']}")
    assert len(fake.history) == 2


def test_a_way_back_that_takes_too_long_is_told(
    fake: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.too_late = fake.no_way_back = True
    assert main(["swap", f"mood={models['topics']}"]) == 1
    error = capsys.readouterr().err
    assert "not all went back to what they served: not within 600 s; /v1/models says what is served" in error


def test_another_deployment_is_noticed_while_a_swap_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    config = cluster.application(ServeConfig.parse({"models": {"mood": "one"}}))
    monkeypatch.setattr(cluster, "_ours", lambda: given[-1] if len(given) == 1 else config)
    monkeypatch.setattr(cluster, "_apply", given.append)
    told = {"wanted": None, "refused": {}}
    monkeypatch.setattr(cluster, "reports", lambda: [told])
    monkeypatch.setattr(cluster, "_state", lambda: "")
    monkeypatch.setattr(cluster, "POLL_S", 0.001)
    wanted = ModelSet.parse({"models": {"mood": "two"}})
    with pytest.raises(cluster.DeploymentError, match="not every replica") as late:
        cluster.change_models(wanted, 0.1)
    assert not isinstance(late.value, cluster.OvertakenError)
    given.append(None)  # from now on the deployment is what somebody else has given
    with pytest.raises(cluster.OvertakenError, match="other models meanwhile"):
        cluster.change_models(wanted, 60.0)


def test_where_no_replica_stands_the_models_can_be_changed_all_the_same(
    fake: FakeCluster, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "served", list)
    assert main(["swap", f"mood={models['topics']}"]) == 0
    assert fake.history[-1].revisions["names"] == load_pretrained(models["names"]).revision


def test_where_no_replica_stood_a_refusal_leaves_nothing_to_compare(
    fake: FakeCluster, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "served", list)
    fake.refusing = {"mood": "there is no room for it"}
    assert main(["swap", f"mood={models['topics']}"]) == 1
    assert "not all is as it was" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "died", [ValueError("no such actor"), KeyError("replicas"), RayActorError(), GetTimeoutError()]
)
def test_a_replica_that_dies_while_it_is_asked_is_asked_again(died: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([died, died, [{"revisions": {"mood": "one"}}]])

    def reports() -> Any:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(cluster, "reports", reports)
    assert cluster.served() == [{"revisions": {"mood": "one"}}]


def test_what_cannot_be_asked_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service goes on where Ray's controller does not answer; where it says why no replica stands, that is told."""

    def gone() -> Any:
        raise ConnectionError

    monkeypatch.setattr(cluster, "replica_states", gone)
    assert cluster.trouble() == ""
    monkeypatch.setattr(cluster, "replica_states", dict)
    monkeypatch.setattr(
        cluster, "_state", lambda: "DEPLOYING {} Traceback\n  x\nseqmodels.errors.ModelError: cut short\n\n"
    )
    assert cluster.trouble() == "no replica stands: seqmodels.errors.ModelError: cut short"
    monkeypatch.setattr(cluster, "replica_states", lambda: {"STARTING": 1, "STOPPING": 1})
    assert cluster.trouble()
    for standing in ("RUNNING", "UPDATING"):  # it goes on answering while it changes its models
        monkeypatch.setattr(cluster, "replica_states", lambda state=standing: {state: 1, "STARTING": 1})
        assert cluster.trouble() == ""


def test_what_cannot_be_taken_back_is_told(
    fake: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first replica has loaded what was written over the old weights in the same directory."""
    fake.refusing = {"mood": "there is no room for it"}
    overwritten = [{"revisions": {**fake.served, "mood": "new"}}, {"revisions": fake.served}]
    first = fake.reports()
    monkeypatch.setattr(fake, "reports", lambda: overwritten)
    monkeypatch.setattr(cluster, "served", lambda: first)
    assert main(["swap", f"mood={models['mood']}"]) == 1
    error = capsys.readouterr().err
    assert "not all is as it was: replicas serve other weights than before as mood, for" in error
    assert "nothing has changed" not in error


def test_what_takes_too_long_is_taken_back(
    fake: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.too_late = True
    assert main(["swap", f"mood={models['topics']}", "--timeout-s", "7"]) == 1
    assert fake.history[-1] == fake.history[0] and len(fake.history) == 3
    error = capsys.readouterr().err
    assert "refused: not within 7 s" in error and "nothing has changed" in error


def test_mistakes_change_nothing(
    fake: FakeCluster, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a directory" in one_line_error(capsys, "swap", f"mood={tmp_path / 'none'}")
    assert "has no config.json" in one_line_error(capsys, "swap", f"mood={tmp_path}")
    assert "--unload nobody: no such model or alias; there are mood, names, feelings" in one_line_error(
        capsys, "swap", "--unload", "nobody"
    )
    assert "--alias x: write OTHER=NAME" in one_line_error(capsys, "swap", "--alias", "x")
    assert "aliases.x is 'y', which is no name in models" in one_line_error(capsys, "swap", "--alias", "x=y")
    assert "models" in one_line_error(capsys, "swap", "--unload", "mood", "--unload", "names")
    assert len(fake.history) == 1
    for contradiction in (
        ["swap"], ["swap", "a.yaml", "--unload", "mood"], ["swap", "--unload", "mood", "--timeout-s", "0"]
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(contradiction)
        assert ended.value.code == 2


WANTED = ModelSet.parse({"models": {"mood": "models/mood"}})
NEW = {"wanted": WANTED.model_dump(mode="json"), "refused": {}}
OLD = {"wanted": None, "refused": {}}
REFUSED = {**NEW, "refused": {"mood": "there is no room for it"}}


class Told:
    """What replicas report, one time after another, and whether Serve says by then that the service runs."""

    def __init__(self, *answers: tuple[bool, list[Any] | Exception]) -> None:
        self.answers = list(answers)
        self.runs = False

    def reports(self) -> list[Any]:
        self.runs, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def change_models(self, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 60.0) -> list[Any]:
        monkeypatch.setattr(cluster, "_ours", lambda: cluster.application(ServeConfig.parse(WANTED.model_dump())))
        monkeypatch.setattr(cluster, "_apply", lambda application: None)
        monkeypatch.setattr(cluster, "_state", lambda: "UNHEALTHY")
        monkeypatch.setattr(cluster, "_is_running", lambda: self.runs)
        monkeypatch.setattr(cluster, "reports", self.reports)
        return cluster.change_models(WANTED, timeout_s)


def test_replicas_that_die_meanwhile_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(
        (True, RayActorError()), (False, []), (True, []), (False, [NEW]), (True, [NEW, OLD]), (True, [NEW, NEW])
    )
    assert told.change_models(monkeypatch) == [NEW, NEW] and len(told.answers) == 1


def test_one_refusal_is_enough_where_another_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that cannot begin with what all are to serve; those that stand have tried, or are about to."""
    told = Told((False, [REFUSED, OLD]), (False, [REFUSED, NEW]))
    assert told.change_models(monkeypatch) == [REFUSED, NEW]


@pytest.mark.parametrize("last", [RayActorError(), LookupError(), [], [NEW]])
def test_replicas_that_never_agree(monkeypatch: pytest.MonkeyPatch, last: Any) -> None:
    with pytest.raises(cluster.DeploymentError, match=r"within 0\.3 s; Ray Serve says of them: UNHEALTHY"):
        Told((False, last)).change_models(monkeypatch, timeout_s=0.3)


def test_a_controller_that_has_died_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cluster.application(ServeConfig.parse(WANTED.model_dump()))
    answers: list[Any] = [RayActorError(), GetTimeoutError(), {cluster.APPLICATION: config}]

    def deployed() -> Any:
        answer = answers.pop(0) if answers else RayActorError()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cluster, "_deployed", deployed)
    assert cluster.model_set() == WANTED and not answers
    monkeypatch.setattr(cluster, "CONTROLLER_S", 0.2)
    for asked in (cluster.model_set, lambda: cluster._apply(config)):
        with pytest.raises(cluster.DeploymentError, match=r"no other came within 0\.2 s; try again"):
            asked()


@pytest.fixture(scope="module")
def service(models: dict[str, str]) -> Iterator[Running]:
    """A real one, of two replicas."""
    with running({"mood": models["mood"]}, replicas=2) as service:
        yield service


def begin_swap(service: Running, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serving", "swap", *arguments, "--address", service.cluster],
        cwd=ROOT, env={**os.environ, "RAY_TMPDIR": str(service.home), **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("token", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN_PATH": "none"}])
def test_a_cluster_refuses_who_has_not_its_token(
    service: Running, models: dict[str, str], token: dict[str, str]
) -> None:
    swapping = begin_swap(service, f"mood={models['topics']}", **token)
    out, error = swapping.communicate(timeout=60)
    assert (swapping.returncode, out) == (2, "")
    *rays, ours = error.splitlines()
    assert len(rays) <= 1 and all("InvalidAuthToken" in line for line in rays), error
    assert ours.startswith("error: what listens at") and "asks for another token; set RAY_AUTH_TOKEN_PATH" in ours


def test_there_is_one_swap_at_a_time(service: Running, models: dict[str, str]) -> None:
    holding = (
        "import sys; from serving import cluster; cluster.connect(sys.argv[1])\n"
        "with cluster.alone(): print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, service.cluster], cwd=ROOT, env={**os.environ, "RAY_TMPDIR": str(service.home)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout and holder.stdout.readline()
        swapping = begin_swap(service, f"mood={models['topics']}")
        assert swapping.communicate(timeout=60) == (
            "", "error: another swap is under way; give this one again when it has ended\n",
        )  # fmt: skip
        assert swapping.returncode == 2
        holder.kill()  # however it ends, the next one may begin


def test_replicas_of_a_real_service_die_as_it_begins(service: Running, models: dict[str, str]) -> None:
    """Both, one after the other: it ends when two stand that serve what was asked for."""
    swapping = begin_swap(service, f"mood={models['topics']}", "--timeout-s", "120")
    first, second = service.processes(REPLICA)
    os.kill(first, signal.SIGKILL)
    until(lambda: len(service.processes(REPLICA)) == 2, 60)
    os.kill(second, signal.SIGKILL)
    out, error = swapping.communicate(timeout=180)
    assert swapping.returncode == 0, error
    assert f"2 replicas serve mood at {load_pretrained(models['topics']).revision}" in out
    left = service.processes(REPLICA)
    assert len(left) == 2 and not {first, second} & set(left)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((), "no Ray cluster runs on this machine; give the --address"),
        (("127.0.0.1:2", "127.0.0.1:1"), "2 Ray clusters run on this machine, at 127.0.0.1:1, 127.0.0.1:2; give the"),
        (("127.0.0.1:1",), "no Ray cluster can be reached at '127.0.0.1:1'"),
    ],
)
def test_without_an_address_the_only_cluster_is_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: tuple[str, ...], told: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: frozenset(found))
    assert told in one_line_error(capsys, "swap", "--unload", "mood")


def test_an_address_that_is_given_is_the_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    told = "no Ray cluster can be reached at "
    assert f"{told}'127.0.0.1:2'" in one_line_error(capsys, "swap", "--unload", "mood")
    assert f"{told}'127.0.0.1:1'" in one_line_error(capsys, "swap", "--unload", "mood", "--address", "127.0.0.1:1")
