"""The numbers that define a model and a training stage, as frozen dataclasses: one class a part,
one function a preset.

Goes in: nothing, a JSON object, a stage file, or words like `llm.num_layers=2`. Comes out: a
hashable `VitaConfig`, or a `TrainConfig`. Sizes have no defaults: a preset or a checkpoint states
them. Read next: `batch.py`, then `models/vita.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import types
import typing
from pathlib import Path

# What is kept of each layer for the backward pass: its input alone, its matrix products, or all.
REMAT = ("full", "dots", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """InternViT, pixel shuffle and projector. Source: VITA-1.5 paper section 3.1;
    InternViT-300M-448px.
    """

    tile_px: int
    patch_px: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    out_dim: int  # width of the LLM that reads the embeddings
    norm_eps: float = 1e-6
    embeddings_scale: float = 0.5  # before the pixel shuffle, as in the release
    dtype: str = "float32"
    remat: str = "full"

    def __post_init__(self):
        if self.tile_px % self.patch_px or (self.tile_px // self.patch_px) % 2:
            raise ValueError(
                f"vision.tile_px={self.tile_px}: expected an even number of patches "
                f"of {self.patch_px} px"
            )
        _check_divides("vision", "embed_dim", self.embed_dim, "num_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_px // self.patch_px

    @property
    def embeddings_per_tile(self) -> int:
        """Embeddings of one tile: the 2x2 pixel shuffle leaves a quarter of the patches."""
        return (self.grid // 2) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Speech encoder and adapter. Source: VITA-1.5 paper section 3.1, the release's encoder."""

    num_mel_bins: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    adapter_dim: int
    out_dim: int
    num_prompts: int = 0  # trained embeddings put in front of every clip
    aligned: bool = False  # whether the other embeddings are near words (objective "align")
    num_units: int = 0  # of the CTC head, the blank included; 0: no head (stage 2.1a alone has one)
    adapter_kernel: int = 5
    max_positions: int = 5000
    chunk_size: int = -1  # encoder frames that see each other; <= 0 is the whole clip
    left_chunks: int = -1  # chunks to the left that are seen too; < 0 is all
    norm_eps: float = 1e-5
    adapter_norm_eps: float = 1e-3
    dither: float = 0.0  # noise on the samples (as int16 values) before the filter bank
    dtype: str = "float32"
    remat: str = "full"

    def __post_init__(self):
        _check_divides("audio", "embed_dim", self.embed_dim, "num_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def max_frames(self) -> int:
        """Longest clip in filter-bank frames (10 ms each) that the position table covers."""
        return 4 * self.max_positions + 6

    @staticmethod
    def encoder_frames(num_frames):
        """Encoder frames (40 ms) for `num_frames` filter-bank frames; works on ints and arrays."""
        return ((num_frames - 1) // 2 - 1) // 2

    @classmethod
    def adapter_frames(cls, num_frames):
        """Adapter outputs (80 ms) for `num_frames` filter-bank frames; works on ints and arrays."""
        return (cls.encoder_frames(num_frames) + 1) // 2

    def num_embeddings(self, num_frames):
        """Embeddings one clip gives the LLM, prompts included."""
        return self.adapter_frames(num_frames) + self.num_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmConfig:
    """Decoder-only language model. Source: Qwen2.5 technical report, section 2."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    num_states: int = 0  # 3: with a head for what a reply answers, query, noise or text; 0: without
    dtype: str = "float32"
    remat: str = "full"

    def __post_init__(self):
        _check_divides("llm", "num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if self.num_states not in (0, 3):
            raise ValueError(f"llm.num_states={self.num_states}: expected 0 or 3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """NAR and AR speech decoders. Source: VITA-1.5 paper section 3.1; Freeze-Omni."""

    embed_dim: int
    num_layers: int  # of the AR decoder; the NAR decoder has half as many
    num_heads: int
    mlp_dim: int
    num_codes: int
    top_k: int = 2  # likeliest codes that each is drawn among, unless a session asks otherwise
    max_positions: int = 2048
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "full"

    qkv_bias: typing.ClassVar[bool] = False

    def __post_init__(self):
        _check_divides("speech", "embed_dim", self.embed_dim, "num_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def num_nar_layers(self) -> int:
        return self.num_layers // 2

    @property
    def vocab_size(self) -> int:
        """The codes and four special ids."""
        return self.num_codes + 4

    @property
    def bos_id(self) -> int:
        """Stands before the text."""
        return self.num_codes

    @property
    def sos_id(self) -> int:
        """Starts the codes."""
        return self.num_codes + 1

    @property
    def eos_id(self) -> int:
        """Ends the codes."""
        return self.num_codes + 2

    @property
    def pad_id(self) -> int:
        return self.num_codes + 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Neural speech codec. Source: TiCodec (arXiv 2310.00014); the release's `codec/model.json`."""

    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    channels: int  # of the decoder's first stage; halved by every upsampling
    encoder_channels: int  # of the encoder's first stage; doubled by every downsampling
    code_dim: int
    num_codes: int
    global_dim: int
    num_global_tokens: int
    global_conv: tuple[int, int, int]  # input, hidden and output channels of the timbre branch
    global_tokens: tuple[int, ...]  # the voice that speaks
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    sample_rate_hz: int = 24000
    codebook_loss_weight: float = 1.0
    commitment_loss_weight: float = 0.25
    weight_norm: bool = True  # convolutions held as direction and length; False once folded

    @property
    def samples_per_token(self) -> int:
        return math.prod(self.upsample_rates)

    @property
    def global_code_dim(self) -> int:
        return self.global_dim // self.num_global_tokens

    def __post_init__(self):
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise ValueError(
                f"codec.upsample_rates={self.upsample_rates} and codec.upsample_kernels="
                f"{self.upsample_kernels} must be of the same length"
            )
        if len(self.resblock_kernels) != len(self.resblock_dilations):
            raise ValueError("codec.resblock_kernels and codec.resblock_dilations differ in length")
        _check_divides(
            "codec", "global_dim", self.global_dim, "num_global_tokens", self.num_global_tokens
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitaConfig:
    """The whole model. `speech` and `codec` are None in a model that cannot speak (yet)."""

    name: str
    vision: VisionConfig
    audio: AudioConfig
    llm: LlmConfig
    speech: SpeechConfig | None
    codec: CodecConfig | None
    max_tokens: int = 6200  # longest conversation, embeddings of pictures and sound included
    max_tiles: int = 12  # tiles a picture is cut into at most, its thumbnail not counted

    def __post_init__(self):
        for part in ("vision", "audio"):
            if getattr(self, part).out_dim != self.llm.embed_dim:
                raise ValueError(
                    f"{part}.out_dim={getattr(self, part).out_dim} must equal "
                    f"llm.embed_dim={self.llm.embed_dim}"
                )
        if self.max_tokens > self.llm.max_positions:
            raise ValueError(
                f"max_tokens={self.max_tokens} exceeds llm.max_positions={self.llm.max_positions}"
            )
        if self.speech is not None:
            _check_divides(
                "llm", "embed_dim", self.llm.embed_dim, "speech.embed_dim", self.speech.embed_dim
            )

    @property
    def speech_frames_per_token(self) -> int:
        """Pieces that one text embedding is cut into for the speech decoder."""
        return self.llm.embed_dim // self.speech.embed_dim

    def with_dtype(self, dtype: str, remat: str = "full") -> VitaConfig:
        """The same model computing in `dtype` ("float32", "bfloat16", "float16"); the codec stays
        float32. `remat` says what a backward pass finds kept of each layer (one of `REMAT`).
        """
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r}: expected one of {', '.join(REMAT)}")
        parts = {
            part: dataclasses.replace(getattr(self, part), dtype=dtype, remat=remat)
            for part in ("vision", "audio", "llm", "speech")
            if getattr(self, part) is not None
        }
        return dataclasses.replace(self, **parts)


# fmt: off
def vita_7b() -> VitaConfig:
    """VITA-1.5 as released. Source: the release's configuration files and tensor shapes."""
    return VitaConfig(
        name="vita_7b",
        vision=VisionConfig(
            tile_px=448, patch_px=14, embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096,
            out_dim=3584,
        ),
        audio=AudioConfig(
            num_mel_bins=80, embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096,
            adapter_dim=2048, out_dim=3584,
        ),
        llm=LlmConfig(
            vocab_size=152064, embed_dim=3584, num_layers=28, num_heads=28, num_kv_heads=4,
            head_dim=128, mlp_dim=18944, max_positions=32768,
        ),
        speech=SpeechConfig(
            embed_dim=896, num_layers=4, num_heads=14, mlp_dim=4864, num_codes=1024
        ),
        codec=CodecConfig(
            upsample_rates=(8, 5, 5, 3), upsample_kernels=(16, 11, 11, 5), channels=512,
            encoder_channels=32, code_dim=512, num_codes=1024, global_dim=128, num_global_tokens=8,
            global_conv=(128, 64, 128), global_tokens=(473, 975, 419, 219, 565, 121, 550, 616),
        ),
    )


def vita_nano() -> VitaConfig:
    """The same architecture with 20M parameters, for laptops. Sizes are ours."""
    return VitaConfig(
        name="vita_nano",
        max_tiles=1,
        vision=VisionConfig(
            tile_px=112, patch_px=14, embed_dim=160, num_layers=9, num_heads=5, mlp_dim=640,
            out_dim=256,
        ),
        audio=AudioConfig(
            num_mel_bins=80, embed_dim=128, num_layers=12, num_heads=4, mlp_dim=512,
            adapter_dim=256, out_dim=256,
        ),
        llm=LlmConfig(
            vocab_size=4096, embed_dim=256, num_layers=5, num_heads=8, num_kv_heads=2,
            head_dim=32, mlp_dim=512, max_positions=32768,
        ),
        speech=SpeechConfig(
            embed_dim=256, num_layers=4, num_heads=4, mlp_dim=1024, num_codes=1024, top_k=1,
        ),
        codec=CodecConfig(
            upsample_rates=(4, 5, 5, 6), upsample_kernels=(8, 11, 11, 12), channels=192,
            encoder_channels=8, code_dim=128, num_codes=1024, global_dim=48, num_global_tokens=8,
            global_conv=(32, 16, 48), global_tokens=(0, 1, 2, 3, 4, 5, 6, 7),
            resblock_kernels=(3, 7), resblock_dilations=((1, 3), (1, 3)),
        ),
    )


def vita_tiny() -> VitaConfig:
    """Under 1M parameters and a byte tokenizer, for tests. Sizes are ours."""
    return VitaConfig(
        name="vita_tiny",
        vision=VisionConfig(
            tile_px=28, patch_px=7, embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64,
            out_dim=64,
        ),
        audio=AudioConfig(
            num_mel_bins=80, embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, adapter_dim=64,
            out_dim=64,
        ),
        llm=LlmConfig(
            vocab_size=320, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
            mlp_dim=128, max_positions=32768,
        ),
        speech=SpeechConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, num_codes=64),
        codec=CodecConfig(
            upsample_rates=(8, 5, 5, 3), upsample_kernels=(16, 11, 11, 5), channels=32,
            encoder_channels=2, code_dim=32, num_codes=64, global_dim=8, num_global_tokens=4,
            global_conv=(8, 4, 8), global_tokens=(0, 1, 2, 3),
            resblock_kernels=(3, 7), resblock_dilations=((1, 3), (1, 3)),
        ),
    )
# fmt: on


PRESETS = {preset.__name__: preset for preset in (vita_7b, vita_nano, vita_tiny)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a stage reads. Sources are folders or files in the release's sample format, or
    `tfds:NAME`.
    """

    mixture: dict[str, float]  # source -> weight
    batch_size: int  # rows of a batch, all processes together
    max_tokens: int  # token budget of a row (packed)
    max_tiles: int = 16  # tiles of a row
    max_clips: int = 8  # clips of a row
    max_audio_frames: int = 3000  # filter-bank frames of a clip
    num_shards: int = 64  # the stream is cut into so many, each shuffled and packed by itself
    num_workers: int = 0  # Grain worker processes
    isolate: bool = True  # packed samples do not see each other (the release: they do)
    video_rate: float = 3.0  # frames a second, the release's loader
    spoken_share: float = 0.0  # of the samples with `recordings`, those that use one
    augment_audio: bool = False  # speed perturbation and SpecAugment of clips
    noises: str | None = None  # folder of sounds that `augment_audio` mixes in, too
    held_out: tuple[str, ...] = ()  # sources of samples to validate with, never trained on
    units: str | None = None  # file of CTC units (`vita data units`); None: the tokenizer's ids
    captions: str | None = None  # file of replies, a JSON list, for objective="match" to tell apart
    max_reject_share: float = 0.05
    seed: int = 42


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, or Muon for weights, with warm-up and cosine. Source: the release's scripts; what they
    leave out is the default of transformers' Trainer.
    """

    learning_rate: float  # at the end of the warm-up
    rates: dict[str, float] = dataclasses.field(default_factory=dict)  # path pattern -> factor
    warmup_ratio: float = 0.03  # share of all steps
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = (r".*(scale|bias)",)  # path patterns
    clip_norm: float = 1.0  # longest gradient, all parameters as one vector
    accumulation: int = 1  # pieces that a batch is computed in, one after the other
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: str = "float32"  # of the first moment; the second is float32
    muon_rate: float = 0.0  # of weights, if not 0: they get Muon, tables, norms and biases AdamW

    def __post_init__(self):
        if self.momentum_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"optim.momentum_dtype={self.momentum_dtype!r}: expected float32 or bfloat16"
            )
        if not 0 <= self.warmup_ratio < 1 or self.accumulation < 1:
            raise ValueError(
                f"optim.warmup_ratio={self.warmup_ratio} and optim.accumulation="
                f"{self.accumulation}: expected 0 <= warmup_ratio < 1 and accumulation >= 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: of a target W what trains is A B in W + alpha/rank A B. Source: LoRA
    (arXiv 2106.09685); on the command line `lora={"targets": "llm/blocks/.*", "rank": 8}`.
    """

    targets: tuple[str, ...]  # path patterns; the weights among what they match
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self):
        if not self.targets:
            raise ValueError("lora.targets=(): expected path patterns, as llm/blocks/.*")
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"lora.rank={self.rank} and lora.alpha={self.alpha}: expected rank >= 1 and a "
                "positive alpha"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


OBJECTIVES = ("next_token", "match", "ctc", "align", "codec", "speech")
HEARING = ("ctc", "align")  # of these, by CTC


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage. Path patterns are regular expressions that match whole parameter paths."""

    model: VitaConfig
    trainable: tuple[str, ...]  # path patterns; all else is frozen
    data: DataConfig
    optim: OptimConfig
    num_steps: int
    objective: str = "next_token"
    lora: LoraConfig | None = None  # trained besides, and merged into the model at the end
    discriminator_channels: int = 32  # of the codec's discriminators; 0 trains it without
    init_from: tuple[str, ...] = ()  # FOLDER or PATTERN=FOLDER, later ones win; none: random
    dtype: str = "bfloat16"  # of computing and of frozen parameters; trained ones are float32
    mesh: tuple[int, int, int] | None = None  # data, fsdp, tensor; None: all devices on fsdp
    remat: str = "full"  # what each layer keeps for the backward pass: one of `REMAT`
    loss_chunk: int = 256  # tokens of a row whose logits are in memory at once
    log_every: int = 10  # steps
    save_every: int = 500  # steps
    validate_every: int = 500  # steps; there is a save, too
    keep: int = 3  # the latest saves; the best one is kept besides
    max_skipped: int = 10  # non-finite updates in a row before the run stops
    seed: int = 42  # of parameters that come from no folder

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective={self.objective!r}: expected one of {', '.join(OBJECTIVES)}"
            )
        if not self.trains:
            raise ValueError("trainable=(): nothing trains; name path patterns, or set lora")
        if self.data.batch_size % self.optim.accumulation:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be a multiple of "
                f"optim.accumulation={self.optim.accumulation}"
            )
        if self.objective in ("codec", "match") and self.optim.accumulation > 1:
            raise ValueError(
                f"optim.accumulation={self.optim.accumulation}: a batch of objective="
                f"{self.objective!r} cannot be cut, as all of it is looked at together; expected 1"
            )
        if self.data.captions and self.objective != "match":
            raise ValueError(
                f"data.captions={self.data.captions!r}: only objective='match' has a use for them, "
                f"not {self.objective!r}; leave it out"
            )
        for part, objectives in (("codec", ("codec", "speech")), ("speech", ("speech",))):
            if self.objective in objectives and getattr(self.model, part) is None:
                raise ValueError(f"objective={self.objective!r}: {self.model.name} has no {part}")
        for name in ("num_steps", "log_every", "save_every", "validate_every", "keep",
                     "max_skipped"):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.model.with_dtype(self.dtype, self.remat)  # refuses any other word

    @property
    def trains(self) -> tuple[str, ...]:
        """Path patterns of what trains, adapters included."""
        return self.trainable if self.lora is None else (*self.trainable, "lora/.*")


def load_config(path, overrides=(), tiny: bool = False) -> TrainConfig:
    """The stage in a Python file, shrunk if `tiny`, with `overrides` applied.

    Args:
      path: file with a function `get_config() -> TrainConfig`, or FILE:STAGE where the function
        takes the name of a stage.
      overrides: words such as "optim.learning_rate=1e-4".
      tiny: takes `shrink` of the stage.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no `get_config`, or an override is bad.
    """
    path, _, stage = str(path).partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; stages are Python files, see configs/")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ValueError(f"{path}: no get_config() in it; a stage file returns a TrainConfig there")
    config = get_config(stage) if stage else get_config()
    return override(shrink(config) if tiny else config, overrides)


def shrink(config: TrainConfig) -> TrainConfig:
    """The stage for a CPU minute: `vita_tiny`, random weights, samples made in memory."""
    model = vita_tiny()
    audio = dataclasses.replace(
        model.audio,
        num_prompts=min(config.model.audio.num_prompts, 2),
        num_units=(model.llm.vocab_size + 1) * bool(config.model.audio.num_units),
    )
    llm = dataclasses.replace(model.llm, num_states=config.model.llm.num_states)
    mixture = {f"synthetic:{Path(k).name}": weight for k, weight in config.data.mixture.items()}
    held_out = tuple(f"synthetic:{Path(name).name}" for name in config.data.held_out)
    if config.data.spoken_share:  # made-up questions come spoken or written
        mixture["synthetic:spoken_qa"] = config.data.spoken_share
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, audio=audio, llm=llm),
        discriminator_channels=min(config.discriminator_channels, 4),
        data=dataclasses.replace(
            config.data,
            mixture=mixture,
            held_out=held_out,
            batch_size=8,
            max_tokens={"codec": 8, "speech": 128}.get(config.objective, 768),
            max_tiles=1,
            max_clips=1,
            max_audio_frames=128,
            spoken_share=0.0,
            augment_audio=False,
            noises=None,
            units=None,
            captions=None,
            num_workers=0,
        ),
        optim=dataclasses.replace(config.optim, learning_rate=3e-3, accumulation=1),
        num_steps=30,
        init_from=(),
        dtype="float32",
        log_every=1,
        save_every=10,
        validate_every=10,
    )


def override(config, words):
    """The config with `words` like `llm.num_layers=2` applied; `model=` takes a preset's name or a
    checkpoint folder, too.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a word without `=`, an unknown key (the valid ones are named) or a value of
        another type.
    """
    tree = to_json(config)
    for word in words:
        key, sep, value = word.partition("=")
        if not sep:
            raise ValueError(f"override {word!r}: expected key=value, as in llm.num_layers=2")
        node, *path = [tree], *key.split(".")
        node = node[0]
        for depth, name in enumerate(path):
            if depth and node is None:
                whole = ".".join(path[:depth])
                raise ValueError(
                    f"override {word!r}: there is no {whole!r} to change; give all of it, as in "
                    f"{whole}={{...}}"
                )
            if not isinstance(node, dict) or name not in node:
                valid = ", ".join(node) if isinstance(node, dict) else "none"
                raise ValueError(
                    f"override {word!r}: unknown key {'.'.join(path[: depth + 1])!r}; "
                    f"valid: {valid}"
                )
            if depth < len(path) - 1:
                node = node[name]
        try:
            node[path[-1]] = json.loads(value)
        except json.JSONDecodeError:
            node[path[-1]] = to_json(_model(value)) if key == "model" else value
    return from_json(type(config), tree)


def _model(name) -> VitaConfig:
    """A preset, or the config of a checkpoint folder."""
    return PRESETS[name]() if name in PRESETS else load(Path(name) / "config.json")


def load(path) -> VitaConfig:
    """The config in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, or not a config; the file and the key are named.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return from_json(VitaConfig, json.load(file))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; a checkpoint folder has a config.json"
        ) from None
    except ValueError as error:  # of the JSON or of the config
        raise ValueError(f"{path}: {error}") from None


def to_json(config) -> dict:
    """The config as JSON values, nested as the dataclasses are."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls, values, where: str = ""):
    """Builds the dataclass `cls` from JSON values as `to_json` made them.

    Raises:
      ValueError: a key that `cls` does not have, one that is missing, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"config {where or cls.__name__}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"unknown config key {where + unknown[0]!r}; "
            f"valid: {', '.join(where + n for n in fields)}"
        )
    missing = [n for n, f in fields.items() if n not in values and _is_required(f)]
    if missing:
        raise ValueError(f"config key {where + missing[0]!r} is missing")
    return cls(**{name: _cast(hints[name], value, where + name) for name, value in values.items()})


def _is_required(field):
    return field.default is field.default_factory is dataclasses.MISSING


def _cast(hint, value, where):
    """`value` as the type `hint`, or a ValueError that names `where`."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where + ".")
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        inner = typing.get_args(hint)[1]
        return {key: _cast(inner, item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint == tuple[str, ...] and isinstance(value, str):
        return (value,)  # one word stands for a list of one
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        args = typing.get_args(hint)
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(_cast(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(
        f"config key {where!r}: expected {getattr(hint, '__name__', hint)}, got {value!r}"
    )


def _check_divides(part, name, value, by_name, by):
    if by <= 0 or value % by:
        raise ValueError(f"{part}.{name}={value} must be a multiple of {by_name}={by}")
