"""What a worker process starts beside Celery's pool: its engine, its presence, a standby dispatch leader.

A worker of the documents node has no engine.

Steps start after the pool and before the consumer, so no hint is taken before the engine is up. Their parts
end by `WorkerParts.end`, after the pool has drained: Celery would stop the steps before it.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from celery.bootsteps import StartStopStep
from celery.worker.components import Pool

from inference.engines import EnginePlan, Policy, plan_engine
from inference.supervisor import NOT_KNOWN, EngineReadings, EngineSupervisor
from pipeline.identity import EngineIdentity, identify_endpoint, register
from runtime.errors import ServiceUnreachable
from runtime.kept_process import KeptProcess
from runtime.logs import get_logger
from runtime.settings import Settings, environment_of
from store.presence import ANNOUNCE_S, PresenceBoard, WorkerPresence
from worker.announced import NOTHING_ANNOUNCED, Announcement, require_endpoints
from worker.engine_hours import EngineHours, MetricsReader
from worker.metrics import MetricsStep, WorkerMetrics
from worker.shared import SharedState

log = get_logger(__name__)

LEAST_CHILDREN, MOST_CHILDREN = 2, 4  # one is writing or claiming while another sends
REGISTERED_CHILDREN = 1  # without an engine; two would look for the knee of one endpoint against each other
LLAMACPP_CHILDREN = 1  # two would send two groups of prompts by turns to slots that keep a cache each
SLOTS_A_CHILD = 512
DISPATCH_GRACE_S = 5.0
CONTROL_CHILDREN = 4  # commands of schedules at once; each is a process that mostly waits
BEAT_GRACE_S = 5.0
EXPRESS_GRACE_S = 10.0  # beyond that of its requests: the end of its pool


class WorkerParts:
    """What the parent process owns, from before the fork to its end."""

    def __init__(self, *, settings: Settings, shared: SharedState) -> None:
        self.settings = settings
        self.shared = shared
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._plan: EnginePlan | None = None
        self._planned = False
        self.engine: EngineSupervisor | None = None
        self.dispatcher: KeptProcess | None = None
        self.express: KeptProcess | None = None
        self.beat: KeptProcess | None = None
        self.presence: PresenceThread | None = None
        self.hours: EngineHours | None = None
        self.metrics: WorkerMetrics | None = None
        self._owner = 0

    @property
    def has_engine(self) -> bool:
        """Whether its node sends jobs to an engine."""
        return self.settings.worker.node == "generation"

    def plan(self) -> EnginePlan | None:
        """The engine to start, planned once in the parent before it forks: the children need its address."""
        if not self._planned:
            self._owner = os.getpid()
            policy: Policy = "priority" if self.settings.worker.express_slots else "fcfs"
            self._plan = plan_engine(self.settings.engine, socket=self._own_folder() / "engine.sock", policy=policy)
            self._planned = True
            if self._plan is not None and self._plan.policy == "priority":
                self.shared.prioritise()
        return self._plan

    def _own_folder(self) -> Path:
        """A folder that only we may enter, for the engine's socket; gone with the worker."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="stoker-worker-")
        return Path(self._folder.name)

    @property
    def engine_url(self) -> str:
        """Where jobs are sent: our own engine, or the one that the settings name."""
        plan = self.plan()
        return plan.url if plan is not None else self.settings.engine.url or ""

    @property
    def engine_slots(self) -> int:
        """Sequences the engine computes at once; an external one is taken to have as many as the settings say."""
        plan = self.plan()
        return plan.slots if plan is not None else self.settings.engine.max_num_seqs

    @property
    def children(self) -> int:
        """Prefork children, known before they are forked: one asyncio loop keeps some hundred slots full."""
        if self.settings.worker.node == "express":
            return 1
        if self.settings.worker.children:
            return self.settings.worker.children
        if self.settings.worker.node == "control":
            return CONTROL_CHILDREN
        if not self.has_engine:
            return os.cpu_count() or 1
        if not self.engine_url:
            return REGISTERED_CHILDREN
        plan, wanted = self.plan(), math.ceil(self.engine_slots / SLOTS_A_CHILD)
        least = LLAMACPP_CHILDREN if plan is not None and plan.kind == "llamacpp" else LEAST_CHILDREN
        return max(least, min(MOST_CHILDREN, wanted))

    @property
    def in_flight(self) -> int:
        """Requests that one child keeps in flight: together twice what the engine computes at once."""
        return self.settings.worker.in_flight or math.ceil(2 * self.engine_slots / self.children)

    def held_back(self) -> int:
        """Of these: how many stay empty now, as single requests come, for whom some of the slots are kept free."""
        if not (self.settings.worker.express_slots and self.shared.has_singles()):
            return 0
        kept = (self.engine_slots - self.settings.worker.express_slots) // self.children
        return self.in_flight - min(self.in_flight, max(1, kept))

    def readings(self) -> EngineReadings:
        """What its own engine said last; of one that it did not start nothing is known."""
        return self.engine.readings if self.engine is not None else NOT_KNOWN

    @property
    def log_file(self) -> Path:
        """Where the engine's output goes."""
        if self.settings.home is None:
            return self._own_folder() / "engine.log"
        folder = self.settings.home / "logs"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder / f"engine-{os.getpid()}.log"

    def drain(self) -> None:
        """Let its children claim nothing more. The page of an express node is the worker's beside it, which goes on."""
        if self.settings.worker.node != "express":
            self.shared.start_draining()

    def end(self) -> None:
        """End everything that was started; called when the pool has drained, and once more is harmless."""
        if self._owner not in (0, os.getpid()):
            return
        parts = (self.beat, self.express, self.presence, self.hours, self.dispatcher, self.engine, self.metrics)
        for part in parts:  # in this order
            if part is not None:
                part.stop()
        if self._folder is not None:
            self._folder.cleanup()


class EngineStep(StartStopStep):  # type: ignore[misc]  # celery has no types
    """Starts the engine, if its node has one, waits until it is healthy, registers it, and announces the worker."""

    requires = {Pool, MetricsStep}  # noqa: RUF012  # celery's own protocol

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._parts: WorkerParts = worker.app.stoker_parts
        if self._parts.has_engine:
            self._parts.plan()

    def start(self, worker: Any) -> None:
        """Block until the engine answers; Celery ends the worker if it cannot."""
        parts = self._parts
        if parts.has_engine:
            identity = self._started(parts)
            announcement, label = Announcement(parts.settings, own_models=identity.models), identity.label
        elif parts.settings.worker.node == "express":
            models = identify_endpoint(parts.engine_url, plan=None, settings=parts.settings).models
            announcement, label = Announcement(parts.settings, own_models=models), "answers single requests"
        else:
            announcement = None
            label = "runs schedules" if parts.settings.worker.node == "control" else "reads documents"
        parts.presence = PresenceThread(parts, worker.hostname, announcement=announcement, engine=label)
        parts.presence.start()

    def _started(self, parts: WorkerParts) -> EngineIdentity:
        plan, began_at = parts.plan(), time.monotonic()
        if plan is not None:
            if plan.warning:
                log.warning("checkpoint_16_bit", advice=plan.warning)
            parts.engine = EngineSupervisor(
                plan,
                log_file=parts.log_file,
                start_timeout_s=parts.settings.engine.start_timeout_s,
                stall_s=parts.settings.engine.stall_s,
            )
            log.info(
                "engine_starts", engine=plan.kind, checkpoint=plan.description["checkpoint"], log=str(parts.log_file)
            )
            parts.engine.start()
        identity = identify_endpoint(parts.engine_url, plan=plan, settings=parts.settings)
        if not identity.is_engine:
            require_endpoints(parts.settings)
            return identity
        engine_id = register(parts.settings, identity)
        parts.shared.set_engine_id(engine_id)
        metrics = MetricsReader(parts.engine_url, api_key=parts.settings.engine.api_key)
        parts.hours = EngineHours(
            parts.settings.require_postgres(),
            engine_id=engine_id,
            slots=parts.engine_slots,
            hour_price=parts.settings.engine.hour_price,
            is_shared=plan is None,
            read=metrics.read if plan is None else parts.readings,
            began_at=began_at,
        )
        parts.hours.start()
        return identity

    def terminate(self, worker: Any) -> None:
        """A cold shutdown: do not wait for anything."""
        self._parts.end()


class DispatchStep(StartStopStep):  # type: ignore[misc]
    """Runs the dispatch loop in a process of its own: a pool task would stall behind long shards."""

    requires = {Pool, EngineStep}  # noqa: RUF012

    def start(self, worker: Any) -> None:
        """Start the standby leader; it dies with this process."""
        parts: WorkerParts = worker.app.stoker_parts
        if parts.settings.worker.node == "express":  # the worker beside it has one
            return
        env = {**os.environ, **environment_of(parts.settings)}
        parts.dispatcher = KeptProcess("worker.dispatcher", name="dispatcher", env=env, grace_s=DISPATCH_GRACE_S)
        parts.dispatcher.start()


class BeatStep(StartStopStep):  # type: ignore[misc]
    """Runs the beat beside a control worker: each has one, and one of them leads."""

    requires = {Pool, EngineStep}  # noqa: RUF012

    def start(self, worker: Any) -> None:
        """Start it; it dies with this process."""
        parts: WorkerParts = worker.app.stoker_parts
        if parts.settings.worker.node != "control":
            return
        env = {**os.environ, **environment_of(parts.settings)}
        parts.beat = KeptProcess("worker.beat", name="beat", env=env, grace_s=BEAT_GRACE_S)
        parts.beat.start()


class ExpressStep(StartStopStep):  # type: ignore[misc]
    """Runs the node that answers single requests beside a generation worker, where slots are kept for them."""

    requires = {Pool, EngineStep}  # noqa: RUF012

    def start(self, worker: Any) -> None:
        """Start it on this worker's engine; it dies with this process."""
        parts: WorkerParts = worker.app.stoker_parts
        if not (parts.has_engine and parts.settings.worker.express_slots):
            return
        env = {
            **os.environ,
            **environment_of(parts.settings),
            "STOKER_WORKER__NODE": "express",
            "STOKER_ENGINE__URL": parts.engine_url,
            "STOKER_ENGINE__MAX_NUM_SEQS": str(parts.engine_slots),
        }
        arguments = [f"express-{worker.hostname}", parts.shared.path]
        grace_s = parts.settings.worker.grace_s + EXPRESS_GRACE_S
        parts.express = KeptProcess("worker.express", name="express", env=env, grace_s=grace_s, arguments=arguments)
        parts.express.start()


class PresenceThread(threading.Thread):
    """Announces this worker in Redis every 5 s; what Redis does not hear costs nothing durable."""

    def __init__(self, parts: WorkerParts, name: str, *, announcement: Announcement | None, engine: str) -> None:
        super().__init__(name="presence", daemon=True)
        self._parts = parts
        self._name_in_redis = name
        self._announcement = announcement
        self._engine_label = engine
        self._stop_wanted = threading.Event()

    def run(self) -> None:
        board = PresenceBoard(self._parts.settings.require_redis())
        while True:
            try:
                board.announce(self._presence())
            except ServiceUnreachable as error:
                log.warning("presence_not_announced", error=str(error))
            if self._stop_wanted.wait(ANNOUNCE_S):
                break
        try:
            board.withdraw(self._name_in_redis)
        except ServiceUnreachable as error:
            log.warning("presence_not_withdrawn", error=str(error))
        board.close()

    def stop(self) -> None:
        """Withdraw the announcement and end the thread."""
        self._stop_wanted.set()
        self.join()

    def _presence(self) -> WorkerPresence:
        engine, readings = self._parts.engine, self._parts.readings()
        serves = NOTHING_ANNOUNCED if self._announcement is None else self._announcement.current()
        return WorkerPresence(
            name=self._name_in_redis,
            node=self._parts.settings.worker.node,
            children=self._parts.children,
            in_flight=self._parts.in_flight if self._parts.has_engine else 0,
            service_s=self._parts.shared.service_s(),
            models=serves.models,
            external_models=serves.external_models,
            endpoints=serves.endpoints,
            engine=self._engine_label,
            healthy=engine.is_healthy if engine else True,
            running=readings.running,
            waiting=readings.waiting,
            tokens_per_s=readings.tokens_per_s,
            kv_use=readings.kv_use,
            gpu_use=readings.gpu_use,
        )
