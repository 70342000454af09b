"""Stage 1.1, vision alignment: teach the projector to speak the LLM's language.

Run:     vita train configs/stage1_1_vision_alignment.py --workdir runs/s1_1
         (add --tiny to try it on a CPU; for a vision encoder that nobody has trained yet
         objective=match optim.accumulation=1 'trainable=["vision/.*"]', and where captions are
         few, data.captions=FILE, a JSON list of all of them)
Needs:   checkpoints/parts (`vita convert` of plain Qwen2.5-7B-Instruct and InternViT) and a fifth
         of the captions in data/captions; others to validate with in data/held_out/captions
Source:  VITA-1.5 paper, three-stage training, stage 1.1; the release's script "s1 pretrain vision
         MLP". The number of steps is ours: one pass over 0.92M captions
"""

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    return TrainConfig(
        model=vita_7b(),
        init_from=("checkpoints/parts",),
        trainable=(r"vision/projector/.*",),
        data=DataConfig(
            mixture={"data/captions": 1.0},
            held_out=("data/held_out/captions",),
            batch_size=512,
            max_tokens=6200,
        ),
        optim=OptimConfig(learning_rate=5e-4, accumulation=2),
        num_steps=1_800,
    )
