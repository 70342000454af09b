"""Stage 0, text: teach a language model that is built from nothing to write.

Run:     vita train configs/stage0_text.py --workdir runs/s0     (add --tiny to try it on a CPU)
Needs:   data/text in the release's sample format, other samples to validate with in
         data/held_out/text (as in all stages: data.held_out=[] does without). Only for models built
         from nothing: the paper starts from Qwen2.5-7B-Instruct
Source:  ours; rates and lengths are those of the release's other stages, or usual for small models
"""

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_nano


def get_config():
    """The stage."""
    return TrainConfig(
        model=vita_nano(),
        trainable=(r"llm/.*",),
        data=DataConfig(
            mixture={"data/text": 1.0},
            held_out=("data/held_out/text",),
            batch_size=64,
            max_tokens=2048,
        ),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, b2=0.95),
        num_steps=20_000,
        dtype="float32",
        remat="dots",
        loss_chunk=64,
    )
