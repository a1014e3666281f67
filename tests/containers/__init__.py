"""Real containers for the tests: runc on an overlay root, made and removed in a fraction of a second.

The harness stands where a container runtime and its shim stand on a node: it makes the root file system, starts
runc, holds the other ends of the container's standard streams, reaps PID 1 and knows its exit status. Nothing of the
project is used here, so a test's container says what the code under test finds on a real node.
"""

from containers.container import Container, ExecError
from containers.layout import PREFIX, base_root, remove_leftovers
from containers.needs import bundle, needs
from containers.spec import Mount

__all__ = ["PREFIX", "Container", "ExecError", "Mount", "base_root", "bundle", "needs", "remove_leftovers"]
