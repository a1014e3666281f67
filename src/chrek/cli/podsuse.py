"""Which checkpoints the cluster's pods need: those that any pod names that has not ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chrek.errors import ChrekError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chrek.kube import Api, Pod

_CURE = "Name the ids to keep with --keep, and add --ignore-pods."


def in_use(kubeconfig: Path | None) -> frozenset[str]:
    """Return the ids that pods name which run or wait; none outside a cluster.

    Raises:
        ChrekError: the API does not say, or a pod takes its id from where it cannot be read.
    """
    from chrek.kube.api import Api, own_namespace

    namespace = own_namespace()
    if kubeconfig is None and namespace is None:
        return frozenset()
    api = Api.connect(kubeconfig)
    try:
        return _ids(api, namespace)
    finally:
        api.close()


def _ids(api: Api, namespace: str | None) -> frozenset[str]:
    from chrek.kube import selection

    found: set[str] = set()
    for pod in _pods(api, namespace):
        if pod.phase in {"Succeeded", "Failed"}:
            continue
        for each in selection.named(pod):
            if each is None:
                message = f"Pod {pod} takes the id of its checkpoint from elsewhere, so that it is not known here."
                raise ChrekError(Reason.API_FAILED, message, cure=f"Set its label nvidia.com/checkpoint-hash. {_CURE}")
            found.add(each)
    return frozenset(found)


def _pods(api: Api, namespace: str | None) -> Iterator[Pod]:
    """Yield all pods of the cluster, or of our own namespace where only those may be seen."""
    from chrek.kube import ApiFailed, every

    try:
        yield from every(api, None)
        return
    except ApiFailed as error:
        if not error.denied or namespace is None:
            raise ApiFailed(error.message, status=error.status, cure=_CURE) from error
    try:
        yield from every(api, namespace)
    except ApiFailed as error:
        raise ApiFailed(error.message, status=error.status, cure=_CURE) from error
