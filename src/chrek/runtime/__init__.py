"""What the node's container runtime knows about a container, asked over the container runtime interface (CRI).

CRI is what the kubelet itself uses, and containerd and CRI-O answer alike. Rejected: reading a runtime's
private state directories (they change between releases) and its own client protocols (one for each).
"""

from chrek.runtime.client import Runtime
from chrek.runtime.container import Container, ContainerMount

__all__ = ["Container", "ContainerMount", "Runtime"]
