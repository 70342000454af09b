"""Stage 1.2, vision understanding: encoder, projector and LLM learn from all captions.

Run:     vita train configs/stage1_2_vision_understanding.py --workdir runs/s1_2
         (add --tiny to try it on a CPU)
Needs:   the model of stage 1.1 in runs/s1_1/model and captions in data/captions; others to
         validate with in data/held_out/captions
Source:  VITA-1.5 paper, three-stage training, stage 1.2; the release's script "s2 pretrain". The
         number of steps is ours: one pass over 4.6M captions
"""

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    return TrainConfig(
        model=vita_7b(),
        init_from=("runs/s1_1/model",),
        trainable=(r"vision/.*", r"llm/.*"),
        data=DataConfig(
            mixture={"data/captions": 1.0},
            held_out=("data/held_out/captions",),
            batch_size=512,
            max_tokens=6200,
        ),
        optim=OptimConfig(
            learning_rate=2e-5,
            rates={r"vision/encoder/.*": 0.1},  # 2e-6
            accumulation=2,
        ),
        num_steps=9_000,
    )
