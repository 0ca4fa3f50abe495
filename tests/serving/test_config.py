"""ServeConfig and the command line: errors name field, value and fix."""

from pathlib import Path

import pytest

from seqmodels.errors import ConfigError
from serving.config import ServeConfig, named_models


def test_defaults_are_safe() -> None:
    config = ServeConfig.parse({"models": {"a": "models/a"}})
    assert config.is_loopback and config.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "models"),
        ({"models": {}}, "models"),
        ({"models": {"a/b": "x"}}, "'a/b' cannot name a model"),
        ({"models": {"a": "x"}, "prot": 1}, "prot is no setting; did you mean port"),
        ({"models": {"a": "x"}, "port": "80"}, "port"),
        ({"models": {"a": "x"}, "port": 70000}, "70000"),
        ({"models": {"a": "x"}, "limits": {"beams": 3}}, "limits.beams is no setting; did you mean num_beams"),
        ({"models": {"a": "x"}, "autoscaling": {"replicas": 3}}, "autoscaling.replicas is no setting; did you mean"),
        ({"models": {"a": "x"}, "max_requests": 8}, "raise max_requests or lower limits.inputs"),
        ({"models": {"a": "x"}, "max_rows": 8}, "max_rows is 8"),
        ({"models": {"a": "x"}, "replicas": 2, "autoscaling": {}}, "leave one of them out"),
        ({"models": {"a": "x"}, "autoscaling": {"min_replicas": 9}}, "min_replicas is 9"),
        ({"models": {"a": "x"}, "device": "cpu", "num_gpus": 0.5}, "num_gpus is 0.5"),
        ({"models": {"a": "x"}, "drain_s": float("nan")}, "drain_s"),
        ({"models": {"a": "x"}, "state_lifetime_s": 1e30}, "state_lifetime_s"),
        (
            {"models": {"a": "x"}, "revisions": {"a": 123456789e01}},
            "revisions.a: YAML takes this revision for a number",
        ),
        ({"models": {"a": "x"}, "revisions": {"a": 123456789012}}, "write it in quotes"),
    ],
)
def test_errors_name_the_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig.parse(fields)


def test_load_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("models: {a: models/a}\nport: 8001\nlimits: {num_beams: 4}\n")
    config = ServeConfig.load(path, port=9000)
    assert (config.port, config.limits.num_beams, config.limits.inputs) == (9000, 4, 256)


@pytest.mark.parametrize("text", ["", "a: [", "- a", "\x00", "a: 2024-13-45", "a: &a [*a]"])
def test_yaml_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        ServeConfig.load(path)
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        ServeConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["models: {a: x}\nport: 1\nport: 2\n", "models: {a: x}\nlimits: {port: 1,\n port: 2}"])
def test_a_key_that_stands_twice(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.yaml is not YAML: 'port' stands twice, in lines 2 and 3; keep one"):
        ServeConfig.load(path)


def test_named_models(tmp_path: Path) -> None:
    (tmp_path / "sentiment").mkdir()
    directory = tmp_path / "sentiment"
    models = named_models([str(directory), f"mood={directory}"])
    assert models == {"sentiment": str(directory), "mood": str(directory)}
    with pytest.raises(ConfigError, match="two models are called 'sentiment'"):
        named_models([str(directory)] * 2)
    with pytest.raises(ConfigError, match="is not a directory"):
        named_models([str(tmp_path / "none")])
