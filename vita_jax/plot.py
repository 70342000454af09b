"""Curves of runs, timelines and answers as PNG files: numbers go in, a picture comes out. Called by
`cli.py`.
"""

import textwrap
import unicodedata
import warnings
from pathlib import Path

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


def budget(report, path):
    """Draws the steps from the end of a question to the first sound, one behind the other, each as
    long as its median; and the two clocks, which also hold what is between the steps.

    Args:
      report: of `bench_chat.chat`.
      path: PNG file to write, 1600 x 500 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes, start = figure.subplots(), 0.0
    rows = [
        (step, 1e3 * row["p50_s"], 1e3 * row["p95_s"]) for step, row in report["budget"].items()
    ]
    for number, (_, p50, p95) in enumerate(rows):
        axes.barh(number, p50, left=start, color=QUESTION)
        axes.annotate(
            f"{p50:.1f} ms (p95 {p95:.1f})", (start + p50, number), xytext=(7, 0), va="center",
            textcoords="offset points", color=INK, fontsize=11,
        )  # fmt: skip
        start += p50
    for name, colour, side, shift in (("model", ANSWER, "right", -7), ("engine", MARK, "left", 7)):
        clock = 1e3 * report["clocks"][name]["p50_s"]
        axes.axvline(clock, color=colour, linewidth=2)
        axes.annotate(
            f"{name} clock {clock:.1f} ms", (clock, -0.8), xytext=(shift, 0), ha=side, va="center",
            textcoords="offset points", color=colour, fontsize=12,
        )  # fmt: skip
    longest = max(start, *(1e3 * row["p50_s"] for row in report["clocks"].values()))
    axes.set(xlim=(0, 1.2 * longest), ylim=(len(rows), -1.2), yticks=range(len(rows)))
    axes.set_yticklabels([step for step, _, _ in rows], fontsize=12)
    axes.set_xlabel("milliseconds after the last sample of the question", color=INK, fontsize=13)
    axes.set_title(f"{report['model']}, {report['machine']['device']}", loc="left", color=INK)
    axes.spines[["right", "top"]].set_visible(False)
    figure.savefig(path, format="png")


# Fonts with Chinese characters, where they are installed: of Linux, macOS, Windows.
HAN_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "STHeiti",
    "Heiti TC", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
HAN_SUBSET = Path(__file__).parent / "samples" / "han.otf"  # characters of the small model's words


def answers(rows, path):
    """Draws questions and their answers, a row each: picture, spoken question, spoken answer.

    Each waveform is scaled to its own peak; seconds are as wide in all of them. Chinese is drawn in
    the first of `HAN_FONTS` that is installed; where none is, in `HAN_SUBSET`, and characters that
    it lacks are drawn as boxes.

    Args:
      rows: dicts with `image` (RGB picture or None), `question` (float32[W]), `question_rate_hz`,
        `asked` (its text), `answer` (float32[W], empty when nothing is said), `answer_rate_hz`,
        `replied` (its text) and `note` (what stands below it).
      path: PNG file to write, 1600 x 300 pixels a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3 * len(rows)), dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows), 3, width_ratios=(1.1, 2.4, 2.4), wspace=0.06, hspace=0.55,
        left=0.01, right=0.985, top=1 - 0.28 / len(rows), bottom=0.17 / len(rows),
    )  # fmt: skip
    panels = grid.subplots(squeeze=False)
    rates = (("question", QUESTION), ("answer", ANSWER))
    seconds = max(len(row[k]) / row[f"{k}_rate_hz"] for row in rows for k, _ in rates) or 1.0
    family = ["DejaVu Sans", *_han_fonts()]
    for row, (picture, *sounds) in zip(rows, panels):
        picture.set_axis_off()
        if row["image"] is not None:
            picture.imshow(row["image"], interpolation="lanczos")
        texts = (row["asked"], ""), (row["replied"], row["note"])
        for axes, (key, colour), (text, note) in zip(sounds, rates, texts):
            if len(row[key]):
                _waveform(axes, row[key], row[f"{key}_rate_hz"], 0.0, colour, "")
            axes.set(xlim=(0, seconds), ylim=(-1.5, 1.1), yticks=[])
            axes.spines[["left", "right", "top"]].set_visible(False)
            axes.tick_params(colors=INK, labelsize=9)
            # A reply may hold "$": it is words, not mathematics.
            says = {"color": INK, "family": family, "parse_math": False}
            axes.set_title(_wrap(text, 54), loc="left", fontsize=17, pad=10, **says)
            axes.text(0, -1.4, note, fontsize=9, **says)
    for axes in panels[-1, 1:]:
        axes.set_xlabel("seconds", color=INK)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, format="png")


def _han_fonts():
    """Families to draw Chinese in, the best first."""
    from matplotlib import font_manager

    fonts = font_manager.fontManager
    installed = {font.name for font in fonts.ttflist}
    found = [name for name in HAN_FONTS if name in installed]
    if not found:
        fonts.addfont(HAN_SUBSET)
        found = [font_manager.get_font(HAN_SUBSET).family_name]
    return found


def _wrap(text, columns, lines=2):
    """`text` in so many lines at most, of so many columns: Chinese characters are two wide."""
    text = "".join(c if c.isprintable() else " " for c in text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    width = columns * len(text) // max(len(text) + wide, 1)
    return textwrap.fill(text, max(width, 8), max_lines=lines, placeholder=" …")


# What `curves` draws: metric, its axis.
PANELS = (
    ("loss", "loss (nats a target; of a codec, mel distance)"),
    ("error", "wrong targets (share)"),
    ("exact", "exact replies (share)"),
    ("grad_norm", "length of the gradient"),
    ("learning_rate", "learning rate"),
    ("tokens_per_s", "tokens a second"),
)


def curves(runs, path) -> tuple[list[str], list[str]]:
    """Draws the metrics of runs, a colour each: lines for training, dots for held-out samples.

    Args:
      runs: {name: lines of its `metrics.jsonl` as dicts}.
      path: PNG file to write, 1500 x 1000 pixels.

    Returns:
      lines of a table: steps, first and last loss (means over a tenth of the lines), the best loss
      on held-out samples and minutes of each run. And the names of runs whose loss did not fall.

    Raises:
      ValueError: a run has no training lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, rising = max(map(len, runs)), []
    table = [f"{'run':<{wide}}{'steps':>9}{'first':>9}{'last':>9}{'held out':>10}{'minutes':>9}"]
    figure = Figure(figsize=(15, 10), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).ravel()
    for axes, (_, label) in zip(panels, PANELS):
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.spines[["right", "top"]].set_visible(False)
    for axes, (metric, _) in zip(panels, PANELS):
        if metric in ("loss", "grad_norm"):  # a codec's are hundreds, those of words a few
            axes.set_yscale("log")
    for number, (name, lines) in enumerate(runs.items()):
        train = [line for line in lines if "loss" in line]
        if not train:
            raise ValueError(f"{name}: no training line in it yet")
        colour = f"C{number % 10}"
        for axes, (metric, _) in zip(panels, PANELS):
            for key, style in ((metric, "-"), (f"held_out_{metric}", "o--")):
                points = [(x["step"], x[key]) for x in lines if x.get(key) is not None]
                is_line = style == "-"
                if is_line and len(points) > 50:  # as measured, pale, below its running mean
                    axes.plot(*zip(*points), color=colour, alpha=0.2, linewidth=0.8)
                    points = _smooth(points)
                if points:
                    label = name if is_line and metric == "loss" else None
                    axes.plot(*zip(*points), style, color=colour, markersize=4, label=label)
        losses = [line["loss"] for line in train if line["loss"] is not None]
        few = -(-len(losses) // 10)
        first, last = np.mean(losses[:few]), np.mean(losses[-few:])
        rising += [name] * (not last < first)
        held_out = [x["held_out_loss"] for x in lines if x.get("held_out_loss") is not None]
        best = f"{min(held_out):10.4f}" if held_out else f"{'-':>10}"
        minutes = sum(line.get("seconds", 0) for line in train) / 60
        table.append(
            f"{name:<{wide}}{train[-1]['step']:>9}{first:>9.4f}{last:>9.4f}{best}{minutes:>9.1f}"
        )
    panels[0].legend(frameon=False)
    figure.savefig(path, format="png")
    return table, rising


def _smooth(points):
    """Points (step, value) with the value replaced by the mean over a fiftieth of the run."""
    width = max(len(points) // 50, 2)
    steps, values = np.array(points, float).T
    means = np.convolve(values, np.ones(width) / width, "valid")
    return list(zip(steps[width - 1 :], means))
