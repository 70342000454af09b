#!/usr/bin/env bash
# The small model that comes with the package, from nothing: data, every stage, the checkpoint, its bars.
#   bash launch/nano.sh [BANK]    all in build/nano; hours on two cores, minutes of training on a GPU
# BANK, a folder of clips made before with a manifest.jsonl, saves most of the hours of speaking.
# The same command goes on where it was stopped or killed. Sizes, mixtures and rates: configs/nano.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh "[data,judges]"
# glibc otherwise gives memory back after every step and has each page of it zeroed again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000
data=build/nano/data runs=build/nano/runs

[ -e $data/manifest.json ] || .venv/bin/vita data build $data ${1:+--bank "$1"}
[ -e $data/units.json ] || .venv/bin/vita data units $data/asr $data/units.json --size 1280
for stage in 0 1_1 1_2 1_2b 1_2c 1_2d 1_3 2_1a 2_1b 2_2 3_1 3_1b 3_1c 3_2; do
    if [ $stage = 3_2 ]; then # the two voices that answer; texts that they were never heard to say
        .venv/bin/vita data codec-tokens $runs/s3_1c/model $data/speech#train:af_heart,zf_xiaoxiao $data/codec_tokens_train
        .venv/bin/vita data codec-tokens $runs/s3_1c/model $data/speech#unseen $data/codec_tokens_held_out
    fi
    echo "Stage $stage"
    .venv/bin/vita train configs/nano.py:$stage --workdir $runs/s$stage
    [ -e $runs/s$stage/model ] || exit 1 # stopped, and saved
done
[ -e build/nano/model ] || .venv/bin/vita quantize $runs/s3_2/model build/nano/model
.venv/bin/vita plot $runs/s*/ --out build/nano/curves.png
.venv/bin/vita eval nano build/nano/model --data $data --before $runs/s1_3/model --out build/nano/eval
