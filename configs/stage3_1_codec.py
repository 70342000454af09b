"""Stage 3.1, the codec: speech to codec tokens and back.

Run:     vita train configs/stage3_1_codec.py --workdir runs/s3_1
         (add --tiny to try it on a CPU)
Needs:   the model of stage 2.2 in runs/s2_2/model, whose other parts go into the new model as they
         are; speech at 24 kHz in data/speech, other speakers to validate with in
         data/held_out/speech: clips in the release's sample format, or a folder of sound files
Source:  VITA-1.5 paper, three-stage training, stage 3.1; TiCodec (arXiv 2310.00014) for losses,
         discriminators, rate and betas, which the paper does not say. Segments of a second and 160
         of them as in the release's codec. Ours: a cosine in the place of TiCodec's 0.98 an epoch,
         the number of steps, a rule for codewords out of use (codebooks.py)
"""

import dataclasses

from vita_jax.config import DataConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    model = vita_7b()
    audio = dataclasses.replace(model.audio, num_prompts=25)
    return TrainConfig(
        model=dataclasses.replace(model, audio=audio),
        init_from=(r"(vision|audio|llm|speech)/.*=runs/s2_2/model",),
        trainable=(r"codec/.*",),
        objective="codec",
        data=DataConfig(
            mixture={"data/speech": 1.0},
            held_out=("data/held_out/speech",),
            batch_size=160,
            max_tokens=40,  # of a segment: one second
        ),
        optim=OptimConfig(learning_rate=2e-4, b1=0.5, b2=0.9, clip_norm=1000.0),
        num_steps=400_000,
        dtype="float32",
    )
