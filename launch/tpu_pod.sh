#!/usr/bin/env bash
# Trains on a TPU pod: the same line on every host of the slice, in a checkout of this repository, as in
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command 'bash vita_jax/launch/tpu_pod.sh CONFIG --workdir DIR'
# DIR and the data are folders that all hosts see. What follows goes to `vita train`. A host that was preempted is given
# the same line again; the others wait for it and go on from the last save.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh "[tpu]"
source launch/restart.sh
until_done .venv/bin/vita train "$@" --distributed
