# SPDX-License-Identifier: Apache-2.0
"""What a cluster with the Prometheus operator and Grafana needs to watch our servers.

    python deploy/kubernetes/monitoring.py | kubectl apply --filename -

A PodMonitor for the servers of ``plain/``, the alerts of ``deploy/prometheus`` as a PrometheusRule
and the dashboard of ``deploy/grafana`` as a ConfigMap, which Grafana's sidecar takes by its label.
Production-stack and llm-d make a monitor of their own, so they need ``--without-monitor``.

Needs PyYAML.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
NAME = "vllm-ficoco"
JOB = "vllm"
"""What the alerts call it."""


def pod_monitor(labels: dict[str, str]) -> dict[str, Any]:
    """Servers with a port `http` whose pods have our name, scraped under the name of the job."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": NAME, "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": NAME}},
            "podMetricsEndpoints": [
                {
                    "port": "http",
                    "path": "/metrics",
                    "interval": "15s",
                    "relabelings": [{"targetLabel": "job", "replacement": JOB}],
                }
            ],
        },
    }


def rules(labels: dict[str, str]) -> dict[str, Any]:
    """The alerts."""
    alerts = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": NAME, "labels": labels},
        "spec": {"groups": alerts["groups"]},
    }


def dashboard(labels: dict[str, str]) -> dict[str, Any]:
    """The dashboard, as it is in the file."""
    file = DEPLOY / "grafana/dashboards/vllm-ficoco.json"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": f"{NAME}-dashboard",
            "labels": {**labels, "grafana_dashboard": "1"},
        },
        "data": {file.name: file.read_text()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--label", action="append", default=[], metavar="release=prometheus",
        help="by which your Prometheus selects monitors and rules; may be repeated")  # fmt: skip
    add("--without-monitor", action="store_true", help="rules and dashboard alone")
    args = parser.parse_args()
    labels = dict(label.split("=", 1) for label in args.label)
    objects = [rules(labels), dashboard(labels)]
    if not args.without_monitor:
        objects.insert(0, pod_monitor(labels))
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=1))


if __name__ == "__main__":
    main()
