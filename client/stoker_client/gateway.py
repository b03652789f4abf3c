"""The gateway over HTTP: requests that outlast its restarts, uploads and downloads that stream.

A request is repeated when its answer did not come, or was one of the passing kind (408, 409, 429, 5xx); what the
gateway refuses is raised at once. The key goes into a header and nowhere else.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from stoker_client.errors import NoGateway, Refused
from stoker_client.progress import Progress
from stoker_client.stopping import Stop

FIRST_S: Final = 10.0  # that a gateway which never answered is tried for
PATIENCE_S: Final = 300.0  # that one which did is waited for: a restart, with recovery, takes up to a minute
TOLD_AFTER_S: Final = 3.0  # of silence: shorter ones need no note
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 8.0
LONGEST_WISH_S: Final = 120.0  # of a Retry-After that is obeyed
UPLOAD_EXPIRES_S: Final = 3 * 24 * 3600  # the gateway forgets the file; its batch does not need it once it runs
TIMEOUTS: Final = httpx.Timeout(120.0, connect=10.0)
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_PASSING: Final = frozenset({408, 409, 429})

Got = TypeVar("Got")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gateway answers, `http://host:port/v1`, and the key for it."""

    url: str
    api_key: str = field(repr=False)

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine, where no proxy stands between."""
        return urlsplit(self.url).hostname in _LOOPBACK


class Gateway:
    """`with Gateway(place, …) as gateway:`. `place` is asked before every try, since an embedded one may move.

    One that never answered is tried for `first_s`, one that did for `patience_s`. All methods raise NoGateway, Refused,
    and Stopped.
    """

    def __init__(
        self,
        place: Callable[[], Place],
        *,
        stop: Stop,
        progress: Progress,
        first_s: float = FIRST_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._place = place
        self._patience_s = patience_s
        self._first_s = first_s
        self._stop = stop
        self._progress = progress
        self._answered = False
        self._client = httpx.Client(
            timeout=TIMEOUTS, trust_env=not place().is_here, headers={"User-Agent": "stoker-client"}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """What lines may name as their model now."""
        return [model["id"] for model in self._json("GET", "/models")["data"]]

    def newest_batch(self, key: str) -> dict[str, Any] | None:
        """The newest batch that was created with this Idempotency-Key, whatever became of it."""
        found = self._json("GET", "/batches", params={"idempotency_key": key})["data"]
        return found[0] if found else None

    def upload(self, file: IO[bytes], *, name: str) -> str:
        """Upload a batch file from its beginning; its id."""
        form = {
            "purpose": "batch",
            "expires_after[anchor]": "created_at",
            "expires_after[seconds]": str(UPLOAD_EXPIRES_S),
        }

        def attempt() -> str:
            file.seek(0)
            part: Any = (name, _Watched(file, self._stop), "application/jsonl")
            return str(self._once("POST", "/files", data=form, files={"file": part})["id"])

        return self._persist(attempt)

    def forget(self, file_id: str) -> None:
        """Delete an upload."""
        self._json("DELETE", f"/files/{file_id}")

    def create(self, body: Mapping[str, Any], *, key: str) -> dict[str, Any]:
        """Create a batch; with a key that created one of the last day, that one."""
        return self._json("POST", "/batches", json=body, headers={"Idempotency-Key": key})

    def batch(self, batch_id: str) -> dict[str, Any]:
        """A batch as it stands."""
        return self._json("GET", f"/batches/{batch_id}")

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Cancel a batch that has not ended."""
        return self._json("POST", f"/batches/{batch_id}/cancel")

    def lines(self, file_id: str, *, line_of: Callable[[Mapping[str, Any]], int]) -> Iterator[dict[str, Any]]:
        """Each line of a complete result file, once, as it comes.

        `line_of`: which line of the input it is about; a download that breaks goes on after the last one.
        """
        last = 0
        trouble = _Trouble()
        while True:
            try:
                for line in self._download(file_id, after_line=last):
                    last = line_of(line)
                    trouble = _Trouble()
                    yield line
            except (httpx.TransportError, _Passing) as error:
                self._pause(trouble, error)
            else:
                return

    def _download(self, file_id: str, *, after_line: int) -> Iterator[dict[str, Any]]:
        place = self._place()
        path = f"{place.url}/files/{file_id}/content"
        params = {"after_line": after_line} if after_line else {}
        with self._client.stream("GET", path, params=params, headers=_headers(place)) as response:
            if response.is_error:
                response.read()
            self._check(response)
            held = b""
            for piece in response.iter_bytes():
                self._stop.check()
                *whole, held = (held + piece).split(b"\n")
                yield from map(json.loads, whole)
            if held:
                raise httpx.RemoteProtocolError("the last line is cut off")

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        return self._persist(lambda: self._once(method, path, **request))

    def _once(self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **request: Any) -> Any:
        place = self._place()
        response = self._client.request(
            method, f"{place.url}{path}", headers=_headers(place) | dict(headers or {}), **request
        )
        self._check(response)
        try:
            return response.json()
        except ValueError as error:
            raise Refused(
                f"{place.url} is no gateway of Stoker: its answer is no JSON; check base_url or STOKER_URL",
                status_code=response.status_code,
            ) from error

    def _check(self, response: httpx.Response) -> None:
        """Raises _Passing for an answer that may be another one soon, Refused for every other that is no success."""
        self._answered = True
        if response.is_success:
            return
        passes = response.status_code in _PASSING or response.status_code >= 500
        refused = _refused(response)
        if passes and response.headers.get("x-should-retry") != "false":
            raise _Passing(refused, _wished_s(response))
        raise refused

    def _persist(self, attempt: Callable[[], Got]) -> Got:
        trouble = _Trouble()
        while True:
            self._stop.check()
            try:
                return attempt()
            except (httpx.TransportError, _Passing) as error:
                self._pause(trouble, error)

    def _pause(self, trouble: _Trouble, error: httpx.TransportError | _Passing) -> None:
        """Wait before the next try. Raises Refused or NoGateway when it was tried for long enough."""
        patience_s = self._patience_s if self._answered else self._first_s
        if trouble.lasted_s > patience_s:
            if isinstance(error, _Passing):
                raise error.refused from error
            raise self._silent(error) from error
        if trouble.is_worth_a_note():
            said = str(error.refused) if isinstance(error, _Passing) else type(error).__name__
            self._progress.say(f"the gateway does not answer ({said}); trying on for {patience_s:.0f} s")
        self._stop.wait(trouble.pause_s(error.wished_s if isinstance(error, _Passing) else None))

    def _silent(self, error: httpx.TransportError) -> NoGateway:
        return NoGateway(
            f"no gateway answers at {self._place().url} ({type(error).__name__}: {error}); start one there "
            "(`stoker up`, `stoker gateway`), or correct base_url or STOKER_URL. If it was submitted, the same call "
            "follows it"
        )


class _Passing(Exception):
    """An answer that may be another one soon; `wished_s`: how long the gateway asks to wait."""

    def __init__(self, refused: Refused, wished_s: float | None) -> None:
        super().__init__(str(refused))
        self.refused = refused
        self.wished_s = wished_s


class _Trouble:
    """A run of tries that failed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tries = 0
        self._told = False

    @property
    def lasted_s(self) -> float:
        return time.monotonic() - self._began if self._tries else 0.0

    def is_worth_a_note(self) -> bool:
        """Once, when it has lasted."""
        is_new = not self._told and self.lasted_s > TOLD_AFTER_S
        self._told = self._told or is_new
        return is_new

    def pause_s(self, wished_s: float | None) -> float:
        """Until the next try: what the gateway wishes, else longer each time, with jitter."""
        if not self._tries:
            self._began = time.monotonic()
        self._tries += 1
        if wished_s is not None:
            return min(wished_s, LONGEST_WISH_S)
        most = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._tries - 1, 10))
        return random.uniform(most / 2, most)  # noqa: S311  # no secret


class _Watched:
    """A file for an upload, which stops when nobody waits for it any more."""

    def __init__(self, file: IO[bytes], stop: Stop) -> None:
        self._file = file
        self._stop = stop
        self.fileno, self.seek, self.tell = file.fileno, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._stop.check()
        return self._file.read(size)


def _headers(place: Place) -> dict[str, str]:
    return {"Authorization": f"Bearer {place.api_key}"}


def _refused(response: httpx.Response) -> Refused:
    """What the gateway said, with what to do where it cannot know that."""
    try:
        error = response.json()["error"]
        said, code = error["message"], error.get("code")
        said = f"{error['param']}: {said}" if error.get("param") else said
    except (ValueError, KeyError, TypeError):
        said, code = response.reason_phrase or "no reason was given", None
    remedy = {
        401: "; check api_key or STOKER_API_KEY",
        404: "; check base_url or STOKER_URL" if code is None else "",
        413: "; pass fewer rows at once, or raise STOKER_GATEWAY__FILE_BYTES and STOKER_GATEWAY__TENANT_BYTES there",
    }.get(response.status_code, "")
    return Refused(
        f"the gateway answered {response.status_code}: {said}{remedy}", status_code=response.status_code, code=code
    )


def _wished_s(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):  # a date is not what the gateway sends
        return None
