"""Serve what a service is compared with (see app.py), until SIGINT.

python -m benchmarks.stock empty --port 8001 --profile haproxy
python -m benchmarks.stock MODEL_DIR --port 8001 --profile haproxy --batch 32
"""

import argparse
import logging
import os
import signal
from collections.abc import Sequence

from serving.config import Limits
from serving.environment import prepared

MAX_REQUESTS = 4096  # as many as HAProxy takes by itself


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with prepared(options.profile, Limits(), MAX_REQUESTS):
        import ray  # reads the environment that has just been prepared
        from ray import serve

        from benchmarks.stock.app import application

        ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, logging_level=logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": options.port})
        serve.run(application(options.what, options.batch))
        print("ready", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        serve.shutdown()
        ray.shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="`empty`, or a model directory for the stock recipe")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--profile", choices=["plain", "haproxy"], default="plain")
    parser.add_argument("--batch", type=int, default=32, help="requests at most in one batch")
    return parser


if __name__ == "__main__":
    main()
