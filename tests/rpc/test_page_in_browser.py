"""The page of `bnlayer serve --dashboard` in a real browser: what a person sees of a job, its drift and its end.

Whatever a test does, the browser must report no error and ask no other host.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bnlayer import BatchNormalization, PeerLostError
from bnserver.authorization import Role, entry
from support.authorities import Authority
from support.looking_on import LONG_S, X, joined, logged_url, train, until

pytestmark = [pytest.mark.rpc, pytest.mark.fault]

expect.set_options(timeout=LONG_S * 1000)

_PACE_S = 0.05  # the page looks once a second; a rank that never rests would take a core from it
_SAMPLES = 21  # a band has to be known before something can leave it

_UNAUTHORIZED = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"

# Rank 1 of 2, until it is killed.
_RANK = """
import sys, time
from bnlayer import BatchNormalization
from support.looking_on import X, joined
world = joined(sys.argv[1], 1, 2)
layer = BatchNormalization(synchronized=True, name="a", collective=world)
print("joined", flush=True)
while True: layer(X, training=True)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program is not None, "no Chromium: install your system's package for it, on Debian chromium"
    with (
        sync_playwright() as playwright,
        # Without its sandbox it starts as root, too; it opens a page of ours alone.
        playwright.chromium.launch(executable_path=program, chromium_sandbox=False) as started,
    ):
        yield started


@contextmanager
def opened(browser: Browser, url: str, *, reported: Sequence[str] = (), **options: Any) -> Iterator[Page]:
    """A page; at its end, the browser must have reported no more than this, and asked no other host."""
    errors: list[str] = []
    asked: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield page
        page.goto("about:blank")  # what the service's end means for a page is not an error of this one
    assert errors == list(reported)
    assert {urlsplit(each).netloc for each in asked if not each.startswith("about:")} == {urlsplit(url).netloc}


def test_a_job_is_seen_drifts_and_loses_a_rank(browser: Browser, serve: Callable[..., Any], tmp_path: Path) -> None:
    """From two ranks and a quiet layer to an alarm, and to the name of the rank that was killed."""
    log = tmp_path / "log"
    service = serve("--dashboard", "127.0.0.1:0", "--log-file", str(log))
    url, shift, lost = logged_url(log, "dashboard: "), [0.0], threading.Event()

    def first() -> None:
        try:
            with joined(service.address, 0, 2) as world:
                layer = BatchNormalization(synchronized=True, name="a", collective=world)
                while True:
                    layer(X + shift[0], training=True)
                    time.sleep(_PACE_S)
        except PeerLostError:
            lost.set()

    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _RANK, service.address]
    thread = threading.Thread(target=first, daemon=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as second, opened(browser, url) as page:
        try:
            thread.start()
            job = page.get_by_role("group", name="Choose a job").get_by_role("button")
            expect(job).to_contain_text("job: running, 2 of 2 ranks")
            expect(page.get_by_role("group", name="Choose a layer").get_by_role("button")).to_have_text("a (2)")
            expect(page.locator("#ranks tr")).to_have_count(2)
            expect(page.locator("#mean canvas")).to_be_visible()
            expect(page.locator("#alarms li")).to_have_text("none")
            _is_usable_by_keyboard_and_on_a_phone(page)

            series = f"{url}series?job=job&layer=a"
            until(lambda: len(page.request.get(series).json()["time"]) >= _SAMPLES)
            shift[0] = 1e4
            drift = "the moving variance of 2 channels left its recent band"
            expect(page.locator("#alarms li").filter(has_text=drift)).to_have_count(1)

            second.send_signal(signal.SIGKILL)
            failure = page.locator("#failures li").first
            expect(failure).to_contain_text("job, generation 1: PEER_LOST: rank 1 (host ")
            expect(page.locator("#status")).to_have_text("no job runs")
            assert lost.wait(LONG_S)
        finally:
            second.kill()
    thread.join(LONG_S)


def _is_usable_by_keyboard_and_on_a_phone(page: Page) -> None:
    """The tab key reaches the choice of jobs; at 400 pixels nothing is cut off; in the dark the page is dark."""

    def focused() -> str:
        return str(page.evaluate("document.activeElement.innerText"))

    while not focused().startswith("job: "):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaPressed") == "true"
    size = page.viewport_size
    assert size is not None
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function("document.scrollingElement.scrollWidth <= 400")  # the charts follow a frame later
    page.set_viewport_size(size)

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    light = background()
    page.emulate_media(color_scheme="dark")
    assert sum(_channels(background())) < sum(_channels(light)) / 2


def _channels(colour: str) -> list[int]:
    return [int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


def test_the_page_asks_for_a_token(browser: Browser, serve: Callable[..., Any], tmp_path: Path) -> None:
    """A wrong one is refused in words; a reader's shows the jobs of its pattern and no other."""
    authority, log, tokens = Authority(tmp_path / "authority"), tmp_path / "log", tmp_path / "tokens.toml"
    tokens.touch(0o600)
    tokens.write_text(
        entry("ops", "ops-secret", ["*"], Role.ADMIN) + entry("team", "team-secret", ["team-*"], Role.READER)
    )
    flags = ("--tokens", str(tokens), "--dashboard", "127.0.0.1:0", "--log-file", str(log))
    service = serve(*authority.flags(), *flags)
    credentials = authority.credentials(token="ops-secret")
    with (
        joined(service.address, job="team-1", credentials=credentials) as world,
        joined(service.address, job="other", credentials=credentials),
        opened(browser, logged_url(log, "dashboard: "), reported=[_UNAUTHORIZED] * 2, ignore_https_errors=True) as page,
    ):
        train(world, 1)
        expect(page.locator("#status")).to_have_text("a token is needed")
        page.get_by_label("Token").fill("wrong-secret")
        page.keyboard.press("Enter")
        expect(page.locator("#refusal")).not_to_be_empty()
        page.get_by_label("Token").fill("team-secret")
        page.keyboard.press("Enter")
        expect(page.locator("#jobs button")).to_have_count(1)
        expect(page.locator("#jobs button")).to_contain_text("team-1: running")
        expect(page.get_by_label("Token")).to_be_hidden()
