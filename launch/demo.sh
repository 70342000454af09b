#!/usr/bin/env bash
# The main job, on a fresh machine too: pictures and spoken questions in, text and spoken answers out. Once the packages
# are installed, it needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

checkpoint=vita_jax/checkpoints/nano
if [ ! -e $checkpoint/config.json ]; then
    echo "No trained model comes with this version: one with random weights answers."
    checkpoint=build/demo/nano
    [ -e $checkpoint ] || .venv/bin/vita init vita_nano $checkpoint --seed 0
fi
.venv/bin/vita demo $checkpoint --out build/demo
