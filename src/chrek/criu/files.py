"""Open files in the images that come from outside the container: the standard streams.

A restore gives the application the new container's streams in their place, which are other files, maybe
of another type. CRIU opens such a file anew through the link that /proc has for the descriptor it was
given, compares it with what it dumped, and seeks to the old position. Each of these is wrong for a
stream that is not the same file.
"""

from __future__ import annotations

import os

from chrek.criu.images import Image
from chrek.criu.messages import File


def loosen_external_files(directory: int) -> int:
    """Let files from outside be other files at a restore; return how many there are.

    Their size and type are no longer compared; what is written goes to the end; and O_NOFOLLOW, with
    which Python opens temporary files, is taken from them, or the link would be refused (ELOOP).

    Raises:
        Refused: ``CORRUPT``.
        OSError: the image cannot be written.
    """
    image: Image[File] = Image.read(directory, "files.img")
    loosened = 0
    for number, file in enumerate(image.decode(File)):
        regular = file.regular
        if regular is None or not regular.external:
            continue
        regular.size = regular.mode = None
        regular.flags &= ~os.O_NOFOLLOW
        if regular.flags & os.O_ACCMODE != os.O_RDONLY:
            regular.flags |= os.O_APPEND
            regular.position = 0
        image.entries[number] = file.encode()
        loosened += 1
    if loosened:
        image.write(directory)
    return loosened
