"""CRIU, unpatched: where it lies, how it is started, what is said to it, and what it writes.

`bundle` finds CRIU and the loader it must run through; `launch` starts it inside a container without
touching a file of that container; `rpc` speaks to it; `images` reads and edits its image files;
`credentials` bounds what an image may ask for. Nothing here decides what to dump or when.
"""
