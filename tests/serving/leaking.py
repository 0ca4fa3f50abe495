"""The service with a leak: `python -m tests.serving.leaking ...` is `python -m serving ...`, but each replica keeps so
many bytes of every request as LEAK_BYTES says. To see that the soak finds it."""

import os
import sys
from typing import TYPE_CHECKING, Any

from serving import __main__
from serving.config import Settings
from serving.environment import set_token
from serving.guard import Exchange

if TYPE_CHECKING:
    from ray.serve import Application

LEAK_BYTES = "SOAK_LEAK_BYTES"  # in the environment


def build(args: Settings) -> "Application":
    """As serving.deployments has it, with another class."""
    from serving import deployments

    class LeakingServer(deployments.ModelServer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._kept: list[bytes] = []

        def _answered(self, exchange: Exchange) -> None:
            super()._answered(exchange)
            self._kept.append(b"x" * int(os.environ[LEAK_BYTES]))

    deployments.ModelServer = LeakingServer  # type: ignore[misc]
    return deployments.build(args)


def main() -> int:
    set_token()  # before Ray is imported
    from serving import cluster

    plain = cluster.application
    cluster.application = lambda config: plain(config).model_copy(  # type: ignore[assignment]
        update={"import_path": "tests.serving.leaking:build"}
    )
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
