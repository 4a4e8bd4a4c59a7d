# CPU server: docker build -f deploy/docker/cpu.Dockerfile -t vilu:0.1.0 .
# docker run --rm --read-only --tmpfs /tmp --shm-size 512m --cap-drop ALL -p 127.0.0.1:8001:8001 \
#   -v $PWD/serving/model_repository:/models:ro vilu:0.1.0
FROM python:3.11-slim-bookworm AS build
COPY deploy/docker/build.txt deploy/docker/cpu.txt /locked/
RUN python -m venv /opt/build && python -m venv --without-pip /opt/vilu \
  && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: -r /locked/build.txt \
  && /opt/build/bin/pip --python /opt/vilu/bin/python install --no-cache-dir --no-deps --require-hashes \
    --only-binary :all: -r /locked/cpu.txt
COPY pyproject.toml README.md LICENSE /src/
COPY .ci/import /src/.ci/import
COPY vilu /src/vilu
COPY kernels /src/kernels
COPY export /src/export
COPY serving /src/serving
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-index --no-build-isolation --wheel-dir /wheels /src \
  && /opt/build/bin/pip --python /opt/vilu/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="vilu" org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 1000 vilu && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp vilu
COPY --from=build /opt/vilu /opt/vilu
ENV PATH=/opt/vilu/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD \
  ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8002/readyz', timeout=2)"]
CMD ["vilu", "serve", "--host", "0.0.0.0", "--model-repository", "/models", "--supervise"]
