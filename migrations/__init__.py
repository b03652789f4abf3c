"""Alembic revisions of the schema in models/rows.py."""
