"""Labels, annotations and variables that users and ChReK write on pods: public interface, all of them."""

from typing import Final

SOURCE_LABEL: Final = "nvidia.com/checkpoint-source"
"""``"true"``: this pod is to be checkpointed."""
HASH_LABEL: Final = "nvidia.com/checkpoint-hash"
"""The checkpoint's id; optional."""
RESTORE_LABEL: Final = "nvidia.com/checkpoint-restore"
"""``"true"``: this pod is restored by its node's agent."""

CONTAINER_ANNOTATION: Final = "nvidia.com/checkpoint-container"
"""Which container; without it the usual rules say which."""
REPLACE_ANNOTATION: Final = "nvidia.com/checkpoint-replace"
"""``"true"``: an existing checkpoint of this id with other facts may be replaced."""
ALLOW_ANNOTATION: Final = "nvidia.com/checkpoint-allow"
"""Comma list of reason codes that the user overrides."""
START_ANNOTATION: Final = "nvidia.com/checkpoint-start"
"""Written by the agent: how the pod started."""
DEFAULT_CONTAINER_ANNOTATION: Final = "kubectl.kubernetes.io/default-container"

HASH_VARIABLE: Final = "DYN_CHECKPOINT_HASH"
SIGNAL_VARIABLE: Final = "DYN_CHECKPOINT_SIGNAL_FILE"
READY_VARIABLE: Final = "DYN_CHECKPOINT_READY_FILE"
LOCATION_VARIABLE: Final = "DYN_CHECKPOINT_LOCATION"
STORAGE_VARIABLE: Final = "DYN_CHECKPOINT_STORAGE_TYPE"
