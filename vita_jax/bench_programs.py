"""Speed of the programs that the engine runs, one by one, beside this machine's limits and, on its
CPU, beside PyTorch doing the same with the same weights.

Goes in: a model and how much is to be done. Comes out: a report, with a row for each program. What
is run are the compiled functions of `infer/decode.py` themselves, with the sizes that the engine
calls them with. Read next: `flops.py`, what is counted; `peer_programs.py`, the peers;
`bench_chat.py`, whole turns.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vita_jax import bench, checkpoint, flops, peer_programs
from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.data.collate import bucket
from vita_jax.infer import decode as programs
from vita_jax.infer import voice as voices
from vita_jax.infer.chunks import FIRST_CHUNK, PADDING
from vita_jax.infer.engine import CODES_PER_CALL, MOST_CODES, SPANS, TOKENS_PER_CALL
from vita_jax.infer.sampling import Sampler
from vita_jax.models import vita

NUM_TEXT = 16  # tokens of a segment to be spoken
NUM_CODES = FIRST_CHUNK + PADDING  # what has to be drawn before the first sound
CLIP_FRAMES = 350  # of the audio encoder's clip: 3.5 s
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest number
WARM_UP = 2  # calls before the clock starts


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be measured.

    Attributes:
      model: a preset, whose weights are random then, or a checkpoint folder.
      overrides: words such as "llm.num_layers=2", for a preset.
      dtype: in which the model computes.
      num_tokens: of the prompt that is read, or that the cache holds.
      num_rows: conversations, segments, windows or clips at a time.
      int8: whether weights stay in 8 bits, those that `checkpoint.load` keeps so.
    """

    model: str
    overrides: tuple[str, ...] = ()
    dtype: str = "float32"
    num_tokens: int = 200  # a spoken question about a picture, in a small model's prompt
    num_rows: int = 1
    int8: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to be timed.

    Attributes:
      call: does it to the end.
      answer: after a call, numbers that came of it, to be compared with a peer's.
      amount: what one call makes, in `unit`.
      unit: "tokens", "codes", "tiles", or "s of sound".
      cost: what a call has to do at least.
    """

    call: Callable[[], None]
    answer: Callable[[], np.ndarray]
    amount: float
    unit: str
    cost: flops.Cost


def decode(config, params, work: Work) -> Program:
    """The LLM writes as many tokens as the engine asks for at once, from a full prompt on."""
    length, num = work.num_tokens, TOKENS_PER_CALL
    num_seen = num_slots(length + num + 1)
    state = programs.init_text(config, work.num_rows, num_seen, Sampler().arrays())
    for row in range(work.num_rows):
        state, _ = _read(config, params, state, row, embeddings(config, params, length), num_seen)
    start = {
        "token": np.full(work.num_rows, _first(config), np.int32),
        "left": np.full(work.num_rows, num + 1, np.int32),
    }
    lengths, running = np.full(work.num_rows, length, np.int32), np.ones(work.num_rows, bool)
    never = np.full(1, -1, np.int32)

    def call():
        nonlocal state
        begun = state.replace(cache=state.cache.replace(length=lengths), **start)
        state, tokens = programs.next_text(config, num_seen, num, params, begun, running, never)
        np.asarray(tokens)

    cost = flops.decode_cost(config, params, length, num, work.num_rows)
    return Program(
        call,
        lambda: np.asarray(state.cache.k[-1, :, length : length + num], np.float32),
        work.num_rows * num,
        "tokens",
        cost,
    )


def prefill(config, params, work: Work) -> Program:
    """The LLM reads a prompt of so many embeddings into an empty row."""
    length = work.num_tokens
    given, num_seen = embeddings(config, params, length), num_slots(length + SPANS[-1])
    state = programs.init_text(config, 1, num_seen, Sampler().arrays())
    hidden = None

    def call():
        nonlocal state, hidden
        state, hidden = _read(config, params, state, 0, given, num_seen)
        hidden.block_until_ready()

    cost = flops.prefill_cost(config, params, length, SPANS[-1])
    return Program(call, lambda: np.asarray(hidden, np.float32), length, "tokens", cost)


def tile(config, params, work: Work) -> Program:
    """The vision encoder and the projector take a tile."""
    run = functools.partial(programs.encode_tile, config, params, _pixels(config))
    return _encoder(run, 1, "tiles", flops.tile_cost(config, params))


def clip(config, params, work: Work) -> Program:
    """The audio encoder and the adapter take clips of 3.5 s."""
    frames = _frames(config, work.num_rows)
    if work.num_rows == 1:
        given = frames[0], np.int32(CLIP_FRAMES)
        run = functools.partial(programs.encode_clip, config, params, *given)
    else:
        one = functools.partial(programs.encode_clip, config, params)
        together = jax.jit(jax.vmap(one))
        run = functools.partial(together, frames, np.full(work.num_rows, CLIP_FRAMES, np.int32))
    cost = flops.clip_cost(config, params, CLIP_FRAMES, work.num_rows)
    return _encoder(run, work.num_rows * CLIP_FRAMES / 100, "s of sound", cost)


def prompt(config, params, work: Work) -> Program:
    """A prompt of so many words, a tile and a clip of 3.5 s, encoded and read into an empty row."""
    pixels, frames = _pixels(config), _frames(config, 1)[0]
    p, s = config.vision.embeddings_per_tile, config.audio.num_embeddings(CLIP_FRAMES)
    length = work.num_tokens + p + s
    num_seen = num_slots(length + SPANS[-1])
    state = programs.init_text(config, 1, num_seen, Sampler().arrays())
    hidden = None

    def call():
        nonlocal state, hidden
        seen = programs.encode_tile(config, params, pixels)
        heard = programs.encode_clip(config, params, frames, np.int32(CLIP_FRAMES))
        given = embeddings(config, params, length)
        given = programs.splice(given, seen, 0, 0, p)
        given = programs.splice(given, heard, 0, length - s, s)
        state, hidden = _read(config, params, state, 0, given, num_seen)
        hidden.block_until_ready()

    costs = (
        flops.prefill_cost(config, params, length, SPANS[-1]),
        flops.tile_cost(config, params),
        flops.clip_cost(config, params, CLIP_FRAMES),
    )
    cost = flops.Cost(sum(x.flops for x in costs), sum(x.bytes for x in costs))
    return Program(call, lambda: np.asarray(hidden, np.float32), length, "tokens", cost)


def speech(config, params, work: Work) -> Program:
    """The speech decoders read a segment of 16 tokens, in every row, and draw the 30 codes that the
    first sound needs.
    """
    n, rows = config.speech_frames_per_token, work.num_rows
    start = 1 + NUM_TEXT * n
    num_seen = num_slots(1 + start + NUM_CODES + CODES_PER_CALL)
    state = programs.init_speech(config, rows, num_seen, Sampler().arrays())
    text, banned = _text(config), voices.banned(config)
    banned[config.speech.eos_id] = True
    given = text, np.int32(NUM_TEXT), jax.random.key(0), np.int32(NUM_CODES), Sampler().arrays()
    running = np.ones(rows, bool)

    def call():
        nonlocal state
        for row in range(rows):
            state = programs.begin_speech(config, params, state, row, *given)
        for _ in range(NUM_CODES // CODES_PER_CALL):
            args = config, num_seen, CODES_PER_CALL, params, banned, state, running
            state, codes = programs.next_speech(*args)
        np.asarray(codes)

    return Program(
        call,
        lambda: np.asarray(state.cache.k[-1, :, start : start + NUM_CODES], np.float32),
        rows * NUM_CODES,
        "codes",
        flops.speech_cost(config, params, NUM_TEXT, NUM_CODES, rows),
    )


def codec(config, params, work: Work) -> Program:
    """The codec's decoder turns windows of 60 codes into sound."""
    codes = np.tile(_codes(config), (work.num_rows, 1))
    voice = np.tile(voices.voice_of(config), (work.num_rows, 1))
    numbers = np.full(work.num_rows, MOST_CODES, np.int32)
    run = functools.partial(programs.decode_codes, config, params, codes, numbers, voice)
    samples = work.num_rows * MOST_CODES * config.codec.samples_per_token
    cost = flops.codec_cost(config, params, MOST_CODES, work.num_rows)
    return _encoder(run, samples / config.codec.sample_rate_hz, "s of sound", cost)


# What `vita bench NAME` measures: parts of the model, programs.
MEASURED = {
    "decode": (("llm",), (decode,)),
    "prefill": (("llm",), (prefill,)),
    "encode": (("vision", "audio"), (tile, clip)),
    "clips": (("audio",), (clip,)),
    "prompt": (("vision", "audio", "llm"), (prompt,)),
    "speech": (("llm", "speech"), (speech,)),
    "codec": (("codec",), (codec,)),
}


def measure(names, work: Work, num_calls: int = 20) -> dict:
    """Times programs on this machine's devices, calls of all in turn.

    Args:
      names: of `MEASURED`.
      work: what is to be done.
      num_calls: of each that are timed.

    Returns:
      a report: `rows`, objects with program, p50_s, p95_s, per_s, unit, flops, bytes, of_copy and
      of_matmul (shares of the measured rates); copy_bytes_per_s, matmul_flops_per_s, dtype, model
      and machine.
    """
    limits = _limits(work.dtype)
    parts = {part for name in names for part in MEASURED[name][0]}
    config, params = model_of(work, [part for part in checkpoint.PARTS if part in parts])
    made = {of.__name__: of(config, params, work) for name in names for of in MEASURED[name][1]}
    seconds = {name: [] for name in made}
    for _ in range(WARM_UP + num_calls):
        for name, program in made.items():
            start_s = time.perf_counter()
            program.call()
            seconds[name].append(time.perf_counter() - start_s)
    rows = [
        _row(name, seconds[name][WARM_UP:], made[name].amount, made[name].unit, made[name].cost)
        for name in made
    ]
    return _report(rows, work, limits)


def measure_beside_torch(names, work: Work, num_calls: int = 20, num_cores: int = 2) -> dict:
    """Times programs and their peers in PyTorch, plain and compiled by Inductor: processes pinned
    to the same cores, whose calls take turns.

    Args:
      names: of `MEASURED`, all with a peer.
      work: what is to be done.
      num_calls: of each that are timed.
      num_cores: cores (and threads) they may use.

    Returns:
      a report as that of `measure`; its rows have also ratio, the faster peer's median to ours
      (above 1 we are ahead), torch_s and torch_compiled_s, medians (None where it cannot be
      compiled, and `note` says why), and error, the largest difference of what came of it.

    Raises:
      ModuleNotFoundError: there is no PyTorch or no transformers.
      ValueError: there is no such peer, or the two do not give the same numbers.
    """
    rows = []
    for name in names:
        if name not in PEERS:
            raise ValueError(f"{name}: has no peer; there are {', '.join(PEERS)}")
        makers = [functools.partial(_limit_of, work.dtype), functools.partial(_ours, name, work)]
        makers += [functools.partial(_theirs, name, work, compiled) for compiled in (False, True)]
        limit, ours, plain, compiled = bench.race(makers, num_calls, num_cores)
        for ended in (limit, ours, plain):
            if isinstance(ended, Exception):
                raise ended
        (answer, amount, unit, cost), seconds = ours
        row = _row(name, seconds, amount, unit, cost)
        row |= {"torch_s": float(np.median(plain[1])), "torch_compiled_s": None, "note": ""}
        answers = [plain[0]]
        if isinstance(compiled, Exception):
            row["note"] = f"not compiled: {str(compiled).splitlines()[0]}"
        else:
            row["torch_compiled_s"] = float(np.median(compiled[1]))
            answers.append(compiled[0])
        row["error"] = max(_error(answer, theirs) for theirs in answers)
        if not row["error"] <= TOLERANCE[work.dtype]:
            raise ValueError(
                f"{name}: ours and PyTorch's differ by {row['error']:.2g} of the largest number; "
                f"at most {TOLERANCE[work.dtype]:g} was expected: they do not do the same"
            )
        faster = min(row["torch_s"], row["torch_compiled_s"] or np.inf)
        row["ratio"] = faster / row["p50_s"]
        rows.append(row)
    return _report(rows, work, limit[0]) | {"peer_cores": num_cores}


def table(report: dict) -> Table:
    """A report of this file, to be printed: a column for each program."""
    machine, rows, beside = report["machine"], report["rows"], "peer_cores" in report
    cores = report.get("peer_cores", machine["cores"])
    notes = [f"; {row['program']} {row['note']}" for row in rows if row.get("note")]
    shown = Table(
        title=f"{report['model']}, {report['dtype']}",
        caption=f"{machine['processor']}, {cores} cores, {machine['device']}; copies "
        f"{report['copy_bytes_per_s'] / 1e9:.4g} GB/s, multiplies "
        f"{report['matmul_flops_per_s'] / 1e12:.4g} TFLOP/s{''.join(notes)}",
    )
    for name in ("", *(row["program"] for row in rows)):
        shown.add_column(name, justify="right" if name else "left")

    def show(name, key, form):
        found = [row[key] for row in rows]
        shown.add_row(name, *("-" if x is None else form(x) for x in found))

    def ms(x):
        return f"{x * 1e3:.4g}"

    if beside:
        show("PyTorch's time to ours", "ratio", "{:.2f}".format)
    show("ms, p50", "p50_s", ms)
    show("ms, p95", "p95_s", ms)
    if beside:
        show("ms, PyTorch", "torch_s", ms)
        show("ms, PyTorch compiled", "torch_compiled_s", ms)
    show("made a second", "per_s", "{:.4g}".format)
    show("what is made", "unit", str)
    show("MB needed", "bytes", lambda x: f"{x / 1e6:.4g}")
    show("GFLOP needed", "flops", lambda x: f"{x / 1e9:.4g}")
    show("of copy rate", "of_copy", "{:.1%}".format)
    show("of matmul rate", "of_matmul", "{:.1%}".format)
    return shown


def model_of(work: Work, parts=checkpoint.PARTS):
    """The config and the parameters of `parts`, on the device as an engine has them.

    Raises:
      FileNotFoundError, ValueError: neither a preset nor a checkpoint, or a bad word.
    """
    if work.model not in configs.PRESETS:
        if work.overrides:
            raise ValueError(f"{work.overrides[0]}: only a preset can be overridden")
        return checkpoint.load(work.model, dtype=work.dtype, parts=parts, int8=work.int8)
    config = configs.override(configs.PRESETS[work.model](), work.overrides)
    config = config.with_dtype(work.dtype)
    codec = config.codec and dataclasses.replace(config.codec, weight_norm=False)
    config = dataclasses.replace(config, codec=codec)
    boxes = {
        path: box
        for path, box in trees.flatten(vita.boxed_shapes(config)).items()
        if path.startswith(tuple(f"{part}/" for part in parts))
    }
    whole = ("codec/", "audio/encoder/cmvn/")
    dtypes = {path: "float32" if path.startswith(whole) else work.dtype for path in boxes}
    here = jax.local_devices()[0]
    if here.platform == "cpu":  # for which XLA takes minutes to compile the draws
        drawn = {path: vita.draw(path, box, 0).astype(dtypes[path]) for path, box in boxes.items()}
        params = jax.device_put(trees.unflatten(drawn), here)
        return config, in_8_bits(config, params) if work.int8 else params
    sharding = jax.sharding.SingleDeviceSharding(here)
    shapes = {
        path: jax.ShapeDtypeStruct(box.value.shape, dtypes[path], sharding=sharding)
        for path, box in boxes.items()
    }
    params = bench.weights(boxes, trees.unflatten(shapes))
    return config, in_8_bits(config, params) if work.int8 else params


def in_8_bits(config, params):
    """The parameters, all or of some parts, as `checkpoint.load` gives those of 8 bits."""
    boxes, flat = trees.flatten(vita.boxed_shapes(config)), trees.flatten(params)
    for path in filter(checkpoint.INT8.fullmatch, list(flat)):
        layers = boxes[path].names.count("layers")
        axes = tuple(range(layers, layers + boxes[path].num_inputs))
        flat[path], flat[path + checkpoint.SCALE] = _to_int8(flat.pop(path), axes)
    return trees.unflatten(flat)


@functools.partial(jax.jit, static_argnums=1)
def _to_int8(weight, axes):
    """As `quantize.to_int8`, on the device."""
    weight = weight.astype(jnp.float32)
    scale = jnp.abs(weight).max(axis=axes, keepdims=True) / 127
    return jnp.rint(weight / scale).astype(jnp.int8), scale


def embeddings(config, params, num_tokens: int):
    """dtype[1, T, D] of made-up words."""
    return programs.embed_text(config, params, _ids(config, num_tokens))


def num_slots(length: int) -> int:
    """Slots that the engine looks at where `length` may be in use."""
    return max(256, 1 << (length - 1).bit_length())


def _ids(config, number):
    return np.random.default_rng(0).integers(0, config.llm.vocab_size, number, np.int32)


def _first(config):
    """The token that decoding goes on from."""
    return config.llm.vocab_size // 2


def _text(config):
    return _ids(config, NUM_TEXT)


def _pixels(config):
    shape = config.vision.tile_px, config.vision.tile_px, 3
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _frames(config, number):
    shape = number, bucket(CLIP_FRAMES, 32), config.audio.num_mel_bins
    return 10 + np.random.default_rng(0).standard_normal(shape, np.float32)


def _codes(config):
    return np.random.default_rng(0).integers(0, config.codec.num_codes, MOST_CODES, np.int32)


def _read(config, params, state, row, given, num_seen):
    """A whole prompt, in spans as the engine reads it."""
    length = given.shape[1]
    for start in range(0, length, SPANS[-1]):
        number = min(SPANS[-1], length - start)
        size = next(size for size in SPANS if size >= number)
        part = jnp.pad(given[:, start : start + number], ((0, 0), (0, size - number), (0, 0)))
        seen = min(num_slots(start + size), num_seen)
        state, hidden = programs.read(config, seen, params, state, row, part, start, number)
    return state, hidden


def _encoder(run, amount, unit, cost):
    """A program without state."""
    last = []

    def call():
        last[:] = [run().block_until_ready()]

    return Program(call, lambda: np.asarray(last[0], np.float32), amount, unit, cost)


def _row(name, seconds, amount, unit, cost):
    p50_s, p95_s = (float(x) for x in np.percentile(seconds, (50, 95)))
    return {
        "program": name, "p50_s": p50_s, "p95_s": p95_s, "per_s": amount / p50_s, "unit": unit,
        "flops": cost.flops, "bytes": cost.bytes,
    }  # fmt: skip


def _limits(dtype):
    return {
        "copy_bytes_per_s": flops.copy_bytes_per_s(),
        "matmul_flops_per_s": flops.matmul_flops_per_s(dtype),
    }


def _report(rows, work, limits):
    for row in rows:
        row["of_copy"] = row["bytes"] / row["p50_s"] / limits["copy_bytes_per_s"]
        row["of_matmul"] = row["flops"] / row["p50_s"] / limits["matmul_flops_per_s"]
    about = {"model": work.model, "dtype": work.dtype, "machine": bench.machine()}
    return {"rows": rows} | limits | about


def _error(ours, theirs):
    """The largest difference, as a share of the largest number; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _limit_of(dtype):
    """This machine's rates, as something to be timed."""
    return lambda: None, functools.partial(_limits, dtype)


def _ours(name, work):
    parts, (of,) = MEASURED[name]
    program = of(*model_of(work, parts), work)
    return program.call, lambda: (program.answer(), program.amount, program.unit, program.cost)


def _peer_decode(config, params, work, compiled):
    given = _ids(config, work.num_tokens), _first(config), TOKENS_PER_CALL, work.num_rows
    return peer_programs.decode(config, params, *given, compiled)


def _peer_prefill(config, params, work, compiled):
    given = embeddings(config, params, work.num_tokens)
    return peer_programs.prefill(config, params, given, compiled)


def _peer_speech(config, params, work, compiled):
    given = _text(config), NUM_CODES, work.num_rows
    return peer_programs.speech(config, params, *given, compiled)


def _peer_codec(config, params, work, compiled):
    codes = np.tile(_codes(config), (work.num_rows, 1))
    return peer_programs.codec(config, params, codes, voices.voice_of(config), compiled)


PEERS = {
    "decode": _peer_decode,
    "prefill": _peer_prefill,
    "speech": _peer_speech,
    "codec": _peer_codec,
}


def _theirs(name, work, compiled):
    return PEERS[name](*model_of(work, MEASURED[name][0]), work, compiled)
