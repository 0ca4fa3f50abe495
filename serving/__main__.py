"""Start the service on this machine:

    python -m serving MODEL_DIR [NAME=MODEL_DIR ...] [--port 8000]
    python -m serving service.yaml
    python -m serving swap NAME=MODEL_DIR ...    # change the models of one that runs; see swap --help
    python -m serving key --name CLIENT          # make an API key; see key --help

It says where it listens and stays up until Ctrl-C. For a cluster see deploy/serve.yaml.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from seqmodels.errors import ConfigError, SeqModelsError
from serving import auth, swap
from serving.auth import ENVIRONMENT_VARIABLE, MIN_LENGTH, load_keys
from serving.config import ServeConfig, named_models
from serving.environment import prepared
from serving.states import load_state_key

# Before Ray is imported: nothing is sent anywhere, and Ray does not repeat its advice about GPUs.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

COMMANDS = {"swap": swap.main, "key": auth.main}
HELP = """\
`python -m serving swap --help` tells how to change the models of a service that runs, `python -m serving key --help`
how to make an API key.

A YAML file says the same and more; options given here win over it:

  models:                      # the name that clients use: model directory
    sentiment: models/sentiment
    en-de: models/multi30k-en-de
  port: 8000
  num_threads: 2
  limits: {num_beams: 8, max_new_tokens: 256}

serving/config.py lists every field with its default; deploy/service.yaml is a whole example.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after Ctrl-C, 1 where a swap was refused, 2 for a mistake of the user, told in one
    line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        config = read_config(arguments)
        _check(config)
        with prepared(config.profile, config.limits, config.max_requests):
            _serve(config)
    except (SeqModelsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_config(arguments: Sequence[str]) -> ServeConfig:
    """The command line as a ServeConfig; options given there win over the file. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        "python -m serving",
        description="Serve saved models over HTTP.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="+", help="MODEL_DIR, NAME=MODEL_DIR, or one YAML file (see below)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, so this machine only)")
    parser.add_argument("--port", type=int, help="default: 8000")
    parser.add_argument(
        "--profile",
        choices=["plain", "haproxy"],
        help="what stands before the replicas: Ray's own proxy (plain, the default), or HAProxy, which is faster and "
        "leaves clients that fall silent",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: auto, a GPU when there is one")
    parser.add_argument("--num-threads", type=int, help="torch threads of each replica (default: 1)")
    parser.add_argument("--replicas", type=int, help="processes that answer (default: 1)")
    parser.add_argument(
        "--api-keys-file",
        help=f"a file with one API key per line, each of at least {MIN_LENGTH} characters; without it the environment "
        f"variable {ENVIRONMENT_VARIABLE} is read, comma-separated; without either no key is asked for",
    )
    options = vars(parser.parse_args(arguments))
    targets = options.pop("target")
    given = {name: value for name, value in options.items() if value is not None}
    if len(targets) == 1 and targets[0].endswith((".yaml", ".yml")):
        return ServeConfig.load(Path(targets[0]), **given)
    return ServeConfig.parse({"models": named_models(targets), **given})


def _check_ports(config: ServeConfig) -> None:
    """Raise OSError if one is taken: Ray would only retry."""
    _check_port(config.host, config.port, f"cannot listen on {config.url}", "choose another --port or --host")
    if config.metrics_port is not None:
        port = config.metrics_port
        _check_port("", port, f"cannot tell metrics on port {port}", "choose another metrics_port")


def _check_port(host: str, port: int, failed: str, fix: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"{failed}: {error.strerror}; {fix}") from None


def _check(config: ServeConfig) -> None:
    """Raise now, in one line, what would otherwise stand in a replica's log."""
    import torch

    from seqmodels.ensemble import load_members, revision_of
    from seqmodels.shortlist import Shortlist, has_shortlist

    load_keys(config.api_keys_file)
    load_state_key(config.state_key_file)
    if config.tracing:
        from serving.traces import exporter_of

        exporter_of(config.tracing)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', which torch cannot use here; use cpu")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.decoder_weights == "int8" and on_gpu:
        raise ConfigError("decoder_weights is 'int8', which is for CPUs, and there is a GPU; set device to cpu")
    if config.decoder_weights in ("float16", "bfloat16") and not on_gpu:
        raise ConfigError(
            f"decoder_weights is {config.decoder_weights!r}, which is for GPUs, and this would run on a CPU; "
            "use float32 or int8"
        )
    everywhere = [directory for directories in config.directories.values() for directory in directories]
    if config.shortlist and not any(map(has_shortlist, everywhere)):
        raise ConfigError(
            "shortlist is true, but no model has one; learn it with `python -m training shortlist MODEL_DIR`"
        )
    for name, directories in config.directories.items():
        members = load_members(directories)  # on the CPU: a GPU is the replicas'
        revision, wanted = revision_of(members, "probability"), config.revisions.get(name)
        if wanted not in (None, revision):
            raise ConfigError(
                f"revisions.{name} is {wanted!r}, but {', '.join(directories)} holds {revision}; put one right"
            )
        for directory, member in zip(directories, members, strict=True):
            if config.shortlist and has_shortlist(directory):
                Shortlist.load(Path(directory), member)
    _check_ports(config)


def _serve(config: ServeConfig) -> None:
    """Until the first SIGINT or SIGTERM; running requests may finish."""
    from serving import cluster  # imports Ray

    stop = threading.Event()
    try:
        _start_ray(config)
        # After `ray.init`, which puts a handler in place that exits in the middle of whatever Ray is doing, and
        # before the first request can be answered.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        cluster.quiet()
        cluster.deploy(config, stop.is_set)
        if not stop.is_set():
            _say_where(config, cluster.address())
        _watch(stop, cluster.trouble)
    except (KeyboardInterrupt, SystemExit):  # while Ray was starting
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # an impatient second one would leave Ray's processes behind
            signal.signal(number, signal.SIG_IGN)
        print("stopping; running requests may finish", flush=True)
        cluster.shut_down()


def _watch(stop: threading.Event, trouble: Callable[[], str], every_s: float = 5.0) -> None:
    """Until `stop`, say what keeps the service from answering, once; it stands in a log of Ray's otherwise."""
    told = ""
    while not stop.wait(every_s):
        now = trouble()
        if now != told:
            print(now or "a replica stands again", file=sys.stderr, flush=True)
        told = now


def _start_ray(config: ServeConfig) -> None:
    import ray

    # Room for what was asked, even on few cores.
    num_cpus = max(os.cpu_count() or 1, config.most_replicas * config.num_threads)
    ray.init(
        "local",  # one of its own, also where RAY_ADDRESS or `ray start` tells of another
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        _metrics_export_port=config.metrics_port,
    )


def _say_where(config: ServeConfig, cluster: str) -> None:
    print(
        f"serving {', '.join(config.models)} at {config.url}; documentation at {config.url}/docs; its Ray cluster at "
        f"{cluster}; Ctrl-C stops it"
    )
    if not config.is_loopback and not load_keys(config.api_keys_file):
        print("warning: other machines can reach this address and no API key is set; see api_keys_file", flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
