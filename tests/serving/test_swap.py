"""`python -m serving swap`: what it makes of its arguments, and that a refusal anywhere leaves all as it was."""

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from seqmodels.pretrained import load_pretrained
from serving import cluster
from serving.__main__ import main
from serving.config import ModelSet, ServeConfig

from .test_main import one_line_error


class FakeCluster:
    """Two replicas that serve what they are told, but for models that the second refuses."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.history = [ModelSet.parse(models)]
        self.refusing: dict[str, str] = {}

    def model_set(self) -> ModelSet:
        return self.history[-1]

    def change_models(self, wanted: ModelSet) -> list[dict[str, Any]]:
        self.history.append(wanted)
        report = {"revisions": wanted.revisions, "aliases": wanted.aliases, "refused": {}}
        return [report, {**report, "refused": self.refusing}]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, models: dict[str, str]) -> FakeCluster:
    fields = {"models": {"mood": models["mood"], "names": models["names"]}, "aliases": {"feelings": "mood"}}
    fake = FakeCluster(fields)
    monkeypatch.setattr(cluster, "connect", lambda address: None)
    monkeypatch.setattr(cluster, "model_set", fake.model_set)
    monkeypatch.setattr(cluster, "change_models", fake.change_models)
    return fake


def test_one_model_changes_and_the_others_stay(
    running: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["swap", f"mood={models['topics']}", f"story={models['story']}", "--alias", "tale=story"]) == 0
    after = running.history[-1]
    assert after.models == {name: str(Path(models[source]).resolve()) for name, source in
                            (("mood", "topics"), ("names", "names"), ("story", "story"))}  # fmt: skip
    assert after.aliases == {"feelings": "mood", "tale": "story"}
    assert after.revisions["mood"] == load_pretrained(models["topics"]).revision and len(after.revisions) == 3
    assert f"2 replicas serve mood at {after.revisions['mood']}" in capsys.readouterr().out


def test_unload_takes_the_aliases_along(running: FakeCluster) -> None:
    assert main(["swap", "--unload", "mood"]) == 0
    assert list(running.history[-1].models) == ["names"] and not running.history[-1].aliases


def test_a_file_says_all(running: FakeCluster, models: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"models: {{story: [{models['story']}]}}\naliases: {{tale: story}}\nport: 1234\n")
    assert main(["swap", str(path)]) == 0
    assert running.history[-1].models == {"story": [models["story"]]} and running.history[-1].aliases == {
        "tale": "story"
    }


def test_a_refusal_takes_everything_back(
    running: FakeCluster, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    running.refusing = {"mood": "there is no room for it"}
    assert main(["swap", f"mood={models['topics']}"]) == 1
    assert running.history[-1] == running.history[0] and len(running.history) == 3
    error = capsys.readouterr().err
    assert "refused: mood: there is no room for it" in error and "nothing has changed" in error


def test_mistakes_change_nothing(
    running: FakeCluster, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a directory" in one_line_error(capsys, "swap", f"mood={tmp_path / 'none'}")
    assert "has no config.json" in one_line_error(capsys, "swap", f"mood={tmp_path}")
    assert "--unload nobody: no such model; there are mood, names" in one_line_error(
        capsys, "swap", "--unload", "nobody"
    )
    assert "--alias x: write OTHER=NAME" in one_line_error(capsys, "swap", "--alias", "x")
    assert "aliases.x is 'y', which is no name in models" in one_line_error(capsys, "swap", "--alias", "x=y")
    assert "models" in one_line_error(capsys, "swap", "--unload", "mood", "--unload", "names")
    assert len(running.history) == 1
    for contradiction in (["swap"], ["swap", "a.yaml", "--unload", "mood"]):
        with pytest.raises(SystemExit) as ended:
            main(contradiction)
        assert ended.value.code == 2


def test_a_replica_that_dies_meanwhile_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ModelSet.parse({"models": {"mood": "models/mood"}})
    told = [{"wanted": wanted.model_dump(mode="json")}]
    answers: list[Any] = [RayActorError(), [], [{"wanted": None}], told]  # [] while none stands

    def reports() -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(cluster, "_ours", lambda: cluster.application(ServeConfig.parse(wanted.model_dump())))
    monkeypatch.setattr(cluster, "_apply", lambda application: None)
    monkeypatch.setattr(cluster, "_wait_until_running", lambda is_stopped: None)
    monkeypatch.setattr(cluster, "reports", reports)
    assert cluster.change_models(wanted) == told and not answers


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
