# SPDX-License-Identifier: Apache-2.0
"""deploy/: the compose file, the alerts and the dashboard fit each other and a real server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ficoco_server.cli import SHUTDOWN_TIMEOUT
from ficoco_server.lifecycle import LAST_WORDS
from tests.server.conftest import MODEL, Server, image, user

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/vllm-ficoco.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
CONDITIONS = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
SCALING = [
    line
    for file in ("prometheus-adapter.yaml", "production-stack.yaml")
    for line in (DEPLOY / "kubernetes" / file).read_text().splitlines()
    if "uery: " in line and "<<" not in line
]
"""What more or fewer servers are decided by."""


def ask(server: Server) -> None:
    """A reduced image and an unreduced one."""
    for seed, more in ((time.time_ns(), {"reduction": {"budget": 16}}), (time.time_ns(), {})):
        server.openai.chat.completions.create(
            model=MODEL, messages=user(image(seed)), max_tokens=4, extra_body=more
        )


def test_compose_keeps_to_its_schema() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    run = subprocess.run([*checker, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_what_compose_builds_and_mounts_is_there() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
            assert service["build"]["target"] in stages
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_dir()
            elif not source.startswith("../"):
                assert source in COMPOSE["volumes"]


def test_compose_gives_servers_time_to_answer_and_starts_dead_ones_again() -> None:
    for name in ("server-cpu", "server-gpu"):
        service = COMPOSE["services"][name]
        command = service.get("command", [])
        seconds = SHUTDOWN_TIMEOUT  # of our command, the image's entrypoint for CPUs
        if name == "server-gpu":  # vLLM's
            seconds = int(command[command.index("--shutdown-timeout") + 1])
        assert int(service["stop_grace_period"].removesuffix("m")) * 60 > seconds + LAST_WORDS
        assert service["restart"] == "unless-stopped"


def test_grafana_finds_its_source_and_its_dashboards() -> None:
    grafana = DEPLOY / "grafana/provisioning"
    source = yaml.safe_load((grafana / "datasources/prometheus.yaml").read_text())["datasources"][0]
    folder = yaml.safe_load((grafana / "dashboards/dashboards.yaml").read_text())["providers"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]
    for panel in DASHBOARD["panels"]:
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {source["uid"]}
    mounted = dict(v.split(":")[:2] for v in COMPOSE["services"]["grafana"]["volumes"])
    assert mounted["./grafana/dashboards"] == folder["options"]["path"]


@pytest.mark.server
def test_dashboard_and_alerts_ask_for_series_that_there_are(server: Server) -> None:
    assert len(SCALING) == 2
    ask(server)
    page = server.http.get("/metrics").text
    known = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    for query in QUERIES + CONDITIONS + SCALING:
        for name in re.findall(r"vllm[:_][a-z0-9_]+", query):
            assert known & {name, re.sub(r"_(bucket|sum|count)$", "", name)}, (name, query)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool on the PATH")
def test_alerts_fire_when_they_should_and_else_not() -> None:
    command = ["promtool", "test", "rules", "alerts_test.yml"]
    run = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[str]:
    """Prometheus with the configuration of deploy/, at a server of the test; its address."""
    command = shutil.which("prometheus")
    if command is None:
        pytest.skip("needs Prometheus on the PATH")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = config["scrape_configs"]
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "prometheus/alerts.yml", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen(
        [command, *flags, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.server
def test_prometheus_answers_every_panel_and_takes_the_alerts(
    server: Server, prometheus: str
) -> None:
    def get(path: str, **params: str) -> Any:
        return httpx.get(f"{prometheus}/api/v1/{path}", params=params).json()["data"]

    for _ in range(8):
        ask(server)
        time.sleep(1)
    for query in QUERIES:
        result = get("query", query=query.replace("$__rate_interval", "1m"))["result"]
        assert result, query
    taken = [rule for group in get("rules")["groups"] for rule in group["rules"]]
    assert [rule["health"] for rule in taken] == ["ok"] * len(CONDITIONS)
    assert not [rule["name"] for rule in taken if rule["state"] == "firing"]
