"""The composition root: the Celery app, its queues, and what a worker process starts and watches."""
