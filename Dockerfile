# The service in a container.
#
#   docker build -t seqmodels .                                    # CUDA: run it with --gpus all
#   docker build -t seqmodels --build-arg TORCH_INDEX=... .        # CPU: the index that pytorch.org names for it
#   docker run --init --read-only --tmpfs /tmp --shm-size 1g --cap-drop ALL --security-opt no-new-privileges \
#       -p 127.0.0.1:8000:8000 -v "$PWD/models:/models:ro" -e SEQMODELS_API_KEYS=... seqmodels /models/sentiment
#
# Arguments are those of `python -m serving`: model directories, or one YAML file. Stop it with SIGTERM (docker stop -t 45).
# deploy/compose.yaml says the same to Docker Compose, with Prometheus beside it. tests/serving/test_image.py takes every
# step here, without Docker.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=
WORKDIR /build
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY deploy/install.sh deploy/
COPY seqmodels seqmodels
COPY serving serving
RUN TORCH_INDEX="$TORCH_INDEX" sh deploy/install.sh /opt/venv

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
# A number: nobody has to be known by name, and Kubernetes sees that it is not root.
USER 10001:10001
WORKDIR /
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# All that is written goes to /tmp (Ray's token, sockets and logs) and /dev/shm, which may both be memory. So the object
# store is no larger than a small /dev/shm (Ray would take a third of the machine, find no room, and move to /tmp), and
# each of Ray's log files is cut at 16 MB and kept twice (Ray would keep 3 GB of each).
ENV HOME=/tmp RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=500000000 \
    RAY_ROTATION_MAX_BYTES=16000000 RAY_ROTATION_BACKUP_COUNT=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"
# Loopback inside a container is of no use to anybody; which of the host's addresses it gets is said by `docker run -p`.
ENTRYPOINT ["python", "-m", "serving", "--host", "0.0.0.0"]
