"""A rank that dies ends the others at once, with a sentence that names it.

Without this the others wait in a collective until NCCL's or gloo's timeout, and then blame the collective. Here every rank
holds a TCP connection to rank 0. The kernel closes it when the process ends, however it ends; keep-alive probes notice a host
that is gone (half a minute). A heartbeat of ours would need the interpreter's lock, which a long write may hold.

A rank that stops by an error of its own says so before it leaves. What a rank sends, one line each:

    SECRET RANK HOST PID    to rank 0, first
    stop SENTENCE           it stops for this reason; rank 0 tells the others
    bye                     it leaves, all is well
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time

import torch

from scbench.errors import UserError
from scbench.training.engine import dist

EXIT_CODE = 1
GRACE = 5.0  # seconds in which a rank that is told of an error may come to one of its own


class Lifeline:
    """The connections of one rank; a context manager around all that the ranks do together.

    Parameters
    ----------
    rank, world
        Of this process. Collective: every rank must make one.
    device
        Of the process group's tensors.
    timeout
        Seconds to wait for the others.
    """

    def __init__(self, rank: int, world: int, device: torch.device, timeout: float) -> None:
        self.rank = rank
        self._leaving = threading.Event()  # this rank ends by itself
        self._broken = False  # an error came up that another rank may have caused
        self._peers: dict[socket.socket, str] = {}  # connection → who is at its other end
        if world == 1:
            return
        secret = secrets.randbits(62)
        server = _server(world) if rank == 0 else None
        address = torch.tensor([server.getsockname()[1] if server else 0, secret], device=device)
        dist.broadcast(address, 0)
        port, secret = address.tolist()
        if server is not None:
            with server:
                server.settimeout(timeout)
                while len(self._peers) < world - 1:
                    connection, _ = server.accept()
                    connection.settimeout(timeout)
                    word, *rest = _line(connection).split(" ")
                    if word == str(secret):  # else a stranger
                        number, host, pid = rest
                        self._peers[connection] = f"rank {number} (process {pid} on {host})"
        else:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout)
            connection.sendall(f"{secret} {rank} {socket.gethostname()} {os.getpid()}\n".encode())
            self._peers[connection] = f"rank 0 (on {os.environ['MASTER_ADDR']})"
        for connection in self._peers:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():
                if hasattr(socket, name):  # else the system's own, hours
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._watch, name="scbench-lifeline", daemon=True).start()

    def __enter__(self) -> "Lifeline":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and self._peers:  # a collective that another rank broke?
            self._broken = True
            time.sleep(GRACE)  # then `_watch` ends this process meanwhile, and says which
        self._leaving.set()
        well = error is None or isinstance(error, SystemExit)
        self._tell("bye" if well else f"stop {_sentence(error)}")

    def _tell(self, line: str) -> None:
        for connection in self._peers:
            with contextlib.suppress(OSError):
                connection.sendall((" ".join(line.split()) + "\n").encode())

    def _watch(self) -> None:
        """Wait for lines and ends of connections, as long as the process lives."""
        with selectors.DefaultSelector() as selector:
            for connection in self._peers:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    line = _line(key.fileobj)
                    selector.unregister(key.fileobj)
                    if not line.startswith("bye"):
                        self._end(self._peers[key.fileobj], line)

    def _end(self, who: str, line: str) -> None:
        """End this process, unless it is leaving for a reason of its own."""
        told = line.startswith("stop ")
        patience = time.monotonic() + GRACE  # all ranks may be about to find the same
        while told and not self._broken and not self._leaving.is_set() and time.monotonic() < patience:
            time.sleep(0.05)
        if self._leaving.is_set():
            return
        sentence = f"{who} died: the run ends; go on from its last checkpoint with --resume."
        if told:
            sentence = line.removeprefix("stop ")
        if self.rank == 0:
            sentence = f"{who} stopped: {sentence}" if told else sentence
            self._tell(f"stop {sentence}")
        print(f"scbench: {sentence}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the main thread may wait in a collective for ever


def _server(connections: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=connections)
    return socket.create_server(("", 0), backlog=connections)


def _line(connection: socket.socket) -> str:
    """The next line; an empty one when the other end is gone."""
    content = bytearray()
    with contextlib.suppress(OSError):
        while piece := connection.recv(1):
            if piece == b"\n":
                return content.decode()
            content += piece
    return ""


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
