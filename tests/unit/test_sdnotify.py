"""What is sent to a service manager, byte for byte, at the socket of one."""

import os
import socket
import threading
from pathlib import Path

from snapd.daemon.sdnotify import Notifier


def test_lines_and_descriptors_arrive(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"})
        assert notifier
        assert notifier.watchdog_s == 2.0
        assert notifier.send("READY=1", "STATUS=two\nlines")
        assert manager.recv(4096) == b"READY=1\nSTATUS=two lines"
        file = os.memfd_create("kept")
        assert notifier.store("u.1f", file)
        data, (copy,), _, _ = socket.recv_fds(manager, 4096, 4)
        assert data == b"FDSTORE=1\nFDNAME=u.1f\nFDPOLL=0"
        assert os.path.sameopenfile(copy, file)
        assert notifier.remove("u.1f")
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=u.1f"
        assert not notifier.barrier(0.05), "nobody has closed its copy"
        socket_fds = socket.recv_fds(manager, 4096, 4)[1]
        for fd in (copy, file, *socket_fds):
            os.close(fd)

        def take() -> None:
            os.close(socket.recv_fds(manager, 4096, 4)[1][0])

        thread = threading.Thread(target=take)
        thread.start()
        assert notifier.barrier(10)
        thread.join()
        notifier._sock.close()  # type: ignore[union-attr]


def test_without_a_manager_nothing_is_sent() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "2000000"})
    assert not notifier
    assert notifier.watchdog_s is None
    assert not notifier.send("READY=1")
    assert not notifier.barrier(0.01)
