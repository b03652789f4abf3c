"""How measured figures are folded, judged and written; the measurements themselves are `make bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import scaling
from benchmarks.batch_lines import bodies, line
from benchmarks.cores import kept_on, processes, tree, tree_cpu_s
from benchmarks.paired import RESULTS, WRITTEN_BY_RUNS, Ratio, commit_of
from benchmarks.readme import README, WHOLE, texts
from benchmarks.rows import Row, at_least, at_most
from benchmarks.sampled import folded
from benchmarks.static_endpoint import ANSWER
from benchmarks.submit_files import RESPONSE
from benchmarks.table import markdown, reports
from inference.endpoint import Reply
from inference.replies import result_of
from models.states import Outcome

STACKS = """\
run (worker/child.py);post (inference/endpoint.py);_request (aiohttp/client.py) 6
run (worker/child.py);_worker (concurrent/futures/thread.py);execute (psycopg/cursor.py) 3
run (worker/child.py) 1
"""


def test_a_profile_counts_the_innermost_function_to_its_package() -> None:
    found = folded(STACKS)
    assert found["samples"] == 10
    assert found["packages"] == {"aiohttp": 0.6, "sqlalchemy, psycopg": 0.3, "ours": 0.1}
    assert next(iter(found["functions"].items())) == ("_request (aiohttp/client.py)", 0.6)


def test_a_row_says_when_its_figure_falls_short() -> None:
    ratio = Ratio.of([4.0, 6.0, 5.0], [1.0, 1.0, 1.0])
    short = Row("ours ÷ theirs", "5", "make", **at_least(ratio, 15))
    met = Row("µs a job", "240", "make", **at_most(240, 250, " µs"))
    assert (short.verdict, met.verdict, Row("x", "1", "make").verdict) == ("**short of ≥ 15**", "≤ 250 µs met", "")
    assert "| ours ÷ theirs | 5 | **short of ≥ 15** | make |" in markdown([short, met])


def test_every_kept_report_of_a_known_form_can_be_read() -> None:
    rows = [row for report in reports() for row in report.rows]
    assert rows
    assert all(row.figure and row.measured and row.command for row in rows)


def test_what_the_endpoints_of_benchmarks_answer_is_a_whole_answer() -> None:
    for answer in (json.dumps(ANSWER), RESPONSE):
        reply = Reply(status_code=200, body=answer.encode(), duration_ms=1)
        result = result_of(0, "/v1/chat/completions", reply)
        assert (result.outcome, result.usage.completion_tokens) == (Outcome.SUCCEEDED, 24)


def test_lines_of_a_benchmark_are_valid_about_400_bytes_and_all_different() -> None:
    made = list(bodies(300, model="static"))
    assert len(set(made)) == 300
    assert 300 < sum(len(body.encode()) for body in made) / 300 < 500
    assert line(7, made[7]).startswith('{"custom_id": "ticket-00000007", "method": "POST"')


def test_cpu_of_a_tree_has_that_of_children_which_have_ended() -> None:
    before = tree_cpu_s(os.getpid(), processes())
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    assert tree_cpu_s(os.getpid(), processes()) > before
    assert os.getpid() in {process.pid for process in tree(os.getpid(), processes())}


def test_what_was_pinned_is_free_again_after_the_block() -> None:
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with kept_on(one, {"child": child.pid}) as pinned:
            assert pinned == ["this", "child"]
            assert os.sched_getaffinity(0) == os.sched_getaffinity(child.pid) == one
        assert os.sched_getaffinity(0) == os.sched_getaffinity(child.pid) == cores
        child.communicate(b"\n")


def test_the_figures_that_are_shown_are_those_that_are_kept() -> None:
    assert texts() == (README.read_text(), WHOLE.read_text())
    assert scaling.text() == scaling.SCALING.read_text()


def test_what_the_leader_does_is_that_of_the_number_of_children_next_above() -> None:
    report = {"run": {"samples": [{"connections": 9}, {"connections": 15}]}}
    rows = {name: cells for name, *cells in scaling._by_workers(report, [1, 10, 1000])}
    kept = json.loads((RESULTS / "dispatch_children.json").read_text())["rows"]
    assert rows["connections"] == ["14 of a worker", "14", "140", "14,000"]
    for what in ("fill", "sweep"):
        assert rows[f"a {what} of the leader, ms"][1:] == [f"{row[f'{what}_ms_median']:.1f}" for row in kept]


def test_the_readme_shows_every_figure_that_falls_short() -> None:
    readme = README.read_text()
    assert all(row.figure in readme for report in reports() for row in report.rows if row.is_met is False)


def test_where_no_slot_waits_no_tail_is_longer_than_where_one_does() -> None:
    for case in json.loads((RESULTS / "refill.json").read_text())["cases"]:
        assert case["ideal_tail"] < 1.02 * max(run["tail"] for run in case["runs"])


def test_a_commit_is_dirty_by_what_was_changed_not_by_what_runs_write(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    written, code = tmp_path / WRITTEN_BY_RUNS[0] / "a.json", tmp_path / "code.py"
    written.parent.mkdir(parents=True)
    for file in (written, code, tmp_path / "README.md"):
        file.write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=all")
    clean = commit_of(tmp_path)

    written.write_text("after")
    (tmp_path / "README.md").write_text("after")
    assert commit_of(tmp_path) == clean
    assert len(clean) == 7

    code.write_text("after")
    assert commit_of(tmp_path) == f"{clean}-dirty"
