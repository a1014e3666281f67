"""The init of a checkpoint-enabled container: PID 1, cold start and restore.

It runs the application as its one child in a session of its own, so that the application is a tree
CRIU can dump and restore without touching the container around it, and otherwise behaves as if it
were not there: every signal is handed on, every zombie is reaped, and it ends as the application
ended.

It is the first process of every such container, so it starts in tens of milliseconds and imports
little: no `dataclasses`, `typing`, `json` or `re` before the application runs.

``__main__``     the first lines: signals blocked, the package found
``init``         PID 1's life, step by step
``environment``  what the variables ask for, or which of them is wrong; ``values`` reads each by its type
``inherited``    what the runtime gave this process, before Python changed it
``child``        the application, from fork to exec
``terminal``     a controlling terminal handed on to it
``signals``      every signal as a readable event, and how it is forwarded
``supervise``    forward, reap, end as the application ended
``checkpointing`` a stale signal file before, a failed checkpoint's verdict after
``restoring``    who restores, and what follows when nobody does
``handover``     waiting for a restore and taking its tree over; ``letterbox`` reads the mailbox
``lives``        how long the last restored starts lived
``clearing``     what a failed restore left: processes, changed files
``selfrestore``  the engine run from inside, as a child of PID 1
``report``       the log line, the termination message
"""
