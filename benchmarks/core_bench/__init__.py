"""ChReK beside stock CRIU: the same process, dumped and restored by both in turn.

``place``       where it happens: namespaces, a process in them, the store
``beats``       what the process itself says of time: when it stood still, when it lived again
``contenders``  the two programs, each as one command
``worker``      ChReK's command: one engine call in a process of its own
``rounds``      the order of everything
``report``      the table; ``plot`` the picture
``app``         the process
"""
