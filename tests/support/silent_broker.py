"""A broker for tests whose workers ask Postgres."""

from __future__ import annotations


class SilentBroker:
    """Takes hints and loses them."""

    def publish(self, shards: object) -> None:
        return

    def ready_count(self) -> int:
        return 10_000

    def invite(self, readers: int) -> None:
        raise AssertionError("no document was added")
