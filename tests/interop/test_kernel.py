"""Linux's own client: nbd-client and nbd.ko in a virtual machine, with file systems on what it connects."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nbdserver import tls
from nbdserver.testing import NbdServers, free_port
from nbdserver.uri import NbdUri, parse
from tests.interop import vm
from tests.serving import create, run

TOOLS = ("nbd-client", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "fstrim")
MODULES = ("nbd", "ext4", "xfs", "crc32c_generic", "crc32c_intel")

#: fill, check: files with known sums. trim_all: discards reach the server. cycle FS: all that a disk goes through.
FUNCTIONS = """
connect() { nbd-client "$@" || die "connect $*"; wait_for 20 test -s /sys/block/nbd0/pid; }
disconnect() {
    nbd-client -d /dev/nbd0 >/dev/null || die disconnect
    while [ -e /sys/block/nbd0/pid ]; do sleep 0.1; done
}
fill() {
    local i
    mkdir -p /mnt/files || die mkdir
    for i in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=/mnt/files/$i bs=64k count=$((i * 7)) 2>/dev/null || die write
        (cd /mnt/files && sha256sum $i) >>/tmp/sums
    done
    sync
}
check() { (cd /mnt/files && sha256sum -c /tmp/sums >/dev/null) || die "the sums differ"; }
cold() { echo 3 >/proc/sys/vm/drop_caches; }
mkfs_of() { case $1 in ext4) mkfs.ext4 -q -F /dev/nbd0 ;; xfs) mkfs.xfs -q -f /dev/nbd0 ;; esac || die "mkfs $1"; }
fsck_of() {
    case $1 in ext4) e2fsck -fn /dev/nbd0 ;; xfs) xfs_repair -n /dev/nbd0 ;; esac >/tmp/fsck 2>&1 && return
    cat /tmp/fsck
    die "fsck $1"
}
cycle() {
    local fs=$1
    shift
    rm -f /tmp/sums
    connect "$@"
    mkfs_of $fs
    mount -t $fs /dev/nbd0 /mnt || die "mount $fs"
    fill
    cold
    check
    dd if=/dev/zero of=/mnt/gone bs=1M count=16 2>/dev/null && sync && rm /mnt/gone && sync
    fstrim -v /mnt || die fstrim
    umount /mnt || die umount
    fsck_of $fs
    disconnect
    connect "$@"
    mount -t $fs /dev/nbd0 /mnt || die "mount $fs again"
    check
    umount /mnt || die umount
    disconnect
    say "cycle $fs"
}
"""


def used(path: Path) -> int:
    """Bytes that a file takes up."""
    return path.stat().st_blocks * 512


def test_file_systems(nbd_server: NbdServers, tmp_path: Path) -> None:
    """With one connection and with four: made, mounted, written, trimmed, checked, connected again."""
    disk = create(tmp_path / "disk.qcow2", "1G")
    server = nbd_server.process("-f", "qcow2", str(disk), tcp=True)
    port = parse(server.uri()).port
    script = f"""{FUNCTIONS}
cycle ext4 -N disk.qcow2 {vm.HOST} {port} /dev/nbd0 -b 512
cycle xfs -N disk.qcow2 -C 4 {vm.HOST} {port} /dev/nbd0
"""
    with vm.Machine(tmp_path, script, tools=TOOLS, modules=MODULES) as machine:
        machine.wait_for("done")
    server.terminate()
    run("qemu-img", "check", disk)
    assert used(disk) < 200 << 20, "what was trimmed has been given back"


def test_tls_and_a_server_that_is_killed(nbd_server: NbdServers, tmp_path: Path) -> None:
    """With TLS; and with a server that is killed: what the guest has synced is there when it connects again. (It is
    not connected then: its kernel may hang on what it has under way.) On the threads backend."""
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 1 << 30)
    pki = tmp_path / "pki"
    tls.init(pki, hosts=["localhost", vm.HOST], client="guest")
    secure = nbd_server.process(
        *("-f", "raw", "--backend", "threads", "--tls-certificates", str(pki), str(disk)), tcp=True
    )
    plain = NbdUri(host="127.0.0.1", port=free_port())
    files = {f"/etc/{name}": pki / name for name in (tls.CA_CERT, tls.CLIENT_CERT, tls.CLIENT_KEY)}
    options = f"-certfile /etc/{tls.CLIENT_CERT} -keyfile /etc/{tls.CLIENT_KEY} -cacertfile /etc/{tls.CA_CERT}"
    script = f"""{FUNCTIONS}
cycle xfs -N disk.raw {vm.HOST} {parse(secure.uri()).port} /dev/nbd0 {options}
say secure
wait_for 60 nbd-client -l {vm.HOST} {plain.port}
rm -f /tmp/sums
connect -N disk.raw {vm.HOST} {plain.port} /dev/nbd0
mkfs_of ext4
mount -t ext4 /dev/nbd0 /mnt || die mount
fill
umount /mnt || die umount
disconnect
say kill
sleep 3
wait_for 60 nbd-client -l {vm.HOST} {plain.port}
connect -N disk.raw {vm.HOST} {plain.port} /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt || die "mount after the server was killed"
check
umount /mnt || die umount
fsck_of ext4
disconnect
"""
    with vm.Machine(tmp_path, script, tools=TOOLS, modules=MODULES, files=files) as machine:
        machine.wait_for("secure")
        assert secure.terminate() == 0
        server = nbd_server.process("-f", "raw", "--backend", "threads", str(disk), listen=plain)
        machine.wait_for("kill")
        server.kill()
        server.start()
        machine.wait_for("done")


#: Linux's client by way of QEMU's, with tools that wait for it.
QEMU_FUNCTIONS = f"""{FUNCTIONS}
mkdir -p /var/lock
has_size() {{ [ "$(cat /sys/block/nbd0/size)" -gt 0 ]; }}
connect() {{
    qemu-nbd -c /dev/nbd0 "$@" || die "connect $*"
    wait_for 20 test -s /sys/block/nbd0/pid
    wait_for 20 has_size
}}
disconnect() {{
    qemu-nbd -d /dev/nbd0 >/dev/null || die disconnect
    while [ -e /sys/block/nbd0/pid ]; do sleep 0.1; done
}}
"""


def test_qemu_nbd_connects(nbd_server: NbdServers, tmp_path: Path) -> None:
    """``qemu-nbd --connect`` of an NBD URI."""
    disk = create(tmp_path / "disk.qcow2", "1G")
    server = nbd_server.process("-f", "qcow2", str(disk), tcp=True)
    script = f"""{QEMU_FUNCTIONS}
cycle ext4 -f raw nbd://{vm.HOST}:{parse(server.uri()).port}/disk.qcow2
"""
    tools = ("qemu-nbd", *TOOLS)
    with vm.Machine(tmp_path, script, tools=tools, modules=MODULES) as machine:
        machine.wait_for("done")
    server.terminate()
    run("qemu-img", "check", disk)
    assert used(disk) < 200 << 20, "what was trimmed has been given back"


def test_a_server_that_is_restarted_underneath(nbd_server: NbdServers, tmp_path: Path) -> None:
    """Killed twice while a mounted file system is written to: QEMU's client asks again, and the guest notices nothing.
    (``nbd-client -persist`` ends instead where the kernel calls a lost connection no error, as Linux 6.1 does.)"""
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 1 << 30)
    server = nbd_server.process("-f", "raw", str(disk), tcp=True)
    options = f"server.host={vm.HOST},server.port={parse(server.uri()).port},export=disk.raw,reconnect-delay=60"
    script = f"""{QEMU_FUNCTIONS}
connect --image-opts driver=nbd,server.type=inet,{options}
mkfs_of ext4
mount -t ext4 /dev/nbd0 /mnt || die mount
for round in 1 2 3; do
    say round $round
    fill
    cold
    check
    rm -r /mnt/files /tmp/sums
done
fill
umount /mnt || die umount
fsck_of ext4
mount -t ext4 /dev/nbd0 /mnt || die "mount again"
check
umount /mnt || die umount
disconnect
"""
    tools = ("qemu-nbd", *TOOLS)
    with vm.Machine(tmp_path, script, tools=tools, modules=MODULES) as machine:
        for number in (1, 2):
            machine.wait_for(f"round {number}")
            server.kill()
            server.start()
        machine.wait_for("done")


def test_guest_boots_from_an_export(nbd_server: NbdServers, tmp_path: Path) -> None:
    """QEMU's own client, and a system whose root is a qcow2 chain of ours."""
    root = tmp_path / "root"
    for name in ("bin", "dev", "proc", "sys"):
        (root / name).mkdir(parents=True)
    shutil.copy(vm.directory() / "bin/busybox", root / "bin/busybox")
    init = root / "init"
    init.write_text(
        "#!/bin/busybox sh\n/bin/busybox mount -t proc proc /proc\n/bin/busybox mount -o remount,rw /\n"
        'echo "written by the guest" >/note && /bin/busybox sync && echo "== at home" >/dev/console\n'
        "/bin/busybox mount -o remount,ro /\n/bin/busybox poweroff -f\n"
    )
    init.chmod(0o755)
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    run("mkfs.ext4", "-q", "-d", root, base, "64M")
    create(overlay, "64M", backing=base, backing_format="raw")
    uri = nbd_server(overlay, format="qcow2")
    script = """
mount -t ext4 -o ro /dev/vda /mnt || die "no root"
mount --move /dev /mnt/dev
exec switch_root /mnt /init
"""
    drive = ("-drive", f"file={uri},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk")
    with vm.Machine(tmp_path, script, modules=["virtio_blk", "ext4", "crc32c_generic"], arguments=drive) as machine:
        machine.wait_for("at home")
        machine.wait_for_end()
    image = tmp_path / "after.raw"
    run("nbdcopy", uri, image)
    assert "written by the guest" in run("debugfs", "-R", "cat /note", image)
