"""The service as an application of a Ray cluster: begun, told to serve other models, asked, ended.

The application is data, in the form of Ray Serve's own configuration files (deploy/serve.yaml is one), so that a
service begun here and one deployed from a file are the same and change in the same way: its models are the
deployment's `user_config`. Only this file speaks to Serve's controller.
"""

import contextlib
import logging
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray
from ray import serve
from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.serve._private.common import RequestMetadata
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve._private.utils import generate_request_id
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeApplicationSchema, ServeDeploySchema

from seqmodels.errors import ConfigError, SeqModelsError
from serving.config import ModelSet, ServeConfig

APPLICATION = "seqmodels"
DEPLOYMENT = "ModelServer"
LOGGING = {"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False}  # our own line is for each request
POLL_S = 0.1
REPORT_S = 5.0  # in which a replica says what it serves
CONTROLLER_S = 60.0  # in which another controller comes where Serve's has died
# All others answer, one that changes its models too. A replica that begins is given what is wanted by then.
NOT_STANDING = ("STARTING", "STOPPING")
# What is raised where a replica has just died, or Serve's controller, which forgets nothing; another comes.
DIED = (RayActorError, GetTimeoutError, LookupError, ValueError)

R = TypeVar("R")


class DeploymentError(SeqModelsError):
    """Ray Serve could not bring the application up, or it is not there."""


class OvertakenError(DeploymentError):
    """The service was told to serve something else meanwhile."""


def application(config: ServeConfig) -> ServeApplicationSchema:
    """The service as one application of a Serve configuration."""
    return ServeApplicationSchema.model_validate(
        {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "serving.deployments:build",
            "args": config.settings.model_dump(mode="json"),
            "deployments": [{"name": DEPLOYMENT, "user_config": config.model_set.model_dump(mode="json")}],
            "logging_config": LOGGING,
        }
    )


def deploy(config: ServeConfig, is_stopped: Callable[[], bool]) -> None:
    """Begin the service on the cluster that this process is connected to, and wait until it answers or `is_stopped`.

    Raises DeploymentError with what Ray says.
    """
    http_options = {
        "host": config.host,
        "port": config.port,
        # A backstop: the app expires requests itself. Serve has one for all, so it is that of the longest.
        "request_timeout_s": config.limits.longest_s + 10.0,
    }
    serve.start(proxy_location="HeadOnly", http_options=http_options, logging_config=LOGGING)
    _apply(application(config))
    _wait_until_running(is_stopped)
    if not is_stopped():
        _get_global_client().wait_for_proxies_serving(wait_for_applications_running=True)


def connect(address: str) -> None:
    """Join the cluster there; "auto" is RAY_ADDRESS, or else the one on this machine. Raises DeploymentError where none
    can be joined, and where "auto" could be several."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        address = _only_one()
    try:
        _knock(address)  # Ray itself would try for minutes, and then end the process
    except (OSError, ValueError):
        message = (
            f"no Ray cluster can be reached at {address!r}; start it, or give the --address of its head, HOST:PORT"
        )
        raise DeploymentError(message) from None
    try:
        logging.getLogger("ray").setLevel(logging.ERROR)  # it would warn that the token is asked for
        # Ray by itself sends the token only to a cluster that it has found by itself.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        # Told at once of a wrong token, and in 40 s that nobody answers: `ray.init` asks for 20 s, or ends the process.
        GcsClient(address=address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RayError):
        message = (
            f"what listens at {address!r} is no Ray cluster, or one that asks for another token; set "
            "RAY_AUTH_TOKEN_PATH to the file that holds it"
        )
        raise DeploymentError(message) from None
    quiet()


def _only_one() -> str:
    """Ray itself would take any of several, and so the models of another service might change."""
    found: list[str] = sorted(services.find_gcs_addresses())
    if len(found) > 1:
        message = (
            f"{len(found)} Ray clusters run on this machine, at {', '.join(found)}; give the --address of one: each "
            "service says its own when it starts"
        )
        raise DeploymentError(message)
    if not found:
        raise DeploymentError("no Ray cluster runs on this machine; give the --address of its head, HOST:PORT")
    return found[0]


def address() -> str:
    """Of the cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5):
        pass


def quiet() -> None:
    """Serve's client tells of its own inner life otherwise."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def model_set() -> ModelSet:
    """The models that the running service is to serve. Raises DeploymentError where none runs."""
    for deployment in _ours().deployments:
        if deployment.name == DEPLOYMENT and deployment.user_config:
            return ModelSet.parse(deployment.user_config)
    raise ConfigError(f"the application's configuration has no user_config for {DEPLOYMENT}; see deploy/serve.yaml")


def change_models(wanted: ModelSet, timeout_s: float = 600.0) -> list[dict[str, Any]]:
    """Have every replica, present and future, serve these models, and wait until all that stand have tried: their
    reports. Where none refused anything, this also waits for those that are being replaced.

    Raises DeploymentError where that takes longer than `timeout_s`; the models remain what is to be served. Raises
    OvertakenError where others were named meanwhile, as by `serve deploy`.
    """
    schema = _ours().model_dump(exclude_unset=True)
    asked = wanted.model_dump(mode="json")
    for deployment in schema["deployments"]:
        if deployment["name"] == DEPLOYMENT:
            deployment["user_config"] = asked
    _apply(ServeApplicationSchema.model_validate(schema))
    limit = time.monotonic() + timeout_s
    state = "nothing"
    while time.monotonic() < limit:
        with contextlib.suppress(*DIED):
            state = _state()
            told = reports()
            have_tried = bool(told) and all(report["wanted"] == asked for report in told)
            if have_tried and (_is_running() or any(report["refused"] for report in told)):
                return told
            if not have_tried and model_set() != wanted:
                raise OvertakenError("the service was told to serve other models meanwhile; see what it serves now")
        time.sleep(POLL_S)
    raise DeploymentError(
        f"not every replica serves what it was told to within {timeout_s:g} s; Ray Serve says of them: {state}"
    )


class _Swap:
    """An actor whose name is taken while models change. It ends with the process that began it."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the only right to change models until the block ends: of two swaps each would go back to what it found, over
    what the other has done. Raises DeploymentError where somebody else holds it."""
    try:
        swap = ray.remote(num_cpus=0)(_Swap).options(name=f"{APPLICATION}-swap", namespace=SERVE_NAMESPACE).remote()
    except ValueError:  # the name is taken
        raise DeploymentError("another swap is under way; give this one again when it has ended") from None
    try:
        yield
    finally:
        ray.kill(swap)


def reports() -> list[dict[str, Any]]:
    """What each replica serves that Serve's controller says stands. Raises one of DIED.

    Each is asked itself, for Serve's handles may not know one that came while another died.
    """
    replicas = _details()[APPLICATION]["deployments"][DEPLOYMENT]["replicas"]
    asked = [_report(replica["actor_name"]) for replica in replicas if replica["state"] not in NOT_STANDING]
    return list(ray.get(asked, timeout=REPORT_S))


def served() -> list[dict[str, Any]]:
    """The same, asked again where a replica, or the controller, dies meanwhile. Empty where none stands."""
    limit = time.monotonic() + CONTROLLER_S
    while time.monotonic() < limit:
        with contextlib.suppress(*DIED):
            return reports()
        time.sleep(POLL_S)
    return []


def _report(replica: str) -> Any:
    """A reference to its report, asked for as Serve's handles do."""
    request = RequestMetadata(request_id=replica, internal_request_id=generate_request_id(), call_method="report")
    return ray.get_actor(replica, namespace=SERVE_NAMESPACE).handle_request.remote(pickle.dumps(request))


def replica_states() -> dict[str, int]:
    """How many replicas are in each state, in Serve's words."""
    ours = _status().deployments.get(DEPLOYMENT)
    return {str(state): count for state, count in ours.replica_states.items() if count} if ours else {}


def trouble() -> str:
    """One line about why no replica stands; "" where one does, or nothing can be asked, which ends no service."""
    with contextlib.suppress(Exception):
        if all(state in NOT_STANDING for state in replica_states()):
            return f"no replica stands: {_reason(_state())}"
    return ""


def _reason(state: str) -> str:
    """The last error that a text of Serve's names, of which it tells the whole way; else that Serve tries again."""
    errors = [line.strip() for line in state.splitlines() if re.match(r"\s*[\w.]*Error\b", line)]
    return errors[-1] if errors else "Ray Serve begins another"


def shut_down() -> None:
    """Stop the service, letting what runs finish, then every process of Ray's that was begun."""
    if ray.is_initialized():
        if APPLICATION in serve.status().applications:
            serve.delete(APPLICATION)
        ray.shutdown()


def _ours() -> ServeApplicationSchema:
    deployed = _once_there(_deployed)
    if APPLICATION not in deployed:
        raise DeploymentError(f"no application {APPLICATION!r} runs on this cluster; start it with python -m serving")
    return deployed[APPLICATION]


def _deployed() -> dict[str, ServeApplicationSchema]:
    """The configurations of all applications, as they were last given."""
    given = {name: about["deployed_app_config"] for name, about in _details().items()}
    return {name: ServeApplicationSchema.model_validate(config) for name, config in given.items() if config}


def _details() -> dict[str, Any]:
    """All that Serve tells of each application."""
    try:
        applications: dict[str, Any] = _get_global_client().get_serve_details()["applications"]
    except RayServeException:  # Serve has not been started
        return {}
    return applications


def _status() -> ApplicationStatusOverview:
    return serve.status().applications[APPLICATION]


def _is_running() -> bool:
    return bool(_status().status == ApplicationStatus.RUNNING)


def _state() -> str:
    """Of the application and its replicas, in Serve's words, with the end of what Serve says is wrong."""
    about = _status()
    ours = about.deployments.get(DEPLOYMENT)
    said = (ours.message if ours else "") or about.message
    return f"{about.status.value} {replica_states()} {said.strip()[-2000:]}".strip()


def _apply(application: ServeApplicationSchema) -> None:
    """Serve drops applications that a configuration does not name, so the others go with it."""

    def apply() -> None:
        others = [config for name, config in _deployed().items() if name != APPLICATION]
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[*others, application]))

    _once_there(apply)


def _once_there(ask: Callable[[], R]) -> R:
    """What Serve's controller answers: where it has died, the next one. Raises DeploymentError where none comes."""
    limit = time.monotonic() + CONTROLLER_S
    while True:
        try:
            return ask()
        except (RayActorError, GetTimeoutError):
            if time.monotonic() > limit:
                message = f"Ray Serve's controller has died, and no other came within {CONTROLLER_S:g} s; try again"
                raise DeploymentError(message) from None
            time.sleep(POLL_S)


def _wait_until_running(is_stopped: Callable[[], bool]) -> None:
    while not is_stopped() and not _is_running():
        if _status().status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise DeploymentError(f"Ray Serve could not bring the service up: {_state()}")
        time.sleep(POLL_S)
