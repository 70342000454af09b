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
train() { # STAGE WORKDIR
    echo "Stage $1"
    .venv/bin/vita train "configs/nano.py:$1" --workdir "$2"
    [ -e "$2/model" ] || exit 1 # stopped, and saved
}
tokens() { # CODEC SPLIT TARGET
    .venv/bin/vita data codec-tokens "$1/model" "$data/speech#$2" "$data/$3"
}
mean() { # TARGET RUN...: what sees, what answers, and what tells it of sound; all else of the first
    local target=$runs/$1/model
    shift
    [ -e $target ] || .venv/bin/vita average $target $(printf "$runs/%s/model " "$@") \
        --only 'vision/.*|llm/.*|audio/prompts'
}
answering=train:af_heart,zf_xiaoxiao # the two voices that answer

for stage in 0 1_1 1_2 1_2b 1_2c 1_2d 1_3 2_1a 2_1b 2_2 3_1 3_1b 3_1c; do
    train $stage $runs/s$stage
done
tokens $runs/s3_1c $answering codec_tokens_train
tokens $runs/s3_1c unseen codec_tokens_held_out # texts that they were never heard to say
train 3_2 $runs/s3_2

# The second round goes on from there.
for stage in again_1_2 again_2_1a again_2_1b again_2_2 again_3_1; do
    train $stage $runs/$stage
done
tokens $runs/again_3_1 $answering codec_tokens_again
train again_3_2 $runs/again_3_2

# The third sees and hears more; the voice stays as it is.
for stage in third_1_2 third_2_1a third_2_1b third_2_2; do
    train $stage $runs/$stage
done

# The fourth sees better, by matching pictures with words first, and speaks better.
for stage in fourth_1_1 fourth_1_2 fourth_2_2 fourth_2_2b; do
    train $stage $runs/$stage
done
tokens $runs/again_3_1 $answering codec_tokens_fourth
train fourth_3_2 $runs/fourth_3_2

# The fifth sees where things are and how many, and speaks the same tokens in a clearer voice.
for stage in fifth_1_1 fifth_1_1b fifth_1_2 fifth_2_1b fifth_3_1 fifth_2_2 fifth_2_2b; do
    train $stage $runs/$stage
done

# The sixth is asked in far more ways, sees where things stand, and hears words as it reads them.
for stage in sixth_1_2 sixth_2_1b sixth_2_1c sixth_2_2 sixth_2_2b sixth_2_2c; do
    train $stage $runs/$stage
done

# The seventh sees four things in a picture, each matched with its name, and hears more voices.
for stage in seventh_1_1 seventh_1_2 seventh_2_1b seventh_2_2; do
    train $stage $runs/$stage
done

# The eighth sees in every part of a picture which part it is.
for stage in eighth_1_1 eighth_1_2 eighth_2_1b eighth_2_2; do
    train $stage $runs/$stage
done

# The ninth tells each picture from all captions.
for stage in ninth_1_1 ninth_1_2 ninth_2_1b ninth_2_1c ninth_2_2; do
    train $stage $runs/$stage
done

# The tenth tells finer differences, and hears Mandarin by the character.
for stage in tenth_1_1 tenth_1_2 tenth_2_1b tenth_2_2; do
    train $stage $runs/$stage
done

# The eleventh learns to see from answers, too, and to hear what nobody asks.
for stage in eleventh_1_2 eleventh_2_1b eleventh_2_2; do
    train $stage $runs/$stage
done

# The twelfth goes on with both, has more noise, and takes means of models.
train twelfth_1_2 $runs/twelfth_1_2
train twelfth_2_1b $runs/twelfth_2_1b
mean twelfth_mean twelfth_1_2 eleventh_2_2
train twelfth_2_2 $runs/twelfth_2_2
mean twelfth twelfth_2_2 twelfth_mean

# The thirteenth has deeper encoders, and hears clips and questions that are put together from pieces.
start=$runs/thirteenth_start/model
[ -e $start ] || .venv/bin/vita deepen $runs/twelfth/model $start vision=9 audio=12
train thirteenth_1_2 $runs/thirteenth_1_2
train thirteenth_2_1b $runs/thirteenth_2_1b
mean thirteenth_mean thirteenth_1_2 thirteenth_start
train thirteenth_2_2 $runs/thirteenth_2_2
mean thirteenth thirteenth_2_2 thirteenth_2_2 thirteenth_mean # the last stage counts twice

# The fourteenth hears words that were seldom said, and sees things as they are drawn half of the time.
train fourteenth_1_2 $runs/fourteenth_1_2
train fourteenth_2_1b $runs/fourteenth_2_1b
mean fourteenth_mean fourteenth_1_2 thirteenth
train fourteenth_2_2 $runs/fourteenth_2_2
mean fourteenth fourteenth_2_2 fourteenth_2_2 fourteenth_mean
[ -e build/nano/model ] || .venv/bin/vita quantize $runs/fourteenth/model build/nano/model
.venv/bin/vita plot $runs/*/ --out build/nano/curves.png
.venv/bin/vita eval nano build/nano/model --data $data --before $runs/fourteenth_mean/model --out build/nano/eval
