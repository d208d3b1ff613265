"""One run of a command in a virtual machine.

The guest writes the command's output to a virtio port, then a token that nobody
can guess and the exit status; the host ends the machine at that word, without
waiting for a shutdown.  Everything that QEMU opens for us (disks, initramfs,
kernel log) is a file without a name, and QEMU dies with the thread that started
it: however a run ends, nothing is left behind.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

from . import initramfs, kernels
from .programs import program

TIMEOUT = 600.0
TIMED_OUT = 124  # as timeout(1)
BOOTS = 3  # tries, while the machine panics before the command begins
DIED = 125  # the machine ended without a word about the command

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # after the caller's
ENVIRONMENT = {
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
KERNEL_PARAMETERS = (
    "mitigations=off tsc=reliable clocksource=tsc no_timer_check nowatchdog audit=0 "
    "cryptomgr.notests random.trust_cpu=on nokaslr panic=-1 oops=panic"
)
COMMAND = "vm: the command begins"
ALIVE = "vm: alive"  # the guest says so in the kernel's log every ten seconds
SILENCE = 180.0  # seconds without a word in that log: the emulated machine hangs
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,19}")  # a virtio serial has 20 bytes


@dataclass(frozen=True)
class Disk:
    """An empty scratch disk, /dev/scratch/NAME in the guest."""

    name: str
    size: int
    fast: bool = False  # in memory; a flush costs nothing

    @classmethod
    def parse(cls, text: str, number: int = 0) -> Disk:
        """Read SIZE[:NAME][:fast], where SIZE may end in K, M, G or T; or raise ValueError."""
        size, *rest = text.split(":")
        match = re.fullmatch(r"(\d+)([KMGT]?)", size)
        fast = rest[-1:] == ["fast"]
        names = rest[:-1] if fast else rest
        name = names[0] if names else f"disk{number}"
        if not match or len(names) > 1 or not NAME.fullmatch(name):
            raise ValueError(f"{text!r} is not SIZE[:NAME][:fast]")
        return cls(name, int(match[1]) << " KMGT".index(match[2] or " ") * 10, fast)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: int  # the command's; 124 after the timeout; 125 if the machine died
    output: str  # what the command wrote, stdout and stderr as they came
    log: str  # the kernel's messages, with a line COMMAND where the command began
    problem: str  # why there is no exit status of the command; empty if there is one


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    kernel: str = "newest",
    memory: str = "2G",
    cpus: int = 2,
    icount: bool = False,
    disks: Sequence[Disk | str] = (),
    shares: Sequence[str | os.PathLike[str]] = (),
    timeout: float = TIMEOUT,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    echo: Callable[[bytes], object] | None = None,
) -> Result:
    """Run a command in a fresh machine over the host's root file system.

    The guest sees the host's files and may write anywhere; its writes are gone
    afterwards, except those under `shares`, which are the host's own folders.
    /tmp, /run and /dev/shm are empty (but the current directory is always there).
    `icount` counts instructions instead of time, with one CPU.  `echo` gets the
    output as it comes.

    Raises KernelError or MissingProgram if there is no machine to be had.
    """
    found = kernels.find(kernel)
    wanted = [d if isinstance(d, Disk) else Disk.parse(d, n) for n, d in enumerate(disks)]
    if len({disk.name for disk in wanted}) != len(wanted):
        raise ValueError("two disks have the same name")
    folder = os.path.abspath(cwd or os.getcwd())
    shared = [os.path.abspath(share) for share in shares]
    token = secrets.token_hex(16)
    settings = {
        "TOKEN": token,
        "FOLDER": folder,
        "SHARES": "\n".join(shared),
        "COMMAND": COMMAND,
        "ALIVE": ALIVE,
        "LIMIT": str(max(1, int(timeout) - 15)),
    }
    texts = {
        "settings": _assign(settings),
        "command": _script(argv, folder, {"PATH": _path(), **ENVIRONMENT, **(env or {})}),
    }
    with ExitStack() as files:
        log = files.enter_context(tempfile.TemporaryFile())
        initrd = files.enter_context(tempfile.TemporaryFile())
        initrd.write(initramfs.build(found, bool(wanted), texts))
        initrd.flush()
        qemu = Qemu(memory, 1 if icount else cpus, icount)
        qemu.boot(found, initrd, log)
        qemu.folder("host", "/", readonly=True)
        qemu.folder("modules", str(found.modules), readonly=True)
        for number, share in enumerate(shared):
            qemu.folder(f"share{number}", share, readonly=False)
        for disk in wanted:
            where = "/dev/shm" if disk.fast else None
            qemu.disk(disk, files.enter_context(tempfile.TemporaryFile(dir=where)))
        for _ in range(BOOTS):
            status, output, problem = _watch(
                qemu, token.encode(), timeout, None if icount else log, echo
            )
            log.seek(0)
            lines = log.read().decode(errors="replace").replace("\r", "").splitlines(keepends=True)
            messages = "".join(line for line in lines if ALIVE not in line)
            if status != DIED or output or COMMAND in messages or "Linux" not in messages:
                break
    panic = re.search("Kernel panic.*", messages)
    if status == DIED and problem and panic:
        problem = panic[0]
    return Result(status, output.decode(errors="replace"), messages, problem)


class Qemu:
    """The command line of a machine.  Files given to it must stay open until it has started."""

    def __init__(self, memory: str, cpus: int, icount: bool) -> None:
        self._fds: list[int] = []
        accel = ["-icount", "shift=0"] if icount else ["-accel", "tcg,thread=multi"]
        self.arguments = [
            *(program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
            program("qemu-system-x86_64", "qemu-system-x86"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35,usb=off,vmport=off,smbus=off,hpet=off", *accel),
            *("-cpu", "max,la57=off", "-smp", str(cpus), "-m", memory),
            *("-chardev", "file,id=output,path=/proc/self/fd/1"),
            *("-device", "virtio-serial-pci,max_ports=2"),
            *("-device", "virtserialport,chardev=output,name=output"),
        ]

    def boot(self, kernel: kernels.Kernel, initrd: IO[bytes], log: IO[bytes]) -> None:
        """Start this kernel; its messages go to the file `log`."""
        # One CPU until init.sh asks for the others: a kernel that patches its code (static
        # keys) while another CPU executes it may panic under emulation, 2 boots of 60.
        append = f"{KERNEL_PARAMETERS} console=ttyS0 loglevel=7 maxcpus=1"
        self.arguments += ["-kernel", str(kernel.image), "-initrd", self._path(initrd.fileno())]
        self.arguments += ["-append", append, "-serial", "chardev:log"]
        self.arguments += ["-chardev", f"file,id=log,path={self._path(log.fileno())}"]

    def folder(self, tag: str, path: str, *, readonly: bool) -> None:
        """Let the guest mount a folder of the host by its tag."""
        escaped = path.replace(",", ",,")
        model = "none" if readonly or os.geteuid() else "passthrough"
        self.arguments += [
            "-fsdev",
            f"local,id={tag},path={escaped},security_model={model},multidevs=remap"
            + (",readonly=on" if readonly else ""),
            "-device",
            f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
        ]

    def disk(self, disk: Disk, file: IO[bytes]) -> None:
        """Add a disk in an empty file, which stays sparse."""
        file.truncate(disk.size)
        cache = "unsafe" if disk.fast else "writeback"
        self.arguments += [
            "-drive",
            f"if=none,id=disk-{disk.name},format=raw,discard=unmap,cache={cache},"
            f"file={self._path(file.fileno())}",
            "-device",
            f"virtio-blk-pci,drive=disk-{disk.name},serial={disk.name}",
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the machine: stdout is the guest's port, stderr is QEMU's own."""
        return subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=self._fds,
            start_new_session=True,  # Ctrl-C is ours to handle
        )

    def _path(self, fd: int) -> str:
        self._fds.append(fd)
        return f"/proc/self/fd/{fd}"


def _watch(
    qemu: Qemu,
    token: bytes,
    timeout: float,
    log: IO[bytes] | None,
    echo: Callable[[bytes], object] | None,
) -> tuple[int, bytes, str]:
    """Run the machine until its last word; return status, output, problem.

    A machine whose kernel says nothing any more hangs, whatever the command is doing: seen once in
    some twenty runs under emulation with two CPUs.  Without `log` nobody listens: a machine that
    counts instructions has a time of its own.
    """
    deadline = time.monotonic() + timeout
    heard, written = time.monotonic(), 0
    received, complaints, echoed = bytearray(), bytearray(), 0
    ending = re.compile(token + rb" (\d+)\n")
    process = qemu.start()
    try:
        with selectors.DefaultSelector() as selector:
            for stream, into in ((process.stdout, received), (process.stderr, complaints)):
                assert stream is not None
                selector.register(stream, selectors.EVENT_READ, into)
            while selector.get_map():
                now = time.monotonic()
                left = deadline - now
                if left <= 0:
                    return TIMED_OUT, bytes(received), f"no end after {timeout:g} s"
                size = os.fstat(log.fileno()).st_size if log else -1
                if not log or size != written:
                    heard, written = now, size
                elif now - heard > SILENCE:
                    return DIED, bytes(received), f"the machine hangs: silent for {SILENCE:g} s"
                for key, _ in selector.select(min(left, 10)):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    key.data.extend(data)
                end = ending.search(received, echoed)
                known = end.start() if end else len(received) - _held(received, token)
                if echo and known > echoed:
                    echo(bytes(received[echoed:known]))
                echoed = known
                if end:
                    return int(end[1]), bytes(received[:known]), ""
        process.wait()
        reason = complaints.decode(errors="replace").strip() or "the guest gave up"
        return DIED, bytes(received), f"the machine ended early: {reason}"
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _held(received: bytearray, token: bytes) -> int:
    """Return how many bytes at the end may be the beginning of the last word."""
    start = received.find(token, max(0, len(received) - len(token) - len(b" 255\n")))
    if start >= 0:
        return len(received) - start
    return next(n for n in range(len(token) - 1, -1, -1) if received.endswith(token[:n]))


def _path() -> str:
    folders = [*os.environ.get("PATH", "").split(":"), *PATH.split(":")]
    return ":".join(dict.fromkeys(folder for folder in folders if folder.startswith("/")))


def _assign(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _script(
    argv: Sequence[str | os.PathLike[str]], folder: str, environment: Mapping[str, str]
) -> str:
    command = shlex.join(os.fspath(argument) for argument in argv)
    variables = shlex.join(f"{name}={value}" for name, value in environment.items())
    return (
        "#!/run/vm/busybox sh\n"
        f"cd {shlex.quote(folder)} || exit {DIED}\n"
        f"exec /usr/bin/env -i {variables} {command}\n"
    )
