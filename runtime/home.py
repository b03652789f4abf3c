"""Where Stoker keeps its own files on a machine: embedded services, logs, spans."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path


def default_home(environ: Mapping[str, str]) -> Path:
    """STOKER_HOME, else /var/lib/stoker as root, else `stoker` in the user's folder for application data.

    Root's own folder is closed to the account that the servers run under, hence /var/lib.
    """
    if environ.get("STOKER_HOME"):
        return Path(environ["STOKER_HOME"])
    if os.geteuid() == 0:
        return Path("/var/lib/stoker")
    if environ.get("XDG_DATA_HOME"):
        return Path(environ["XDG_DATA_HOME"]) / "stoker"
    return Path(pwd.getpwuid(os.geteuid()).pw_dir) / ".local" / "share" / "stoker"
