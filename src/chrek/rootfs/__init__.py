"""Files: what a container changed, put into an archive, replayed elsewhere, and undone again.

=====================  ===================================================================
`container_overlay`    find the overlay that is a process's root
`diff_overlay`         write what its upper directory changed to an archive
`open_volume`          open a mounted volume as the container sees it
`pack_tree`            write a volume's whole content to an archive
`read_archive`         check an archive before anything is done with it
`apply`                replay it into a root or a volume, with a journal
`Journal`              undo or commit, also in a later process
`put_file, take_file`  write or remove a marker with the same journal
`save_links` …         carry CRIU's link-remap files
=====================  ===================================================================

Everything is reached by directory descriptors and ``openat2`` (Linux 5.6): no name in an archive or in
a container leads anywhere else. ``docs/format-files.md`` describes the archive.
"""

from chrek.rootfs.apply import Applied, apply, put_file, take_file
from chrek.rootfs.archive import Archive, read_archive
from chrek.rootfs.capture import Packed, diff_overlay, open_volume, pack_tree
from chrek.rootfs.journal import Journal
from chrek.rootfs.links import SideFile, put_back_links, remove_links, save_links
from chrek.rootfs.overlay import Overlay, container_overlay, mount_points

__all__ = [
    "Applied",
    "Archive",
    "Journal",
    "Overlay",
    "Packed",
    "SideFile",
    "apply",
    "container_overlay",
    "diff_overlay",
    "mount_points",
    "open_volume",
    "pack_tree",
    "put_back_links",
    "put_file",
    "read_archive",
    "remove_links",
    "save_links",
    "take_file",
]
