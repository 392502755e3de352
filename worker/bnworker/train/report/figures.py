"""The figures of a run's report, drawn with matplotlib.

The same history gives the same figures: the user's own matplotlib settings are not used. Figures are drawn into memory
without a display. Every axis is labelled with its quantity and unit.

Shape suffixes: E epochs, C channels, R ranks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from bnworker.train.events import LayerStatistics
from bnworker.train.report.history import History

# Okabe and Ito's colours: also distinguishable with colour blindness.
_TRAIN, _TEST, _VALIDATION, _FADED = "#0072B2", "#D55E00", "#009E73", "#9DB8CC"
_WAITING, _WORKING = "#D55E00", "#9DB8CC"

_STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 144,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_WIDE = (9.0, 3.2)  # inches; two panels side by side
_FEW = 40  # up to so many epochs get a marker; more would merge into a thick line
_LOGARITHMIC = 100.0  # a variance that spans two decades is unreadable on a linear axis
_RANKS_NAMED = 16  # up to so many bars have room for a number


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        name: of its file, without ".png".
        caption: what it shows, in a sentence.
        png: the file.
    """

    name: str
    caption: str
    png: bytes


def pictures(history: History) -> list[Picture]:
    """All pictures for which the history has data, the most important first."""
    drawn: list[Picture] = []
    with matplotlib.style.context(["default", _STYLE]):
        if history.points or history.epochs:
            drawn.append(_drawn("learning", _LEARNING, partial(_learning, history)))
        for name, seen in history.layers().items():
            caption = (
                f"Layer {name}, {len(seen[0][1].moving_mean)} channels: moving mean and variance after each epoch, "
                "as their owner keeps them. Line: median channel; dark band: the middle half of the channels; "
                "light band: all of them."
            )
            drawn.append(_drawn(f"layer_{name}", caption, partial(_layer, history, seen)))
        if history.waiting()[1].shape[1] > 1:  # a single rank never waits
            drawn.append(_drawn("waiting", _WAITED, partial(_waiting, history)))
    return drawn


_LEARNING = (
    "Loss (mean cross-entropy) and accuracy. Training: while the weights move, with the statistics of the batch; "
    "test and validation: after each epoch, with the moving statistics."
)
_WAITED = (
    "Time of each rank inside exchanges: waiting for the other ranks and for the wire. A rank that waits less than "
    "the others is the one that they wait for. Right: the mean of the ranks, and their range."
)


def _drawn(name: str, caption: str, draw: Callable[[Figure], None]) -> Picture:
    figure = Figure(figsize=_WIDE, layout="constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    safe = "".join(character if character.isalnum() or character in "-_." else "_" for character in name)
    return Picture(safe, caption, file.getvalue())


# ---- loss and accuracy ----


def _learning(history: History, figure: Figure) -> None:
    loss, accuracy = figure.subplots(1, 2)
    ends = [history.position(epoch.steps) for epoch in history.epochs]
    steps = [history.position(point.step) for point in history.points]
    loss.plot(steps, [point.loss for point in history.points], color=_FADED, linewidth=0.8, label="training, per step")
    accuracy.plot(steps, [point.accuracy for point in history.points], color=_FADED, linewidth=0.8)
    dots = "o" if len(ends) <= _FEW else ""
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        for label, prefix, colour in (
            ("training", "", _TRAIN),
            ("validation", "validation_", _VALIDATION),
            ("test", "test_", _TEST),
        ):
            values = [getattr(epoch, prefix + what) for epoch in history.epochs]
            if ends and None not in values:
                axes.plot(ends, values, color=colour, marker=dots, markersize=3, label=label)
        axes.set_title(what)
        _epochs(axes, history)
    _scale(loss, [point.loss for point in history.points])
    loss.set_ylabel("cross-entropy, nats per row")
    loss.legend()
    accuracy.set_ylabel("rows classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    accuracy.set_ylim(top=1.005)
    if history.epochs:
        last = history.epochs[-1]
        # The first steps have a low accuracy; an axis that included them would compress the rest.
        lowest = min(min(epoch.accuracy, epoch.test_accuracy) for epoch in history.epochs)
        accuracy.set_ylim(bottom=max(0.0, lowest - 0.05))
        accuracy.annotate(
            f"test {last.test_accuracy:.2%}",
            (ends[-1], last.test_accuracy),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            va="top",
            color=_TEST,
        )


# ---- a layer's moving statistics ----


def _layer(history: History, seen: Sequence[tuple[int, LayerStatistics]], figure: Figure) -> None:
    mean, variance = figure.subplots(1, 2)
    ends = np.array([history.position(steps) for steps, _ in seen])
    for axes, what in ((mean, "moving_mean"), (variance, "moving_variance")):
        values_EC = np.array([getattr(layer, what) for _, layer in seen], np.float64)
        _bands(axes, ends, values_EC)
        axes.set_title(f"{seen[0][1].name}: {what.replace('_', ' ')}")
        _epochs(axes, history)
    mean.set_ylabel("activation before normalization")
    variance.set_ylabel("activation squared")
    _scale(variance, np.array([layer.moving_variance for _, layer in seen], np.float64).ravel())
    _legend_below(figure, mean)


def _bands(axes: Axes, ends: NDArray[np.float64], values_EC: NDArray[np.float64]) -> None:
    low, lower, middle, upper, high = np.quantile(values_EC, [0.0, 0.25, 0.5, 0.75, 1.0], axis=1)
    axes.fill_between(ends, low, high, color=_TRAIN, alpha=0.15, linewidth=0, label="all channels")
    axes.fill_between(ends, lower, upper, color=_TRAIN, alpha=0.35, linewidth=0, label="middle half")
    axes.plot(ends, middle, color=_TRAIN, marker="o" if len(ends) <= _FEW else "", markersize=3, label="median")
    if len(ends) == 1:  # a band of width 0 would be invisible
        axes.vlines(ends, low, high, color=_TRAIN, alpha=0.3, linewidth=6)
        axes.vlines(ends, lower, upper, color=_TRAIN, alpha=0.5, linewidth=6)


# ---- waiting ----


def _waiting(history: History, figure: Figure) -> None:
    totals, shares = figure.subplots(1, 2)
    epochs, waited_ER = history.waiting()
    seconds_E = np.array([epoch.seconds for epoch in epochs])
    ranks = np.arange(waited_ER.shape[1])
    waited_R = waited_ER.sum(axis=0)
    thick = 0.7 if len(ranks) <= _RANKS_NAMED else 1.0
    totals.barh(ranks, waited_R, color=_WAITING, label="in exchanges", height=thick)
    totals.barh(
        ranks, np.maximum(seconds_E.sum() - waited_R, 0), left=waited_R, color=_WORKING, label="the rest", height=thick
    )
    totals.set_title("time in training steps")
    totals.set_xlabel("seconds")
    totals.set_ylabel("rank")
    totals.set_ylim(max(len(ranks), 3) - 0.5, -0.5)  # rank 0 on top; few bars stay bars
    totals.set_yticks(ranks[:: -(-len(ranks) // _RANKS_NAMED)])
    totals.grid(axis="y", visible=False)
    _legend_below(figure, totals)

    share_ER = waited_ER / np.maximum(seconds_E, np.finfo(np.float64).tiny)[:, None]
    ends = [history.position(epoch.steps) for epoch in epochs]
    shares.fill_between(ends, share_ER.min(axis=1), share_ER.max(axis=1), color=_WAITING, alpha=0.25, linewidth=0)
    dots = "o" if len(ends) <= _FEW else ""
    shares.plot(ends, share_ER.mean(axis=1), color=_WAITING, marker=dots, markersize=3)
    shares.set_title("share of the time in exchanges")
    shares.set_ylabel("of the epoch's steps")
    shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    shares.set_ylim(0, max(1.0, float(share_ER.max())))
    _epochs(shares, history)


# ---- axes ----


def _epochs(axes: Axes, history: History) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    if history.resumed is not None:
        at = history.position(history.resumed)
        axes.axvline(at, color="#666666", linestyle=":", linewidth=1, label="resumed")


def _legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for both panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _scale(axes: Axes, values: Sequence[float] | NDArray[np.float64]) -> None:
    """Make an axis logarithmic if its values are positive and span decades; otherwise let it begin at zero."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.min() > 0 and finite.max() > _LOGARITHMIC * finite.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
