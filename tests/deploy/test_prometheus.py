"""The files for Prometheus and Grafana: by promtool, against what the service exports, and with a real Prometheus.

A missing promtool fails the tests: `.ci/system-tools` says what is needed.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from bnserver.authorization import Role, entry
from bnserver.metrics import Seen, Source, of_jobs, of_service
from bnserver.servicer import Servicer
from bnserver.tls import Certificates, Files, load
from support.authorities import Authority
from support.service import daemon

_FOLDER = Path(__file__).parents[2] / "deploy/prometheus"
_ALERTS, _TESTS, _DASHBOARD = (_FOLDER / name for name in ("alerts.yml", "alerts_test.yml", "grafana.json"))
_LONG_S = 150.0


def _tool(name: str) -> str:
    executable = shutil.which(name)
    assert executable is not None, f"{name} is missing: see .ci/system-tools"
    return executable


def _promtool(*arguments: Any) -> tuple[int, str]:
    done = subprocess.run([_tool("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def _panels() -> list[dict[str, Any]]:
    return list(json.loads(_DASHBOARD.read_text())["panels"])


def test_the_rules_pass_promtool() -> None:
    """Their syntax, and their own tests; and the configuration that names them."""
    code, said = _promtool("check", "rules", _ALERTS)
    assert code == 0, said
    code, said = _promtool("check", "config", "--syntax-only", _FOLDER / "prometheus.yml")
    assert code == 0, said
    code, said = _promtool("test", "rules", _TESTS)
    assert code == 0, said


def test_each_alert_is_shown_firing() -> None:
    """One without a test could be a name that nothing exports."""
    alerts = {rule["alert"] for group in yaml.safe_load(_ALERTS.read_text())["groups"] for rule in group["rules"]}
    shown = {
        case["alertname"]
        for test in yaml.safe_load(_TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert shown == alerts


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("== 0\n        for: 1m", "== 1\n        for: 1m"),
        ('reason="PEER_LOST"', 'reason="none"'),
        ("> 0.1", "> 0.001"),
        ("0.5 * sum", "0.4 * sum"),
        ("> 60", "> 40"),
        ("changes", "resets"),
        ('state="recovering"', 'state="running"'),
        ("unsaved_jobs > 0", "unsaved_jobs > 1"),
        ("4 * 3600", "900"),
        ("14 * 86400", "9 * 86400"),
    ],
)
def test_promtool_notices_a_mistake(right: str, wrong: str, tmp_path: Path) -> None:
    """The tests of the rules can fail, for each of them."""
    text = _ALERTS.read_text()
    assert right in text
    (tmp_path / _ALERTS.name).write_text(text.replace(right, wrong))
    shutil.copy(_TESTS, tmp_path)
    code, said = _promtool("test", "rules", tmp_path / _TESTS.name)
    assert (code, "FAILED" in said) == (1, True), said


class _Everything(Collector):
    """All families, of a service without jobs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        async def seen() -> tuple[Seen, Source]:
            exchanges = Servicer(1, None)
            certificates = Certificates(load(Files(*Authority(self._folder / "authority").issue("server"))))
            source = Source(exchanges, asyncio.get_running_loop(), None, certificates, self._folder)
            return Seen(exchanges, lambda _: True), source

        snapshot, source = asyncio.run(seen())
        yield from of_service(snapshot, source)
        yield from of_jobs(snapshot)


def _exported(folder: Path) -> set[str]:
    registry = CollectorRegistry()
    registry.register(_Everything(folder))
    names: set[str] = set()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + ending for ending in endings}
    return names


def test_alerts_and_dashboard_ask_for_what_is_exported(tmp_path: Path) -> None:
    """A metric that was renamed would never fire, or draw."""
    (tmp_path / "x").mkdir()
    exported = _exported(tmp_path / "x")
    asked = set(re.findall(r"bnserver_\w+", _ALERTS.read_text() + _TESTS.read_text()))
    drawn = {name for panel in _panels() for t in panel["targets"] for name in re.findall(r"bnserver_\w+", t["expr"])}
    assert asked - exported == set()
    assert drawn - exported == set()


def test_the_dashboard_is_one_that_grafana_reads(tmp_path: Path) -> None:
    """Its expressions are PromQL, its variables are declared, its panels do not overlap."""
    dashboard = json.loads(_DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    expressions = [target["expr"] for panel in _panels() for target in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"\$(\w+)", text)} - {"__rate_interval"}
    assert used | {"datasource"} == variables
    rules = [
        {"record": f"panel:{n}", "expr": text.replace("$__rate_interval", "1m")} for n, text in enumerate(expressions)
    ]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = _promtool("check", "rules", tmp_path / "panels.yml")
    assert code == 0, said
    cells = [
        (x, y)
        for box in (panel["gridPos"] for panel in _panels())
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in _panels()}) == len(_panels())


@contextmanager
def _prometheus(configuration: Path, data: Path) -> Iterator[str]:
    """A Prometheus on a port that it chose; yields the address of its interface."""
    flags = [f"--config.file={configuration}", f"--storage.tsdb.path={data}", "--web.listen-address=127.0.0.1:0"]
    with subprocess.Popen([_tool("prometheus"), *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            while line := process.stderr.readline():
                said.append(line)
                if match := re.search(r'msg="Listening on" address=(\S+)', line):
                    yield f"http://{match[1]}"
                    return
            raise AssertionError("".join(said))
        finally:
            process.kill()


@pytest.mark.rpc
def test_a_real_prometheus_scrapes_as_configured(tmp_path: Path) -> None:
    """With the file that is here, over TLS and with a reader's token; names of hosts and files aside."""
    authority = Authority(tmp_path / "authority")
    tokens, token, log = tmp_path / "tokens.toml", tmp_path / "metrics.token", tmp_path / "log"
    tokens.touch(0o600)
    tokens.write_text(entry("prometheus", "metrics-secret", ["*"], Role.READER))
    token.write_text("metrics-secret")
    flags = (*authority.flags(), "--tokens", str(tokens), "--metrics", "127.0.0.1:0", "--log-file", str(log))
    with daemon(*flags):
        (line,) = [line for line in log.read_text().splitlines() if "metrics: " in line]
        target = line.split()[-1].removeprefix("https://").removesuffix("/metrics")
        text = (_FOLDER / "prometheus.yml").read_text()
        for given, ours in (
            ("/etc/prometheus/bnlayer-ca.pem", str(authority.ca)),
            ("/etc/prometheus/bnlayer-metrics.token", str(token)),
            ("trainer:9464", target),
            ("15s", "1s"),
            ("alerts.yml", str(_ALERTS)),
        ):
            assert text.count(given) == 1
            text = text.replace(given, ours)
        (tmp_path / "prometheus.yml").write_text(text)
        with _prometheus(tmp_path / "prometheus.yml", tmp_path / "data") as address:

            def asked(query: str) -> list[Any]:
                url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
                try:
                    with urllib.request.urlopen(url, timeout=_LONG_S) as answer:
                        return list(json.load(answer)["data"]["result"])
                except urllib.error.HTTPError as error:
                    error.close()
                    if error.code != 503:  # it listens before it is ready
                        raise
                    return []

            while not asked("up == 1"):  # a test that waits in vain ends by its timeout
                time.sleep(0.1)
            (jobs,) = asked('bnserver_jobs{state="running"}')
            assert jobs["metric"]["job"] == "bnserver"
            assert jobs["value"][1] == "0"
            (ends,) = asked("bnserver_certificate_expiry_timestamp_seconds > time()")
            assert ends["metric"]["instance"] == target
