# docker build -t plrhf .                                  CPU
# docker build -t plrhf --build-arg TORCH=cu128 .          CUDA
# docker run --rm -v "$PWD:/work" plrhf train experiment=quickstart
FROM python:3.11-slim

ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/work/.cache/huggingface

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY plrhf plrhf
COPY conf conf
RUN pip install -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch==2.13.0 \
    && pip install -c constraints.txt ".[serve,judge,sweeps]" \
    && useradd --create-home --uid 1000 plrhf

USER 1000
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["plrhf"]
CMD ["--help"]
