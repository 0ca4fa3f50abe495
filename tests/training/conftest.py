"""One small Ray for all tests of training that need it: starting it takes seconds."""

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def small_ray() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray

    options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", object_store_memory=128 * 1024**2, _node_ip_address="127.0.0.1", **options)
    yield
    ray.shutdown()
