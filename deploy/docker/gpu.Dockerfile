# GPU server: docker build -f deploy/docker/gpu.Dockerfile -t vilu-gpu:0.1.0 .
# docker run --rm --gpus 1 --read-only --tmpfs /tmp --shm-size 2g --cap-drop ALL -p 127.0.0.1:8001:8001 \
#   -v $PWD/serving/model_repository:/models:ro vilu-gpu:0.1.0
# TRITON is the release of NVIDIA's container. gpu.txt is for its Python, 3.12.
ARG TRITON=26.09
FROM python:3.12-slim-bookworm AS build
COPY deploy/docker/build.txt /locked/
RUN python -m venv /opt/build \
  && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: -r /locked/build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY .ci/import /src/.ci/import
COPY vilu /src/vilu
COPY kernels /src/kernels
COPY export /src/export
COPY serving /src/serving
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-index --no-build-isolation --wheel-dir /wheels /src

FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3
LABEL org.opencontainers.image.title="vilu-gpu" org.opencontainers.image.licenses="MIT"
COPY deploy/docker/gpu.txt /locked/
COPY --from=build /wheels /wheels
# Into the container's own Python: its stub of the Python backend runs with no other.
RUN python3 -m pip install --no-cache-dir --break-system-packages --ignore-installed --no-deps --require-hashes \
    --only-binary :all: -r /locked/gpu.txt \
  && python3 -m pip install --no-cache-dir --break-system-packages --no-deps --no-index /wheels/*.whl
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s CMD \
  ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8002/readyz', timeout=2)"]
CMD ["vilu", "serve", "--host", "0.0.0.0", "--model-repository", "/models", "--supervise", "--startup-seconds", "600"]
