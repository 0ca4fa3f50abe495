# The service in a container.
#
#   docker build -t seqmodels .                                    # CUDA: run it with --gpus all
#   docker build -t seqmodels --build-arg TORCH_INDEX=... .        # CPU: the index that pytorch.org names for it
#   docker run -p 8000:8000 --shm-size 1g -v "$PWD/models:/models:ro" -e SEQMODELS_API_KEYS=... seqmodels /models/sentiment
#
# Arguments are those of `python -m serving`: model directories, or one YAML file. Stop it with SIGTERM (docker stop -t 30).

FROM python:3.11-slim AS build
ARG TORCH_INDEX=
WORKDIR /build
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY deploy/install.sh deploy/
COPY seqmodels seqmodels
COPY serving serving
RUN TORCH_INDEX="$TORCH_INDEX" sh deploy/install.sh /opt/venv

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 seqmodels
COPY --from=build /opt/venv /opt/venv
USER seqmodels
WORKDIR /home/seqmodels
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"
# Loopback inside a container is of no use to anybody; which of the host's addresses it gets is said by `docker run -p`.
ENTRYPOINT ["python", "-m", "serving", "--host", "0.0.0.0"]
