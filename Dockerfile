# The image that nodes and jobs run: vectormill with all it needs at the versions of constraints.txt, and all-MiniLM-L6-v2.
#
#   docker build -t REGISTRY/vectormill:TAG .                             # GPUs and CPUs: torch comes with CUDA
#   docker build -t REGISTRY/vectormill:TAG --build-arg EXTRAS=[gpu] .    # and the index kernels for GPUs
#   docker build -t REGISTRY/vectormill:TAG --build-arg TORCH_INDEX=URL . # CPUs only, a few GB smaller; URL: PyTorch's CPU wheels
#
# For an image that can be made again byte by byte give PYTHON_IMAGE by its digest.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

# bash and wget: KubeRay's start commands and probes. openssh-client and rsync: `ray up`, whose head reaches its workers so.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash vectormill

ENV HOME=/home/vectormill \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TOKENIZERS_PARALLELISM=false

# Dependencies are a layer of their own, made again only when they change. They go to /usr/local, which is on the path of
# every shell, also of a login shell. boto3: Ray's autoscaler on AWS.
WORKDIR /opt/vectormill
ARG EXTRAS=
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" python -m pip install --no-cache-dir -c constraints.txt ".${EXTRAS}" boto3 \
    && python -m pip uninstall --yes vectormill \
    && rm -rf README.md LICENSE build *.egg-info

COPY README.md LICENSE ./
COPY kernels kernels
COPY operators operators
COPY cluster cluster
COPY pipelines pipelines
RUN python -m pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q kernels operators cluster pipelines \
    && vectormill --version

# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/vectormill
ENTRYPOINT ["vectormill"]
