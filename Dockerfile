# megatron_slm for NVIDIA GPUs. Written for CUDA 12.8 and not built yet: there was no Docker where it was written.
#   docker build -t megatron_slm . && docker run --gpus all --ipc=host -v $PWD:/work -w /work megatron_slm slm-pretrain --help
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 \
    VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# python3-dev and build-essential: Triton and DeepSpeed compile small C extensions at the first use
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
       build-essential git iproute2 openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV"

RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu128
COPY . /opt/megatron_slm
WORKDIR /opt/megatron_slm
RUN pip install -c constraints.txt ".[preprocess]" "triton>=3.3"

WORKDIR /workspace
CMD ["slm-pretrain", "--help"]
