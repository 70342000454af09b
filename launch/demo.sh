#!/usr/bin/env bash
# The main job, on a fresh machine too: a picture and a spoken question in, text and a spoken answer out.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

checkpoint=build/demo/nano
mkdir -p build/demo
[ -e $checkpoint ] || .venv/bin/vita init vita_nano $checkpoint --seed 0
.venv/bin/vita chat $checkpoint \
    --image vita_jax/samples/picture.jpg \
    --audio vita_jax/samples/question_en.wav \
    --max-new-tokens 40 \
    --out build/demo/reply.wav
echo "Listen to build/demo/reply.wav and look at build/demo/reply.png."
