"""Timelines as PNG files: arrays and seconds go in, a picture comes out. Called by `cli.py`."""

import numpy as np

QUESTION = "#5b8def"
ANSWER = "#e4793a"
MARK = "#0b6e4f"
INK = "#2b2d42"


def timeline(question, question_rate_hz, answer, answer_rate_hz, events, path):
    """Draws a spoken question and its spoken answer on one time axis; 0 is the end of the question.

    Each waveform is scaled to its own peak.

    Args:
      question: float32[W] waveform; empty when the question was typed.
      question_rate_hz: its sample rate.
      answer: float32[W] waveform, drawn from `events["first sound"]` on; empty when there is none.
      answer_rate_hz: its sample rate.
      events: {name: seconds after the end of the question}, a labelled vertical mark each.
      path: PNG file to write, 1600 x 500 pixels.
    """
    # The figure is made without pyplot: no display is needed and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = -len(question) / question_rate_hz
    end = sound = events.get("first sound", 0.0)
    if len(question):
        _waveform(axes, question, question_rate_hz, start, QUESTION, "question")
    if len(answer):
        _waveform(axes, answer, answer_rate_hz, sound, ANSWER, "answer")
        end += len(answer) / answer_rate_hz

    axes.plot([0, 0], [-1.1, 1.1], color=INK, linewidth=1, linestyle=":")
    # Every later mark is a row lower, so that no mark crosses the label of another.
    height = 1.2 + 0.2 * len(events)
    for name, seconds in sorted(events.items(), key=lambda event: event[1]):
        axes.plot([seconds, seconds], [-1.1, height], color=MARK, linewidth=2)
        axes.annotate(
            f"{name}  {seconds:.2f} s", (seconds, height), xytext=(7, 0), color=MARK, va="top",
            textcoords="offset points", fontsize=13,
        )  # fmt: skip
        height -= 0.2
    last = max(events.values(), default=0.0)
    margin = 0.02 * (max(end, last) - start) + 0.1
    label = 0.14 * (last - start)  # room for the label of the last mark
    axes.set_xlim(start - margin, max(end + margin, last + label))
    axes.set_ylim(-1.3, 1.3 + 0.2 * len(events))
    axes.set_yticks([])
    axes.set_xlabel("seconds after the end of the question", color=INK, fontsize=13)
    axes.tick_params(colors=INK, labelsize=12)
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.savefig(path, format="png")


def _waveform(axes, samples, rate_hz, start, color, label):
    """Fills between the lowest and the highest sample of every 5 ms, as fine as the picture."""
    step = round(0.005 * rate_hz)
    pieces = np.pad(samples, (0, -len(samples) % step)).reshape(-1, step)
    seconds = start + np.arange(len(pieces)) * step / rate_hz
    peak = np.abs(samples).max() or 1.0
    low, high = pieces.min(axis=1) / peak, pieces.max(axis=1) / peak
    axes.fill_between(seconds, low, high, color=color, linewidth=0.8, edgecolor=color)
    axes.annotate(
        label, (start, -1.1), xytext=(7, 0), textcoords="offset points", color=color, fontsize=13
    )
