"""Another voice, or another language for the voice: the decoders learn from a folder of speech.

Run:     vita train configs/finetune_voice.py --workdir runs/voice \\
             model=CKPT init_from=CKPT 'data.mixture={"my_voice":1}'
         (add --tiny to try it on a CPU)
Needs:   a model that speaks in the folder CKPT; in my_voice one speaker's sound files with their
         words in text files of the same names (a.wav, a.txt), or any source of stage 3.2. Their
         codec tokens are made first, by the codec of CKPT. The new model, runs/voice/model, speaks
         in the timbre of these clips
Source:  LoRA (arXiv 2106.09685) on all weights of both decoders, whose other weights stay as they
         are; sizes and rates are ours. To train the decoders whole, as stage 3.2 does:
         lora=null 'trainable=["speech/.*"]' optim.learning_rate=5e-5
"""

from vita_jax.config import DataConfig, LoraConfig, OptimConfig, TrainConfig, vita_7b


def get_config():
    """The stage."""
    return TrainConfig(
        model=vita_7b(),
        init_from=("checkpoints/vita",),
        trainable=(),
        lora=LoraConfig(targets=(r"speech/(nar|ar)/.*",), rank=16, alpha=32.0),
        objective="speech",
        data=DataConfig(
            mixture={"data/codec_tokens": 1.0},
            batch_size=8,
            max_tokens=2048,
            num_shards=8,
        ),
        optim=OptimConfig(learning_rate=5e-4),
        num_steps=1_000,
        save_every=100,
    )
