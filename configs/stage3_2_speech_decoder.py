"""Stage 3.2, the speech decoders: from the words of a reply to codec tokens.

Run:     vita train configs/stage3_2_speech_decoder.py --workdir runs/s3_2
         (add --tiny to try it on a CPU)
Needs:   the model of stage 3.1 in runs/s3_1/model; words and their codec tokens, as made by
         `vita data codec-tokens runs/s3_1/model SPEECH data/codec_tokens`, in data/codec_tokens,
         others to validate with in data/held_out/codec_tokens (SPEECH itself will do: its tokens
         are then made first)
Source:  VITA-1.5 paper, three-stage training, stage 3.2: both decoders train, of the LLM only the
         input embeddings are read. Rate 5e-5 as reported for decoders of the same kind; warm-up,
         batch and number of steps are ours
"""

import dataclasses

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    model = vita_7b()
    audio = dataclasses.replace(model.audio, num_prompts=25)
    return TrainConfig(
        model=dataclasses.replace(model, audio=audio),
        init_from=("runs/s3_1/model",),
        trainable=(r"speech/.*",),
        objective="speech",
        data=DataConfig(
            mixture={"data/codec_tokens": 1.0},
            held_out=("data/held_out/codec_tokens",),
            batch_size=64,
            max_tokens=4096,
        ),
        optim=OptimConfig(learning_rate=5e-5),
        num_steps=100_000,
    )
