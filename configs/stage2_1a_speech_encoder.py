"""Stage 2.1a, speech encoder: teach it to write down what it hears, by CTC.

Run:     vita train configs/stage2_1a_speech_encoder.py --workdir runs/s2_1a
         (add --tiny to try it on a CPU)
Needs:   the model of stage 1.3 in runs/s1_3/model, whose audio encoder is random or not; speech
         with its words in data/speech, other speech to validate with in data/held_out/speech, and
         the units made of the words: vita data units data/speech data/units.json --size 8000
Source:  VITA-1.5 paper, three-stage training, stage 2.1. Rate, betas, decay and clipping are those
         of the sibling Freeze-Omni. Units (Chinese characters, pieces of English words, and the
         blank; how many), batch and number of steps are ours
"""

import dataclasses

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    model = vita_7b()
    audio = dataclasses.replace(model.audio, num_units=8000)
    return TrainConfig(
        model=dataclasses.replace(model, audio=audio),
        objective="ctc",
        init_from=("runs/s1_3/model",),
        trainable=(r"audio/encoder/.*", r"audio/ctc.*"),
        data=DataConfig(
            mixture={"data/speech": 1.0},
            held_out=("data/held_out/speech",),
            batch_size=128,
            max_tokens=512,
            max_clips=4,
            augment_audio=True,
            units="data/units.json",
        ),
        optim=OptimConfig(learning_rate=2e-4, b2=0.99, eps=1e-6, weight_decay=0.01, clip_norm=5.0),
        num_steps=100_000,
    )
