"""The Dockerfile and compose.yaml without Docker: each step of the image is read from its file and taken here.

What it copies exists, its build step is a script that we run, and its last stage is run as a container's runtime would:
on a read-only root, without rights (in_container.sh), with the settings of service.compose.yaml.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seqmodels.pipeline import Pipeline
from serving.auth import hash_key
from serving.config import ServeConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LAST_STAGE = DOCKERFILE.replace("\\\n", " ").rsplit("\nFROM ", 1)[1]
SOURCES = [path for line in re.findall(r"^COPY (?!--)(.+)$", DOCKERFILE, re.M) for path in line.split()[:-1]]
KEY = "a key that only this test knows"
IN_CONTAINER = Path(__file__).with_name("in_container.sh")
UNSHARE = [
    *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"),
    *("sh", str(IN_CONTAINER)),
]
# The container's life: begun by its entrypoint, found healthy, asked, told to stop.
SESSION = """
[ "$(id -u)" != 0 ] && [ ! -w / ] && [ ! -w "$ROOT" ] && grep -q "CapEff:\t0*$" /proc/self/status || exit 3
"$@" & service=$!
until sh -c "$HEALTHCHECK" 2> /dev/null; do kill -0 $service && sleep 0.5 || exit 4; done
python -c "$ASK" || exit 5
cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep ^--plasma_directory | sort -u
kill -TERM $service && wait $service
"""
ASK = f"""
import httpx
from serving.client import Client
print(Client(api_key={KEY!r}).classify("a good day").model_dump_json(exclude_none=True))
print("ray_" in httpx.get("http://127.0.0.1:8080/metrics").text)
"""


def said(instruction: str) -> str:
    """What the last stage says after this word."""
    return " ".join(re.findall(rf"^{instruction} (.+)$", LAST_STAGE, re.M))


def plain(name: str) -> str:
    """A package's name in the one form that its index gives to all its spellings."""
    return re.sub("[-_.]+", "-", name).lower()


def in_container(folder: Path, venv: Path, kept: list[Path], *command: str) -> subprocess.CompletedProcess[str]:
    """Run it as the last stage says, with this environment in place of /opt/venv."""
    folder.mkdir()
    user, group = said("USER").split(":")
    path = {"/opt/venv": str(venv), "$PATH": "/usr/local/bin:/usr/bin:/bin"}
    variables = re.sub("|".join(map(re.escape, path)), lambda found: path[found[0]], said("ENV")).split()
    arguments = [user, group, str(folder), " ".join(map(str, kept)), *variables, *command]
    return subprocess.run([*UNSHARE, *arguments], capture_output=True, text=True, timeout=400)


def serves_without_rights(folder: Path, venv: Path, model: str, *variables: str, profile: str) -> None:
    kept = [ROOT, venv, Path(model), mounted := folder / "mounted"]
    mounted.mkdir()
    (mounted / "keys").write_text(f"sha256:{hash_key(KEY)}\n")
    fields = yaml.safe_load((DEPLOY / "service.compose.yaml").read_text())
    fields |= {"models": {"mood": model}, "api_keys_file": str(mounted / "keys"), "profile": profile}
    (mounted / "service.yaml").write_text(yaml.safe_dump(fields))
    probe = in_container(folder / "probe", venv, kept, "true")
    if probe.returncode:
        pytest.skip(f"no namespaces here: {probe.stderr.strip()}")
    given = [f"HEALTHCHECK={said('HEALTHCHECK').split('CMD ')[1]}", f"ASK={ASK}", f"ROOT={ROOT}", *variables]
    command = ["sh", "-c", SESSION, "sh", *json.loads(said("ENTRYPOINT")), str(mounted / "service.yaml")]
    done = in_container(folder / "session", venv, kept, *given, *command)
    assert done.returncode == 0, (done.returncode, done.stdout + done.stderr)
    assert not re.search("Traceback|ERROR|Read-only|denied", done.stderr), done.stderr
    first, answer, *told = done.stdout.splitlines()
    assert first.startswith("serving mood at http://0.0.0.0:8000")
    assert json.loads(answer)["results"] == Pipeline.from_pretrained(model)(["a good day"])
    assert told == ["True", "--plasma_directory=/dev/shm", "stopping; running requests may finish"]


def test_every_copied_path_exists_and_is_let_through() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert SOURCES
    for path in SOURCES:
        assert (ROOT / path).exists(), path
        assert any(entry == path or entry.startswith(f"{path}/") for entry in allowed), path


def test_the_build_step_is_the_install_script() -> None:
    (step,) = re.findall(r"^RUN (.+)$", DOCKERFILE, re.M)
    assert step.endswith("sh deploy/install.sh /opt/venv")
    subprocess.run(["sh", "-n", str(ROOT / "deploy" / "install.sh")], check=True)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned and f"torch=={pinned[1]}" in (ROOT / "deploy" / "install.sh").read_text()


def test_it_runs_without_rights_on_a_read_only_root(models: dict[str, str], tmp_path: Path) -> None:
    """The last stage, over the environment that the tests run in."""
    serves_without_rights(tmp_path, Path(sys.prefix), models["mood"], f"PYTHONPATH={ROOT}", profile="plain")


@pytest.mark.slow  # installs all of it: a minute where packages are near
def test_what_is_installed_from_what_is_copied_serves(models: dict[str, str], tmp_path: Path) -> None:
    build, venv = tmp_path / "build", tmp_path / "venv"
    for path in SOURCES:
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, build / path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (build / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, build / path)
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not what stands here
    subprocess.run(["sh", "deploy/install.sh", str(venv)], cwd=build, env=own, stdout=subprocess.DEVNULL, check=True)
    listing = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    told = subprocess.run(
        [venv / "bin" / "python", "-c", listing], env=own, capture_output=True, text=True, check=True
    ).stdout
    installed = {plain(name): version.split("+")[0] for name, version in map(str.split, told.splitlines())}
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {plain(name): version for name, version in pinned.items()}
    assert installed.pop("seqmodels") and "torch" in installed
    assert installed == {name: pins.get(name) for name in installed}
    serves_without_rights(tmp_path, venv, models["mood"], profile="haproxy")


def test_compose_gives_the_service_no_rights_and_what_it_needs() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose) == {"name", "services", "secrets", "volumes"}
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            path = (DEPLOY / source).resolve()
            assert path.is_file() or path == ROOT / "models" or source in compose["volumes"], source
    given, container = compose["services"]["seqmodels"], IN_CONTAINER.read_text()
    assert (DEPLOY / given["build"]["context"] / "Dockerfile").is_file()
    assert set(given["build"]["args"]) == set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.M))
    assert given["tmpfs"] == ["/tmp:size=512m,mode=1777"] and "size=512m" in container  # as the tests run it
    assert given["shm_size"] == "1g" and "size=1g" in container
    assert given["command"] == ["/etc/seqmodels.yaml"]
    config = ServeConfig.load(DEPLOY / "service.compose.yaml")
    assert f"./service.compose.yaml:{given['command'][0]}:ro" in given["volumes"]
    assert all(path.startswith("/models/") for (path,) in config.directories.values())
    assert config.api_keys_file == f"/run/secrets/{given['secrets'][0]}" and set(compose["secrets"]) == {"keys"}
    assert f"127.0.0.1:8000:{config.port}" in given["ports"] and f"EXPOSE {config.port}" in LAST_STAGE
    assert int(given["stop_grace_period"].removesuffix("s")) > config.drain_s + 20
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": [f"seqmodels:{config.metrics_port}"]}]
