"""The report page of a run: one HTML file that contains its pictures and loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bnworker.train.data import spelled
from bnworker.train.events import Epoch
from bnworker.train.report.figures import Picture
from bnworker.train.report.history import History

# The content security policy: embedded pictures and styles only; the browser refuses everything else.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    history: History,
    pictures: Iterable[Picture],
    summary: Mapping[str, Any],
    *,
    when: str,
    failure: str | None,
    stopped: bool = False,
) -> str:
    """The page.

    Args:
        history: of the run.
        pictures: to show, in order.
        summary: the contents of `--summary`; of a failed run, the entries that are available.
        when: the time at which the run ended.
        failure: the error of a run that did not complete; None: it completed.
        stopped: whether it did not complete because it was asked to stop.
    """
    title = f"bnlayer train: {summary['data']}"
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    ending = "It was stopped." if stopped else "It failed."
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{style}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="when">ended {escape(when)}</p>',
        "" if failure is None else f'<p class="failed"><strong>{ending}</strong> {escape(failure)}</p>',
        _headline(history, summary),
        *map(_figure, pictures),
        _epochs(history.epochs),
        _settings("Settings", summary.get("settings", {})),
        _settings("Exchanges of rank 0", summary.get("exchanges", {})),
        "<footer>Written by bnlayer. This file holds all that it shows.</footer>",
        "</body></html>\n",
    ]
    return "\n".join(filter(None, parts))


def _headline(history: History, summary: Mapping[str, Any]) -> str:
    last = history.epochs[-1] if history.epochs else None
    points = history.points
    shown = {
        "test accuracy": _percent(summary.get("test_accuracy", last.test_accuracy if last else None)),
        "validation accuracy": _percent(last.validation_accuracy if last else None),
        "training loss": _number(last.loss if last else None, ".4f"),
        "labels": spelled(tuple(summary.get("labels", ()))),
        "epochs": f"{len(history.epochs):,}",
        "steps": _number(summary.get("steps", points[-1].step if points else None), ",.0f"),
        "ranks": str(summary["world_size"]) + (f" ({summary['transport']})" if summary["world_size"] > 1 else ""),
        "seconds of training": _number(summary.get("seconds"), ",.1f"),
        "rows/s": _number(summary.get("rows_per_second"), ",.0f"),
        "time reading rows": f"{history.reading_share:.1%}",
    }
    items = (f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in shown.items() if value)
    chosen = summary.get("kept_epoch", last and last.number)
    note = (
        f'<p class="when">The model that was kept is that of epoch {chosen}.</p>'
        if last and chosen != last.number
        else ""
    )
    return f'<dl class="figures">{"".join(items)}</dl>{note}'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = escape(picture.caption)
    return (
        f'<figure id="{escape(picture.name)}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _epochs(epochs: Sequence[Epoch]) -> str:
    columns = {
        "epoch": [str(epoch.number) for epoch in epochs],
        "steps": [f"{epoch.steps:,}" for epoch in epochs],
        "training loss": [f"{epoch.loss:.4f}" for epoch in epochs],
        "accuracy": [f"{epoch.accuracy:.2%}" for epoch in epochs],
        "validation loss": [_number(epoch.validation_loss, ".4f") for epoch in epochs],
        "accuracy ": [_percent(epoch.validation_accuracy) for epoch in epochs],
        "test loss": [f"{epoch.test_loss:.4f}" for epoch in epochs],
        "accuracy  ": [f"{epoch.test_accuracy:.2%}" for epoch in epochs],
        "learning rate": [f"{epoch.learning_rate:.3g}" for epoch in epochs],
        "seconds": [f"{epoch.seconds:.2f}" if epoch.seconds else "" for epoch in epochs],
    }
    used = {name: values for name, values in columns.items() if any(values)}
    head = "".join(f"<th>{name.strip()}</th>" for name in used)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in zip(*used.values(), strict=True)
    )
    return (
        f'<details><summary>Epochs</summary><div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
        if epochs
        else ""
    )


def _settings(title: str, values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_shown(value))}</td></tr>" for name, value in values.items()
    )
    return f"<details><summary>{title}</summary><table>{rows}</table></details>" if values else ""


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _number(value, ".2%")
