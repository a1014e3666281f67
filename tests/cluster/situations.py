"""What can be wrong with a checkpoint or a restore on a cluster, and what everybody sees of it: one table.

`test_flow_situations` makes every situation and asserts every column; `tools/gen-situations` writes the same rows into
docs/troubleshooting.md. So the page promises nothing that was not seen, and a behaviour that changes changes the page.
Rows that name another module in `where` are asserted there, because they stop programs that other tests need.

Nothing but the standard library: the generator needs no cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

LABEL: Final = "nvidia.com/checkpoint-hash"
ALLOW: Final = "nvidia.com/checkpoint-allow"
WRONG_ID: Final = "environment"
HERE: Final = "test_flow_situations.py"
ENTRYPOINT: Final = "/usr/local/bin/smart-entrypoint.sh"
WITNESS: Final = 'python3 /app/server.py; cat "$DYN_CHECKPOINT_SIGNAL_FILE"'
"""The guide's sample in a shell that outlives it, and prints the signal file that the sample ended for."""


class Kind(Enum):
    """What the pod with the fault asks for."""

    CHECKPOINT = "checkpoint"
    RESTORE = "restore"


class App(Enum):
    """What became of the application in the pod."""

    TOLD = "unharmed; is told, and ends itself"
    WAITS = "unharmed; waits on"
    SERVES = "unharmed; serves on"
    GONE = "ends with its pod"
    NEVER = "never started"
    COLD = "starts anew"
    RESTORED = "goes on where it was"


class Fault(Enum):
    """What is wrong outside the pod's manifest."""

    NONE = ""
    FULL = "the store is full"
    READ_ONLY = "the store is read-only"
    DAMAGED = "a byte of the checkpoint is another one"
    CHANGED = "the manifest was changed by hand"
    NEWER = "the manifest's format is one that is still to come"
    TENANT = "the manifest names another namespace"
    GPUS = "the manifest names two GPUs"
    PROCESSOR = "the manifest names a processor feature that does not exist"
    MACHINE = "the manifest names another architecture"
    IMAGE = "the pod's image is another one"
    SIDECAR = "a second container stands beside the application's"


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the manifest differs from a good one; None takes something away.

    Attributes:
        env: variables of the main container.
        container: fields of the main container.
        spec: fields of the pod's spec.
    """

    labels: Mapping[str, str | None] = field(default_factory=dict)
    annotations: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)
    container: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, manifest: dict[str, Any]) -> None:
        """Change a pod's manifest."""
        metadata, spec = manifest["metadata"], manifest["spec"]
        main = spec["containers"][0]
        variables = {each["name"]: each["value"] for each in main["env"]}
        _merge(variables, self.env)
        main["env"] = [{"name": name, "value": value} for name, value in variables.items()]
        _merge(main, self.container)
        _merge(spec, self.spec)
        for name, changes in (("labels", self.labels), ("annotations", self.annotations)):
            _merge(metadata.setdefault(name, {}), changes)


def _merge(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    target.update(changes)
    for name in [name for name, value in changes.items() if value is None]:
        del target[name]


@dataclass(frozen=True)
class Command:
    """What to type, with POD and ID for the names, and a part of what it prints."""

    run: str
    shows: str


DESCRIBE: Final = "kubectl describe pod POD"
EVENTS: Final = "kubectl get events --field-selector involvedObject.name=POD,reportingComponent=chrek-agent"
MESSAGE: Final = "kubectl get pod POD -o jsonpath='{.status.containerStatuses[*].state.terminated.message}'"
RESULT: Final = "kubectl get pod POD -o jsonpath='{.metadata.annotations.nvidia\\.com/checkpoint-result}'"
START: Final = "kubectl get pod POD -o jsonpath='{.metadata.annotations.nvidia\\.com/checkpoint-start}'"
START_LINE: Final = "kubectl logs POD | grep 'chrek: start='"
LOGS: Final = "kubectl logs POD"
PREVIOUS: Final = "kubectl logs --previous POD"
AGENT_LOG: Final = "kubectl logs ds/chrek-agent | grep POD"
AGENTS: Final = "kubectl get pods -o wide"
LABELS: Final = "kubectl get pod POD --show-labels"
VERIFY: Final = "kubectl exec ds/chrek-agent -- chrek verify ID"
INSPECT: Final = "kubectl exec ds/chrek-agent -- chrek inspect ID"
LIST: Final = "kubectl exec ds/chrek-agent -- chrek list"
FREE: Final = "kubectl exec ds/chrek-agent -- df -h /checkpoints"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One row.

    Attributes:
        name: of the pod, and of the checkpoint unless `checkpoint_id` says otherwise.
        what: what is wrong, in a sentence.
        change, fault: how it is made wrong.
        source: for a restore of a checkpoint of its own: how the captured job's manifest was changed.
        signal: ``none``, ``success``, or the reason code in a signal file whose ``success`` is false.
        events: the reasons of all events of the agent on the pod, in their order.
        code: the reason code of the last warning, and of the container's own words.
        exit_code: the container's; None: it runs on.
        ending: how the termination message begins; for a running container: what will be there when it ends.
        next_pod: how a pod that is restored from this id starts: ``restored`` or ``cold/CODE``; for a restore
            that pod is this one. Empty: no pod can name such an id, or it is this one.
        commands: what shows more than the commands of the row's group.
        where: the module that asserts the row, or its test in `test_flow_situations` where that is one of its own.
    """

    name: str
    kind: Kind = Kind.CHECKPOINT
    what: str
    change: Change = Change()
    fault: Fault = Fault.NONE
    source: Change | None = None
    checkpoint_id: str = ""
    signal: str = "none"
    events: tuple[str, ...] = ()
    code: str = ""
    exit_code: int | None = None
    app: App
    next_pod: str = ""
    commands: tuple[Command, ...] = ()
    where: str = HERE

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.checkpoint_id or self.name

    @property
    def result(self) -> str:
        """What the agent's annotation says of a checkpoint, before the container's id."""
        said = self.events[-1].removeprefix("Checkpoint").lower() if self.events else ""
        return f"{said}/{self.code}" if self.code else said

    @property
    def ending(self) -> str:
        """How the termination message begins; empty: there is none."""
        if not self.code:
            return ""
        if self.kind is Kind.RESTORE and self.exit_code != 2:
            return f"not restored: {self.code}: "
        if self.exit_code in (170, 172):
            return f"checkpoint failed: {self.code}: "
        return f"{self.code}: " if self.exit_code == 2 else ""


def _refused(name: str, what: str, code: str, change: Change, **more: Any) -> Situation:
    """A checkpoint that is refused before the application is touched."""
    values = {
        "signal": code,
        "events": ("CheckpointRefused",),
        "exit_code": 172,
        "app": App.TOLD,
        "next_pod": "cold/NOT_FOUND",
    }
    return Situation(name=name, what=what, code=code, change=change, **{**values, **more})


def _wrong(name: str, what: str, code: str = "BAD_VALUE", **env: str | None) -> Situation:
    """A checkpoint job whose environment is wrong: nothing is started."""
    nameless = code == "BAD_ID" or "DYN_CHECKPOINT_HASH" in env
    return Situation(
        name=f"env-{name}",
        what=what,
        change=Change(env=env),
        code=code,
        exit_code=2,
        app=App.NEVER,
        next_pod="" if nameless else "cold/NOT_FOUND",
        checkpoint_id=WRONG_ID,
    )


def _cold(name: str, what: str, code: str, change: Change | None = None, **more: Any) -> Situation:
    """A restore that is refused: the pod starts cold."""
    values = {
        "checkpoint_id": "one",
        "events": ("RestoreRefused", "StartedCold"),
        "app": App.COLD,
        "next_pod": f"cold/{code}",
    }
    return Situation(
        name=name, kind=Kind.RESTORE, what=what, code=code, change=change or Change(), **{**values, **more}
    )


def _damaged(name: str, what: str, code: str, fault: Fault, **more: Any) -> Situation:
    """A restore of a copy of the checkpoint that does not fit here, or is broken."""
    return _cold(name, what, code, fault=fault, checkpoint_id=name, **more)


_CLAIM: Final = {"volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": "chrek-pvc"}}]}
_EMPTY: Final = {"volumes": [{"name": "storage", "emptyDir": {}}]}


def _mount(path: str, **more: str) -> dict[str, Any]:
    return {"volumeMounts": [{"name": "storage", "mountPath": path, **more}]}


NOTHING: Final = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
_MODELS: Final = Change(
    container={
        "args": [ENTRYPOINT, "sh", "-c", f"exec 3< /models/weights; {WITNESS}"],
        **_mount("/models", subPath="models"),
    },
    spec=_CLAIM,
)

TAKEN: Final = (
    Situation(
        name="created",
        what="nothing is wrong",
        signal="success",
        events=("CheckpointStarted", "CheckpointCreated"),
        exit_code=0,
        app=App.TOLD,
        next_pod="restored",
        commands=(Command(LIST, "created"),),
    ),
    Situation(
        name="again",
        what="a checkpoint of this id exists already, of the same application",
        checkpoint_id="one",
        signal="success",
        events=("CheckpointSkipped",),
        exit_code=0,
        app=App.TOLD,
        next_pod="restored",
    ),
    Situation(
        name="claimed",
        what="the job mounts the agent's own claim, as in the original guide",
        change=Change(container=_mount("/checkpoints"), spec=_CLAIM),
        signal="success",
        events=("CheckpointStarted", "CheckpointCreated"),
        exit_code=0,
        app=App.TOLD,
        next_pod="restored",
    ),
    Situation(
        name="bare-command",
        what="the pod's `command` replaces ChReK's entrypoint, so nobody turns the failure into an exit code",
        change=Change(container={"command": ["sh", "-c", WITNESS], "args": None}),
        signal="APP_IS_PID1",
        code="APP_IS_PID1",
        events=("CheckpointStarted", "CheckpointRefused"),
        exit_code=0,
        app=App.TOLD,
        next_pod="cold/NOT_FOUND",
        commands=(Command(DESCRIBE, "APP_IS_PID1: "),),
    ),
)

REFUSED: Final = (
    _refused(
        "no-probe",
        "the container has no readiness probe",
        "NO_READINESS_PROBE",
        Change(container={"readinessProbe": None}),
    ),
    _refused(
        "other-label",
        "the label and the variable name different ids",
        "ID_MISMATCH",
        Change(labels={LABEL: "another"}),
        commands=(Command(LABELS, f"{LABEL}=another"),),
    ),
    _refused(
        "shared",
        "the pod's containers share their process ids",
        "POD_NOT_SUPPORTED",
        Change(spec={"shareProcessNamespace": True}),
    ),
    _refused(
        "other-volume",
        "another volume than the agent's is mounted where the checkpoint should go",
        "STORE_MISMATCH",
        Change(container=_mount("/checkpoints"), spec=_EMPTY),
    ),
    _refused(
        "sub-path",
        "the agent's claim is mounted with a `subPath`",
        "STORE_MISMATCH",
        Change(container=_mount("/checkpoints", subPath="mine"), spec=_CLAIM),
    ),
    _refused(
        "taken",
        "a checkpoint of this id exists, of another command or image",
        "ID_IN_USE_DIFFERENT",
        Change(container={"args": [ENTRYPOINT, "sh", "-c", f": other; {WITNESS}"]}),
        checkpoint_id="one",
        next_pod="restored",
        commands=(Command(INSPECT, "python3 /app/server.py"),),
    ),
    _refused(
        "impatient",
        "the liveness probe bears less than the application will stand still",
        "LIVENESS_TOO_TIGHT",
        Change(
            container={
                "livenessProbe": {
                    "exec": {"command": ["true"]},
                    # Never asked here: on a busy machine it would kill.
                    "initialDelaySeconds": 3600,
                    "periodSeconds": 1,
                    "failureThreshold": 1,
                    "timeoutSeconds": 1,
                }
            },
            env={"MODEL_MB": "640"},
        ),
        events=("CheckpointStarted", "CheckpointRefused"),
    ),
    _refused(
        "not-yours",
        "an annotation overrides what keeps tenants apart",
        "PRIVILEGE_EXCEEDED",
        Change(annotations={ALLOW: "PRIVILEGE_EXCEEDED"}),
    ),
    _refused(
        "mistyped",
        "an annotation lists a word that is no reason code",
        "BAD_VALUE",
        Change(annotations={ALLOW: "MEMORY"}),
    ),
    _refused(
        "full",
        "the volume of the checkpoints is full",
        "NO_SPACE",
        Change(),
        fault=Fault.FULL,
        events=("CheckpointStarted", "CheckpointRefused"),
        commands=(Command(FREE, "100%"),),
    ),
)

FAILED: Final = (
    Situation(
        name="read-only",
        what="the volume of the checkpoints is mounted read-only, or became so",
        fault=Fault.READ_ONLY,
        signal="WRITE_FAILED",
        code="WRITE_FAILED",
        events=("CheckpointStarted", "CheckpointFailed"),
        exit_code=170,
        app=App.TOLD,
        next_pod="cold/NOT_FOUND",
        commands=(Command(DESCRIBE, "Read-only file system"),),
    ),
)

_LONG: Final = "a" * 64
ENVIRONMENT: Final = (
    _wrong("ready", "a variable is missing", DYN_CHECKPOINT_READY_FILE=None),
    _wrong("hash", "the id's variable is missing", DYN_CHECKPOINT_HASH=None),
    _wrong("location", "a variable is missing", DYN_CHECKPOINT_LOCATION=None),
    _wrong("type", "a variable is missing", DYN_CHECKPOINT_STORAGE_TYPE=None),
    _wrong("s3", "the storage type is one that does not exist yet", DYN_CHECKPOINT_STORAGE_TYPE="s3"),
    _wrong("way-out", "the id is a path", "BAD_ID", DYN_CHECKPOINT_HASH="../../etc"),
    _wrong("empty", "the id is empty", "BAD_ID", DYN_CHECKPOINT_HASH=""),
    _wrong("hidden", "the id begins with a dot", "BAD_ID", DYN_CHECKPOINT_HASH=".one"),
    _wrong("long", "the id is longer than 63 characters", "BAD_ID", DYN_CHECKPOINT_HASH=_LONG),
    _wrong("apart", "the location ends with another id", "ID_MISMATCH", DYN_CHECKPOINT_LOCATION="/checkpoints/b"),
    _wrong("boolean", "a boolean is neither true nor false", DEBUG="perhaps"),
    _wrong("blank", "a boolean is empty", DEBUG=""),
    _wrong("number", "a number is none", CRIU_TIMEOUT="soon"),
    _wrong("both", "the pod is to be checkpointed and to wait for a restore", WAIT_FOR_CHECKPOINT="true"),
)

WAITING: Final = (
    Situation(
        name="no-label",
        what='the label `nvidia.com/checkpoint-source` is missing, or not `"true"`',
        change=Change(labels={"nvidia.com/checkpoint-source": None}),
        app=App.WAITS,
        next_pod="cold/NOT_FOUND",
        commands=(Command(LABELS, "<none>"),),
    ),
    Situation(
        name="never-ready",
        what="the readiness probe fails",
        change=Change(container={"readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1}}),
        app=App.WAITS,
        next_pod="cold/NOT_FOUND",
        commands=(Command(DESCRIBE, "Readiness probe failed"), Command("kubectl get pod POD", "0/1")),
    ),
    Situation(
        name="no-ready-file",
        what="the probe succeeds, and the ready file is not there: another path, or not a regular file",
        change=Change(
            container={"readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}},
            env={"DYN_CHECKPOINT_READY_FILE": "/dev/null"},
        ),
        app=App.WAITS,
        next_pod="cold/NOT_FOUND",
        commands=(Command("kubectl exec POD -- sh -c 'ls -l $DYN_CHECKPOINT_READY_FILE'", "/dev/null"),),
    ),
    Situation(
        name="unclear",
        what="the pod has several containers, and nothing says which one is meant",
        change=Change(container={"name": "server"}),
        fault=Fault.SIDECAR,
        code="CONTAINER_UNCLEAR",
        events=("CheckpointRefused",),
        app=App.WAITS,
        next_pod="cold/NOT_FOUND",
        commands=(Command(DESCRIBE, "CONTAINER_UNCLEAR: "),),
    ),
    Situation(
        name="nobody",
        what="the annotation `nvidia.com/checkpoint-container` names a container that the pod does not have",
        change=Change(annotations={"nvidia.com/checkpoint-container": "engine"}),
        code="CONTAINER_UNCLEAR",
        events=("CheckpointRefused",),
        app=App.WAITS,
        next_pod="cold/NOT_FOUND",
        commands=(Command(DESCRIBE, "CONTAINER_UNCLEAR: "),),
    ),
    Situation(
        name="no-signal-variable",
        what="`DYN_CHECKPOINT_SIGNAL_FILE` is missing, so the pod is none that waits for a checkpoint",
        change=Change(
            env={"DYN_CHECKPOINT_SIGNAL_FILE": None, "CHREK_AGENT_TIMEOUT": "0.5"},
            container={"readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1}},
        ),
        code="BAD_ID",
        events=("CheckpointRefused",),
        app=App.SERVES,
        next_pod="cold/NOT_FOUND",
        commands=(Command(DESCRIBE, "BAD_ID: "), Command(LOGS, "start=cold reason=NO_AGENT")),
    ),
)

RESTORES: Final = (
    Situation(
        name="good",
        kind=Kind.RESTORE,
        what="nothing is wrong",
        checkpoint_id="one",
        events=("Restored",),
        app=App.RESTORED,
        next_pod="restored",
    ),
    _cold(
        "absent",
        "there is no checkpoint of this id",
        "NOT_FOUND",
        checkpoint_id="absent",
        events=("StartedCold",),
        commands=(Command(LIST, "one"),),
    ),
    _cold(
        "image",
        "the pod's image is another one",
        "IMAGE_MISMATCH",
        fault=Fault.IMAGE,
        commands=(Command(DESCRIBE, "was taken of image sha256:"),),
    ),
    _cold(
        "unmounted",
        "a volume with a file that was open is not mounted",
        "MOUNT_MISSING",
        source=_MODELS,
        checkpoint_id="unmounted",
        commands=(Command(DESCRIBE, "/models/weights"),),
    ),
    _cold(
        "small",
        "the memory limit is below what the application used",
        "MEMORY_LIMIT",
        Change(container={"resources": {"limits": {"memory": "32Mi"}}}, env={"MODEL_MB": "1"}),
        commands=(Command(DESCRIBE, "Set it to "),),
    ),
    _cold(
        "rights",
        "the checkpointed processes had more rights than this pod has",
        "PRIVILEGE_EXCEEDED",
        Change(container={"securityContext": NOTHING}),
        source=Change(container={"securityContext": {}}),
        checkpoint_id="rights",
    ),
    _damaged(
        "gpus",
        "the checkpoint needs more GPUs than the pod has",
        "GPU_MISMATCH",
        Fault.GPUS,
        commands=(Command(DESCRIBE, "needs 2 x NVIDIA H100"),),
    ),
    _damaged("processor", "the node's processor lacks a feature", "CPU_MISMATCH", Fault.PROCESSOR),
    _damaged("machine", "the node is of another architecture", "ARCH_MISMATCH", Fault.MACHINE),
    _damaged(
        "damaged",
        "a byte of the checkpoint is not what was written",
        "CORRUPT",
        Fault.DAMAGED,
        events=("RestoreFailed", "StartedCold"),
        commands=(Command(VERIFY, "memory/shard-00"),),
    ),
    _damaged(
        "changed",
        "the manifest was changed by hand",
        "CORRUPT",
        Fault.CHANGED,
        commands=(Command(VERIFY, "manifest.json"),),
    ),
    _damaged(
        "newer",
        "a newer ChReK wrote the checkpoint",
        "FORMAT_TOO_NEW",
        Fault.NEWER,
        commands=(Command(VERIFY, "FORMAT_TOO_NEW"),),
    ),
    _damaged("foreign", "the checkpoint was taken in another namespace", "TENANT_MISMATCH", Fault.TENANT),
    _cold(
        "two-ids",
        "the label and the variable name different ids",
        "ID_MISMATCH",
        Change(labels={LABEL: "another"}),
        commands=(Command(LABELS, f"{LABEL}=another"),),
    ),
    _cold(
        "in-common",
        "the pod's containers share their process ids",
        "POD_NOT_SUPPORTED",
        Change(spec={"shareProcessNamespace": True}),
    ),
    _cold(
        "unseen",
        "the label `nvidia.com/checkpoint-restore` is missing, or no agent watches the namespace",
        "NO_AGENT",
        Change(labels={"nvidia.com/checkpoint-restore": None}, env={"CHREK_AGENT_TIMEOUT": "0.5"}),
        events=("StartedCold", "RestoreFailed"),
        commands=(Command(LABELS, "<none>"), Command(AGENTS, "chrek-agent")),
    ),
    _cold(
        "strict",
        "the checkpoint is damaged, and `CHREK_ON_RESTORE_FAILURE` is `fail`",
        "CORRUPT",
        Change(env={"CHREK_ON_RESTORE_FAILURE": "fail"}),
        fault=Fault.CHANGED,
        checkpoint_id="strict",
        events=("RestoreRefused",),
        exit_code=171,
        app=App.NEVER,
        next_pod="",
    ),
    *(
        Situation(
            name=f"restore-{name}",
            kind=Kind.RESTORE,
            what=what,
            change=Change(env=env),
            code=code,
            exit_code=2,
            app=App.NEVER,
        )
        for name, what, code, env in (
            ("id", "the id is a path", "BAD_ID", {"DYN_CHECKPOINT_HASH": "../one"}),
            ("boolean", "a boolean is neither true nor false", "BAD_VALUE", {"WAIT_FOR_CHECKPOINT": "perhaps"}),
        )
    ),
)

SPECIAL: Final = (
    Situation(
        name="twin",
        what="two pods of one id are ready together",
        signal="success",
        events=("CheckpointSkipped",),
        exit_code=0,
        app=App.TOLD,
        next_pod="restored",
        where="test_two_pods_of_one_id",
    ),
    Situation(
        name="orphan",
        what="the agent is killed, evicted or upgraded during the capture; its successor takes it up",
        signal="success",
        events=("CheckpointStarted", "CheckpointCreated"),
        exit_code=0,
        app=App.TOLD,
        next_pod="restored",
        where="test_flow_kills.py",
    ),
    Situation(
        name="powerless",
        what="the agent may not write Leases (the chart's RBAC was changed), so it cannot know whether another node writes",
        code="API_FAILED",
        app=App.WAITS,
        next_pod="cold/NOT_FOUND",
        where="test_flow_rbac.py",
    ),
    Situation(
        name="patient",
        kind=Kind.RESTORE,
        what="`WAIT_FOR_CHECKPOINT` is true, and the checkpoint comes later",
        events=("Restored",),
        app=App.RESTORED,
        next_pod="restored",
        where="test_waiting_for_a_checkpoint",
    ),
    Situation(
        name="forsaken",
        kind=Kind.RESTORE,
        what="the agent is killed during the restore, before the application runs",
        checkpoint_id="one",
        code="RESTORE_FAILED",
        events=("StartedCold", "RestoreFailed"),
        app=App.COLD,
        next_pod="cold/RESTORE_FAILED",
        where="test_flow_kills.py",
    ),
    Situation(
        name="deleted",
        what="the pod is deleted during its capture",
        events=("CheckpointStarted", "CheckpointFailed"),
        code="CAPTURE_INTERRUPTED",
        app=App.GONE,
        next_pod="cold/NOT_FOUND",
        commands=(Command(AGENT_LOG, "the pod is being deleted"),),
        where="test_pod_deleted_during_a_capture",
    ),
    Situation(
        name="loop",
        kind=Kind.RESTORE,
        what="three restored starts in a row ended within a minute",
        checkpoint_id="one",
        code="RESTORE_GIVEN_UP",
        events=("RestoreGivenUp", "StartedCold"),
        app=App.COLD,
        next_pod="cold/RESTORE_GIVEN_UP",
        commands=(Command(PREVIOUS, "start=restored"),),
        where="test_crash_loop_is_given_up",
    ),
)
"""Rows whose making is a story of its own; each names the test that tells it."""

ALL: Final = (*TAKEN, *REFUSED, *FAILED, *ENVIRONMENT, *WAITING, *RESTORES, *SPECIAL)
"""The whole table."""


@dataclass(frozen=True)
class Group:
    """Rows that look alike at first sight: what one sees, what it means, and what to type for all of them.

    In the commands' fragments ``{code}``, ``{event}``, ``{result}``, ``{ending}`` and ``{next_pod}`` are the row's.
    """

    seen: str
    means: str
    commands: tuple[Command, ...]


SUCCEEDED: Final = Group(
    "The job has succeeded",
    "The application was told that its checkpoint is finished, and ended with 0. Look whether there is a checkpoint: where"
    " ChReK's init is not PID 1, nobody turns a failure into an exit code.",
    (Command(RESULT, "{result} container="), Command(EVENTS, "{event}")),
)
EXIT_172: Final = Group(
    "The job's container ends with exit code 172",
    "The checkpoint was refused before anything was touched. It would be refused again: change what the message names.",
    (Command(MESSAGE, "{ending}"), Command(DESCRIBE, "{event}")),
)
EXIT_170: Final = Group(
    "The job's container ends with exit code 170",
    "The checkpoint failed on its way. Nothing was published; the application was unharmed and was told.",
    (Command(MESSAGE, "{ending}"), Command(AGENT_LOG, "{code}")),
)
EXIT_2: Final = Group(
    "A container ends with exit code 2 within a second",
    "A variable of the environment is missing or wrong; the application was not started. The message names the variable,"
    " its value and what is allowed. The event `CheckpointRefused` is there only if the agent saw the container in time.",
    (Command(MESSAGE, "{code}: "), Command(LOGS, "chrek: {code}: ")),
)
WAITS: Final = Group(
    "The job does not end, and no checkpoint appears",
    "The application is ready and waits, but the pod is none that the agent may capture, or not yet.",
    (),
)
RESTORED: Final = Group(
    "The pod runs from its checkpoint",
    "All is well: this is how it looks.",
    (Command(START, "restored seconds="), Command(START_LINE, "start=restored reason=none")),
)
COLD: Final = Group(
    "The pod starts cold although it was to be restored",
    "The restore was refused or failed; what it had changed is undone, and the original command runs. Nothing else is"
    " wrong with the pod.",
    (
        Command(START, "{next_pod} seconds="),
        Command(START_LINE, "start=cold reason={code}"),
        Command(DESCRIBE, "{event}"),
    ),
)
EXIT_171: Final = Group(
    "The pod to be restored ends with exit code 171",
    "The restore did not work out, and `CHREK_ON_RESTORE_FAILURE=fail` forbids a cold start.",
    (Command(MESSAGE, "{ending}"), Command(DESCRIBE, "{event}")),
)
GROUPS: Final = (SUCCEEDED, EXIT_172, EXIT_170, EXIT_2, WAITS, RESTORED, COLD, EXIT_171)
_BY_EXIT: Final = {0: SUCCEEDED, 2: EXIT_2, 170: EXIT_170, 171: EXIT_171, 172: EXIT_172}


def group_of(row: Situation) -> Group:
    """Return the group that a row belongs to."""
    if row.exit_code is not None:
        return _BY_EXIT[row.exit_code]
    if row.kind is Kind.CHECKPOINT:
        return WAITS
    return RESTORED if row.app is App.RESTORED else COLD


def commands_of(row: Situation) -> tuple[Command, ...]:
    """Return what to type for a row: what its group shows, then what is its own."""
    event = row.events[-1] if row.events else ""
    values = {"code": row.code, "event": event, "ending": row.ending, "next_pod": row.next_pod, "result": row.result}
    shared = (Command(each.run, each.shows.format(**values)) for each in group_of(row).commands)
    return (*shared, *row.commands)
