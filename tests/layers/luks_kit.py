"""What the LUKS tests have in common: images that QEMU and cryptsetup make, and what QEMU reads in them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from layers.file import File
from layers.luks import Luks
from nbdserver.layer import Layer
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


def qemu_io(path: Path, *commands: str) -> None:
    """Run qemu-io commands on the decrypted image."""
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", *_secrets(path), "--image-opts", _image(path), *words)
    assert "failed" not in output and "rror" not in output, output


def _secrets(path: Path, **passphrases: bytes) -> list[str]:
    files = {"s": secret(path.parent), **{name: secret(path.parent, p, name) for name, p in passphrases.items()}}
    return [word for name, file in files.items() for word in ("--object", f"secret,id={name},file={file}")]


def _image(path: Path) -> str:
    return f"driver=luks,key-secret=s,file.driver=file,file.filename={path}"
