"""Every error ChReK raises on purpose, and the closed list of reasons.

::

    ChrekError                  exit 1
    ├── UsageError              exit 2    a bad option, or a bad value in the environment
    ├── CaptureFailed           exit 170  the application was unharmed
    ├── RestoreFailed           exit 171  a cold start would work
    └── Refused                 exit 172  nothing was touched

Each carries a `Reason` (a stable code that programs may compare), a message that says what happened
to what, and a cure that says what to do next. The tables in ``docs/reasons.md`` are generated from
this module.
"""

from __future__ import annotations

from enum import Enum


class ExitCode(int, Enum):
    """How ChReK's programs end; an application that ran gives its own status instead."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    CAPTURE_FAILED = 170
    RESTORE_FAILED = 171
    REFUSED = 172


class Reason(Enum):
    """A stable reason code, what it means, and the usual cure.

    The name is the code. A raise may give a more exact cure; it may not invent a code.
    """

    summary: str
    cure: str

    def __init__(self, summary: str, cure: str) -> None:
        self.summary = summary
        self.cure = cure

    @property
    def code(self) -> str:
        """The code as users see it, for example ``IO_URING_IN_USE``."""
        return self.name

    @classmethod
    def parse_list(cls, text: str) -> frozenset[Reason]:
        """Read a comma list of codes, as ``CHREK_ALLOW`` has it.

        Raises:
            UsageError: ``BAD_VALUE``, naming the word that is not a code.
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        for word in words:
            if word not in cls.__members__:
                raise UsageError(cls.BAD_VALUE, f"{word!r} is not a reason code; docs/reasons.md lists them all.")
        return frozenset(cls[word] for word in words)

    # --- usage ---------------------------------------------------------------------------------
    BAD_VALUE = (
        "An option or environment variable has a value that is not allowed.",
        "Set it to one of the values that the message lists.",
    )
    BAD_ID = (
        "A checkpoint id is not 1 to 63 characters of A-Z a-z 0-9 . _ - starting with a letter or digit.",
        "Choose an id of that form; it becomes the name of a directory.",
    )
    KNOB_REFUSED = (
        "A tuning variable asks for something that cannot be had here.",
        "Unset the variable that the message names.",
    )
    NO_COMMAND = (
        "There is no application command to run.",
        "Give the command after --, or set args in the pod.",
    )

    # --- this host -----------------------------------------------------------------------------
    NOT_SUPPORTED_HERE = (
        "This machine lacks something ChReK needs.",
        "Run `chrek doctor`; it names each missing piece and how to get it.",
    )
    CRIU_UNUSABLE = (
        "CRIU is missing, older than 4.1.1, or its own check fails on this kernel.",
        "Install the bundle (`make setup`), or point CHREK_CRIU_BUNDLE at a newer one.",
    )
    NO_SPACE = (
        "The store has not enough free space for this checkpoint.",
        "Free space or enlarge the volume by the amount the message gives; `chrek gc` removes old checkpoints.",
    )

    # --- Kubernetes ----------------------------------------------------------------------------
    RUNTIME_UNREACHABLE = (
        "No container runtime of this node answers over the container runtime interface.",
        "Set the chart's runtime socket to the path that the kubelet uses on this node.",
    )
    CONTAINER_GONE = (
        "The container does not run any more.",
        "Nothing to do: it ended or was replaced; a new container is looked at anew.",
    )
    API_FAILED = (
        "The Kubernetes API refused a request or did not answer.",
        "Look at the status in the message: 401 and 403 are the chart's RBAC, anything else the API server.",
    )
    NO_READINESS_PROBE = (
        "The container to be checkpointed has no readiness probe.",
        "Add one that reads the ready file: without it the pod is Ready, and would be captured, half loaded.",
    )
    POD_NOT_SUPPORTED = (
        "The pod has a feature that neither capture nor restore can work with.",
        "Remove the feature that the message names from the pod's spec.",
    )
    STORE_MISMATCH = (
        "The pod's checkpoint volume is another one than the agent's.",
        "Mount the agent's own claim (chrek-pvc), without subPath, or mount none: the agent needs no volume in the pod.",
    )
    TENANT_MISMATCH = (
        "The checkpoint belongs to another namespace.",
        "Take a checkpoint in this namespace, or let the chart's shareWith name this one.",
    )
    LIVENESS_TOO_TIGHT = (
        "The application would stand still for longer than its liveness probe bears.",
        "Raise the probe's failureThreshold, or remove the probe from the checkpoint job.",
    )
    RESTORE_GIVEN_UP = (
        "Three restored starts of this container in a row ended within a minute, or one said that its state is damaged.",
        "Look at the application's log of those starts; the container starts cold until the pod is made anew.",
    )
    CONTAINER_UNCLEAR = (
        "The pod does not say which of its containers is meant.",
        "Name it in the annotation nvidia.com/checkpoint-container.",
    )
    LEASE_LOST = (
        "Another node took over writing this checkpoint.",
        "Nothing to do: the other node's capture goes on.",
    )

    # --- what cannot be captured ---------------------------------------------------------------
    APP_NOT_FOUND = (
        "No application started by ChReK's init was found.",
        "Start the container's command through restore-entrypoint (or `chrek run`).",
    )
    APP_IS_PID1 = (
        "The application is PID 1 of its container.",
        "Start the command through restore-entrypoint, so that ChReK's init is PID 1.",
    )
    IO_URING_IN_USE = (
        "A process has an io_uring instance, which CRIU cannot dump.",
        "Set CHREK_BLOCK_IO_URING=true, or turn io_uring off in the application.",
    )
    DESCRIPTOR_UNSUPPORTED = (
        "A process has a descriptor of a kind that CRIU cannot dump, such as an MPTCP socket.",
        "For Go programs set GODEBUG=multipathtcp=0, or let the init turn MPTCP off: CHREK_BLOCK_IO_URING=true.",
    )
    SYSV_IPC_IN_USE = (
        "System V shared memory, semaphores or message queues exist in the container.",
        "Make the application use POSIX or anonymous shared memory.",
    )
    USER_NAMESPACE = (
        "The application runs in a user namespace of its own (hostUsers: false).",
        "Run the pod with hostUsers: true.",
    )
    FOREIGN_MOUNT = (
        "A process holds a file of another mount namespace.",
        "Close the file, or open it inside the container.",
    )
    FOREIGN_NAMESPACE = (
        "A process of the tree is in another namespace than the container's PID 1.",
        "Keep the application's processes in the container's own namespaces.",
    )
    DELETED_FILE_TOO_BIG = (
        "A deleted file that is still open has 4 GiB or more, past what CRIU can carry.",
        "Close the file before the checkpoint, or do not delete it.",
    )
    DEVICE_IN_USE = (
        "A process holds a device open that cannot be dumped.",
        "Close the device before the checkpoint; start CUDA workers by spawn, not fork.",
    )
    BEING_TRACED = (
        "A debugger or tracer is attached to a process of the application.",
        "Detach it; CRIU needs to trace the process itself.",
    )
    NO_TMP = (
        "The container has no writable /tmp, which CRIU needs.",
        "Mount an emptyDir at /tmp.",
    )
    WATCH_UNRESTORABLE = (
        "A process watches or holds files that will not exist in the next container.",
        "Close the file or the watch (ConfigMap, Secret and token volumes) before the checkpoint.",
    )
    BOUND_TO_POD_IP = (
        "A socket is bound to the pod's own address, which the next pod will not have.",
        "Bind to 0.0.0.0 or to 127.0.0.1.",
    )
    NO_OVERLAY = (
        "The container's root is not an overlay file system, so its changes cannot be found.",
        "Use the overlayfs snapshotter.",
    )
    CAPTURE_IN_PROGRESS = (
        "Another capture of this id is under way.",
        "Wait for it to end, or use another id.",
    )
    ID_MISMATCH = (
        "The id asked for is not the id the container was started with.",
        "Use the same id in both places.",
    )
    ID_IN_USE_DIFFERENT = (
        "A checkpoint of this id exists and is of something else.",
        "Use another id, delete the old checkpoint, or ask for it to be replaced.",
    )

    # --- GPUs: what cannot be captured ----------------------------------------------------------------
    GPU_DRIVER_MISSING = (
        "The process uses a GPU and NVIDIA's driver library libcuda.so.1 cannot be loaded here.",
        "Run ChReK where the driver's libraries are mounted (NVIDIA_DRIVER_CAPABILITIES=compute,utility).",
    )
    GPU_DRIVER_TOO_OLD = (
        "NVIDIA's driver lacks a call that checkpointing needs.",
        "Install the driver version that the message names, or a newer one, on the node.",
    )
    GPU_PEER_ACCESS = (
        "A process uses several GPUs with direct access between them, which the driver saves and cannot bring back.",
        "Avoid copies between GPUs and NCCL's P2P transport, or use one process and one GPU each.",
    )
    CUDA_IPC = (
        "Processes share GPU memory through CUDA IPC, which the driver saves and cannot bring back.",
        "Close the shared handles before the checkpoint, or pass the data through host memory.",
    )
    NVLS_MULTICAST = (
        "NVLink multicast (NVLS) is in use, which the driver saves and cannot bring back.",
        "Start the application with NCCL_NVLS_ENABLE=0.",
    )
    NCCL_TRANSPORT = (
        "NCCL connects GPUs of this host by a transport that does not survive a checkpoint.",
        "Start every rank with NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NVLS_ENABLE=0.",
    )
    MANAGED_MEMORY = (
        "A process uses managed (unified) memory, which the driver does not checkpoint.",
        "Use ordinary GPU memory (cudaMalloc) in the application.",
    )
    MIG_IN_USE = (
        "A process runs on a MIG slice of a GPU, which is not known to come back.",
        "Give the pod a whole GPU.",
    )
    MPS_IN_USE = (
        "A process is a client of NVIDIA's Multi-Process Service, which the driver does not checkpoint.",
        "Run the application without MPS (unset CUDA_MPS_PIPE_DIRECTORY, no MPS daemon).",
    )
    GPU_FD_INHERITED = (
        "A process holds GPU device files that it inherited by fork, and no driver call closes them.",
        "Start GPU workers by spawn instead of fork (vLLM: VLLM_WORKER_MULTIPROC_METHOD=spawn).",
    )
    GPU_BUSY = (
        "The GPU work under way did not come to a stop within the deadline.",
        "Take the checkpoint when the application is idle, or raise the deadline.",
    )
    GPU_CALL_FAILED = (
        "A checkpoint call of NVIDIA's driver failed.",
        "The message names the call and the driver's error; the application was driven back to running.",
    )
    GPU_STUCK = (
        "A process was left locked or checkpointed by the GPU driver and could not be driven back.",
        "End the process that the message names and start it anew.",
    )

    # --- GPUs: checkpoints that do not fit here -------------------------------------------------------
    GPU_MISMATCH = (
        "The GPUs here cannot take the place of the checkpoint's.",
        "Restore on as many GPUs of the same model, with the free memory that the message names.",
    )
    DRIVER_MISMATCH = (
        "NVIDIA's driver here is another version than the checkpoint's.",
        "Restore on a node with the driver version in the message, or take the checkpoint again.",
    )

    # --- a capture that did not work out ---------------------------------------------------------
    DUMP_FAILED = (
        "CRIU could not dump the application.",
        "The message ends with CRIU's own error; dump.log beside the message has the rest.",
    )
    MEMORY_UNREADABLE = (
        "The application's memory could not be read.",
        "Look whether a process of it ended during the capture, and take the checkpoint again.",
    )
    CAPTURE_INTERRUPTED = (
        "The capture was stopped before it was complete.",
        "Start it again; the application was left running.",
    )
    WRITE_FAILED = (
        "Writing the checkpoint failed.",
        "Look at the error of the file system in the message; nothing was published.",
    )
    FILE_NOT_CARRIED = (
        "A file that the application made cannot be carried in a checkpoint.",
        "Remove the file, or leave it out by a pattern; the message names it.",
    )
    TIMEOUT = (
        "A step took longer than its deadline.",
        "Raise the deadline, or look for what holds the step up in the log.",
    )

    # --- checkpoints that cannot be used ---------------------------------------------------------
    NOT_FOUND = (
        "There is no complete checkpoint of this id in the store.",
        "Look at `chrek list`; a directory without checkpoint.done is not a checkpoint.",
    )
    CORRUPT = (
        "A file of the checkpoint is not what its manifest says.",
        "Delete the checkpoint and take it again.",
    )
    FORMAT_TOO_NEW = (
        "The checkpoint was written in a newer format than this ChReK reads.",
        "Use a newer ChReK here, or take the checkpoint again with this one.",
    )
    ARCH_MISMATCH = (
        "The checkpoint was taken on another processor architecture.",
        "Restore on the architecture the message names.",
    )
    CPU_MISMATCH = (
        "The checkpoint needs processor features that this machine lacks.",
        "Restore on a processor with the features the message lists.",
    )
    KERNEL_TOO_OLD = (
        "This kernel lacks something the checkpoint needs.",
        "Restore on a kernel at least as new as the one the message names.",
    )
    IMAGE_MISMATCH = (
        "A program or library the checkpoint uses differs here.",
        "Restore in a container of the same image.",
    )
    MOUNT_MISSING = (
        "A file on a mount that the application had open is missing or different here.",
        "Mount the same volume at the same path.",
    )
    PRIVILEGE_EXCEEDED = (
        "The checkpoint asks for more privilege than this container's PID 1 has.",
        "Give both containers the same security context; or allow it, where capabilities or seccomp filters can be cut down.",
    )
    MEMORY_LIMIT = (
        "The container's memory limit is lower than what this needs.",
        "Raise the limit to the number in the message.",
    )
    UNDO_IMPOSSIBLE = (
        "The checkpoint's file changes could not be undone after a failed restore.",
        "Restore in a container whose root file system is writable and private.",
    )

    # --- a restore that did not work out -----------------------------------------------------------
    RESTORE_FAILED = (
        "CRIU could not restore the application.",
        "The message ends with CRIU's own error; /tmp/criu-restore.log has the rest.",
    )
    FILES_NOT_APPLIED = (
        "The checkpoint's file changes could not be put into the container.",
        "Look at the file system's error in the message; what had been changed is undone.",
    )
    PID_IN_USE = (
        "A process id that the application needs is taken in this container.",
        "Restart the container; run nothing in it before the restore.",
    )
    FILL_FAILED = (
        "The application's memory could not be put back.",
        "Verify the checkpoint with `chrek verify`, then try again.",
    )
    NO_AGENT = (
        "No agent answered within CHREK_AGENT_TIMEOUT.",
        "Look whether the node runs chrek-agent and the pod has the label nvidia.com/checkpoint-restore.",
    )
    NOT_ROOT = (
        "PID 1 of the container has not the privileges for a restore from inside.",
        "Let the agent restore the pod (label nvidia.com/checkpoint-restore), or run it as root and privileged.",
    )
    SECCOMP_INSIDE = (
        "CRIU would run under the container's seccomp profile.",
        "Let the agent restore the pod (label nvidia.com/checkpoint-restore), or run it with seccompProfile Unconfined.",
    )
    CLAIM_LOST = (
        "The container's init no longer waits for a restore.",
        "Nothing to do: the container was started cold or is ending.",
    )


class ChrekError(Exception):
    """Something failed; the message says what, and the cure what to do."""

    exit_code = ExitCode.FAILED

    def __init__(self, reason: Reason, message: str, *, cure: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.cure = reason.cure if cure is None else cure

    def __str__(self) -> str:
        return f"{self.reason.code}: {self.message} {self.cure}".rstrip()


class UsageError(ChrekError):
    """An option, a variable or a file that the user wrote is wrong."""

    exit_code = ExitCode.USAGE


class CaptureFailed(ChrekError):
    """A checkpoint could not be taken; the application goes on as if nothing had happened."""

    exit_code = ExitCode.CAPTURE_FAILED


class RestoreFailed(ChrekError):
    """A restore failed; what was half restored is gone and a cold start would work."""

    exit_code = ExitCode.RESTORE_FAILED


class Refused(ChrekError):
    """ChReK declined before it touched anything."""

    exit_code = ExitCode.REFUSED
