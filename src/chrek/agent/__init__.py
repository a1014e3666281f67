"""The node's agent: the DaemonSet program that captures and restores other pods' applications.

It holds no state: what is to be done and what was done is read from the API, from the store, and from what each
container's init publishes. Every piece of work on a container is a process of its own.

``main``        start, stop, what is asked of it over HTTP
``config``      what the chart tells it
``controller``  which pod is looked at when
``captures``    pods to be checkpointed; ``slots`` how many at a time, ``liveness`` for how long
``restores``    pods to be restored, and how every pod of ours started
``unsaid``      what a killed predecessor had not said any more
``inside``      files in a container: ready file, signal file
``work``        one worker process, from outside; ``worker`` from inside
``node``        what all of them share
``log``, ``metrics``, ``web``, ``tracing``  what people and programs see of it
"""
