"""What ChReK asks of and says to the Kubernetes API, over the official client.

Nothing is remembered here that a restart would miss: state is in the API's own objects and in the store.
"""

from chrek.kube.api import Api, ApiFailed, own_namespace
from chrek.kube.events import EventReason, Events
from chrek.kube.leases import CheckpointLease
from chrek.kube.pods import Pod, PodContainer, annotate, every
from chrek.kube.watch import PodWatch

__all__ = [
    "Api",
    "ApiFailed",
    "CheckpointLease",
    "EventReason",
    "Events",
    "Pod",
    "PodContainer",
    "PodWatch",
    "annotate",
    "every",
    "own_namespace",
]
