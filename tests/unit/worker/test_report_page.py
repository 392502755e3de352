"""The page of a run: it holds everything that it shows, and shows nothing but the run's events."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bnworker.train.report.recorder import Recorder
from support.events import STEPS_PER_EPOCH, run, step

SUMMARY: dict[str, Any] = {
    "data": "rows <of> my/own.npz",
    "world_size": 2,
    "transport": "service",
    "test_accuracy": 0.625,
    "kept_epoch": 2,
    "steps": 15,
    "seconds": 1.5,
    "rows_per_second": 12345.6,
    "settings": {"hidden": [128, 64], "early_stop": None},
    "exchanges": {"bn_1 forward sums": 15},
}


class Reader(HTMLParser):
    """Collects elements, attributes and text; a tag that is not closed is a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an element."""
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """It closes the one that was opened last."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Remember the text."""
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        assert not self._open
        return [attributes for name, attributes in self.tags if name == tag]


def read(folder: Path) -> Reader:
    """The page in a folder."""
    reader = Reader()
    reader.feed((folder / "index.html").read_text(encoding="utf-8"))
    reader.close()
    return reader


def recorded(folder: Path, summary: dict[str, Any] = SUMMARY, failure: str | None = None) -> Reader:
    """The page of a run of three epochs."""
    recorder = Recorder(folder, None, 3 * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    for event in run(3):
        recorder.watch(event)
    recorder.finish(summary, failure)
    return read(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that went well: drawn once, read by several tests."""
    folder = tmp_path_factory.mktemp("report")
    recorded(folder)
    return folder


def test_it_fetches_nothing(folder: Path) -> None:
    """Every picture lies within; no element, and no style, refers to anything outside; the browser is told so."""
    page = read(folder)
    pictures = page.all("img")
    assert len(pictures) == 4
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    assert {tag for tag, _ in page.tags} & {"link", "script", "iframe", "object", "a", "base", "source"} == set()
    assert not any("href" in attributes or "style" in attributes for _, attributes in page.tags)
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", text)
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_pictures_are_files_too(folder: Path) -> None:
    """Beside the page, and nothing else."""
    names = ["index.html", "layer_bn_1.png", "layer_bn_2.png", "learning.png", "waiting.png"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_page_holds_what_was_recorded(folder: Path) -> None:
    """The figures of the summary, one row an epoch, settings, exchanges; names of files are text, not markup."""
    page = read(folder)
    assert "bnlayer train: rows <of> my/own.npz" in page.text
    for shown in ("62.50%", "2 (service)", "12,346", "The model that was kept is that of epoch 2.", "128, 64"):
        assert shown in page.text
    assert page.text.count("not given") == 1
    assert len(page.all("tr")) == 1 + 3 + 2 + 1
    assert "It failed." not in page.text


def test_a_run_that_failed(tmp_path: Path) -> None:
    """It says why, and shows what there is."""
    summary = {"data": "digits", "world_size": 1, "transport": "alone"}
    page = recorded(tmp_path, summary, failure="DivergedError: The loss of step 7 is <nan>")
    assert "It failed. DivergedError: The loss of step 7 is <nan>" in page.text
    assert "75.00%" in page.text  # the last epoch's, as there is no other


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    """It did not fail; steps that do not fill a point of the picture are in it all the same."""
    recorder = Recorder(tmp_path, None, 4000, 2000)
    for number in range(1, 4):
        recorder.watch(step(number))
    recorder.finish({"data": "digits", "world_size": 1, "transport": "alone"}, "SIGINT after step 3.", stopped=True)
    page = read(tmp_path)
    assert "It was stopped. SIGINT after step 3." in page.text
    assert "It failed." not in page.text
    assert "steps3" in page.text


def test_a_run_that_failed_at_once(tmp_path: Path) -> None:
    """No epoch is over yet: no table, no headline of one; and no division by zero."""
    recorder = Recorder(tmp_path, None, 10, 5)
    recorder.watch(step(1))
    recorder.finish({"data": "digits", "world_size": 1, "transport": "alone"}, "why")
    page = read(tmp_path)
    assert "test accuracy" not in page.text
    assert [picture["alt"][:4] for picture in page.all("img")] == ["Loss"]


def test_an_earlier_report_outlives_a_run_that_never_began(tmp_path: Path) -> None:
    """Wrong settings for `--resume`, say, must not replace it by an empty one."""
    recorded(tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    assert Recorder(tmp_path, None, 10, 5).finish(SUMMARY, "CheckpointError") is None
    assert (tmp_path / "index.html").read_bytes() == before


def test_a_recorder_without_folders_writes_nothing(tmp_path: Path) -> None:
    """A recorder without folders writes nothing."""
    recorder = Recorder(None, None, 10, 5)
    recorder.watch(step(1))
    assert recorder.finish(SUMMARY) is None
    assert list(tmp_path.iterdir()) == []
