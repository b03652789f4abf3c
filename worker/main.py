"""The Celery entry point: `celery -A worker.main worker`."""

from __future__ import annotations

from runtime.settings import load_settings
from worker.celery_app import make_app

settings = load_settings()
app = make_app(settings)
