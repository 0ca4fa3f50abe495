"""The Dockerfile without Docker: it copies what exists and is let through, and its build step is the script we run."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_every_copied_path_exists_and_is_let_through() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [path for line in re.findall(r"^COPY (?!--)(.+)$", DOCKERFILE, re.M) for path in line.split()[:-1]]
    assert sources
    for path in sources:
        assert (ROOT / path).exists(), path
        assert any(entry == path or entry.startswith(f"{path}/") for entry in allowed), path


def test_the_build_step_is_the_install_script() -> None:
    (step,) = re.findall(r"^RUN .*install\.sh.*$", DOCKERFILE, re.M)
    assert "sh deploy/install.sh /opt/venv" in step
    subprocess.run(["sh", "-n", str(ROOT / "deploy" / "install.sh")], check=True)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned and f"torch=={pinned[1]}" in (ROOT / "deploy" / "install.sh").read_text()


def test_it_runs_as_a_user_without_rights_and_keeps_the_signal() -> None:
    last_stage = DOCKERFILE.rsplit("FROM ", 1)[1]
    assert re.search(r"^USER (?!root)", last_stage, re.M)
    assert 'ENTRYPOINT ["python", "-m", "serving"' in last_stage  # no shell between `docker stop` and the service
