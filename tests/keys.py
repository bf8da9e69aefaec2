"""A redis-server full of keys, and a client that knows every value in it.

Owns what the values are and how one is compared. Whoever uses it decides when it works, and what is dumped meanwhile.
"""

import contextlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.harness import Daemon, HarnessError, Spawner, wait_until
from tests.targets.objects import make_record

START_S: Final = 120.0
BATCH: Final = 500
BUSY_SHARE: Final = 20
"""The load is on one key of twenty."""


class Values:
    """What each redis key must hold: text that is made anew from the key's number and version at any moment."""

    def __init__(self) -> None:
        """Make the pool of records that values are composed of."""
        rng = random.Random(1)
        self._records = [json.dumps(make_record(rng, number)).encode() for number in range(4096)]

    def text(self, number: int, version: int) -> bytes:
        """Return the value of a string key, about a kilobyte."""
        first, second = (hash((number, version, part)) % len(self._records) for part in (1, 2))
        return b"%d/%d %s %s" % (number, version, self._records[first], self._records[second][:400])

    def fields(self, number: int, version: int) -> dict[bytes, bytes]:
        """Return the value of a hash key."""
        text = self.text(number, version)
        return {b"field%d" % at: text[at : at + 256] for at in range(0, len(text), 256)}


class Keys:
    """A redis-server on a Unix socket, and a client that knows every value in it."""

    name = "redis"
    operation = "request"
    pause_s = 0.001

    def __init__(
        self,
        spawn: Spawner,
        daemon: Daemon | None,
        count: int,
        *,
        busy: range | None = None,
        options: Mapping[str, object] | None = None,
        directory: Path | None = None,
    ) -> None:
        """Start the server; `busy` are the keys that work() is on, `options` the server's own.

        Without a daemon it wants a `directory` for its socket and files.
        """
        directory = directory or (daemon.directory if daemon else Path())
        socket = directory / "redis.sock"
        given = {"port": 0, "unixsocket": socket, "dir": directory, "logfile": directory / "redis.log"}
        argv = ["redis-server"]
        for name, value in {**given, **(options or {})}.items():
            argv += [f"--{name}", *str(value).split()]
        self._target = spawn.program(argv, wait=False, deadline_s=START_S + count / 1000)
        # No second tries: a request that fails is what this is here to see.
        self.client = redis.Redis(unix_socket_path=str(socket), socket_timeout=START_S, retry=Retry(NoBackoff(), 0))
        self._daemon = daemon
        self._count = count
        self._busy = range(0, count, BUSY_SHARE) if busy is None else busy
        self.versions: dict[int, int] = {}
        self._values = Values()
        self._rng = random.Random(1)
        self.pid = self._target.pid

    @staticmethod
    def _key(number: int) -> bytes:
        return b"object:%08d" % number

    @staticmethod
    def _is_hash(number: int) -> bool:
        return number % 8 == 7

    def _answers(self) -> bool:
        if not self._target.alive:
            raise HarnessError(f"redis-server ended at once: {self._target.stderr()}")
        with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
            return bool(self.client.ping())
        return False

    def wait(self) -> None:
        """Wait until it answers, with all that it has loaded, and is managed where there is a daemon."""
        wait_until(self._answers, "an answer of redis-server")
        if self._daemon is not None:
            self._daemon.wait_for_session(self.pid)

    def prepare(self) -> None:
        """Wait for it, and give it all keys."""
        self.wait()
        for first in range(0, self._count, BATCH):
            pipe = self.client.pipeline(transaction=False)
            for number in range(first, min(first + BATCH, self._count)):
                if self._is_hash(number):
                    pipe.hset(self._key(number), mapping=cast("dict[Any, Any]", self._values.fields(number, 0)))
                else:
                    pipe.set(self._key(number), self._values.text(number, 0))
            pipe.execute()

    def work(self) -> None:
        """Read one value, compare it and write the next version of it."""
        number = self._rng.choice(self._busy)
        version = self.versions.get(number, 0)
        if self._is_hash(number):
            self._compare(number, self.client.hgetall(self._key(number)))
            new = self._values.fields(number, version + 1)
            pipe = self.client.pipeline()
            pipe.delete(self._key(number))
            pipe.hset(self._key(number), mapping=cast("dict[Any, Any]", new))
            pipe.execute()
        else:
            self._compare(number, self.client.get(self._key(number)))
            self.client.set(self._key(number), self._values.text(number, version + 1))
        self.versions[number] = version + 1

    def _compare(self, number: int, found: object) -> None:
        version = self.versions.get(number, 0)
        make: Callable[[int, int], object] = self._values.fields if self._is_hash(number) else self._values.text
        if found != make(number, version):
            raise HarnessError(f"redis key {self._key(number).decode()} is not as version {version}: {found!r:.200}")

    def verify(self) -> str:
        """Compare every value; returns what was verified. HarnessError for the first that is not as it must be."""
        for first in range(0, self._count, BATCH):
            numbers = range(first, min(first + BATCH, self._count))
            pipe = self.client.pipeline(transaction=False)
            for number in numbers:
                (pipe.hgetall if self._is_hash(number) else pipe.get)(self._key(number))
            for number, found in zip(numbers, pipe.execute(), strict=True):
                self._compare(number, found)
        if (keys := self.client.dbsize()) != self._count:
            raise HarnessError(f"redis has {keys} keys, and {self._count} were given to it")
        return f"{self._count:,} values compared"

    def end(self) -> None:
        """Shut it down; its exit status must be 0."""
        self.client.shutdown(nosave=True)
        self.client.close()
        if status := self._target.wait():
            raise HarnessError(f"redis-server exited with status {status}")
