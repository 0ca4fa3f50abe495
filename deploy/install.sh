#!/bin/sh
# Install the service into a new virtual environment: sh deploy/install.sh DIRECTORY
# This is the Dockerfile's build step, kept here so that it can be run, and tested, without Docker.
# TORCH_INDEX: where torch comes from; empty for pip's own index (on Linux that is the CUDA build).
set -eu
directory=$1
python3 -m venv "$directory"
# torch first and alone, so that nothing else can choose another build of it
"$directory/bin/pip" install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$directory/bin/pip" install --no-cache-dir --constraint constraints.txt ".[serve,trace]"
"$directory/bin/python" -c "import serving.deployments"
"$directory/bin/pip" uninstall --quiet --yes pip # what serves installs nothing
