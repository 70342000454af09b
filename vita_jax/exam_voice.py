"""An examination of the voice: what others hear of replies, what the codec keeps, how fast it is.

Goes in: an engine and the samples of a set. Comes out: values and records, as in `exam.py`. Read
next: `eval_nano.py`.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import statistics

import jax
import numpy as np

from vita_jax import evaluate
from vita_jax.data.audio import write_wav
from vita_jax.data.utterance import read_clip
from vita_jax.exam import MAX_NEW_TOKENS, Exam, Unmeasured, errors, record, turn
from vita_jax.infer.engine import load
from vita_jax.infer.voice import Segmenter, speak

MAX_CODES = 400  # of a segment that is spoken: 10 s
NUM_DNSMOS = 50  # clips of a set that DNSMOS hears: a second each, and no bar
NUM_TIMED, NUM_CORES = 20, 2  # turns of each spoken set whose speed is measured, and on what
OPUS = "Opus 6 kb/s: "  # before the judge's name, where it is Opus that is judged


def said(lang):
    """A scoring function: words through the voice, heard by the recogniser, in "en" or "zh"."""

    def score(exam, name, samples):
        codec = exam.engine.config.codec
        if exam.engine.config.speech is None or codec is None:
            raise Unmeasured("the model has no voice")
        if reason := evaluate.recognizer_missing():
            raise Unmeasured(reason)
        records, folder = [record(sample) for sample in samples], exam.out / name
        folder.mkdir(exist_ok=True)
        waveforms = say(exam, [line["expected"] for line in records], name)
        for i, waveform in enumerate(exam.track(waveforms, f"{name} heard")):
            write_wav(folder / f"{i}.wav", waveform, codec.sample_rate_hz)
            spoke = len(waveform) > 0
            heard = evaluate.recognize(waveform, codec.sample_rate_hz, lang) if spoke else ""
            records[i] |= {"got": heard, "file": f"{name}/{i}.wav"}
        if lang == "en":
            return {"WER %": errors(records, evaluate.units)}, records
        by_character = evaluate.missing("opencc")
        if not by_character:
            records = [line | {"got": evaluate.simplified(line["got"])} for line in records]
            by_character = errors(records, evaluate.characters)
        syllables = errors(records, evaluate.units)
        return {"syllable error %": syllables, "CER %": by_character}, records

    return score


def say(exam: Exam, texts: list[str], what: str = "") -> list[np.ndarray]:
    """float32[W] of each text, its segments spoken one by one as in a reply; `what` names the
    progress bar.
    """
    engine, pieces = exam.engine, []
    for number, text in enumerate(texts):
        cut = Segmenter()
        pieces += [(number, segment) for segment in cut.push(text) + cut.flush()]
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][1]))  # alike, so little padding
    waveforms = {}
    for few, count in exam.batches(order, what):
        segments = [pieces[i][1] for i in few]
        made = speak(engine.config, engine.params, engine.tokenizer, segments, MAX_CODES)
        waveforms |= dict(zip(few[:count], made))
    whole = [[np.zeros(0, np.float32)] for _ in texts]
    for i, (number, _) in enumerate(pieces):
        whole[number].append(waveforms[i])
    return [np.concatenate(parts) for parts in whole]


def codec(exam, name, samples):
    """Clips through the codec alone, and through Opus."""
    config = exam.engine.config.codec
    if config is None:
        raise Unmeasured("the model has no codec")
    rate_hz, params = config.sample_rate_hz, exam.engine.params["codec"]
    clips = [read_clip(sample, rate_hz) for sample in samples]
    ours = []
    for few, count in exam.batches(clips, name):
        ours += evaluate.through_codec(config, params, few)[:count]
    judges = {
        "STOI": evaluate.missing("pystoi"),
        "PESQ-WB": evaluate.missing("pesq"),
        "DNSMOS OVRL": evaluate.missing("speechmos", "onnxruntime", "requests"),
    }
    judges["DNSMOS P808"] = judges["DNSMOS OVRL"]
    chosen = set(np.linspace(0, len(clips) - 1, NUM_DNSMOS, dtype=int).tolist())
    records = [record(sample) for sample in samples]
    for i, clip in enumerate(exam.track(clips, f"{name} judged")):
        for coder, waveform in (("", ours[i]), (OPUS, evaluate.opus(clip, rate_hz))):
            if not judges["STOI"]:
                records[i][coder + "STOI"] = evaluate.stoi(clip, waveform, rate_hz)
            if not judges["PESQ-WB"]:
                records[i][coder + "PESQ-WB"] = evaluate.pesq(clip, waveform, rate_hz)
            if not judges["DNSMOS OVRL"] and i in chosen:
                marks = evaluate.dnsmos(waveform, rate_hz)
                records[i] |= dict(zip((coder + "DNSMOS OVRL", coder + "DNSMOS P808"), marks))
    return {
        coder + judge: reason or [line.get(coder + judge) for line in records]
        for coder in ("", OPUS)
        for judge, reason in judges.items()
    }, records


def speed(exam, name, held):
    """Seconds from the end of a spoken question on, by a process with `NUM_CORES` cores."""
    if exam.engine.config.speech is None or exam.engine.config.codec is None:
        raise Unmeasured("the model has no voice")
    samples = [sample for part in held.values() for sample in part[:NUM_TIMED]]
    turns = [turn(sample, i) for i, sample in enumerate(samples)]
    cores = sorted(os.sched_getaffinity(0))[:NUM_CORES]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _pin, (cores,)) as process:
        times = process.submit(_time, exam.checkpoint, exam.dtype, turns).result()
    records = [record(sample, **seconds) for sample, seconds in zip(samples, times)]
    return speeds(times) | {"cores": float(len(cores))}, records


def speeds(times: list[dict]) -> dict:
    """Medians over replies that have sound, of `first_sound_s` and of `done_s` a second of their
    sound, `reply_s`; and how many have none.
    """
    heard = [x for x in times if x["reply_s"]]
    silent = {"replies without sound": float(len(times) - len(heard))}
    if not heard:
        return silent | dict.fromkeys(("first sound s", "real-time factor"), "no reply had sound")
    return silent | {
        "first sound s": statistics.median(x["first_sound_s"] for x in heard),
        "real-time factor": statistics.median(x["done_s"] / x["reply_s"] for x in heard),
    }


def _pin(cores):
    """Keeps a process that has not computed anything yet to CPU cores."""
    os.sched_setaffinity(0, cores)
    jax.config.update("jax_platforms", "cpu")


def _time(checkpoint, dtype, turns):
    """Times of spoken replies, all given once before to compile what they need."""
    engine, times = load(checkpoint, dtype=dtype), []
    for timed in (False, True):
        for one in turns:
            reply = engine.chat(
                one.text, one.images, one.audio, one.video, max_new_tokens=MAX_NEW_TOKENS["answer"]
            )
            if timed:
                sound_s = len(reply.audio) / reply.sample_rate_hz
                first_s, done_s = (reply.times_s.get(x) for x in ("first sound", "done"))
                times.append({"first_sound_s": first_s, "done_s": done_s, "reply_s": sound_s})
    return times
