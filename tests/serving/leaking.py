"""The service with a leak: `python -m tests.serving.leaking ...` is `python -m serving ...`, but each replica keeps so
many bytes of every request as LEAK_BYTES says. To see that the soak finds it."""

import os
import sys
from typing import Any

from ray.serve import Application

from serving import __main__, cluster, deployments
from serving.config import Settings
from serving.deployments import ModelServer
from serving.guard import Exchange

LEAK_BYTES = "SOAK_LEAK_BYTES"  # in the environment


class LeakingServer(ModelServer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kept: list[bytes] = []

    def _answered(self, exchange: Exchange) -> None:
        super()._answered(exchange)
        self._kept.append(b"x" * int(os.environ[LEAK_BYTES]))


def build(args: Settings) -> Application:
    """As serving.deployments has it, with the other class."""
    deployments.ModelServer = LeakingServer  # type: ignore[misc]
    return deployments.build(args)


def main() -> int:
    plain = cluster.application
    cluster.application = lambda config: plain(config).model_copy(  # type: ignore[assignment]
        update={"import_path": "tests.serving.leaking:build"}
    )
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
