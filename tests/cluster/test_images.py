"""Checkpoint-enabled images behave as their base images do, whatever those are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chrek.errors import Reason
from cluster.builder import CONTEXT, Builder
from cluster.kube import Cluster
from cluster.kube.layout import BUSYBOX_IMAGE, PAUSE_IMAGE
from cluster.workspace import Manifest, Workspace

pytestmark = pytest.mark.timeout(900)
MEGABYTE = 1_000_000


@pytest.fixture(scope="session")
def builder(cluster: Cluster) -> Builder:
    """Buildah with the images that everything here starts from."""
    made = Builder(cluster)
    made.make_debian()
    for name in ("busybox", "pause"):
        made.pull_archive(cluster.layout.images / f"{name}.tar")
    return made


def derive(builder: Builder, folder: Path, name: str, *lines: str, base: str = BUSYBOX_IMAGE) -> str:
    """An application's image, from a Dockerfile of a few lines."""
    (folder / "Dockerfile").write_text("\n".join([f"FROM {base}", *lines]) + "\n")
    image = f"localhost/{name}:1"
    done = builder.build("--tag", image, context=folder)
    assert done.status == 0, done.output
    return image


def enable(builder: Builder, image: str) -> str:
    """Its checkpoint-enabled form, loaded into the cluster."""
    output = f"{image}-checkpoint"
    done = builder.checkpoint_enable(image, output)
    assert done.status == 0, done.output
    builder.load(output)
    return output


def image_pod(name: str, image: str, *, args: list[str] | None = None, **container: Any) -> Manifest:
    """A pod that runs an image's own command."""
    main: Manifest = {"name": "main", "image": image, "imagePullPolicy": "Never", **container}
    if args is not None:
        main["args"] = args
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [main]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def output_of(workspace: Workspace, manifest: Manifest) -> list[str]:
    """What it writes until it ends, without ChReK's own lines."""
    workspace.apply(manifest)
    name = manifest["metadata"]["name"]
    assert workspace.ended(name).status.phase == "Succeeded", workspace.logs(name)
    return [line for line in workspace.logs(name).splitlines() if not line.startswith("chrek: ")]


def test_command_user_directory_and_environment_are_kept(
    workspace: Workspace, builder: Builder, tmp_path: Path
) -> None:
    """ENTRYPOINT and CMD run as before, as the same user in the same place; the container's args replace the CMD."""
    image = derive(
        builder, tmp_path, "whole",
        "USER 65534:65534", "WORKDIR /tmp", "ENV GREETING='it is'",
        'ENTRYPOINT ["sh", "-c", "echo \\"$GREETING\\" \\"$0\\" \\"$@\\"; id -u; pwd"]', 'CMD ["the command\'s", "own $HOME"]',
    )  # fmt: skip
    enabled = enable(builder, image)
    config = builder.config(enabled)
    assert (config["User"], config["WorkingDir"]) == ("65534:65534", "/tmp")
    assert output_of(workspace, image_pod("own", enabled)) == ["it is the command's own $HOME", "65534", "/tmp"]
    assert output_of(workspace, image_pod("args", enabled, args=["given"]))[0] == "it is given"


def test_image_with_only_a_command(workspace: Workspace, builder: Builder, tmp_path: Path) -> None:
    """Without an ENTRYPOINT the CMD is the application, and args are another one."""
    enabled = enable(builder, derive(builder, tmp_path, "cmd", 'CMD ["echo", "own"]'))
    assert output_of(workspace, image_pod("own", enabled)) == ["own"]
    assert output_of(workspace, image_pod("args", enabled, args=["echo", "given"])) == ["given"]


def test_image_with_nothing_but_the_application(workspace: Workspace, builder: Builder) -> None:
    """No shell, no C library, no Python in the base image: the bundle brings what it needs."""
    enabled = enable(builder, PAUSE_IMAGE)
    workspace.apply(image_pod("bare", enabled))
    workspace.ready("bare")
    workspace.wait_log("bare", "chrek: start=cold")
    shell = workspace.exec("bare", "/opt/chrek/bin/sh", "-c", "for p in /proc/[0-9]*; do cat $p/comm; done").output
    assert "pause" in shell.split()


def test_restricted_pod_with_read_only_root(workspace: Workspace, builder: Builder, tmp_path: Path) -> None:
    """The enabled image runs under the restricted standard with a root that cannot be written."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    workspace.core.patch_namespace(workspace.namespace, {"metadata": {"labels": labels}})
    enabled = enable(builder, derive(builder, tmp_path, "readonly", 'CMD ["echo", "own"]'))
    context = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert output_of(workspace, image_pod("restricted", enabled, securityContext=context)) == ["own"]


def test_plain_build_from_the_documented_folder(workspace: Workspace, builder: Builder) -> None:
    """`cd deploy/chrek` and a build work; without the base image's command that is said, then and at the start."""
    image = "localhost/plain:checkpoint-enabled"
    done = builder.build("--target", "placeholder", "--build-arg", f"BASE_IMAGE={BUSYBOX_IMAGE}", "-t", image)
    assert done.status == 0, done.output
    builder.load(image)
    workspace.apply(image_pod("plain", image))
    ended = workspace.ended("plain").status.container_statuses[0].state.terminated
    assert ended.exit_code == 2
    said = workspace.logs("plain")
    assert Reason.NO_COMMAND.code in said
    assert "checkpoint-enable" in said
    assert output_of(workspace, image_pod("args", image, args=["echo", "given"])) == ["given"]


def test_two_lines_in_a_dockerfile_of_ones_own(workspace: Workspace, builder: Builder, tmp_path: Path) -> None:
    """The variant by hand: copy two things from an enabled image, name the entrypoint, give the command."""
    enabled = enable(builder, PAUSE_IMAGE)
    copies = [
        f"COPY --from={enabled} /opt/chrek /opt/chrek",
        f"COPY --from={enabled} /usr/local/bin/restore-entrypoint /usr/local/bin/smart-entrypoint.sh /usr/local/bin/",
        'ENTRYPOINT ["/usr/local/bin/smart-entrypoint.sh"]',
    ]
    image = derive(builder, tmp_path, "by-hand", *copies, 'CMD ["echo", "by hand"]')
    builder.load(image)
    assert output_of(workspace, image_pod("by-hand", image)) == ["by hand"]


def test_enabled_image_is_not_enabled_twice(builder: Builder) -> None:
    """That would hide the application's command behind our own; the message says what to give."""
    output = f"{PAUSE_IMAGE}-checkpoint"
    assert builder.checkpoint_enable(PAUSE_IMAGE, output).status == 0
    again = builder.checkpoint_enable(output, f"{output}-twice")
    assert again.status == 1
    assert "give its base image" in again.output


def test_bundle_is_small_and_carries_its_licences(builder: Builder) -> None:
    """Under 60 MB in all, with CRIU's and Python's copyright."""
    done = builder.build("--target", "bundle", "--tag", "localhost/chrek-bundle:1")
    assert done.status == 0, done.output
    container = builder.run("from", "--pull-never", "localhost/chrek-bundle:1").strip()
    try:
        home = Path(builder.run("mount", container).strip()) / "opt" / "chrek"
        files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
        assert sum(path.stat().st_size for path in files) < 60 * MEGABYTE
        assert {"criu", "libc6", "busybox-static"} <= {path.name for path in (home / "licenses").iterdir()}
        assert not [path for path in files if path.stat().st_mode & 0o022]
    finally:
        builder.run("rm", container)


def test_agent_image_runs_the_command_line(workspace: Workspace, builder: Builder) -> None:
    """`kubectl exec` finds chrek in it; its labels say what it is."""
    image = "localhost/chrek-agent:test"
    done = builder.build("--target", "agent", "--tag", image)
    assert done.status == 0, done.output
    labels = builder.config(image)["Labels"]
    assert labels["org.opencontainers.image.title"] == "chrek-agent"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.description"]
    builder.load(image)
    workspace.apply(image_pod("agent", image, command=["/opt/chrek/bin/sh", "-c", "sleep 1000"]))
    workspace.ready("agent")
    version = workspace.exec("agent", "chrek", "--version")
    assert (version.status, version.output.split()[0]) == (0, "chrek")
    paths = "sys.path[:0] = ['/opt/chrek/lib', '/opt/chrek/lib/site-packages']"
    client = f"import sys; {paths}; import chrek.agent.main, chrek.cli.program, rich.progress"
    imported = workspace.exec("agent", "/opt/chrek/bin/python3", "-IS", "-c", client)
    assert (imported.status, imported.output) == (0, "")


def test_context_of_the_documented_folder_is_the_project() -> None:
    """The link that makes the documented commands work leads to the project's root."""
    assert (CONTEXT / "Dockerfile").samefile(CONTEXT.resolve() / "Dockerfile")
    assert (CONTEXT / "src" / "chrek").is_dir()
