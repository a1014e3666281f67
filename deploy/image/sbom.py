#!/usr/bin/env python3
"""What the images are made of: a bill of materials in SPDX 2.3, and the notices that licences ask for.

``lay-out-bundle`` writes ``/opt/chrek/sbom.spdx.json`` for the bundle. Run as a program in the agent's build, this adds
the Python packages and libraries of the agent. Names and versions are those that dpkg and pip have recorded, so
nothing is guessed from files; the standard library is enough, and a build needs no scanner.

usage: sbom.py BUNDLE OUTPUT --python DIRECTORY --native FILE...
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NAME = "sbom.spdx.json"
KNOWN = {"criu": "GPL-2.0-only", "libcompel1": "LGPL-2.1-only", "busybox-static": "GPL-2.0-only"}
"""Licences of Debian packages as SPDX has them; of the others the copyright file speaks."""
COMMON = Path("/usr/share/common-licenses")
README = """\
ChReK itself is under the Apache License 2.0, in the file chrek.

Beside it lie parts of Debian packages, each with its copyright file here under the package's name; the texts that these
refer to are in common-licenses. CRIU and busybox are under the GNU General Public License, version 2 (GPL-2.0-only),
the C library under the GNU Lesser General Public License, version 2.1 or later. The exact versions are in
../sbom.spdx.json; their sources are Debian's source packages of these versions (`apt-get source PACKAGE=VERSION`).

No code of them was changed. In CRIU, its libraries and the loader, paths of configuration files were overwritten by paths
that do not exist, so that nothing of a container is read; tools/setup-criu of ChReK's sources does that.
"""


@dataclass(frozen=True, order=True)
class Part:
    """A package that something in the image comes from."""

    kind: str
    name: str
    version: str
    suite: str = ""
    license: str = "NOASSERTION"

    @property
    def purl(self) -> str:
        """Its package URL."""
        version = self.version.replace("+", "%2B").replace(":", "%3A")
        if self.kind == "deb":
            return f"pkg:deb/debian/{self.name}@{version}?arch=amd64&distro={self.suite}"
        name = re.sub(r"[-_.]+", "-", self.name).lower()
        return f"pkg:{self.kind}/{name}@{version}"

    def as_spdx(self, number: int) -> dict[str, object]:
        """Return it as a package of an SPDX document."""
        return {
            "SPDXID": f"SPDXRef-{number}",
            "name": self.name,
            "versionInfo": self.version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": self.license,
            "copyrightText": "NOASSERTION",
            "externalRefs": [
                {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": self.purl}
            ],
        }


# --- what there is -------------------------------------------------------------------------------------------------


def debian(name: str, version: str, suite: str) -> Part:
    """Return a Debian package as a part."""
    return Part("deb", name, version, suite, KNOWN.get(name, "NOASSERTION"))


def owners(files: Iterable[Path]) -> dict[str, str]:
    """Return the installed Debian packages that files come from, with their versions."""
    found: dict[str, str] = {}
    for file in files:
        real = file.resolve()
        # dpkg knows some files by the names they had before /bin and /lib became links.
        spellings = {str(each) for each in (file, real, Path("/usr") / real.relative_to("/"))}
        spellings.add(str(real).removeprefix("/usr"))
        argv = ["dpkg", "-S", *sorted(spellings)]
        lines = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.splitlines()
        names = {line.split(":")[0] for line in lines if not line.startswith("diversion ")}
        if not names:
            raise SystemExit(f"sbom: no Debian package has {file}")
        for name in names - found.keys():
            query = ["dpkg-query", "--show", "--showformat=${Version}", name]
            found[name] = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return found


def own_suite() -> str:
    """Return the Debian release that this image is made from."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def python_packages(directory: Path) -> list[Part]:
    """Return the distributions that pip has installed in a directory."""
    found = []
    for each in importlib.metadata.distributions(path=[str(directory)]):
        declared = each.metadata.get("License-Expression") or "NOASSERTION"
        found.append(Part("pypi", each.metadata["Name"], each.version, license=declared))
    return found


# --- documents -----------------------------------------------------------------------------------------------------


def write(target: Path, own: Part, parts: Iterable[Part]) -> None:
    """Write the document: our own package, which contains the parts."""
    listed = [own, *sorted(set(parts))]
    packages = [part.as_spdx(number) for number, part in enumerate(listed)]
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = dt.datetime.now(dt.UTC)
    created = dt.datetime.fromtimestamp(int(epoch), dt.UTC) if epoch else now
    relations = [
        {"spdxElementId": "SPDXRef-DOCUMENT", "relatedSpdxElement": "SPDXRef-0", "relationshipType": "DESCRIBES"}
    ]
    relations += [
        {"spdxElementId": "SPDXRef-0", "relatedSpdxElement": each["SPDXID"], "relationshipType": "CONTAINS"}
        for each in packages[1:]
    ]
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{own.name}-{own.version}",
        "documentNamespace": uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(packages)).urn,
        "creationInfo": {"created": created.strftime("%Y-%m-%dT%H:%M:%SZ"), "creators": ["Tool: chrek-sbom"]},
        "packages": packages,
        "relationships": relations,
    }
    target.write_text(json.dumps(document, indent=1) + "\n")


def write_notices(directory: Path, packages: dict[str, str], license_file: Path) -> None:
    """Put the copyright file of each installed package into a directory, with the texts that they refer to.

    Slim images leave these files out; then they are taken from the package itself.
    """
    directory.mkdir(exist_ok=True)
    shutil.copytree(COMMON, directory / "common-licenses", dirs_exist_ok=True)
    shutil.copy(license_file, directory / "chrek")
    (directory / "README").write_text(README)
    for name, version in packages.items():
        notice = Path("/usr/share/doc", name, "copyright")
        if notice.exists():
            shutil.copy(notice, directory / name)
        else:
            _fetch_notice(name, version, directory / name)


def _fetch_notice(name: str, version: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for wanted in (f"{name}={version}", name):  # the mirror may have a later one by now
            fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", wanted]
            if subprocess.run(fetch, cwd=folder, capture_output=True, check=False).returncode == 0:
                break
        archives = list(Path(folder).glob("*.deb"))
        if not archives:
            raise SystemExit(f"sbom: {name} has no copyright file here, and the package cannot be fetched")
        other = copy_notice(archives[0], name, target)
        if other:
            _fetch_notice(other, version, target)


def copy_notice(archive: Path, name: str, target: Path) -> str | None:
    """Take the copyright file out of a package; return the package that has it, where this one only refers to it."""
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "--extract", str(archive), unpacked], check=True)
        folder = Path(unpacked, "usr/share/doc", name)
        notice = folder / "copyright"
        if notice.is_file():
            shutil.copy(notice, target)
            return None
        for link in (folder, notice):
            if link.is_symlink():
                return [part for part in link.readlink().parts if part not in {"..", "copyright"}][-1]
    raise SystemExit(f"sbom: {archive.name} has no copyright file")


def read(target: Path) -> tuple[Part, list[Part]]:
    """Return our own package of a document that `write` has written, and the parts."""
    found = []
    for each in json.loads(target.read_text())["packages"]:
        locator = each["externalRefs"][0]["referenceLocator"]
        kind, suite = locator.removeprefix("pkg:").partition("/")[0], locator.partition("distro=")[2]
        found.append(Part(kind, each["name"], each["versionInfo"], suite, each["licenseDeclared"]))
    return found[0], found[1:]


def main() -> None:
    """Write the document of the agent: that of the bundle, and what the agent has beside it."""
    parser = argparse.ArgumentParser(description="Bill of materials of the agent's image.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--native", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    own, parts = read(options.bundle / NAME)
    packages = owners(options.native)
    options.output.mkdir(parents=True, exist_ok=True)
    write_notices(options.output / "licenses", packages, options.bundle / "licenses" / "chrek")
    native = [debian(name, version, own_suite()) for name, version in packages.items()]
    write(options.output / NAME, own, [*parts, *python_packages(options.python), *native])


if __name__ == "__main__":
    main()
