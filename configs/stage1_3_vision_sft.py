"""Stage 1.3, vision instruction tuning: questions about pictures and video, and some captions.

Run:     vita train configs/stage1_3_vision_sft.py --workdir runs/s1_3
         (add --tiny to try it on a CPU)
Needs:   the model of stage 1.2 in runs/s1_2/model, questions in data/qa, captions in data/captions;
         other questions to validate with in data/held_out/qa
Source:  VITA-1.5 paper, three-stage training, stage 1.3; the release's script "s3 finetune task".
         The script leaves the vision encoder frozen; here it trains, as the paper says, at the rate
         of the rest. The number of steps is ours: one pass over 17.5M questions and 0.92M captions
"""

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    return TrainConfig(
        model=vita_7b(),
        init_from=("runs/s1_2/model",),
        trainable=(r"vision/.*", r"llm/.*"),
        data=DataConfig(
            mixture={"data/qa": 0.95, "data/captions": 0.05},
            held_out=("data/held_out/qa",),
            batch_size=256,
            max_tokens=6200,
        ),
        optim=OptimConfig(learning_rate=2e-5, accumulation=2),
        num_steps=72_000,
    )
