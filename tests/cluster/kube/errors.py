"""The one error of the test cluster."""


class ClusterError(Exception):
    """The cluster cannot be built, started or removed; the message says what a person can do."""
