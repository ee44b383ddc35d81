"""Runs a static x86-64 Linux program under Bochs: AVX-512 for processors without it.

Bochs interprets a whole PC, with a model of a processor that has AVX-512 (qemu, which can run single programs, has
none). To boot Linux in it would take a kernel image, a file system and a long start. So the program gets a machine of
its own: the disk image holds a boot sector and a few KiB of code (``boot.S``, ``machine.c``), the program, one argument
and its standard input. That code turns AVX-512 on, loads the program, answers its system calls, writes its outputs back
to the disk image and has Bochs stop. A second for no work; then some 20 million instructions a second.

Limits: 32 MiB of program (linked ``-static -no-pie``), 128 MiB of input, 128 MiB of output, 64 KiB of error output; no
files, no threads. An exception, such as an illegal instruction, ends the run with status 255 and a line of error
output.

Debian, Ubuntu: ``apt-get install --no-install-recommends bochs bochs-term bochsbios vgabios g++``. No display needed.
"""

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

HERE, SHARE = Path(__file__).parent, Path("/usr/share/bochs")
COMPILER, LINKER, COPIER = (f"x86_64-linux-gnu-{tool}" for tool in ("gcc", "ld", "objcopy"))
FLAGS = [
    "-O1", "-std=c11", "-Wall", "-Wextra", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-fcf-protection=none",
    "-mno-red-zone", "-mgeneral-regs-only", "-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns",
]  # fmt: skip
MIB, SECTOR, HEADER_SECTOR, CYLINDER = 1 << 20, 512, 64, 16 * 63 * 512
MAGIC = 0x5452415453363158  # these numbers, and the layout of header and result, are those of machine.c
PROGRAM_SPACE, INPUT_SPACE, OUTPUT_SPACE, ERROR_SPACE = 32 * MIB, 128 * MIB, 128 * MIB, 1 << 16

# tigerlake: a processor model with all of AVX-512 that the kernels use, VBMI and VPOPCNTDQ included
CONFIGURATION = """\
config_interface: textconfig
display_library: term
cpu: model=tigerlake, count=1, ips=4000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file={share}/BIOS-bochs-latest, options=fastboot
vgaromimage: file={share}/VGABIOS-lgpl-latest
clock: sync=none, time0=utc
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, mode=flat, path="{disk}", cylinders=0
boot: disk
log: {log}
panic: action=fatal
speaker: enabled=0
"""


def missing() -> list[str]:
    """What is not installed here."""
    tools = [tool for tool in ("bochs", COMPILER, LINKER, COPIER) if shutil.which(tool) is None]
    files = [path for path in (SHARE / "BIOS-bochs-latest", SHARE / "VGABIOS-lgpl-latest") if not path.exists()]
    terminal = any(Path("/usr/lib").glob("*/bochs/plugins/libbx_term_gui.so*"))
    return tools + [str(path) for path in files] + ([] if terminal else ["bochs-term"])


def execute(program: Path, argument: str, stdin: bytes, timeout: float = 300) -> subprocess.CompletedProcess:
    """Like ``subprocess.run([program, argument], input=stdin, capture_output=True)``, in the emulated machine."""
    code = program.read_bytes()
    if len(code) > PROGRAM_SPACE or len(stdin) > INPUT_SPACE:
        raise ValueError(f"expected at most {PROGRAM_SPACE} and {INPUT_SPACE} bytes, got {len(code)} and {len(stdin)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk, log, configuration, commands = (folder / file for file in ("disk", "log", "configuration", "commands"))
        files = _sectors(code) + _sectors(stdin)
        result = (HEADER_SECTOR + 1) * SECTOR + len(files)
        header = struct.pack("<3q", len(code), len(stdin), result // SECTOR) + argument.encode().ljust(488, b"\0")
        with disk.open("wb") as image:
            image.write(_machine(folder) + header + files)
            size = result + 2 * SECTOR + OUTPUT_SPACE + ERROR_SPACE
            image.truncate(-(-size // CYLINDER) * CYLINDER)  # sparse: takes no space until it is written
        configuration.write_text(CONFIGURATION.format(share=SHARE, disk=disk, log=log))
        commands.write_text("continue\nquit\n")  # Debian's Bochs comes up in its debugger
        bochs = subprocess.run(
            ["bochs", "-q", "-f", str(configuration), "-rc", str(commands)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            env=os.environ | {"TERM": "xterm"},  # it opens a terminal of its own for the emulated screen
        )  # its exit status says nothing
        with disk.open("rb") as image:
            image.seek(result)
            magic, status, output_bytes, error_bytes = struct.unpack("<4q", image.read(SECTOR)[:32])
            if magic != MAGIC:
                raise RuntimeError(f"the emulated machine stopped early:\n{bochs.stdout.decode(errors='replace')}")
            output, errors = (image.read(n + -n % SECTOR)[:n] for n in (output_bytes, error_bytes))
    return subprocess.CompletedProcess([str(program), argument], status, output, errors)


def _sectors(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)


def _machine(folder: Path) -> bytes:
    """The first sectors of the disk, up to the header: ``boot.S`` and ``machine.c``."""

    def run(*command):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    objects = [folder / "boot.o", folder / "machine.o"]
    linked, image = folder / "machine.elf", folder / "machine.img"
    run(COMPILER, "-c", HERE / "boot.S", "-o", objects[0])
    run(COMPILER, *FLAGS, "-c", HERE / "machine.c", "-o", objects[1])
    run(LINKER, "-T", HERE / "machine.ld", *objects, "-o", linked)
    run(COPIER, "-O", "binary", "-j", ".all", linked, image)
    return image.read_bytes().ljust(HEADER_SECTOR * SECTOR, b"\0")
