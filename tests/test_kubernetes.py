# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes: what it says fits our images, servers and alerts, and charts take it.

What is rendered is checked against Kubernetes' own schemas and the definitions of the resources
that are not its own. Skipped where the tools are not installed (`make charts`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from ficoco_server.cli import FLAGS
from ficoco_server.lifecycle import LAST_WORDS
from ficoco_server.policy import Policy

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy/kubernetes"
TOOLS = ROOT / ".tools/kubernetes"
VERSION = "1.35"
CHARTS = {"vllm-stack": "production-stack.yaml", "llm-d-modelservice": "llm-d.yaml"}
SERVING = ("plain/server.yaml", "kserve.yaml", *CHARTS.values())
OWN = ("apps/", "autoscaling/", "policy/", "rbac.authorization.k8s.io/", "v1")
"""How versions of Kubernetes' own resources begin."""


def tool(name: str) -> str:
    """A command of the tools, or one that is on the PATH."""
    found = shutil.which(str(TOOLS / "bin" / name)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: make charts")
    return found


def documents(text: str) -> list[dict[str, Any]]:
    """Of YAML, without empty ones."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # definitions are megabytes
    return [document for document in yaml.load_all(text, loader) if document]


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All mappings in it."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for value in tree:
            yield from nodes(value)


def rendered(name: str) -> list[dict[str, Any]]:
    """The resources of a folder of ours, or of a chart with our values."""
    if name in CHARTS:
        helm, chart = tool("helm"), TOOLS / "charts" / name
        if not chart.exists():
            pytest.skip(f"needs the chart {name}: make charts")
        command = [helm, "template", "release", str(chart), f"--values={KUBERNETES / CHARTS[name]}"]
    else:
        command = [tool("kubectl"), "kustomize", str(KUBERNETES / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def containers(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of our image."""
    return [
        container
        for node in nodes(resources)
        for container in node.get("containers", ())
        if "vllm-ficoco" in container.get("image", "")
    ]


def monitoring(*flags: str) -> list[dict[str, Any]]:
    """What monitoring.py prints."""
    command = [sys.executable, str(KUBERNETES / "monitoring.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    items: list[dict[str, Any]] = json.loads(done.stdout)["items"]
    return items


def strict(schema: Any) -> Any:
    """A schema of a resource definition as JSON Schema has it, without unknown fields."""
    for node in nodes(schema):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        if node.pop("x-kubernetes-int-or-string", None):
            node.pop("type", None)
            node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return schema


def check_defined(resource: dict[str, Any]) -> None:
    """A resource against its definition, where that is there."""
    file = TOOLS / "definitions" / f"{resource['kind'].lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"needs the definition of a {resource['kind']}: make charts")
    [definition] = documents(file.read_text())
    _, version = resource["apiVersion"].split("/")
    [schema] = [
        strict(one["schema"]["openAPIV3Schema"])
        for one in definition["spec"]["versions"]
        if one["name"] == version
    ]
    schema["properties"]["metadata"] = {"type": "object"}
    errors = [e.message for e in Draft7Validator(schema).iter_errors(resource)]
    assert not errors, errors


@pytest.mark.parametrize("name", SERVING)
def test_variables_are_ours_and_mean_what_they_should(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [plugins] = set(
        re.findall(r"^ENV VLLM_PLUGINS=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    )
    known = {f"FICOCO_{flag.upper().replace('-', '_')}" for flag, *_ in FLAGS} | {"FICOCO_STAGES"}
    trees = documents((KUBERNETES / name).read_text())
    said = {
        variable["name"]: variable["value"]
        for node in nodes(trees)
        if isinstance(node.get("env"), list)
        for variable in node["env"]
        if "value" in variable
    }
    assert said["VLLM_PLUGINS"] == plugins
    ours = {key: value for key, value in said.items() if key.startswith("FICOCO_")}
    assert ours and ours.keys() <= known
    for key, value in ours.items():
        monkeypatch.setenv(key, value)
    assert Policy.from_environment().default_budget == int(ours["FICOCO_DEFAULT_BUDGET"])


def test_a_server_has_the_time_that_it_gives_its_clients() -> None:
    """Before it is killed: to be out of the Service, to answer, and for its last words."""
    for name in ("plain/server.yaml", "llm-d.yaml"):
        text = (KUBERNETES / name).read_text()
        [grace] = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)
        [seconds] = re.findall(r"--shutdown-timeout=(\d+)", text)
        [sleep] = re.findall(r'\[sleep, "(\d+)"\]', text)
        assert int(grace) > int(sleep) + int(seconds) + LAST_WORDS
    text = (KUBERNETES / "production-stack.yaml").read_text()
    assert int(re.findall(r"--shutdown-timeout=(\d+)", text)[0]) + LAST_WORDS < 30


def test_the_autoscaler_asks_for_a_metric_that_the_adapter_has() -> None:
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
    [scaler] = documents((KUBERNETES / "plain/autoscaler.yaml").read_text())
    [rule], [metric] = adapter["rules"]["custom"], scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].split("{")[0])


def test_monitoring_is_made_of_the_files() -> None:
    monitor, rules, dashboard = monitoring("--label=release=prometheus")
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert rules["spec"] == {"groups": alerts["groups"]}
    file = ROOT / "deploy/grafana/dashboards/vllm-ficoco.json"
    assert dashboard["data"] == {file.name: file.read_text()}
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    for one in (monitor, rules, dashboard):
        assert one["metadata"]["labels"]["release"] == "prometheus"
    deployment = documents((KUBERNETES / "plain/server.yaml").read_text())[0]
    pod = deployment["spec"]["template"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert monitor["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert endpoint["port"] in [p["name"] for p in pod["spec"]["containers"][0]["ports"]]
    assert monitoring("--without-monitor")[0]["kind"] == "PrometheusRule"


def test_alerts_find_the_job_by_its_name() -> None:
    [job] = set(re.findall(r'job="(\w+)"', (ROOT / "deploy/prometheus/alerts.yml").read_text()))
    relabelled = {"targetLabel": "job", "replacement": job}
    for tree in (
        monitoring(),
        *(documents((KUBERNETES / values).read_text()) for values in CHARTS.values()),
    ):
        assert [relabelled] in [node.get("relabelings") for node in nodes(tree)]


@pytest.mark.parametrize("name", ["plain", "cpu", *CHARTS])
def test_what_is_rendered_is_valid(name: str, tmp_path: Path) -> None:
    validate = tool("kubernetes-validate")
    resources = rendered(name)
    own = [one for one in resources if one["apiVersion"].startswith(OWN)]
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump_all(own))
    command = [validate, f"--kubernetes-version={VERSION}", "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for one in resources:
        if one not in own:
            check_defined(one)


def test_monitors_rules_and_kserve_are_as_defined(tmp_path: Path) -> None:
    kserve = documents((KUBERNETES / "kserve.yaml").read_text())
    for one in [*monitoring(), *kserve]:
        if one["kind"] != "ConfigMap":
            check_defined(one)


@pytest.mark.parametrize("name", ["plain", "cpu", *CHARTS])
def test_pods_run_our_server_as_nobody_special_and_are_looked_after(name: str) -> None:
    resources = rendered(name)
    [container] = containers(resources)
    command = container["command"]
    assert command[:2] == (["vllm-ficoco", "serve"] if name == "cpu" else ["vllm", "serve"])
    ports = {port.get("name"): port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["path"] == "/health" and ports.get(get["port"], get["port"]) == 8000
    [pod] = [node for node in nodes(resources) if container in node.get("containers", ())]
    assert pod["securityContext"]["runAsNonRoot"] is True
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["FICOCO_DEFAULT_BUDGET"] == ("48" if name == "cpu" else "192")


@pytest.mark.parametrize("name", CHARTS)
def test_what_a_pod_needs_of_a_secret_is_there(name: str) -> None:
    """Or the pod waits for it for ever; what values say can make a chart ask for a key."""
    resources = rendered(name)
    secrets = {
        (one["metadata"]["name"], key)
        for one in resources
        if one["kind"] == "Secret"
        for key in (one.get("data") or {}) | (one.get("stringData") or {})
    }
    asked = [node["secretKeyRef"] for node in nodes(resources) if "secretKeyRef" in node]
    assert {(one["name"], one["key"]) for one in asked} <= secrets


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_what_images_copy_is_there_for_them() -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    for source in " ".join(copies).split():
        assert source in allowed and (ROOT / source).exists(), source


def test_no_image_runs_as_root() -> None:
    """As a number, or Kubernetes cannot tell that it is not root; with a home that it may use."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.M)[1:]
    for stage in stages:
        name = re.findall(r"AS (\w+)$", stage, re.M)[0]
        if name == "build":
            continue
        assert int(re.findall(r"^USER (\S+)$", stage, re.M)[-1]) > 0, name
        if name == "gpu":
            [home] = re.findall(r"^ENV HOME=(\S+) USER=\S+$", stage, re.M)
            [volume] = compose["services"]["server-gpu"]["volumes"]
            assert volume == f"models:{home}/.cache/huggingface" and volume.split(":")[1] in stage
