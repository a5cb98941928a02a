"""Two hosts on one machine: each with its own network, host name, processes, mounts and sshd, joined by a cable.

Everything hangs on kernel namespaces that nothing outside refers to: when the process that made a host goes away, however
it does, the kernel ends all of the host's processes and takes its network and mounts along. Nothing is written to
this machine's /etc: the hosts see files of their own there, mounted over them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
PROGRAMS = ("unshare", "nsenter", "ip", "hostname", "mount")
SSH = ("sshd", "ssh", "ssh-keygen")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")
_PATH = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not_here(*programs: str) -> str | None:
    """What keeps this machine from having hosts; None where nothing does."""
    for program in (*PROGRAMS, *programs):
        if shutil.which(program, path=_PATH) is None:
            return f"no {program}"
    probe = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(probe, capture_output=True, text=True, env={"PATH": _PATH}, timeout=30)
    return None if done.returncode == 0 else f"namespaces are not permitted: {done.stderr.strip()}"


def needs_hosts(*programs: str) -> Any:
    """Marks a test that needs hosts, and these programs beside."""
    reason = why_not_here(*programs)
    return pytest.mark.skipif(reason is not None, reason=f"two hosts on one machine: {reason}")


class Host:
    """One of them."""

    def __init__(self, name: str, address: str, folder: Path, init: str) -> None:
        self.name, self.address, self.folder = name, address, folder
        command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child", "sh", "-ec", init]
        # the host lives until this pipe closes, which it does when this process ends
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"PATH": _PATH}
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said == b"ready\n", said + self._process.stdout.read()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self.pid = int(children.split()[0])

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs `words` on this host."""
        return ["nsenter", "--target", str(self.pid), *_NAMESPACES, f"--wd={Path.cwd()}", "--", *words]

    def start(self, words: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> subprocess.Popen:
        """Start a command; what it says goes to `log`."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.command(words), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={"PATH": _PATH, "HOME": str(self.folder), **environment},
            )  # fmt: skip

    def run(self, *words: str, environment: Mapping[str, str] = {}, timeout: float = 60.0) -> str:
        """Run a command to its end; what it said."""
        done = subprocess.run(
            self.command(words), capture_output=True, text=True, timeout=timeout,
            env={"PATH": _PATH, "HOME": str(self.folder), **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """The command lines of what runs there, by process id, without what a host has anyhow."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or os.readlink(entry / "ns/pid") != space:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # gone meanwhile
                continue
            if line and int(entry.name) != self.pid and "sshd" not in line:  # the dead have no command line
                found[int(entry.name)] = line
        return found

    def pull_cable(self) -> None:
        """No packet leaves or comes in from now on."""
        self.run("ip", "link", "set", "eth0", "down")

    def stop(self) -> None:
        """End it and all that runs there."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)


_INIT = """
hostname {name}
mount --make-rprivate /
mount --bind {folder}/hosts /etc/hosts
{mounts}
ip link set lo up
{sshd}
echo ready
exec cat
"""
_SSHD = """
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
/usr/sbin/sshd -f {folder}/sshd_config -E {folder}/{name}.sshd.log
"""


@contextmanager
def two_hosts(folder: Path, *, ssh: bool = True, private: Sequence[Path] = ()) -> Iterator[tuple[Host, Host]]:
    """node0 and node1, each reachable from the other by name, and by ssh.

    Args:
        folder: for their keys and configurations.
        private: folders of which each host sees an empty one of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    addresses = {"node0": "10.77.0.1", "node1": "10.77.0.2"}
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
    if ssh:
        _write_keys(folder)
    for path in private:
        path.mkdir(parents=True, exist_ok=True)
    hosts: list[Host] = []
    try:
        for name, address in addresses.items():
            mounts = "\n".join(f"mount -t tmpfs tmpfs {path}" for path in private)
            sshd = _SSHD.format(name=name, folder=folder) if ssh else ""
            init = _INIT.format(name=name, folder=folder, mounts=mounts, sshd=sshd)
            hosts.append(Host(name, address, folder, init))
        first, second = hosts
        cable = ["ip", "link", "add", "eth0", "netns", str(first.pid), "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*cable, "netns", str(second.pid)], check=True, env={"PATH": _PATH})
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        if ssh:
            _wait_for_ssh(first, second)
        yield first, second
    finally:
        for host in hosts:
            host.stop()


def _write_keys(folder: Path) -> None:
    for key in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "id.pub", folder / "authorized_keys")
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        "ServerAliveInterval 2\nServerAliveCountMax 2\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPidFile none\n"
        f"PasswordAuthentication no\nUsePAM no\nPermitRootLogin yes\nSetEnv PATH={_PATH}\n"
        "ClientAliveInterval 2\nClientAliveCountMax 2\nMaxStartups 100\n"
    )


def _wait_for_ssh(first: Host, second: Host) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            assert first.run("ssh", second.name, "hostname").strip() == second.name
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
