"""A Ray cluster of two nodes on one machine, with room for one replica on each, and the service on it:

    python -m tests.serving.nodes service.yaml

In a process of its own, because Ray ties itself to the one that it runs in. It says that it is `serving`, and obeys on
its standard input: `kill`, which ends all of the second node at once, as if its machine had lost power, and says
`killed`; `add`, which begins another and says `added` once a replica serves there. It ends with its input, or by
SIGINT.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving.__main__ import read_config
from serving.environment import set_token

set_token()  # before Ray is imported

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from serving import cluster  # noqa: E402

STORE_BYTES = 80_000_000


def main(arguments: Sequence[str]) -> None:
    config = read_config(arguments)
    options = {"num_cpus": config.num_threads, "object_store_memory": STORE_BYTES}
    nodes = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    second = nodes.add_node(**options)
    ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
    cluster.quiet()
    try:
        cluster.deploy(config, lambda: False)
        print("serving on two nodes", flush=True)
        for word in map(str.strip, sys.stdin):
            if word == "kill":
                kill(second.all_processes["raylet"][0].process.pid)
                nodes.remove_node(second, allow_graceful=False)
                print("killed", flush=True)
            elif word == "add":
                second = nodes.add_node(**options)
                wait_for_replicas(config.replicas)
                print("added", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        cluster.shut_down()
        nodes.shutdown()


def wait_for_replicas(number: int) -> None:
    """Until so many tell what they serve; meanwhile the dead one may still be asked."""
    told = 0
    while told < number:
        time.sleep(0.1)
        with contextlib.suppress(*cluster.DIED):
            told = len(cluster.reports())


def kill(raylet: int) -> None:
    """A node's raylet, and its replica and whatever else runs below it."""
    processes = [raylet, *below(raylet)]
    assert any(b"ServeReplica" in Path(f"/proc/{process}/cmdline").read_bytes() for process in processes)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def below(process: int) -> list[int]:
    children = [
        int(one) for path in Path(f"/proc/{process}/task").glob("*/children") for one in path.read_text().split()
    ]
    return [*children, *(one for child in children for one in below(child))]


if __name__ == "__main__":
    main(sys.argv[1:])
