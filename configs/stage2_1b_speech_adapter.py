"""Stage 2.1b, speech adapter: teach it, and prompts in front of each clip, the LLM's language.

Run:     vita train configs/stage2_1b_speech_adapter.py --workdir runs/s2_1b
         (add --tiny to try it on a CPU; without the LLM, by CTC of embeddings against its input
         table: objective=align optim.accumulation=1 'trainable=["audio/(encoder|adapter)/.*"]')
Needs:   the model of stage 1.3 in runs/s1_3/model, that of stage 2.1a in runs/s2_1a/model, speech
         to write down in data/speech, other speech to validate with in data/held_out/speech
Source:  VITA-1.5 paper, three-stage training, stage 2.1; the release's scripts "s1 audio MLP"
         (rate, batch) and "fo prompt tuning" (number of prompts). The number of steps is ours
"""

import dataclasses

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    model = vita_7b()
    audio = dataclasses.replace(model.audio, num_prompts=25)
    return TrainConfig(
        model=dataclasses.replace(model, audio=audio),
        init_from=("runs/s1_3/model", r"audio/encoder/.*=runs/s2_1a/model"),
        trainable=(r"audio/adapter/.*", r"audio/prompts"),
        data=DataConfig(
            mixture={"data/speech": 1.0},
            held_out=("data/held_out/speech",),
            batch_size=512,
            max_tokens=6200,
        ),
        optim=OptimConfig(learning_rate=5e-4, accumulation=2),
        num_steps=10_000,
    )
