"""What Ray Serve is told, the shipped examples, and a replica's own parts without a cluster."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from recipes.demo.__main__ import GOALS
from seqmodels.errors import ConfigError
from serving import cluster, deployments
from serving.autoscaling import METRIC
from serving.cluster import DEPLOYMENT
from serving.config import LOOPBACK, ModelSet, ServeConfig, Settings
from serving.deployments import ModelServer, build, deployment_options
from serving.runner import Order

EXAMPLES = Path(__file__).parents[2] / "deploy"


def settings(**fields: Any) -> Settings:
    return Settings.parse(fields)


def test_the_cluster_example_is_what_ray_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = yaml.safe_load((EXAMPLES / "serve.yaml").read_text())
    parsed = ServeDeploySchema.model_validate(fields)
    (application,) = parsed.applications
    assert application.import_path == "serving.deployments:build"
    monkeypatch.setattr(deployments, "load_keys", lambda path: ())  # its key file is not on this machine
    built = call_user_app_builder_with_args_if_necessary(build, application.args)  # as `serve deploy` does
    assert isinstance(built, Application)
    assert Settings.parse(application.args).allowed_hosts is None  # no client gets a 421
    (server,) = application.deployments
    assert server.name == DEPLOYMENT and ModelSet.parse(server.user_config or {}).aliases
    unknown = set(fields) - set(ServeDeploySchema.model_fields) | set(fields["applications"][0]) - set(
        type(application).model_fields
    )
    assert not unknown, "Ray ignores fields that it does not know"


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("host", "0.0.0.0", "under http_options, and allowed_hosts says"), ("port", 8000, "under http_options"),
        ("profile", "haproxy", "by the environment of the nodes"), ("metrics_port", 8080, "--metrics-export-port"),
    ],
)  # fmt: skip
def test_what_is_for_one_machine_is_told_where_it_belongs_on_a_cluster(name: str, value: Any, place: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is for `python -m serving` alone.*{place}"):
        call_user_app_builder_with_args_if_necessary(build, {name: value})
    assert getattr(ServeConfig.parse({"models": {"a": "a"}, name: value}), name) == value


def test_names_of_the_machine_are_all_that_a_service_on_loopback_is_called_by() -> None:
    def of(**fields: Any) -> list[str] | None:
        return Settings.parse(
            cluster.application(ServeConfig.parse({"models": {"a": "a"}, **fields})).args
        ).allowed_hosts

    assert of() == list(LOOPBACK) and of(host="0.0.0.0") is None
    assert of(allowed_hosts=["example.org"]) == of(allowed_hosts=["example.org"], host="0.0.0.0") == ["example.org"]


def test_the_example_for_kubernetes_holds_the_same_application_and_gives_it_no_rights() -> None:
    service = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(given)
    assert given == yaml.safe_load((EXAMPLES / "serve.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__ and cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"requests", "limits"} == set(container["resources"])
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]} and mounted["temporary"] == "/tmp"
    assert "readinessProbe" in cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


def test_the_example_for_one_machine_is_a_config() -> None:
    """Of models that `make demo` makes."""
    assert ServeConfig.load(EXAMPLES / "service.yaml").is_loopback
    models = yaml.safe_load((EXAMPLES / "service.yaml").read_text())["models"]
    assert models.items() <= {name: f"models/{name}" for name in GOALS}.items()


def test_options_in_rays_own_names() -> None:
    options = deployment_options(settings(replicas=3, num_threads=2, num_gpus=0.25, max_requests=500))
    assert options["num_replicas"] == 3
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.25}
    assert options["max_ongoing_requests"] > 500
    assert options["backpressure_config"]["status_code"] == 429
    assert options["graceful_shutdown_timeout_s"] > settings().drain_s


def test_autoscaling_takes_the_place_of_a_number() -> None:
    options = deployment_options(settings(autoscaling={"max_replicas": 5}))
    assert "num_replicas" not in options and options["autoscaling_config"]["max_replicas"] == 5
    assert isinstance(build(settings(autoscaling={"max_replicas": 5})), Application)


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"), [("auto", True, 1), ("auto", False, 0), ("cpu", True, 0), ("cuda", False, 1)]
)
def test_a_gpu_is_asked_for_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch, device: str, has_gpu: bool, expected: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert deployment_options(settings(device=device))["ray_actor_options"]["num_gpus"] == expected


def test_autoscaling_is_told_of_the_rows_that_may_be_in_use(models: dict[str, str]) -> None:
    """Under overload fewer may be, and what is full then must not look half empty."""
    server = ModelServer(settings().model_dump(mode="json"), (), b"")
    assert server.record_autoscaling_stats() == {METRIC: 0}
    asyncio.run(server.reconfigure({"models": {"mood": models["mood"]}}))
    model = server.models.served["mood"]
    model.load = {**model.load, "rows_live": model.load["rows_total"] // 2}
    assert server.record_autoscaling_stats() == {METRIC: 0.5}
    model.pace.share = 0.25
    assert server.record_autoscaling_stats() == {METRIC: 2.0}


def test_health_check_fails_when_the_engine_stands_still(models: dict[str, str]) -> None:
    server = ModelServer(settings(stall_after_s=0.8).model_dump(mode="json"), (), b"")
    with pytest.raises(RuntimeError, match="no model is served"):
        server.check_health()
    asyncio.run(server.reconfigure({"models": {"mood": models["mood"]}}))
    with pytest.raises(RuntimeError, match="has not turned"):
        server.check_health()  # not started
    server.runner.start(lambda events: None)
    server.check_health()
    model = server.models.served["mood"]
    model.pipeline.step = lambda bounds: [time.sleep(1.5)][:0]  # type: ignore[method-assign, func-returns-value]
    server.runner.submit([Order(model, model.pipeline.prepare("good"))])
    time.sleep(1.2)
    with pytest.raises(RuntimeError, match="has not turned"):
        server.check_health()
    server.runner.stop()


def test_only_the_first_models_may_stop_a_replica(models: dict[str, str]) -> None:
    """Later ones that cannot be served are kept out, and so is a user_config that is none."""
    server = ModelServer(settings().model_dump(mode="json"), (), b"")
    with pytest.raises(ConfigError, match="models"):
        asyncio.run(server.reconfigure({"models": {}}))
    asyncio.run(server.reconfigure({"models": {"mood": models["mood"]}}))
    before = server.report()["revisions"]
    asyncio.run(server.reconfigure({"modles": {}}))
    assert "modles" in server.report()["refused"]["user_config"] and server.report()["revisions"] == before
    asyncio.run(server.reconfigure({"models": {"mood": models["names"], "names": "nowhere"}}))
    assert list(server.report()["refused"]) == ["names"] and server.report()["revisions"] != before
    server.runner.stop()
