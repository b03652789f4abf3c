"""Use cases: submit, run a shard, dispatch, finish, cancel, export. No SQL, no HTTP, no Celery here."""
