"""The stages of the small model that comes with the package, all in one place.

Run:     vita train configs/nano.py:STAGE --workdir build/nano/runs/sSTAGE, in the order of `STAGES`
         (launch/nano.sh does all of it)
Needs:   what `vita data build build/nano/data` wrote, and the models of the stages before
Source:  the files of the stages beside this one for what each trains and on what objective; sizes,
         mixtures, rates and numbers of steps are ours, for two CPU cores
"""

import dataclasses
import runpy
from pathlib import Path

from vita_jax.config import DataConfig, OptimConfig, vita_nano

DATA, RUNS = "build/nano/data", "build/nano/runs"
LATER = dict(weight_decay=0.05, b2=0.98)
PROMPTS = 4  # trained embeddings in front of every clip, from stage 2.1b on
EYES_AND_WORDS = (r"vision/.*", r"llm/(?!embedding).*")
PROJECTOR_AND_WORDS = (r"vision/projector/.*", r"llm/(?!embedding).*")
EARS = (r"audio/(encoder|adapter)/.*",)
EARS_BUT_CONVOLUTIONS = (r"audio/encoder/(?!subsampling).*", r"audio/adapter/.*")
ADAPTERS_AND_WORDS = (*PROJECTOR_AND_WORDS, r"audio/(adapter|prompts).*")
NUM_UNITS = 1280  # at most, of the CTC head: Chinese characters, and English by the letter


def sources(shares):
    """Folders of the data, and kinds of drawn samples (#KIND), by their shares."""
    return {DATA + name if name[0] == "#" else f"{DATA}/{name}": x for name, x in shares.items()}


def seen(mixture, held_out="names-held_out", rows=16, max_tokens=144, max_tiles=4):
    """Data of a stage that sees. Many short rows: little attention is spent on what is masked."""
    return DataConfig(
        mixture=sources(mixture),
        held_out=(f"{DATA}#{held_out}",),
        batch_size=rows,
        max_tokens=max_tokens,
        max_tiles=max_tiles,
        num_shards=4,
    )


def captioned(kind, every, before, muon_rate, num_steps):
    """A leg of stage 1.2, which names every so many of the concepts."""
    return dict(
        file="stage1_2_vision_understanding",
        init_from=(f"{RUNS}/s{before}/model",),
        data=seen({f"#{kind}:{every}": 1.0}, f"{kind}-held_out:{every}"),
        optim=OptimConfig(learning_rate=muon_rate / 3, muon_rate=muon_rate, **LATER),
        num_steps=num_steps,
    )


def heard(mixture, batch_size=12, **more):
    """Data of a stage that hears."""
    return DataConfig(
        mixture=sources(mixture),
        held_out=(f"{DATA}/held_out/asr",),
        batch_size=batch_size,
        max_tokens=144,
        max_clips=3,
        max_audio_frames=320,
        max_reject_share=0.1,  # what is longer
        num_shards=4,
        augment_audio=True,
        **more,
    )


def asked(mixture):
    """Data of a stage that is nearly always spoken to, about pictures."""
    data = heard(mixture, max_tiles=6, spoken_share=0.9)
    return dataclasses.replace(data, held_out=(), max_tokens=320, max_reject_share=0.5)


def spoken(mixture, learning_rate, num_steps, max_tokens=40, rows=5, init_from=()):
    """A leg of the codec's stage, without discriminators."""
    return dict(
        file="stage3_1_codec",
        discriminator_channels=0,
        init_from=init_from,
        data=DataConfig(
            mixture={f"{DATA}/speech{name}": share for name, share in mixture.items()},
            held_out=(f"{DATA}/speech#held_out",),
            batch_size=rows,
            max_tokens=max_tokens,
            num_shards=rows,
        ),
        optim=OptimConfig(learning_rate=learning_rate, b1=0.8, b2=0.99, clip_norm=1e5),
        num_steps=num_steps,
    )


def shorter(data, max_audio_frames, max_reject_share=0.5, **more):
    """The same without its longest clips."""
    return dataclasses.replace(
        data, max_audio_frames=max_audio_frames, max_reject_share=max_reject_share, **more
    )


def seen_and_heard(mixture, max_tiles=7, spoken_share=0.6):
    """Data of a stage that sees and hears as much, its clips short."""
    data = heard(mixture, max_tiles=max_tiles, spoken_share=spoken_share)
    return shorter(data, 240, held_out=(), max_tokens=320)


def trained(learning_rate, muon_rate, **more):
    """How a stage of a later round is trained."""
    return OptimConfig(learning_rate=learning_rate, muon_rate=muon_rate, **LATER, **more)


def leg(file, init_from, data, optim, num_steps, others=(), **more):
    """A stage that goes on from the model of a run, with parts of which `others` are."""
    parts = {
        "eyes": "vision/.*", "audio": "audio/.*", "ears": "audio/(encoder|adapter)/.*",
        "speech": "speech/.*", "codec": "codec/.*",
    }  # fmt: skip
    others = [f"{parts[part]}={RUNS}/{run}/model" for part, run in dict(others).items()]
    init_from = (f"{RUNS}/{init_from}/model", *others)
    return dict(file=file, init_from=init_from, data=data, optim=optim, num_steps=num_steps, **more)


def matched(init_from, mixture, optim, num_steps, rows=8, max_tokens=320, **more):
    """A leg of stage 1.1 in which pictures are told apart by their words, without the LLM."""
    data = seen(mixture, "views-held_out", rows, max_tokens, max_tiles=8)
    data, eyes = dataclasses.replace(data, **more), (r"vision/.*",)
    file = "stage1_1_vision_alignment"
    return leg(file, init_from, data, optim, num_steps, objective="match", trainable=eyes)


def understood(init_from, mixture, optim, num_steps, trainable=PROJECTOR_AND_WORDS, **others):
    """A leg of stage 1.2 that answers questions."""
    data = seen(mixture, rows=12, max_tokens=320, max_tiles=8)
    file = "stage1_2_vision_understanding"
    return leg(file, init_from, data, optim, num_steps, others, trainable=trainable)


def aligned(init_from, mixture, optim, num_steps, seed, trainable=EARS, **more):
    """A leg of stage 2.1b that embeds clips as words are: by CTC in the LLM's own tokens."""
    data = dataclasses.replace(heard(mixture, batch_size=8), seed=seed, **more)
    optim, file = dataclasses.replace(optim, clip_norm=5.0), "stage2_1b_speech_adapter"
    return leg(file, init_from, data, optim, num_steps, objective="align", trainable=trainable)


def answered(init_from, data, optim, num_steps, trainable=ADAPTERS_AND_WORDS, **others):
    """A leg of stage 2.2."""
    file = "stage2_2_audio_sft"
    return leg(file, init_from, data, optim, num_steps, others, trainable=trainable)


def voiced(init_from, optim, num_steps, **others):
    """A leg of stage 3.2, from codec tokens that are named as its round is."""
    tokens = f"{DATA}/codec_tokens_{init_from.partition('_')[0]}"
    data = DataConfig(mixture={tokens: 1.0}, batch_size=8, max_tokens=384, num_shards=8)
    return leg("stage3_2_speech_decoder", init_from, data, optim, num_steps, others)


STAGES = {
    "0": dict(
        file="stage0_text",
        data=DataConfig(
            mixture={f"{DATA}/text": 1.0},
            held_out=(f"{DATA}/held_out/text",),
            batch_size=14,
            max_tokens=144,
            num_shards=2,
        ),
        optim=OptimConfig(learning_rate=2e-3, muon_rate=6e-3, **LATER),
        num_steps=500,
    ),
    "1_1": dict(
        file="stage1_1_vision_alignment",
        init_from=(f"{RUNS}/s0/model",),
        data=seen({"#captions": 1.0}),
        optim=OptimConfig(learning_rate=1e-3, **LATER),
        num_steps=60,
    ),
    # Few things first, then twice as many, then as they may be met: of 837 at once,
    # 80,000 pictures taught nothing.
    "1_2": captioned("captions", 4, before="1_1", muon_rate=6e-3, num_steps=300),
    "1_2b": captioned("captions", 2, before="1_2", muon_rate=4e-3, num_steps=300),
    "1_2c": captioned("captions", 1, before="1_2b", muon_rate=4e-3, num_steps=400),
    "1_2d": captioned("views", 1, before="1_2c", muon_rate=3e-3, num_steps=900),
    "1_3": dict(
        file="stage1_3_vision_sft",
        init_from=(f"{RUNS}/s1_2d/model",),
        data=seen({"#views": 0.2, "#names": 0.3, "#qa": 0.4, "easy_vqa": 0.1}),
        optim=OptimConfig(learning_rate=7e-4, muon_rate=2e-3, **LATER),
        num_steps=1400,
    ),
    "2_1a": dict(
        file="stage2_1a_speech_encoder",
        init_from=(),  # nothing that was trained before goes into it
        data=heard({"asr": 1.0}, batch_size=4, units=f"{DATA}/units.json"),
        optim=OptimConfig(learning_rate=2e-3, muon_rate=6e-3, clip_norm=5.0, **LATER),
        num_steps=7000,
    ),
    "2_1b": dict(
        file="stage2_1b_speech_adapter",
        init_from=(f"{RUNS}/s1_3/model", rf"audio/encoder/.*={RUNS}/s2_1a/model"),
        data=heard({"asr": 1.0}),
        optim=OptimConfig(learning_rate=1e-3, muon_rate=3e-3, **LATER),
        num_steps=200,
    ),
    "2_2": dict(
        file="stage2_2_audio_sft",
        init_from=(f"{RUNS}/s2_1b/model",),
        data=heard(
            {"#qa": 0.35, "#names": 0.15, "easy_vqa": 0.1, "asr": 0.3, "noise": 0.1},
            max_tiles=4,
            spoken_share=0.6,
        ),
        optim=OptimConfig(learning_rate=1e-3, muon_rate=3e-3, **LATER),
        num_steps=1800,
    ),
    "3_1": spoken({"#train": 1.0}, learning_rate=1e-3, num_steps=8000, max_tokens=20, rows=8),
    "3_1b": spoken(  # on, in pieces of a second: less of each is an edge
        {"#train": 1.0}, learning_rate=6e-4, num_steps=2000, init_from=(f"{RUNS}/s3_1/model",)
    ),
    "3_1c": spoken(  # on, half of it in the two voices that answer
        {"#train": 0.5, "#train:af_heart,zf_xiaoxiao": 0.5},
        learning_rate=5e-4,
        num_steps=3500,
        init_from=(f"{RUNS}/s3_1b/model",),
    ),
    "3_2": dict(
        file="stage3_2_speech_decoder",
        init_from=(f"{RUNS}/s2_2/model", rf"codec/.*={RUNS}/s3_1c/model"),
        data=DataConfig(
            mixture={f"{DATA}/codec_tokens_train": 1.0},
            held_out=(f"{DATA}/codec_tokens_held_out",),
            batch_size=8,
            max_tokens=384,
            num_shards=8,
        ),
        optim=OptimConfig(learning_rate=2e-3, muon_rate=6e-3, **LATER),
        num_steps=1000,
    ),
    # The second round goes on from the first one's model. Word embeddings stay as they are, so that
    # the voice, which reads these, can be trained beside the rest.
    "again_1_2": understood(
        "s3_2",
        {"#mosaics": 0.6, "#names": 0.15, "#qa": 0.2, "easy_vqa": 0.05},
        trained(1e-3, 3e-3),
        num_steps=600,
        trainable=EYES_AND_WORDS,
    ),
    "again_2_1a": dict(
        file="stage2_1a_speech_encoder",
        init_from=(f"{RUNS}/s3_2/model",),
        data=shorter(heard({"asr": 1.0}, batch_size=8, units=f"{DATA}/units.json"), 200),
        optim=trained(2e-3, 6e-3, clip_norm=5.0),
        num_steps=1200,
    ),
    "again_2_1b": dict(
        file="stage2_1b_speech_adapter",
        init_from=(f"{RUNS}/again_1_2/model", rf"audio/encoder/.*={RUNS}/again_2_1a/model"),
        data=shorter(heard({"asr": 1.0}), 200),
        optim=trained(1e-3, 3e-3),
        num_steps=80,
    ),
    "again_2_2": answered(
        "again_2_1b",
        shorter(
            heard(
                {"#qa": 0.37, "#names": 0.2, "easy_vqa": 0.08, "asr": 0.25, "noise": 0.1},
                max_tiles=6,
                spoken_share=0.8,
            ),
            240,
            0.3,
            max_tokens=320,
        ),
        trained(7e-4, 2e-3, rates={r"audio/.*": 1.5}),
        num_steps=420,
        trainable=(*EYES_AND_WORDS, r"audio/.*"),
    ),
    "again_3_1": spoken(
        {"#train": 0.25, "#train:af_heart,zf_xiaoxiao": 0.75},
        learning_rate=5e-4,
        num_steps=1800,
        init_from=(f"{RUNS}/s3_2/model",),
    ),
    "again_3_2": voiced(
        "again_2_2", trained(1e-3, 3e-3), num_steps=500, speech="s3_2", codec="again_3_1"
    ),
    # The third round sees and hears more, on from the model of the second.
    "third_1_2": understood(
        "again_3_2",
        {"#mosaics": 0.4, "#names": 0.3, "#qa": 0.25, "easy_vqa": 0.05},
        trained(7e-4, 2e-3),
        num_steps=900,
        trainable=EYES_AND_WORDS,
    ),
    "third_2_1a": dict(
        file="stage2_1a_speech_encoder",
        init_from=(f"{RUNS}/again_2_1a/model",),
        data=shorter(heard({"asr": 1.0}, batch_size=8, units=f"{DATA}/units.json"), 200, seed=43),
        optim=trained(1e-3, 3e-3, clip_norm=5.0),
        num_steps=3400,
    ),
    "third_2_1b": dict(
        file="stage2_1b_speech_adapter",
        init_from=(f"{RUNS}/again_3_2/model", rf"audio/encoder/.*={RUNS}/third_2_1a/model"),
        data=shorter(heard({"asr": 1.0}), 240),
        optim=trained(5e-4, 1.5e-3),
        num_steps=400,
    ),
    "third_2_2": answered(
        "third_1_2",
        shorter(
            heard(
                {"#qa": 0.38, "#names": 0.2, "easy_vqa": 0.07, "asr": 0.3, "noise": 0.05},
                max_tiles=6,
                spoken_share=0.8,
            ),
            280,
            0.3,
            max_tokens=320,
        ),
        trained(5e-4, 1.5e-3, rates={r"audio/.*": 1.5}),
        num_steps=340,
        trainable=(*EYES_AND_WORDS, r"audio/.*"),
        audio="third_2_1b",
    ),
    # The fourth sees better, as pictures are first told apart by their words, without the LLM, and
    # speaks better, as there are more answers to learn from.
    "fourth_1_1": matched(
        "third_1_2", {"#views": 0.85, "#captions": 0.15}, trained(1.3e-3, 4e-3), num_steps=1700
    ),
    "fourth_1_2": understood(
        "third_2_2",
        {"#mosaics": 0.1, "#names": 0.35, "#qa": 0.45, "easy_vqa": 0.1},
        trained(7e-4, 2e-3, rates={r"vision/encoder/.*": 0.3}),
        num_steps=260,
        eyes="fourth_1_1",
        trainable=EYES_AND_WORDS,
    ),
    "fourth_2_2": answered(
        "fourth_1_2",
        shorter(
            heard(
                {"#qa": 0.36, "#names": 0.17, "easy_vqa": 0.09, "asr": 0.33, "noise": 0.05},
                max_tiles=6,
                spoken_share=0.8,
            ),
            280,
            0.3,
            max_tokens=320,
        ),
        trained(5e-4, 1.5e-3, rates={r"audio/.*": 1.5, r"vision/encoder/.*": 0.3}),
        num_steps=420,
        trainable=(*EYES_AND_WORDS, r"audio/.*"),
    ),
    "fourth_2_2b": answered(  # on, with more to see
        "fourth_2_2",
        seen_and_heard({"#qa": 0.43, "#names": 0.25, "easy_vqa": 0.1, "asr": 0.15, "noise": 0.07}),
        trained(7e-4, 2e-3),
        num_steps=240,
        trainable=(*EYES_AND_WORDS, r"audio/(adapter|prompts).*"),
    ),
    "fourth_3_2": voiced("fourth_2_2b", trained(1e-3, 3e-3), num_steps=1600),
    # The fifth matches pictures with more than names, as the side where a thing is, and keeps the
    # vision encoder as it then is for a stage.
    "fifth_1_1": matched(
        "fourth_1_1", {"#views": 0.6, "#labels": 0.4}, trained(1e-3, 3e-3), num_steps=1300
    ),
    "fifth_1_1b": matched(
        "fifth_1_1", {"#views": 0.65, "#labels": 0.35}, trained(7e-4, 2e-3), num_steps=450
    ),
    "fifth_1_2": understood(
        "fourth_3_2",
        {"#mosaics": 0.08, "#names": 0.37, "#qa": 0.4, "easy_vqa": 0.15},
        trained(7e-4, 2e-3),
        num_steps=450,
        eyes="fifth_1_1b",
    ),
    "fifth_2_1b": dict(  # the encoder, too, as far as the LLM can tell it what it misheard
        file="stage2_1b_speech_adapter",
        init_from=(f"{RUNS}/fourth_3_2/model",),
        trainable=(r"audio/.*",),
        data=shorter(heard({"asr": 1.0}), 240),
        optim=trained(7e-4, 2e-3),
        num_steps=450,
    ),
    # A better voice from the same codec tokens, so that what speaks them stays as it is.
    "fifth_3_1": dict(
        spoken(
            {"#train": 0.15, "#train:af_heart,zf_xiaoxiao": 0.85},
            learning_rate=6e-4,
            num_steps=3600,
            init_from=(f"{RUNS}/fourth_3_2/model",),
        ),
        trainable=(r"codec/decoder/.*",),
    ),
    "fifth_2_2": answered(
        "fifth_1_2",
        seen_and_heard({"#qa": 0.42, "#names": 0.18, "easy_vqa": 0.1, "asr": 0.24, "noise": 0.06}),
        trained(7e-4, 2e-3, rates={r"vision/encoder/.*": 0.4}),
        num_steps=380,
        trainable=(*EYES_AND_WORDS, r"audio/.*"),
        audio="fifth_2_1b",
        codec="fifth_3_1",
    ),
    "fifth_2_2b": answered(  # on, nearly always spoken to
        "fifth_2_2",
        seen_and_heard(
            {"#qa": 0.44, "#names": 0.22, "easy_vqa": 0.06, "asr": 0.22, "noise": 0.06},
            max_tiles=6,
            spoken_share=0.9,
        ),
        trained(7e-4, 2e-3),
        num_steps=170,
        trainable=(*PROJECTOR_AND_WORDS, r"audio/.*"),
    ),
    # In the sixth, the LLM reads three times as many forms of questions, about pictures whose
    # embeddings are shorter, and clips are embedded as words are: by CTC in the LLM's own tokens.
    "sixth_1_2": understood(
        "fifth_2_2b",
        {"#mosaics": 0.05, "#names": 0.33, "#qa": 0.47, "easy_vqa": 0.1, "text": 0.05},
        trained(1e-3, 3e-3),
        num_steps=1150,
    ),
    "sixth_2_1b": aligned(
        "fifth_2_2b",
        {"asr": 1.0},
        trained(1e-3, 3e-3),
        num_steps=2400,
        seed=44,
        max_audio_frames=240,
        max_reject_share=0.5,
    ),
    # on, with as much Mandarin as English, and its clips, which are longer
    "sixth_2_1c": aligned(
        "sixth_2_1b", {"asr": 0.45, "asr_zh": 0.55}, trained(7e-4, 2e-3), num_steps=1000, seed=45
    ),
    "sixth_2_2": answered(  # the audio encoder stays as it is: the LLM is what has to learn
        "sixth_1_2",
        asked(
            {"#spoken": 0.42, "#qa": 0.16, "#names": 0.1, "easy_vqa": 0.06}
            | {"asr": 0.1, "asr_zh": 0.05, "noise": 0.11}
        ),
        trained(7e-4, 2e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=760,
        trainable=(*EYES_AND_WORDS, r"audio/(adapter|prompts).*"),
        ears="sixth_2_1c",
    ),
    "sixth_2_2b": answered(  # on, with questions that have no picture: these it took for noise
        "sixth_2_2",
        asked(
            {"#spoken": 0.48, "#talk": 0.18, "#qa": 0.08, "#names": 0.06, "easy_vqa": 0.04}
            | {"asr": 0.06, "asr_zh": 0.03, "noise": 0.07}
        ),
        trained(5e-4, 1.5e-3),
        num_steps=220,
    ),
    "sixth_2_2c": answered(  # on, with as much that asks nothing
        "sixth_2_2b",
        asked({"#spoken": 0.36, "#talk": 0.22, "#names": 0.08, "noise": 0.34}),
        trained(5e-4, 1.5e-3),
        num_steps=110,
    ),
    # The seventh matches four names with each picture, one with each quarter of it, and hears more
    # that is spoken, in voices that are made others.
    "seventh_1_1": matched(
        "sixth_2_2c",
        {"#quarters": 0.45, "#views": 0.4, "#labels": 0.15},
        trained(1e-3, 3e-3),
        num_steps=3700,
        rows=4,
        max_tokens=800,
    ),
    "seventh_1_2": understood(
        "sixth_2_2c",
        {"#mosaics": 0.05, "#names": 0.35, "#qa": 0.5, "easy_vqa": 0.1},
        trained(1e-3, 3e-3),
        num_steps=600,
        eyes="seventh_1_1",
    ),
    "seventh_2_1b": aligned(
        "sixth_2_1c",
        {"asr": 0.3, "asr_zh": 0.25, "asked": 0.45},
        trained(1e-3, 3e-3),
        num_steps=2650,
        seed=46,
    ),
    "seventh_2_2": answered(
        "seventh_1_2",
        asked(
            {"#spoken": 0.4, "#talk": 0.13, "#qa": 0.08, "#names": 0.08, "easy_vqa": 0.06}
            | {"asked": 0.08, "asr": 0.05, "asr_zh": 0.03, "noise": 0.09}
        ),
        trained(7e-4, 2e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=660,
        trainable=(*EYES_AND_WORDS, r"audio/(adapter|prompts).*"),
        ears="seventh_2_1b",
    ),
    # The eighth has each quarter say where it is, too: what is where had been told by the order of
    # embeddings alone.
    "eighth_1_1": matched(
        "seventh_2_2",
        {"#quarters": 0.4, "#labels": 0.35, "#views": 0.25},
        trained(1e-3, 3e-3),
        num_steps=2200,
        rows=4,
        max_tokens=800,
    ),
    "eighth_1_2": understood(
        "seventh_2_2",
        {"#names": 0.24, "#qa": 0.16, "#place": 0.2, "#move": 0.18, "#count": 0.1}
        | {"easy_vqa": 0.12},
        trained(1e-3, 3e-3),
        num_steps=1000,
        eyes="eighth_1_1",
    ),
    "eighth_2_1b": aligned(
        "seventh_2_2",
        {"asr": 0.25, "asr_zh": 0.2, "asked": 0.55},
        trained(1e-3, 3e-3),
        num_steps=1400,
        seed=47,
    ),
    "eighth_2_2": answered(  # encoders stay as they are
        "eighth_1_2",
        asked(
            {"#spoken": 0.4, "#talk": 0.1, "#qa": 0.06, "#names": 0.12, "#move": 0.06}
            | {"easy_vqa": 0.06, "asked": 0.06, "asr": 0.03, "asr_zh": 0.02, "noise": 0.09}
        ),
        trained(7e-4, 2e-3),
        num_steps=1050,
        ears="eighth_2_1b",
    ),
    # The ninth matches each picture with its answers among all that there are, and not only among
    # those of a batch, and these are in the words of the LLM's answers.
    "ninth_1_1": matched(
        "eighth_2_2",
        {"#views": 0.45, "#labels": 0.37, "#quarters": 0.18},
        trained(1e-3, 4e-3),
        num_steps=3600,
        rows=6,
        max_tokens=800,
        captions=f"{DATA}/captions.json",
    ),
    "ninth_1_2": understood(
        "eighth_2_2",
        {"#names": 0.27, "#qa": 0.16, "#place": 0.15, "#count": 0.15, "#move": 0.09}
        | {"#shape": 0.03, "easy_vqa": 0.15},
        trained(1e-3, 3e-3),
        num_steps=1300,
        eyes="ninth_1_1",
    ),
    "ninth_2_1b": aligned(
        "eighth_2_2",
        {"asr": 0.22, "asr_zh": 0.18, "asked": 0.6},
        trained(1e-3, 3e-3),
        num_steps=2400,
        seed=48,
    ),
    # on, with the convolutions in front, half of the work, as they are
    "ninth_2_1c": aligned(
        "ninth_2_1b",
        {"asr": 0.22, "asr_zh": 0.18, "asked": 0.6},
        trained(9e-4, 2.7e-3),
        num_steps=2600,
        seed=49,
        trainable=EARS_BUT_CONVOLUTIONS,
    ),
    "ninth_2_2": answered(
        "ninth_1_2",
        asked(
            {"#spoken": 0.36, "#talk": 0.07, "#names": 0.13, "#place": 0.07, "#count": 0.05}
            | {"#move": 0.02, "easy_vqa": 0.06, "asked": 0.08, "asr": 0.04, "asr_zh": 0.05}
            | {"noise": 0.07}
        ),
        trained(7e-4, 2e-3),
        num_steps=1750,
        ears="ninth_2_1c",
    ),
    # The tenth tells apart captions that differ by one word, and is trained for longer.
    "tenth_1_1": matched(
        "ninth_2_2",
        {"#views": 0.36, "#labels": 0.44, "#quarters": 0.2},
        trained(1e-3, 4e-3),
        num_steps=2300,
        rows=6,
        max_tokens=800,
        captions=f"{DATA}/captions.json",
        seed=43,
    ),
    "tenth_1_2": understood(
        "ninth_2_2",
        {"#names": 0.25, "#qa": 0.15, "#place": 0.14, "#pair": 0.06, "#count": 0.15}
        | {"#move": 0.05, "#shape": 0.04, "easy_vqa": 0.16},
        trained(1e-3, 3e-3),
        num_steps=1900,
        eyes="tenth_1_1",
    ),
    "tenth_2_1b": aligned(
        "ninth_2_2",
        {"asr": 0.2, "asr_zh": 0.2, "asked": 0.6},
        trained(1e-3, 3e-3),
        num_steps=5000,
        seed=50,
        trainable=EARS_BUT_CONVOLUTIONS,
    ),
    "tenth_2_2": answered(  # the adapter, too, stays: trained here, it forgot held-out voices
        "tenth_1_2",
        asked(
            {"#spoken": 0.32, "#talk": 0.06, "#names": 0.1, "#place": 0.05, "#pair": 0.02}
            | {"#count": 0.05, "#move": 0.02, "easy_vqa": 0.06, "asked": 0.16, "asr": 0.03}
            | {"asr_zh": 0.05, "noise": 0.08},
        ),
        trained(1e-3, 3e-3),
        num_steps=2050,
        trainable=(*PROJECTOR_AND_WORDS, r"audio/prompts"),
        ears="tenth_2_1b",
    ),
    # In the eleventh, the LLM reads a fifth more forms of questions, the vision encoder learns from
    # its answers again, and the audio encoder hears what nobody asks.
    "eleventh_1_2": understood(
        "tenth_2_2",
        {"#names": 0.33, "#qa": 0.13, "#place": 0.13, "#pair": 0.04, "#count": 0.17}
        | {"#move": 0.04, "#shape": 0.03, "easy_vqa": 0.13},
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1450,
        trainable=EYES_AND_WORDS,
    ),
    "eleventh_2_1b": aligned(
        "tenth_2_2",
        {"asr": 0.15, "asr_zh": 0.1, "asked": 0.33, "mixed": 0.42},
        trained(1e-3, 3e-3),
        num_steps=3000,
        seed=51,
        trainable=EARS_BUT_CONVOLUTIONS,
    ),
    "eleventh_2_2": answered(
        "eleventh_1_2",
        asked(
            {"#spoken": 0.26, "#talk": 0.05, "#names": 0.1, "#place": 0.05, "#pair": 0.01}
            | {"#count": 0.06, "#move": 0.01, "easy_vqa": 0.05, "asked": 0.12, "mixed": 0.14}
            | {"asr": 0.03, "asr_zh": 0.05, "noise": 0.07},
        ),
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=2400,
        trainable=(*EYES_AND_WORDS, r"audio/prompts"),
        ears="eleventh_2_1b",
    ),
    # The twelfth goes on with both. Its LLM writes down less of what it hears, and has more noise.
    "twelfth_1_2": understood(
        "eleventh_2_2",
        {"#names": 0.41, "#qa": 0.1, "#place": 0.14, "#pair": 0.03, "#count": 0.2}
        | {"#move": 0.03, "#shape": 0.02, "easy_vqa": 0.07},
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1300,
        trainable=EYES_AND_WORDS,
    ),
    "twelfth_2_1b": aligned(
        "eleventh_2_2",
        {"asr": 0.1, "asr_zh": 0.08, "asked": 0.27, "mixed": 0.55},
        trained(1e-3, 3e-3),
        num_steps=5400,
        seed=52,
        trainable=EARS_BUT_CONVOLUTIONS,
    ),
    "twelfth_2_2": answered(  # on from the mean of twelfth_1_2 and eleventh_2_2
        "twelfth_mean",
        asked(
            {"#spoken": 0.34, "#talk": 0.05, "#names": 0.15, "#place": 0.06, "#pair": 0.01}
            | {"#count": 0.08, "#move": 0.01, "easy_vqa": 0.04, "asked": 0.06, "mixed": 0.04}
            | {"asr": 0.01, "asr_zh": 0.02, "noise": 0.13},
        ),
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1700,
        trainable=(*EYES_AND_WORDS, r"audio/prompts"),
        ears="twelfth_2_1b",
    ),
    # The thirteenth has more layers in its encoders, which at first change nothing, and hears clips
    # that are put together anew each time: it knew those that it had by heart.
    "thirteenth_1_2": understood(
        "thirteenth_start",
        {"#names": 0.4, "#qa": 0.1, "#place": 0.16, "#pair": 0.03, "#count": 0.2}
        | {"#move": 0.02, "#shape": 0.02, "easy_vqa": 0.07},
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1550,
        trainable=EYES_AND_WORDS,
    ),
    "thirteenth_2_1b": aligned(
        "thirteenth_start",
        {"asr": 0.1, "asr_zh": 0.06, "asked": 0.22, "mixed": 0.22, "#spliced": 0.4},
        trained(1e-3, 3e-3),
        num_steps=5600,
        seed=53,
        trainable=EARS_BUT_CONVOLUTIONS,
    ),
    "thirteenth_2_2": answered(  # on from the mean of thirteenth_1_2 and thirteenth_start
        "thirteenth_mean",
        asked(
            {"#spoken": 0.16, "#pieced": 0.22, "#talk": 0.04, "#names": 0.14, "#place": 0.07}
            | {"#pair": 0.01, "#count": 0.08, "#move": 0.01, "easy_vqa": 0.04, "asked": 0.03}
            | {"mixed": 0.02, "asr": 0.01, "asr_zh": 0.01, "noise": 0.16},
        ),
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1000,
        trainable=(*EYES_AND_WORDS, r"audio/prompts"),
        ears="thirteenth_2_1b",
    ),
    # The fourteenth hears words that were seldom said (`voices.jobs`), and sees half of what it
    # learns from as it is drawn.
    "fourteenth_1_2": understood(
        "thirteenth",
        {"#names": 0.43, "#qa": 0.08, "#place": 0.15, "#pair": 0.03, "#count": 0.2}
        | {"#move": 0.02, "#shape": 0.02, "easy_vqa": 0.07},
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1500,
        trainable=EYES_AND_WORDS,
    ),
    "fourteenth_2_1b": aligned(
        "thirteenth",
        {"asr": 0.1, "asr_zh": 0.06, "asked": 0.12, "mixed": 0.36, "#spliced": 0.36},
        trained(1e-3, 3e-3),
        num_steps=5200,
        seed=54,
        trainable=EARS_BUT_CONVOLUTIONS,
    ),
    "fourteenth_2_2": answered(  # on from the mean of fourteenth_1_2 and thirteenth
        "fourteenth_mean",
        asked(
            {"#spoken": 0.17, "#pieced": 0.24, "#talk": 0.04, "#names": 0.14, "#place": 0.07}
            | {"#pair": 0.01, "#count": 0.09, "#move": 0.01, "easy_vqa": 0.04, "asked": 0.03}
            | {"mixed": 0.02, "asr": 0.01, "asr_zh": 0.01, "noise": 0.12},
        ),
        trained(1e-3, 3e-3, rates={r"vision/encoder/.*": 0.5}),
        num_steps=1050,
        trainable=(*EYES_AND_WORDS, r"audio/prompts"),
        ears="fourteenth_2_1b",
    ),
}


def get_config(stage):
    """The stage of this name."""
    changes = dict(STAGES[stage])
    file = Path(__file__).with_name(changes.pop("file") + ".py")
    config = runpy.run_path(str(file))["get_config"]()
    model = vita_nano()
    units = NUM_UNITS * stage.endswith("2_1a")
    first = list(STAGES).index("2_1b")  # of the stages with trained prompts
    prompts = PROMPTS * (list(STAGES).index(stage) >= first)
    # Embeddings of pictures had become ten times as long as what the first layer of the LLM adds to
    # them, which leaves it little to say about them. From the sixth round on they are shorter, and
    # those of sound are aligned with those of words.
    deeper = stage.startswith(("thirteenth", "fourteenth"))
    rounds = ("sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth")
    later = deeper or stage.startswith(rounds)
    scale = model.vision.embeddings_scale * (1 / 16 if later else 1)
    vision = dataclasses.replace(model.vision, embeddings_scale=scale)
    audio = dataclasses.replace(model.audio, num_prompts=prompts, num_units=units, aligned=later)
    if not deeper:
        vision, audio = (dataclasses.replace(part, num_layers=6) for part in (vision, audio))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, vision=vision, audio=audio),
        dtype="float32",
        remat="none",
        save_every=200,
        validate_every=400,
        loss_chunk=48,
        **changes,
    )
