# Image for workers of the Beam pipelines with an NVIDIA GPU. JAX brings CUDA in wheels; the host brings the driver.
#
#     docker build -t IMAGE . && docker push IMAGE
#
# For workers without a GPU: --build-arg JAX=jax. The image and the machine that launches the pipeline must have the same version of Beam.
ARG BEAM=2.77.0
FROM apache/beam_python3.11_sdk:${BEAM} AS beam

FROM python:3.11-slim
ARG JAX=jax[cuda13]
COPY requirements/core.txt /tmp/core.txt
RUN pip install --no-cache-dir -r /tmp/core.txt \
    && pip install --no-cache-dir "${JAX}==$(sed -n 's/^jax==\([0-9.]*\).*/\1/p' /tmp/core.txt | head -n 1)" "apache-beam[gcp]" gcsfs s3fs -c /tmp/core.txt
COPY . /src
RUN pip install --no-cache-dir --no-deps /src
# Build, index and search run in several processes on one GPU: JAX must not reserve its memory.
ENV XLA_PYTHON_CLIENT_PREALLOCATE=false
COPY --from=beam /opt/apache/beam /opt/apache/beam
ENTRYPOINT ["/opt/apache/beam/boot"]
