"""Encrypted images in every command: keys given as qemu-img's options give them, and the same results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from layers.ondisk.luks import ITERATIONS_AT, KEY_SLOTS_AT
from nbdserver.errors import ConfigError
from nbdserver.image.options import parse, secrets
from tests.image.kit import KIB, MIB, image, image_json, qemu_img
from tests.layers.luks_kit import content, qcow2, qemu_io
from tests.serving import run, run_json

SIZE = 4 * MIB

QUICK = "encrypt.format=luks,encrypt.iter-time=1"


class Keys:
    """Two secrets, "s" and "t", in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "key").write_bytes(b"correct horse")
        (directory / "other").write_bytes(b"battery staple\n")
        files = {"s": directory / "key", "t": directory / "other"}
        self.objects = [w for name, file in files.items() for w in ("--object", f"secret,id={name},file={file}")]

    def create(self, path: Path, *words: object, key: str = "s", options: str = "", size: object = SIZE) -> Path:
        """An encrypted image that we make."""
        chosen = f"{QUICK},encrypt.key-secret={key}{options}"
        image("create", "-q", "-f", "qcow2", *self.objects, "-o", chosen, *words, path, size)
        return path

    def opts(self, path: Path, key: str = "s", more: str = "") -> list[str]:
        """What names an image by options, for us and for qemu-img."""
        return [*self.objects, "--image-opts", f"driver=qcow2,encrypt.key-secret={key},file.filename={path}{more}"]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def disk(keys: Keys, tmp_path: Path) -> Path:
    """An encrypted image with data and zeroes."""
    path = keys.create(tmp_path / "disk.qcow2")
    qemu_io(path, "write -P 1 0 300k", "write -P 2 1M 5000", "write -z 100k 64k", options=qcow2(path))
    return path


@pytest.fixture
def plain(disk: Path) -> bytes:
    return content(disk, qcow2(disk))


def test_info_needs_no_key(disk: Path) -> None:
    assert image("info", disk).stdout == qemu_img("info", disk).out
    assert "encrypted: yes" in image("info", disk).stdout
    assert image_json("info", disk) == json.loads(qemu_img("info", "--output=json", disk).out)


def test_info_of_luks_alone_and_of_the_old_aes(keys: Keys, tmp_path: Path) -> None:
    alone, old = tmp_path / "alone", tmp_path / "old"
    run("qemu-img", "create", "-q", "-f", "luks", *keys.objects, "-o", "key-secret=s,iter-time=10", alone, "1M")
    options = "encrypt.format=aes,encrypt.key-secret=s"
    run("qemu-img", "create", "-q", "-f", "qcow2", *keys.objects, "-o", options, old, "1M")
    for path in (alone, old):
        assert image("info", path).stdout == qemu_img("info", path).out
        assert image_json("info", path) == json.loads(qemu_img("info", "--output=json", path).out)
    assert "too weak" in image("convert", old, tmp_path / "raw", status=1).stderr
    (tmp_path / "data").write_bytes(os.urandom(MIB))
    named = f"driver=luks,key-secret=s,file.filename={alone}"
    run("qemu-img", "convert", "-n", *keys.objects, "--target-image-opts", tmp_path / "data", named)
    image("convert", *keys.objects, "--image-opts", named, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "data").read_bytes()


def test_check_needs_no_key(disk: Path, keys: Keys) -> None:
    theirs = qemu_img("check", *keys.opts(disk))
    assert image("check", disk).stdout.strip() == theirs.out.strip()
    assert image("check", "-r", "all", disk).stdout.strip() == theirs.out.strip()


def test_what_needs_a_key_says_so(disk: Path, tmp_path: Path, keys: Keys) -> None:
    for words in (("convert", disk, tmp_path / "raw"), ("map", disk), ("resize", disk, "5M"), ("snapshot", disk)):
        assert f"{disk} is encrypted, and there is no key for it" in image(*words, status=1).stderr
    wrong = image("map", *keys.opts(disk, "t"), status=1).stderr
    assert f"{disk}: no key slot opens with this passphrase, which ends in a newline" in wrong
    unknown = image("map", *keys.opts(disk, "u"), status=1).stderr
    assert "there is no secret 'u'; there are: 's', 't'" in unknown


def test_map_compare_and_measure(disk: Path, keys: Keys, tmp_path: Path, plain: bytes) -> None:
    theirs = run_json("qemu-img", "map", "--output=json", *keys.opts(disk))
    assert image_json("map", *keys.opts(disk)) == theirs
    same = keys.create(tmp_path / "same.qcow2", key="t")
    run("qemu-img", "convert", "-n", *keys.opts(disk), "--target-image-opts", keys.opts(same, "t")[-1])
    image("compare", *keys.opts(disk), keys.opts(same, "t")[-1])
    qemu_img("check", *keys.opts(same, "t"))
    words = ("-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s", *keys.opts(disk))
    expected = json.loads(qemu_img("measure", "--output=json", *words).out)
    assert image_json("measure", *words) == expected


@pytest.mark.parametrize("cluster_size", [512, 2 * MIB])
def test_convert_both_ways(cluster_size: int, disk: Path, keys: Keys, tmp_path: Path, plain: bytes) -> None:
    target = tmp_path / "target.qcow2"
    chosen = f"{QUICK},encrypt.key-secret=t,cluster_size={cluster_size}"
    image("convert", *keys.opts(disk), "-O", "qcow2", "-o", chosen, target)
    image("compare", *keys.opts(disk), keys.opts(target, "t")[-1])
    back = tmp_path / "back.raw"
    run("qemu-img", "convert", *keys.opts(target, "t"), "-O", "raw", back)
    assert back.read_bytes() == plain
    image("convert", *keys.opts(target, "t"), tmp_path / "ours.raw")
    assert (tmp_path / "ours.raw").read_bytes() == plain
    image("convert", "-n", "-f", "raw", *keys.objects, back, "--target-image-opts", keys.opts(target, "t")[-1])


def test_nothing_is_compressed(disk: Path, keys: Keys, tmp_path: Path) -> None:
    words = ("convert", "-c", *keys.opts(disk), "-O", "qcow2")
    assert qemu_img(*words, "-o", f"{QUICK},encrypt.key-secret=s", tmp_path / "c").status == 1
    refused = image(*words, "-o", f"{QUICK},encrypt.key-secret=s", tmp_path / "c", status=1)
    assert "encrypt.format: what is compressed is not encrypted" in refused.stderr


def test_a_chain_with_different_keys(disk: Path, keys: Keys, tmp_path: Path, plain: bytes) -> None:
    top = keys.create(tmp_path / "top.qcow2", "-b", disk, "-F", "qcow2", key="t", size=SIZE)
    chain = keys.opts(top, "t", ",backing.encrypt.key-secret=s")
    run("qemu-io", *chain[:-1], chain[-1], "-c", "write -P 9 200k 1000k")
    expected = plain[: 200 * KIB] + b"\x09" * 1000 * KIB + plain[1200 * KIB :]
    assert f"{disk} is encrypted" in image("map", *keys.opts(top, "t"), status=1).stderr
    image("convert", *chain, tmp_path / "one.raw")
    assert (tmp_path / "one.raw").read_bytes() == expected
    assert image_json("map", *chain) == run_json("qemu-img", "map", "--output=json", *chain)
    assert [info["encrypted"] for info in image_json("info", "--backing-chain", top)] == [True, True]
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(top.read_bytes())
    image("rebase", *keys.opts(copy, "t", ",backing.encrypt.key-secret=s"), "-b", "")
    image("compare", *keys.objects, "--image-opts", keys.opts(copy, "t")[-1], chain[-1])
    image("commit", *chain)
    assert content(disk, qcow2(disk)) == expected
    image("check", top)


def test_changing_images(disk: Path, keys: Keys, plain: bytes) -> None:
    image("snapshot", "-c", "one", *keys.opts(disk))
    image("resize", *keys.opts(disk), "5M")
    image("bitmap", "--add", *keys.opts(disk), "bits")
    told = json.loads(qemu_img("info", "--output=json", disk).out)
    assert told["virtual-size"] == 5 * MIB and [s["name"] for s in told["snapshots"]] == ["one"]
    assert [bitmap["name"] for bitmap in told["format-specific"]["data"]["bitmaps"]] == ["bits"]
    assert content(disk, qcow2(disk)) == plain + bytes(MIB)
    assert qemu_img("check", *keys.opts(disk)).status == 0


@pytest.mark.parametrize(
    "options",
    ["", ",preallocation=metadata", ",preallocation=full,cluster_size=4k", ",preallocation=falloc,extended_l2=on"],
)
def test_new_images_are_zeroes(options: str, keys: Keys, tmp_path: Path) -> None:
    """Also those that are preallocated, which as QEMU makes them are noise."""
    path = keys.create(tmp_path / "new", options=options, size=MIB)
    assert content(path, qcow2(path)) == bytes(MIB)
    assert qemu_img("check", *keys.opts(path)).status == 0
    assert image("check", path).stdout


def test_a_new_image_is_laid_out_as_qemu_lays_it_out(keys: Keys, tmp_path: Path) -> None:
    ours, theirs = keys.create(tmp_path / "ours"), tmp_path / "theirs"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    run("qemu-img", "create", "-q", "-f", "qcow2", *keys.objects, "-o", options, theirs, str(SIZE))
    told, known = (run_json("qemu-img", "info", "--output=json", path) for path in (ours, theirs))
    for one in (told, known):
        encrypt = one["format-specific"]["data"]["encrypt"]
        encrypt["uuid"] = encrypt["master-key-iters"] = encrypt["slots"][0]["iters"] = None
    assert told["format-specific"] == known["format-specific"]
    at = 262144 + KEY_SLOTS_AT + ITERATIONS_AT
    assert ours.read_bytes()[:262144] == theirs.read_bytes()[:262144]
    assert int.from_bytes(ours.read_bytes()[at : at + 4], "big") >= 1000


def test_how_long_a_passphrase_takes(keys: Keys, tmp_path: Path) -> None:
    rounds = {}
    for time in (20, 200):
        path = keys.create(tmp_path / str(time), options=f",encrypt.iter-time={time}")
        encrypt: dict[str, Any] = image_json("info", path)["format-specific"]["data"]["encrypt"]
        rounds[time] = encrypt["slots"][0]["iters"]
        assert encrypt["master-key-iters"] == max(rounds[time] // 8, 1000)
    assert 2 < rounds[200] / rounds[20] < 50


def test_a_secret_that_is_not_there_costs_nothing(disk: Path, keys: Keys) -> None:
    before = disk.read_bytes()
    for secret in ("--object=secret,id=s,file=/nowhere/key", "--object=secret,id=u,fd=0"):
        refused = image("create", "-f", "qcow2", secret, "-o", f"{QUICK},encrypt.key-secret=s", disk, "1M", status=1)
        assert "/nowhere/key cannot be read" in refused.stderr or "there is no secret 's'" in refused.stderr
    assert disk.read_bytes() == before


# -- options -----------------------------------------------------------------------------------------------------------


SECRETS = {
    "secret,id=s,data=hush": "on the command line, where everybody on the machine can read it",
    "secret,id=s,file=f,data=hush": "on the command line",
    "secret,file=f": "has no id",
    "secret,id=s": "needs one of file, env, fd",
    "secret,id=s,file=f,env=E": "needs one of file, env, fd",
    "secret,id=s,file=f,format=base64": "only format=raw",
    "secret,id=s,file=f,keyid=k": "keyid is not known",
    "secret,id=s,fd=x": "fd=x is no descriptor",
    "tls-creds-psk,id=s,dir=d": "found 'tls-creds-psk'",
    "": "found ''",
}


@pytest.mark.parametrize(("text", "words"), SECRETS.items())
def test_secrets_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^--object: .*{words}"):
        secrets([text])


def test_secrets() -> None:
    found = secrets(["secret,id=a,file=x,,y", "qom-type=secret,id=b,env=KEY", "secret,fd=3,id=c,format=raw"])
    assert found == {
        "a": {"key_file": "x,y", "key_env": None, "key_fd": None},
        "b": {"key_file": None, "key_env": "KEY", "key_fd": None},
        "c": {"key_file": None, "key_env": None, "key_fd": 3},
    }
    with pytest.raises(ConfigError, match="two secrets 'a'"):
        secrets(["secret,id=a,file=x", "secret,id=a,file=y"])


def test_image_options() -> None:
    node = parse("driver=qcow2,encrypt.format=luks,encrypt.key-secret=a,file.driver=file,file.filename=x,,y")
    assert node == ("x,y", "qcow2", "a", None)
    assert parse("driver=file,filename=x") == ("x", "raw", None, None)
    node = parse("filename=x,backing.driver=qcow2,backing.encrypt.key-secret=b,backing.backing.key-secret=c")
    assert node == ("x", None, None, (None, "qcow2", "b", (None, None, "c", None)))


OPTIONS = {
    "driver=qcow2": "names no file.filename",
    "x.qcow2": "found 'x.qcow2', allowed is KEY=VALUE",
    "file.filename=x,lazy-refcounts=on": "lazy-refcounts is not known here",
    "file.filename=x,file.driver=nbd": "file.driver: allowed is file or host_device",
    "file.filename=x,encrypt.format=aes": "encrypt.format: allowed is luks",
    "file.filename=x,backing.file.filename=y": "backing.file.filename: it is what the image names",
}


@pytest.mark.parametrize(("text", "words"), OPTIONS.items())
def test_image_options_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(text)


def test_options_and_a_format_contradict_each_other(disk: Path, keys: Keys) -> None:
    assert "their driver" in image("map", "-f", "qcow2", *keys.opts(disk), status=1).stderr


def test_a_key_for_a_backing_file_that_is_not_there(disk: Path, keys: Keys) -> None:
    refused = image("map", *keys.opts(disk, "s", ",backing.key-secret=t"), status=1)
    assert f"{disk} has no backing file" in refused.stderr
