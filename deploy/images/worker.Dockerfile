# The image for workers and for MLflow, which workers require anyway. docker-compose.yml builds it from the repository's
# root. It contains TensorFlow for CPUs, or with REQUIREMENTS=worker-gpu TensorFlow with CUDA's libraries.
FROM python:3.12.14-slim-trixie AS build
# A mirror of the Python package index, for networks that cannot reach the public index.
ARG PIP_INDEX_URL
ARG REQUIREMENTS=worker
WORKDIR /opt
COPY requirements/${REQUIREMENTS}.txt requirements.txt
# Wheels only, because building a package would download its build tools without a hash.
RUN python -m venv --without-pip venv \
    && pip --python venv/bin/python install --disable-pip-version-check --no-cache-dir --only-binary=:all: \
        --require-hashes --requirement requirements.txt

FROM python:3.12.14-slim-trixie
# The user id is the same as in the API's image, because both write to one volume. A new volume gets the owner of its folder.
RUN groupadd --gid 10001 espalier \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin espalier \
    && install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/espalier /var/lib/mlflow
# The root file system is read-only, so libraries write their home files to the tmpfs. Telemetry is off.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true NNCF_CI=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /opt/espalier
COPY --from=build /opt/venv /opt/venv
COPY broker.py clock.py dispatch.py environments.py errors.py logs.py no_telemetry.py settings.py ./
COPY artifacts artifacts/
COPY console/vendor console/vendor/
COPY inference inference/
COPY migrations migrations/
COPY models models/
COPY ops/__init__.py ops/collect.py ops/migrate.py ops/weights.py ops/
COPY recipes recipes/
COPY training training/
COPY worker worker/
# If the repository was checked out with a strict umask, other users could not read its files.
RUN chmod -R a+rX . && python -m compileall -q .
USER 10001:10001
# If a package of this repository or a library is missing, the build fails, not the first start of a container.
RUN python -c "import worker.app, worker.child.__main__, ops.collect, ops.weights, training.experiment, mlflow"
CMD ["celery", "--app", "worker.app", "worker", "--loglevel", "WARNING"]
