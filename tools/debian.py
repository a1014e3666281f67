"""Fetch Debian packages with all they depend on, without touching the machine's own apt state.

apt does the work (mirror, signatures, dependencies, resumed downloads), with lists, cache and status file of its own
under a directory of ours: the machine's configuration is read, its state is not. The status file is empty, so what is
fetched is complete whatever the machine has installed. Signatures are checked with the machine's Debian keyring.

No mirror is named here: it is the one that the machine's own apt configuration uses for its own release.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

UNUSED = ("sourceparts", "parts", "main", "preferences", "preferencesparts")  # of the machine's apt configuration
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class SetupError(Exception):
    """A step failed; the message says which, and what to do."""


@dataclass(frozen=True)
class Fetched:
    """Package files, and the version of each package."""

    files: list[Path]
    versions: dict[str, str]


def run(argv: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program to its end and return its standard output; its last words go into the error."""
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise SetupError(f"`{' '.join(argv)}` ended with {done.returncode}:\n  {tail}")
    return done.stdout


def own_suite() -> str:
    """Return the code name of the Debian release that this machine runs."""
    release = platform.freedesktop_os_release()
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not codename:
        raise SetupError(
            f"this machine runs {release.get('PRETTY_NAME', 'something unknown')}; the set-up needs Debian 12 or newer"
        )
    return codename


def mirror() -> str:
    """Return the address of the Debian mirror that this machine uses; third parties' archives are passed over."""
    named = os.environ.get("CHREK_DEBIAN_MIRROR")
    if named:
        return named
    codename = own_suite()
    text = run(["apt-get", "indextargets", "--no-release-info", "--format", "$(CREATED_BY) $(REPO_URI) $(RELEASE)"])
    for line in text.splitlines():
        created_by, uri, suite = ([*line.split(), "", "", ""])[:3]
        if created_by == "Packages" and suite == codename and "debian" in uri:
            return uri
    raise SetupError(f"apt knows no Debian mirror for {codename}; set CHREK_DEBIAN_MIRROR to the address of one")


def private_apt(home: Path, *, suite: str) -> dict[str, str]:
    """Write an apt configuration whose whole state lies in `home`; return the environment that selects it."""
    if not KEYRING.exists():
        raise SetupError(f"{KEYRING} is missing, so no signature can be checked: install debian-archive-keyring")
    for part in ("lists/partial", "archives/partial"):
        (home / part).mkdir(parents=True, exist_ok=True)
    (home / "status").touch()
    (home / "sources.list").write_text(f"deb [arch=amd64 signed-by={KEYRING}] {mirror()} {suite} main\n")
    # The machine's proxies, certificates and time-outs are kept; its hooks (which may empty its caches) are not.
    acquire = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::")]
    places = {
        "Dir": home,
        "Dir::State": home,
        "Dir::State::lists": home / "lists",
        "Dir::State::status": home / "status",
        "Dir::State::extended_states": home / "extended_states",
        "Dir::Cache": home,
        "Dir::Cache::archives": home / "archives",
        "Dir::Etc::sourcelist": home / "sources.list",
        **{f"Dir::Etc::{part}": "/dev/null" for part in UNUSED},
        "Dir::Log": "/dev/null",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "0",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Acquire::Retries": "3",
        # A lagging mirror of a testing suite is no reason to stop: signatures still hold, and what is fetched says its
        # version.
        "Acquire::Check-Valid-Until": "false",
        "DPkg::Lock::Timeout": "120",  # a killed run's apt-get may still be at work
    }
    conf = home / "apt.conf"
    lines = [*acquire, 'APT::Architectures:: "amd64";', *(f'{name} "{value}";' for name, value in places.items())]
    conf.write_text("\n".join(lines) + "\n")
    return {**os.environ, "APT_CONFIG": str(conf), "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}


def fetch(packages: list[str], *, suite: str, home: Path) -> Fetched:
    """Download `packages` of `suite` and everything they depend on into `home`; print what is going on."""
    env = private_apt(home, suite=suite)
    print(f"  reading the package lists of {suite} (about 10 MB, less what is there)", flush=True)
    run(["apt-get", "update", "-q"], env=env)
    install = ["apt-get", "install", "-y", "-q"]
    missing = [line.split() for line in run([*install, "--print-uris", *packages], env=env).splitlines()]
    size = sum(int(words[2]) for words in missing if words and words[0].startswith("'"))
    print(f"  downloading packages ({size / 1e6:.0f} MB)", flush=True)
    run([*install, "--download-only", *packages], env=env)
    files: list[Path] = []
    versions: dict[str, str] = {}
    for line in run([*install, "--simulate", *packages], env=env).splitlines():
        match = re.match(r"Inst (\S+) \((\S+) .*\[(\w+)\]", line)
        if match:
            package, version, arch = match.groups()
            versions[package] = version
            files.append(home / "archives" / f"{package}_{version.replace(':', '%3a')}_{arch}.deb")
    return Fetched(files=files, versions=versions)


def fetch_alone(package: str, *, suite: str, home: Path) -> Path:
    """Download one package of `suite` without what it depends on into `home`; return its file."""
    env = private_apt(home, suite=suite)
    run(["apt-get", "update", "-q"], env=env)
    words = run(["apt-get", "download", "--print-uris", package], env=env).split()
    run(["apt-get", "download", "-q", package], env=env, cwd=home / "archives")
    return home / "archives" / words[1]


def unpack(files: list[Path], root: Path) -> None:
    """Unpack the packages' files into `root`, through symbolic links that stand there; none of their scripts is run."""
    tar = ["tar", "--extract", "--directory", str(root), "--keep-directory-symlink", "--file", "-"]
    for file in files:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE) as reader:
            done = subprocess.run(tar, stdin=reader.stdout, capture_output=True, text=True, check=False)
        if reader.returncode or done.returncode:
            raise SetupError(f"{file.name} could not be unpacked: {done.stderr.strip()[-500:]}")
