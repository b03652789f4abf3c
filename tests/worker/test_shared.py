"""What a worker's processes tell each other without a lock."""

from __future__ import annotations

import os

from worker.shared import SharedState


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
