#!/usr/bin/env bash
# Speed on one GPU.
#
#   bash launch/bench_gpu.sh [MODEL]    the engine at the shape of MODEL (default: vita_7b), random weights in bfloat16: a
#                                       table of figures and bars, and build/bench_gpu/all.json
#   bash launch/bench_gpu.sh train      the step of stage 1.2 at the shape of the 7B model: packed rows of 4,096 tokens with
#                                       7 tiles, as many layers as there is room for, and with 8 layers what keeping matrix
#                                       products (remat=dots) gains; five runs of at most 90 s each
#
# Either is stopped after 8 minutes. PYTHON=... names a Python that has the packages; else .venv is made.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    source launch/venv.sh "[gpu]"
    PYTHON=.venv/bin/python
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=.95

if [ "${1:-}" != train ]; then
    exec timeout 480 "$PYTHON" -m vita_jax bench all "${1:-vita_7b}" --dtype bfloat16 --out build/bench_gpu
fi

bench() {
    echo "== $*"
    timeout 90 "$PYTHON" -m vita_jax bench train configs/stage1_2_vision_understanding.py --steps 5 \
        mesh=[1,1,1] optim.accumulation=1 data.max_tokens=4096 data.max_tiles=7 "$@" 2>&1 | tail -n 8
}

for depth in 24 20 16; do # 4 GB a layer: weights, gradients and two moments in float32, a copy in bfloat16
    bench data.batch_size=1 "model.llm.num_layers=$depth" && break
done
for remat in full dots; do
    bench data.batch_size=2 model.llm.num_layers=8 "remat=$remat" || true
done
