"""Stage 2.2, audio instruction tuning: questions, half of them spoken, and noise to be left alone.

Run:     vita train configs/stage2_2_audio_sft.py --workdir runs/s2_2
         (add --tiny to try it on a CPU)
Needs:   the model of stage 2.1b in runs/s2_1b/model; a fifth of the questions in data/qa, with
         recordings of them; captions in data/captions; noise in data/noise; other
         questions to validate with in data/held_out/qa
Source:  VITA-1.5 paper, three-stage training, stage 2.2; the release's script "s3 finetune
         task+neg". The script leaves both encoders frozen; here they train, as the paper says. The
         reply's state token tells the kind of input, as in the release; model.llm.num_states=3
         adds the paper's head for it (query, noise, text), whose loss is on each line of metrics
         (later stages then need the word, too). The share of noise and the number of steps are ours
"""

import dataclasses

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    model = vita_7b()
    audio = dataclasses.replace(model.audio, num_prompts=25)
    return TrainConfig(
        model=dataclasses.replace(model, audio=audio),
        init_from=("runs/s2_1b/model",),
        trainable=(r"vision/.*", r"audio/.*", r"llm/.*"),
        data=DataConfig(
            mixture={"data/captions": 0.05, "data/qa": 0.9, "data/noise": 0.05},
            held_out=("data/held_out/qa",),
            batch_size=512,
            max_tokens=6200,
            spoken_share=0.5,
        ),
        optim=OptimConfig(learning_rate=1e-5, accumulation=2),
        num_steps=7_000,
    )
