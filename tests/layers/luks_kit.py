"""What the LUKS tests have in common: images that QEMU and cryptsetup make, and what QEMU reads in them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from layers.file import File
from layers.luks import Luks
from layers.qcow2 import Qcow2
from layers.qcow2.create import Options
from nbdserver.files import FileOpener, Files, Keys, Source
from nbdserver.graph import Graph
from nbdserver.layer import Layer
from nbdserver.reference import open_stack
from tests.serving import run

KIB, MIB = 1 << 10, 1 << 20

PASSPHRASE = b"correct horse"

#: QEMU measures how fast it hashes, and gives up when the clock says that it took no time.
ATTEMPTS_COUNT = 20


def secret(directory: Path, passphrase: bytes = PASSPHRASE, name: str = "key") -> Path:
    """A file that holds the passphrase."""
    path = directory / name
    path.write_bytes(passphrase)
    return path


def luks(path: Path, *, header: Layer | None = None) -> Luks:
    """The layer for an image whose passphrase lies beside it."""
    return Luks(File(str(path)), header=header, key_file=str(secret(path.parent)))


def create(path: Path, size: int = MIB, **options: object) -> Path:
    """A LUKS image that qemu-img makes; further keywords are its creation options."""
    words = {"key-secret": "s", "iter-time": 10, **{key.replace("_", "-"): value for key, value in options.items()}}
    text = ",".join(f"{key}={value}" for key, value in words.items())
    measured("qemu-img", "create", "-q", "-f", "luks", *_secrets(path), "-o", text, str(path), str(size))
    return path


def create_qcow2(path: Path, size: int | str = MIB, *, words: tuple[str, ...] = (), **options: object) -> Path:
    """A qcow2 image, encrypted with LUKS, that qemu-img makes; further keywords are its creation options, those of
    encryption beginning with "encrypt_"; ``words`` come before the size."""
    encryption = {"encrypt_format": "luks", "encrypt_key_secret": "s", "encrypt_iter_time": 10}
    given = {**encryption, **options}
    named = {
        f"encrypt.{key.removeprefix('encrypt_').replace('_', '-')}" if key.startswith("encrypt_") else key: value
        for key, value in given.items()
    }
    text = ",".join(f"{key}={value}" for key, value in named.items())
    command = ("qemu-img", "create", "-q", "-f", "qcow2", *_secrets(path), "-o", text, *words)
    measured(*command, str(path), str(size))
    return path


def make_qcow2(path: Path, size: int = MIB, **options: object) -> Path:
    """One that we make, which takes no time; the keywords are fields of its `Options`."""
    path.write_bytes(b"")
    if "data_file" in options:
        data = Path(str(options["data_file"]))
        data.write_bytes(b"")
        os.truncate(data, size)
    key: Source = {"key_file": str(secret(path.parent)), "key_env": None, "key_fd": None}
    wanted = {"encrypt_format": "luks", "encrypt_key_secret": "s", "encrypt_iter_time": 1, **options}
    with open_stack(file := File(str(path))):
        opener = FileOpener(Graph(), Files(), keys=Keys({"s": key}))
        Qcow2.create(file, size, Options(**wanted), opener=opener)  # type: ignore[arg-type]
    return path


def qcow2(path: Path) -> str:
    """The image options with which QEMU opens an encrypted qcow2 image."""
    return f"driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={path}"


def check_qcow2(path: Path) -> None:
    """QEMU finds nothing wrong with an encrypted image."""
    run("qemu-img", "check", "-q", *_secrets(path), "--image-opts", qcow2(path))


def format(path: Path, *options: str, size: int = MIB, passphrase: bytes = PASSPHRASE) -> Path:
    """A LUKS1 image that cryptsetup makes; quickly, with as few iterations as it allows."""
    path.write_bytes(bytes(2 * MIB + size))
    key = secret(path.parent, passphrase)
    quick = ("--batch-mode", "--pbkdf-force-iterations", "1000", "--use-urandom")
    run("cryptsetup", "luksFormat", "--type", "luks1", *quick, *options, path, key)
    return path


def amend(path: Path, options: str, **passphrases: bytes) -> None:
    """Change key slots with qemu-img; ``passphrases`` are further secrets, by name."""
    command = ("qemu-img", "amend", "-q", *_secrets(path, **passphrases), "--image-opts", _image(path))
    measured(*command, "-o", options)


def measured(*command: str) -> None:
    """Run a qemu-img that measures how fast it hashes, and again while that fails."""
    for _ in range(ATTEMPTS_COUNT):
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=120)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def content(path: Path, options: str | None = None) -> bytes:
    """What QEMU decrypts; ``options`` for other stacks than just this image."""
    out = path.with_name(path.name + ".content")
    run("qemu-img", "convert", *_secrets(path), "--image-opts", options or _image(path), "-O", "raw", out)
    data = out.read_bytes()
    out.unlink()
    return data


def qemu_io(path: Path, *commands: str, options: str | None = None) -> None:
    """Run qemu-io commands on the decrypted image; ``options`` as for `content`."""
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", *_secrets(path), "--image-opts", options or _image(path), *words)
    assert "failed" not in output and "rror" not in output, output


def _secrets(path: Path, **passphrases: bytes) -> list[str]:
    files = {"s": secret(path.parent), **{name: secret(path.parent, p, name) for name, p in passphrases.items()}}
    return [word for name, file in files.items() for word in ("--object", f"secret,id={name},file={file}")]


def _image(path: Path) -> str:
    return f"driver=luks,key-secret=s,file.driver=file,file.filename={path}"
