# The server as an image. Two targets: cpu, and cuda, which is the last one and so the default.
#
#   docker build --target cpu -t transformers-openai-api:cpu --build-arg TORCH_INDEX_URL=... .
#   docker run --init -p 7088:7088 -v model-cache:/cache transformers-openai-api:cpu --hf-model demo
#   docker run --rm transformers-openai-api:cpu plan --hf-model demo     # what it would take, and whether it fits
#   docker build -t transformers-openai-api:cuda .
#   docker run --init --gpus all -p 7088:7088 -v model-cache:/cache transformers-openai-api:cuda
#
# Options follow the image's name, or are environment variables. Another port outside is `-p 8000:7088`; inside it is
# given as PORT, never as --port, because the health check reads PORT. `docker stop -t 90` leaves time for the drain.
# docker-compose.yml does all this.

# The Python that the tests run with.
ARG PYTHON_VERSION=3.11.14

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PATH=/venv/bin:$PATH

FROM base AS dependencies
# Where to get PyTorch from, as `start.sh --torch-index` takes it: the address that the selector on pytorch.org's
# "Get started" page shows. Without it, on x86-64, both targets get the build with CUDA: gigabytes that a CPU never uses.
ARG TORCH_INDEX_URL=""
WORKDIR /build
COPY requirements.txt ./
# Wheels only, so that no compiler is needed here. torch alone comes from the index, its
# dependencies with the rest.
RUN python -m venv /venv \
    && if [ -n "$TORCH_INDEX_URL" ]; then \
         python -m pip install --no-cache-dir --only-binary=:all: --no-deps --index-url "$TORCH_INDEX_URL" \
           "$(grep '^torch==' requirements.txt)"; \
       fi \
    && python -m pip install --no-cache-dir --only-binary=:all: -r requirements.txt

FROM base AS server
# What --torch-compile and the int4 kernel of --hqq are built with when they are asked for; nothing else is.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# The user owns the cache and nothing else; a new volume takes its owner from the image.
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin server \
    && install -d -o server -g server /cache /cache/huggingface
ENV HF_HOME=/cache/huggingface CACHE_DIR=/cache/transformers-openai-api
VOLUME /cache
COPY --from=dependencies /venv /venv
WORKDIR /app
# .dockerignore keeps what the server does not need out of these.
COPY LICENSE *.py ./
COPY api api/
COPY audio audio/
COPY demo demo/
COPY engine engine/
COPY runtime runtime/
COPY text text/
# A checkout made under a strict umask is readable by its owner only.
RUN chmod -R a+rX .
# A number, because Kubernetes' runAsNonRoot cannot tell who a name is.
USER 1000:1000
EXPOSE 7088
# An hour, because the first start downloads the model; ready sooner, the container is healthy sooner. http.client, for
# urllib would ask a proxy that the container has for its downloads.
HEALTHCHECK --start-period=1h --interval=30s --timeout=10s --retries=3 CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('localhost', int(os.environ.get('PORT') or 7088), timeout=5); server.request('GET', '/ready'); sys.exit(server.getresponse().status != 200)"]
# No shell in between, so that SIGTERM reaches the server. The address is given because HOSTNAME, which --host is read
# from, is the container's own name here; a --host among the options wins over it.
ENTRYPOINT ["python", "main.py", "--host", "0.0.0.0"]

FROM server AS cpu
ENV ACCELERATOR_TYPE=cpu

FROM server AS cuda
# Told, not guessed: a container that was started without its GPU says so instead of crawling along on the CPU.
ENV ACCELERATOR_TYPE=cuda NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN ["python", "-c", "import sys, torch; sys.exit(None if torch.version.cuda else 'this PyTorch has no CUDA: give another TORCH_INDEX_URL, or none')"]
