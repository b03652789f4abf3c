"""Asking a server on this machine, such as one of our own processes, whether it answers."""

from __future__ import annotations

import http.client


def status_of(host: str, port: int, path: str, *, timeout_s: float) -> int | None:
    """The status of what a server answers; None without an answer. One that listens everywhere is asked on loopback."""
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
