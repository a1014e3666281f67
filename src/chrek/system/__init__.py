"""What the kernel gives: ids, /proc, mounts, namespaces, control groups, descriptors.

Everything here is a thin wrapper over one kernel interface, with that interface's odd facts written
down beside it. Nothing here knows what a checkpoint is.
"""
