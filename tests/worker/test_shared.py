"""What a worker's processes tell each other without a lock."""

from __future__ import annotations

import os

from runtime.settings import EngineSettings, Settings, WorkerSettings
from worker.express import prioritised
from worker.shared import SharedState
from worker.steps import WorkerParts


def test_a_child_in_the_place_of_a_dead_one_does_not_speak_with_its_voice() -> None:
    shared = SharedState()
    assert shared.service_s() == 0
    shared.set_service_s(2.0, child=0)
    shared.set_service_s(40.0, child=1)
    assert shared.service_s() == 21

    shared.set_service_s(0.0, child=1)

    assert shared.service_s() == 2


def test_a_process_that_was_forked_is_heard() -> None:
    shared = SharedState()
    shared.set_engine_id(1 << 40)
    child = os.fork()
    if not child:
        shared.set_service_s(3.0, child=70)
        shared.start_draining()
        os._exit(0 if shared.engine_id() == 1 << 40 else 1)

    assert os.waitpid(child, 0)[1] == 0
    assert (shared.service_s(), shared.is_draining()) == (3, True)


def test_another_process_finds_it_by_its_path() -> None:
    shared = SharedState()
    assert (shared.is_prioritised(), shared.has_singles()) == (False, False)
    shared.set_engine_id(7)
    shared.prioritise()

    other = SharedState.at(shared.path)
    other.saw_single()

    assert (other.engine_id(), other.is_prioritised(), shared.has_singles()) == (7, True, True)


def test_a_child_keeps_slots_free_only_while_single_requests_come() -> None:
    settings = Settings(
        engine=EngineSettings(url="http://127.0.0.1:1", max_num_seqs=64), worker=WorkerSettings(express_slots=16)
    )
    parts = WorkerParts(settings=settings, shared=SharedState())
    assert (parts.children, parts.in_flight, parts.held_back()) == (2, 64, 0)

    parts.shared.saw_single()

    assert parts.in_flight - parts.held_back() == (64 - 16) / 2  # of each child
    parts.end()


def test_a_worker_whose_engine_has_no_slot_to_spare_goes_on_all_the_same() -> None:
    settings = Settings(
        engine=EngineSettings(url="http://127.0.0.1:1", max_num_seqs=4), worker=WorkerSettings(express_slots=99)
    )
    parts = WorkerParts(settings=settings, shared=SharedState())
    parts.shared.saw_single()
    assert parts.in_flight - parts.held_back() == 1
    parts.end()


def test_a_single_request_says_that_it_goes_first_whatever_it_states() -> None:
    assert prioritised(b'{"model":"m"}') == b'{"model":"m","priority":-1}'
    assert prioritised(b'{"priority":-9}') == b'{"priority":-1}'
