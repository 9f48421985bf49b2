# The commands with CUDA, and the scripts that train: builds without a GPU, runs on one from Turing on.
#
#   docker build -t grpo-pipes .
#   docker run --gpus all -v "$PWD/runs:/work/runs" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" grpo-pipes
#
# trains the recipe RECIPE (-e RECIPE=... and every number of it, as with `make train`) in runs/.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential ca-certificates curl && \
    curl -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal
ENV PATH=/root/.cargo/bin:$PATH
WORKDIR /src
COPY . .
RUN make install CUDA=1 PREFIX=/opt/grpo-pipes

# With cuBLASLt, which the devel image has too, but not its compiler.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates jq && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/grpo-pipes /usr/local
ENV RECIPE=qwen2.5-0.5b
WORKDIR /work
CMD ["bash", "/usr/local/share/grpo-pipes/pipelines/train.sh"]
