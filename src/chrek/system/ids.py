"""Process ids that cannot be mixed up.

A process inside a container has one id in the container's PID namespace and another one in the
namespace of whoever looks at it from outside. Handing one to a call that wants the other acts on a
stranger's process, so the two are different types.
"""

# Not typing.TYPE_CHECKING: importing typing costs a container's init 15 ms and 2 MB for two names
# that are plain integers at run time. Type checkers know the constant by its name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NewType

    HostPid = NewType("HostPid", int)
    """A process id as the calling program's own /proc shows it."""

    NsPid = NewType("NsPid", int)
    """A process id inside the application's PID namespace: what CRIU's images and the application see."""
else:
    HostPid = int
    NsPid = int
