"""The command line: what it understands, and that a user's mistake is one line and exit status 2."""

import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch

from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import load_pretrained, save_pretrained
from seqmodels.shortlist import FILE, NONE, Shortlist
from seqmodels.tokenizer import EOS
from serving.__main__ import _check, _watch, main, read_config
from serving.deployments import load_pipeline
from serving.environment import free_port
from tests.serving.model_directories import save_all


def test_command_line(models: dict[str, str]) -> None:
    config = read_config([models["mood"], f"tr={models['en-de']}", "--port", "8111", "--num-threads", "2"])
    assert list(config.models) == ["mood", "tr"] and (config.port, config.num_threads) == (8111, 2)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("models: {a: models/a}\nport: 1234\nreplicas: 2\n")
    config = read_config([str(tmp_path / "s.yaml"), "--port", "8111"])
    assert (config.port, config.replicas) == (8111, 2)


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


def test_mistakes_are_one_line(tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a directory" in one_line_error(capsys, str(tmp_path / "none"))
    assert "mood= is not a directory" in one_line_error(capsys, "mood=")
    assert "No such file" in one_line_error(capsys, str(tmp_path / "none.yaml"))
    assert "has no config.json" in one_line_error(capsys, str(tmp_path))
    assert "port" in one_line_error(capsys, models["mood"], "--port", "99999")
    assert "cannot be read" in one_line_error(capsys, models["mood"], "--api-keys-file", str(tmp_path / "none"))


def test_a_port_that_is_taken(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        error = one_line_error(capsys, models["mood"], "--port", str(taken.getsockname()[1]))
    assert "cannot listen on" in error and "choose another --port" in error


def test_a_port_for_metrics_that_is_taken(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "service.yaml").write_text(f"models: {{mood: {models['mood']}}}\nmetrics_port: {port}\n")
        error = one_line_error(capsys, str(tmp_path / "service.yaml"), "--port", str(free_port()))
    assert f"cannot tell metrics on port {port}" in error and "choose another metrics_port" in error


def test_what_keeps_the_service_from_answering_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()
    states = iter(["", "no replica stands: A", "no replica stands: A", "no replica stands: B", "", ""])

    def trouble() -> str:
        if (state := next(states, None)) is None:
            stop.set()
        return state or ""

    _watch(stop, trouble, every_s=0.001)
    assert capsys.readouterr().err.splitlines() == [
        "no replica stands: A",
        "no replica stands: B",
        "a replica stands again",
    ]


def test_a_broken_model(tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path(models["mood"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 200 if path.name == "model.safetensors" else None])
    assert "model.safetensors" in one_line_error(capsys, f"mood={tmp_path}")


def test_another_revision_than_is_wanted(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"models: {{mood: {models['mood']}}}\nrevisions: {{mood: '123456789abc'}}\n")
    error = one_line_error(capsys, str(path))
    assert f"holds {load_pretrained(models['mood']).revision}" in error and "revisions.mood is '123456789abc'" in error


def test_a_gpu_that_is_not_there(
    models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device is 'cuda'" in one_line_error(capsys, models["mood"], "--device", "cuda")


@pytest.mark.parametrize(("weights", "gpu"), [("int8", True), ("float16", False), ("bfloat16", False)])
def test_weights_that_the_device_does_not_compute_in(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
    gpu: bool,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    (tmp_path / "s.yaml").write_text(f"models: {{m: {models['mood']}}}\ndecoder_weights: {weights}\n")
    assert f"decoder_weights is '{weights}'" in one_line_error(capsys, str(tmp_path / "s.yaml"))


@pytest.fixture
def with_shortlist(tmp_path: Path, models: dict[str, str]) -> Path:
    """A service of a classifier and of a translator that has a shortlist of one character, x."""
    translator = tmp_path / "translator"
    shutil.copytree(models["en-de"], translator)
    pretrained = load_pretrained(translator)
    assert pretrained.source_tokenizer and pretrained.target_tokenizer
    always = torch.tensor([EOS, *pretrained.target_tokenizer.encode("x")]).int()
    translations = torch.full((pretrained.source_tokenizer.vocab_size, 1), NONE).int()
    Shortlist(translations, always).save(translator, pretrained)
    service = tmp_path / "s.yaml"
    service.write_text(f"models: {{mood: {models['mood']}, tr: {translator}}}\nshortlist: true\n")
    return service


def test_a_shortlist_is_used(with_shortlist: Path) -> None:
    config = read_config([str(with_shortlist), "--device", "cpu", "--port", str(free_port())])
    _check(config)
    pipelines = {name: load_pipeline(config, directories) for name, directories in config.directories.items()}
    (answer,) = pipelines["tr"](["Some text."], max_new_tokens=6, min_new_tokens=3)
    assert set(answer["sequences"][0]["text"]) == {"x"}
    assert pipelines["mood"](["Some text."])[0]["label"] in ("bad", "good")
    assert pipelines["tr"].facts == {"batch_invariant": True, "decoder_weights": "float32", "shortlist": True}
    assert pipelines["mood"].facts == {"batch_invariant": True}


def test_a_list_of_directories_answers_as_one(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_all(tmp_path / "others")["mood"]  # the same weights, but for what is changed here
    pretrained = load_pretrained(other)
    with torch.no_grad():
        pretrained.model.head.bias += torch.tensor([1.0, -1.0])  # type: ignore[union-attr]
    save_pretrained(pretrained.model, Path(other), source_tokenizer=pretrained.source_tokenizer)
    service = tmp_path / "s.yaml"
    service.write_text(f"models: {{both: [{models['mood']}, {other}], tr: {models['en-de']}}}\n")
    config = read_config([str(service), "--device", "cpu"])
    both = load_pipeline(config, config.directories["both"])
    scores = [
        pipeline(["Some text."])[0]["scores"]
        for pipeline in (Pipeline.from_pretrained(models["mood"]), Pipeline.from_pretrained(other), both)
    ]
    for label, score in scores[2].items():
        assert score == pytest.approx((scores[0][label] + scores[1][label]) / 2)
    assert both.facts["members"] == [load_pretrained(path).revision for path in (models["mood"], other)]
    service.write_text(f"models: {{both: [{models['mood']}, {models['en-de']}]}}\n")
    assert "cannot answer as one: their tasks differ" in one_line_error(capsys, str(service), "--device", "cpu")
    service.write_text("models: {both: []}\n")
    assert "models.both" in one_line_error(capsys, str(service))


def test_no_model_has_a_shortlist(tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_text(f"models: {{tr: {models['en-de']}}}\nshortlist: true\n")
    assert "no model has one" in one_line_error(capsys, str(tmp_path / "s.yaml"))


def test_a_broken_shortlist(with_shortlist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = with_shortlist.parent / "translator" / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert f"{FILE} is cut short" in one_line_error(capsys, str(with_shortlist))
    tokenizer = file.with_name("source_tokenizer.json")
    file.write_bytes(whole)
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert "of another model; learn it again" in one_line_error(capsys, str(with_shortlist))
