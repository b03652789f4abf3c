"""What each message asks for: one call into pipeline. Plain functions; the worker registers them with Celery."""
