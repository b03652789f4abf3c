"""Who uses the system through the upgrade: submits batch after batch, and reads the results of each that ended."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import openai

from tests.chaos.system import System
from tests.upgrade.code import Code

T = TypeVar("T")

BATCH_JOBS: Final = 400
AHEAD_JOBS: Final = 1600  # 10 s of work, so that a command that is slow to begin leaves no worker without any
COMMAND_EVERY: Final = 3  # of the batches one is submitted by command, the others over HTTP
AWAY_S: Final = 60.0
LOOK_S: Final = 0.25


class Client:
    """`with Client(system, code=old, url=…, key=…) as client:` both threads run until the end of the block.

    `code` and `url` may be changed meanwhile. What an answer says against what was submitted is in `problems`.
    """

    def __init__(self, system: System, *, code: Code, url: str, key: str) -> None:
        self.code, self.url = code, url
        self.problems: list[str] = []
        self.tried_again = 0
        self.submitted: Counter[str] = Counter()
        """Batches by the revision of the code that took them."""
        self.read: Counter[str] = Counter()
        """Batches whose results were read, by the revision of the code that gave them."""
        self._system, self._key = system, key
        self._is_over = threading.Event()
        self._unread: list[str] = []
        self._threads = [threading.Thread(target=self._guarded, args=[work]) for work in (self._submit, self._read)]

    def __enter__(self) -> Client:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def stop_submitting(self) -> None:
        """What was submitted is still read, until all of it is."""
        self._is_over.set()
        self._threads[0].join()

    def has_read_all(self) -> bool:
        """Whether the results of every batch that it submitted were read, or reading has failed."""
        return not self._unread or not self._threads[1].is_alive()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a thread's end is told to whoever counts
            self.problems.append(f"the client: {type(error).__name__}: {error}")

    def _submit(self) -> None:
        number = 0
        while not self._is_over.wait(LOOK_S):
            if self._system.unfinished() > AHEAD_JOBS:
                continue
            name = f"batch-{number}"
            file = self._system.write_file(name, BATCH_JOBS)
            revision = self.code.revision
            is_command = number % COMMAND_EVERY == COMMAND_EVERY - 1
            batch = self._by_command(file) if is_command else self._over_http(name, file)
            self._system.batches[batch.removeprefix("batch_")] = [f"{name}-{job}" for job in range(BATCH_JOBS)]
            self.submitted[revision] += 1
            self._unread.append(batch)
            number += 1

    def _by_command(self, file: Path) -> str:
        done = self.code.run("submit", file, env=self._system.env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _over_http(self, name: str, file: Path) -> str:
        uploaded = self._asked(lambda api: api.files.create(file=file, purpose="batch"))
        created = self._asked(
            lambda api: api.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_headers={"Idempotency-Key": name},
            )
        )
        return created.id

    def _read(self) -> None:
        while self._unread or not self._is_over.wait(LOOK_S):
            for batch in list(self._unread):
                if self._has_ended(batch):
                    self._unread.remove(batch)
            time.sleep(LOOK_S)

    def _has_ended(self, batch: str) -> bool:
        """Whether it has; its results are read then."""
        found = self._asked(lambda api: api.batches.retrieve(batch))
        if found.status in ("failed", "expired", "cancelled"):
            self.problems.append(f"{batch} is {found.status}: {found.errors}")
            return True
        output = found.output_file_id
        if found.status != "completed" or output is None:
            return False
        revision = self.code.revision
        self._compare(batch, self._asked(lambda api: api.files.content(output).text))
        self.read[revision] += 1
        return True

    def _compare(self, batch: str, text: str) -> None:
        got = sorted(str(json.loads(line)["custom_id"]) for line in text.splitlines())
        wanted = sorted(self._system.batches[batch.removeprefix("batch_")])
        if got != wanted:
            self.problems.append(f"{batch}: {len(got)} lines, {len(set(got))} custom_ids, of {len(wanted)} jobs")

    def _asked(self, question: Callable[[openai.OpenAI], T]) -> T:
        """What the gateway answers; one that is away, or says that a service is, is asked again for a minute."""
        until = time.monotonic() + AWAY_S
        while True:
            try:
                with openai.OpenAI(base_url=f"{self.url}/v1", api_key=self._key, max_retries=0) as api:
                    return question(api)
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                if time.monotonic() > until:
                    raise
                self.tried_again += 1
                print(f"client: {error}", flush=True)
                time.sleep(LOOK_S)
