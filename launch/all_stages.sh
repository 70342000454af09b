#!/usr/bin/env bash
# Every training stage in order, each from the model of the one before, then a question to the last.
#   bash launch/all_stages.sh --tiny   vita_tiny on a few hundred real samples, on a laptop, in build/all_stages
#   bash launch/all_stages.sh --nano   the model that comes with the package, in build/nano (launch/nano.sh)
#   bash launch/all_stages.sh          the stages as their files say, on data/, from checkpoints/parts, in runs/
# The same command goes on where it was stopped or killed. With --tiny, a loss that does not fall is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" = --nano ] && exec bash launch/nano.sh "${@:2}"
if [ $# -gt 1 ] || [ "${1:---tiny}" != --tiny ]; then
    echo "usage: bash launch/all_stages.sh [--tiny | --nano [BANK]]" >&2
    exit 2
fi
source launch/venv.sh "[data]"

if [ $# = 0 ]; then
    # Without stage 0, which is for models built from nothing: these start from Qwen2.5 and InternViT.
    for stage in 1_1_vision_alignment 1_2_vision_understanding 1_3_vision_sft \
        2_1a_speech_encoder 2_1b_speech_adapter 2_2_audio_sft 3_1_codec 3_2_speech_decoder; do
        if [ $stage = 3_2_speech_decoder ]; then
            for split in data data/held_out; do
                .venv/bin/vita data codec-tokens runs/s3_1/model $split/speech $split/codec_tokens
            done
        fi
        workdir=runs/s${stage%%_[a-z]*}
        .venv/bin/vita train configs/stage$stage.py --workdir $workdir
        [ -e $workdir/model ] || exit 1 # stopped, and saved
    done
    exec .venv/bin/vita chat runs/s3_2/model --out reply.wav \
        --image vita_jax/samples/picture.jpg --audio vita_jax/samples/question_en.wav
fi

out=build/all_stages
mkdir -p $out
[ -e $out/data ] || .venv/bin/vita data starter tests/data/speech $out/data

train() { # STAGE HELD_OUT MIXTURE OVERRIDE...; data/ and runs/ in these are those in $out
    local words=("data.held_out=data/held_out/$2" "data.mixture=$3" "${@:4}") workdir=$out/runs/s${1%%_[a-z]*}
    words=("${words[@]//data\//$out/data/}")
    words=("${words[@]//runs\//$out/runs/}")
    echo "Stage $1"
    .venv/bin/vita train "configs/stage$1.py" --tiny --workdir "$workdir" \
        data.num_shards=8 save_every=50 validate_every=40 "${words[@]}"
    [ -e "$workdir/model" ] || exit 1
}

# A sample is the system prompt, 458 bytes or with a picture 700, and what is said; a picture is 10 tiles.
seen="data.max_tokens=800 data.max_tiles=10"
heard="data.max_audio_frames=300"
train 0_text text '{"data/text":1}' data.max_tokens=560 num_steps=120
train 1_1_vision_alignment captions '{"data/captions":1}' $seen \
    init_from=runs/s0/model optim.learning_rate=1e-2 num_steps=60
train 1_2_vision_understanding captions '{"data/captions":1}' $seen init_from=runs/s1_1/model num_steps=80
train 1_3_vision_sft qa '{"data/qa":0.95,"data/captions":0.05}' $seen init_from=runs/s1_2/model num_steps=80
train 2_1a_speech_encoder speech '{"data/speech":1}' $heard data.max_tokens=560 data.max_clips=2 \
    init_from=runs/s1_3/model num_steps=100
train 2_1b_speech_adapter speech '{"data/speech":1}' $heard data.max_tokens=560 \
    'init_from=["runs/s1_3/model","audio/encoder/.*=runs/s2_1a/model"]' \
    optim.learning_rate=1e-2 num_steps=80
train 2_2_audio_sft qa '{"data/captions":0.05,"data/qa":0.9,"data/noise":0.05}' $seen $heard \
    data.spoken_share=0.5 init_from=runs/s2_1b/model num_steps=80
train 3_1_codec speech '{"data/speech":1}' data.max_tokens=20 \
    'init_from="(vision|audio|llm|speech)/.*=runs/s2_2/model"' num_steps=80
for split in $out/data $out/data/held_out; do
    .venv/bin/vita data codec-tokens $out/runs/s3_1/model $split/speech $split/codec_tokens
done
train 3_2_speech_decoder codec_tokens '{"data/codec_tokens":1}' data.max_tokens=512 \
    init_from=runs/s3_1/model num_steps=80

pictures=($out/data/held_out/qa/*.png)
.venv/bin/vita chat $out/runs/s3_2/model --image "${pictures[0]}" --max-new-tokens 60 \
    --audio tests/data/speech/clips/en_af_alloy_2ad6922fe0.ogg --out $out/reply.wav
.venv/bin/vita plot $out/runs/*/ --out $out/curves.png --falling
