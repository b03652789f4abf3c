"""Installs from the system's packages, a server without letting it run: `python -m tests.support.packages nginx`.

A server's package would start it at once and on every address; ours start one of their own, on loopback.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# By program: the package that brings it, the service that must not run if it has one, and what else there is to do.
PACKAGES: dict[str, tuple[str, str | None, str]] = {
    "chromium": ("chromium", None, "install your system's chromium; without it the page's tests are skipped"),
    "debootstrap": ("debootstrap", None, "install your system's debootstrap, as root"),
    "nginx": ("nginx-light", "nginx", "install your system's nginx-light, stopped"),
    "promtool": (
        "prometheus",
        "prometheus",
        "install your system's prometheus, stopped; without it this check is skipped",
    ),
    "rabbitmq-server": (
        "rabbitmq-server",
        "rabbitmq-server",
        "install it, start one (docker run -p 127.0.0.1:5672:5672 rabbitmq:4), or set STOKER_TEST_RABBITMQ",
    ),
}
POLICY = Path("/usr/sbin/policy-rc.d")


def located(program: str) -> str | None:
    """Where it is, also in a folder that only root has on its path; None if it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def install(program: str) -> None:
    """Install it unless it is there; SystemExit with the remedy where we may not."""
    if located(program):
        return
    package, service, remedy = PACKAGES[program]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"{program} is not installed: {remedy}")
    print(f"installing {package} from the system's packages", file=sys.stderr)
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    made = not POLICY.exists()
    if made:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package], check=True)
    finally:
        if made:
            POLICY.unlink()
    if service is not None and shutil.which("systemctl"):  # nor at the next boot
        subprocess.run(["systemctl", "disable", "--quiet", service], check=False, capture_output=True)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        install(wanted)
