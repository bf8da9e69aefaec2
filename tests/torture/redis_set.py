"""redis-server under torture: a load that it answers meanwhile, saves by fork, the saved file compared key by key."""

import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import redis

from snapd.torture import TortureReport
from tests.harness import wait_until
from tests.peers import require
from tests.torture.conftest import Torture

BATCH = 500
START_S = 60.0


def value_of(key: int, version: int) -> bytes:
    """Return what a key holds: long enough that pages differ, and never the same for two."""
    return Random(key << 20 | version).randbytes(40).hex().encode() * (1 + key % 13)


def arguments(directory: Path, socket: Path) -> list[str]:
    """Return the server's command line: no port, and nothing saved unless told."""
    return ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(directory), "--appendonly", "no"]


def connected(socket: Path) -> redis.Redis:
    """Return a client of the server, once it answers."""
    client = redis.Redis(unix_socket_path=str(socket), socket_timeout=60)

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    wait_until(answers, "an answer of redis", START_S)
    return client


def redis_under_torture(torture: Torture, tmp_path: Path, *, seconds: float, keys: int) -> TortureReport:
    """Run the server under torture while it is loaded and saves; every key is compared, in it and in its file."""
    server, benchmark = require("redis-server"), require("redis-benchmark")
    socket = tmp_path / "redis.sock"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(torture, server, *arguments(tmp_path, socket), limit_s=seconds + 110)
        try:
            client = connected(socket)
            versions = drive(client, benchmark, socket, seconds=seconds, keys=keys)
            compare(client, versions)
            wait_until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"], "the end of the last save", 60)
            assert client.info("persistence")["rdb_last_bgsave_status"] == "ok"
            client.save()
        finally:
            stop(socket)
        report = running.result()
    with alone(server, tmp_path) as saved:
        compare(saved, versions)
    return report


def drive(client: redis.Redis, benchmark: Path, socket: Path, *, seconds: float, keys: int) -> list[int]:
    """Load the server for a time; returns the version of each key."""
    versions = [0] * keys
    for first in range(0, keys, BATCH):
        client.mset({f"k{key}": value_of(key, 0) for key in range(first, min(first + BATCH, keys))})
    rng, end = Random(keys), time.monotonic() + seconds
    command = [str(benchmark), "-s", str(socket), "-t", "set,get,lpush,hset", "-n", "20000", "-r", "20000", "-d", "200"]
    with beside(lambda: subprocess.run([*command, "-q"], check=True, timeout=110, stdout=subprocess.DEVNULL), end):
        while time.monotonic() < end:
            if not client.info("persistence")["rdb_bgsave_in_progress"]:
                client.bgsave()
            for key in rng.sample(range(keys), 200):
                versions[key] += 1
                client.set(f"k{key}", value_of(key, versions[key]))
            some = rng.sample(range(keys), 200)
            compare_some(client, versions, some)
    return versions


@contextmanager
def beside(work: object, end: float) -> Iterator[None]:
    """Do `work` again and again in a thread until `end`; raises what it raised."""
    assert callable(work)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while time.monotonic() < end:
                work()
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def compare(client: redis.Redis, versions: list[int]) -> None:
    """Compare every key."""
    for first in range(0, len(versions), BATCH):
        compare_some(client, versions, range(first, min(first + BATCH, len(versions))))


def compare_some(client: redis.Redis, versions: list[int], keys: range | list[int]) -> None:
    """Compare some keys."""
    found = client.mget([f"k{key}" for key in keys])
    for key, value in zip(keys, found, strict=True):
        assert value == value_of(key, versions[key]), f"k{key}"


def stop(socket: Path) -> None:
    """End a server, if there is one."""
    client = redis.Redis(unix_socket_path=str(socket), socket_timeout=60)
    try:
        client.shutdown(nosave=True)
    except redis.RedisError:
        return


@contextmanager
def alone(server: Path, directory: Path) -> Iterator[redis.Redis]:
    """Run a server without snapd on the file that was saved."""
    socket = directory / "alone.sock"
    with subprocess.Popen([str(server), *arguments(directory, socket)], stdout=subprocess.DEVNULL) as process:
        try:
            yield connected(socket)
        finally:
            process.kill()
