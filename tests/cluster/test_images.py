"""Checkpoint-enabled images behave as their base images do, whatever those are made of."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chrek
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
    # Its variables are the application's alone: the shell drops none, and the bundle's loader says nothing of its own.
    named = {"LD_PRELOAD": "/nowhere.so", "LD_DEBUG": "all", "LC_ALL": "xx_XX.ISO-8859-1", "server.port": "80", "IFS": ","}
    variables = [{"name": name, "value": value} for name, value in named.items()]
    found = output_of(workspace, image_pod("variables", enabled, args=["env"], env=variables))
    assert {f"{name}={value}" for name, value in named.items()} <= set(found)
    assert all("=" in line for line in found)
    assert not {"PWD", "SHLVL", "OLDPWD", "CHREK_ENVIRONMENT_FD"} & {line.partition("=")[0] for line in found}


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


@contextlib.contextmanager
def opened(builder: Builder, image: str) -> Iterator[Path]:
    """The files of an image."""
    container = builder.run("from", "--pull-never", image).strip()
    try:
        yield Path(builder.run("mount", container).strip())
    finally:
        builder.run("rm", container)


def materials(home: Path) -> dict[str, set[tuple[str, str]]]:
    """The names and versions of a bill of materials, by the kind of package; what all of them must have is checked."""
    document = json.loads((home / "sbom.spdx.json").read_text())
    assert document["spdxVersion"] == "SPDX-2.3"
    (described,) = [each for each in document["relationships"] if each["relationshipType"] == "DESCRIBES"]
    contained = [
        each["relatedSpdxElement"] for each in document["relationships"] if each["relationshipType"] == "CONTAINS"
    ]
    assert sorted([described["relatedSpdxElement"], *contained]) == sorted(e["SPDXID"] for e in document["packages"])
    found: dict[str, set[tuple[str, str]]] = {}
    for each in document["packages"]:
        kind = re.match(r"pkg:(\w+)/", each["externalRefs"][0]["referenceLocator"])
        assert kind, each
        found.setdefault(kind[1], set()).add((each["name"], each["versionInfo"]))
    return found


def test_bundle_is_small_and_says_what_is_in_it(builder: Builder) -> None:
    """Under 60 MB in all; every package is named with its version, and its licence's notice is there."""
    done = builder.build("--target", "bundle", "--tag", "localhost/chrek-bundle:1")
    assert done.status == 0, done.output
    with opened(builder, "localhost/chrek-bundle:1") as root:
        home = root / "opt/chrek"
        files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
        assert sum(path.stat().st_size for path in files) < 60 * MEGABYTE
        assert not [path for path in files if path.stat().st_mode & 0o022]
        named = materials(home)
        assert named["generic"] == {("chrek", chrek.__version__)}
        criu = json.loads((home / "criu/bundle.json").read_text())["packages"]
        assert set(criu.items()) <= named["deb"]
        packages = {name for name, _ in named["deb"]}
        minor = f"python{next(home.glob('lib/python3.*')).name.removeprefix('python')}"
        assert {"busybox-static", "libc6", "libssl3t64", f"{minor}-minimal", f"lib{minor}-stdlib"} <= packages
        notices = {path.name for path in (home / "licenses").iterdir()}
        assert notices == packages | {"README", "chrek", "common-licenses"}
        gpl = (home / "licenses/common-licenses/GPL-2").read_text().split()
        assert gpl[:6] == ["GNU", "GENERAL", "PUBLIC", "LICENSE", "Version", "2,"]
        assert "GPL-2" in (home / "licenses/criu").read_text()


def build_agent(builder: Builder) -> str:
    """The agent's image."""
    image = "localhost/chrek-agent:test"
    facts = ("--build-arg", "VERSION=1.2.3", "--build-arg", "REVISION=abc")
    done = builder.build("--target", "agent", *facts, "--tag", image)
    assert done.status == 0, done.output
    return image


def test_agent_says_what_is_in_it(builder: Builder) -> None:
    """Beside the bundle's, every Python package and every library of the agent is named, and has its notice."""
    with opened(builder, build_agent(builder)) as root:
        home = root / "opt/chrek"
        named = materials(home)
        installed = importlib.metadata.distributions(path=[str(home / "lib/site-packages")])
        assert named["pypi"] == {(each.metadata["Name"], each.version) for each in installed}
        assert {"kubernetes", "grpcio"} <= {name for name, _ in named["pypi"]}
        packages = {name for name, _ in named["deb"]}
        assert {"criu", "libstdc++6"} <= packages
        notices = {path.name for path in (home / "licenses").iterdir()}
        assert notices == packages | {"README", "chrek", "common-licenses"}


def test_labels_of_an_enabled_image(builder: Builder, tmp_path: Path) -> None:
    """What the base image says of itself stays; what it does not say is filled in."""
    about = "org.opencontainers.image"
    silent = derive(builder, tmp_path, "silent", 'CMD ["echo"]')
    assert builder.checkpoint_enable(silent, f"{silent}-checkpoint").status == 0
    labels = builder.config(f"{silent}-checkpoint")["Labels"]
    assert labels[f"{about}.title"] == "silent"
    assert labels[f"{about}.version"] == "1"
    assert labels[f"{about}.description"].startswith(f"{silent}, checkpoint-enabled by ChReK ")
    assert labels[f"{about}.base.name"] == silent
    assert labels[f"{about}.licenses"].startswith("(LicenseRef-base-image) AND Apache-2.0 AND GPL-2.0-only AND ")
    assert labels["nvidia.com/chrek-version"] == chrek.__version__
    assert re.match(r"[0-9a-f]{40}|unknown", labels["nvidia.com/chrek-revision"])
    own = {"title": "My app", "version": "3.1", "revision": "abc", "licenses": "MIT OR Zlib", "description": "Sums."}
    words = " ".join(f'{about}.{key}="{value}"' for key, value in own.items())
    told = derive(builder, tmp_path, "told", f"LABEL {words}", 'CMD ["echo"]')
    assert builder.checkpoint_enable(told, f"{told}-checkpoint").status == 0
    labels = builder.config(f"{told}-checkpoint")["Labels"]
    assert [labels[f"{about}.{key}"] for key in ("title", "version", "revision")] == ["My app", "3.1", "abc"]
    assert labels[f"{about}.description"].startswith("Sums., checkpoint-enabled by ChReK ")
    assert labels[f"{about}.licenses"].startswith("(MIT OR Zlib) AND Apache-2.0 AND ")


def test_agent_image_runs_the_command_line(workspace: Workspace, builder: Builder) -> None:
    """`kubectl exec` finds chrek in it; its labels say what it is, also where another version was built before."""
    other = builder.build("--target", "agent", "--build-arg", "VERSION=0.0.1", "--tag", "localhost/chrek-agent:other")
    assert other.status == 0, other.output
    image = build_agent(builder)
    about, labels = "org.opencontainers.image", builder.config(image)["Labels"]
    assert [labels[f"{about}.{key}"] for key in ("title", "version", "revision")] == ["chrek-agent", "1.2.3", "abc"]
    assert "GPL-2.0-only" in labels[f"{about}.licenses"].split(" AND ")
    assert labels[f"{about}.description"]
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
