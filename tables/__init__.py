"""Tables: Parquet, CSV, JSONL and Arrow files as batches of rows, and the same files with result columns appended.

The only adapter of pyarrow: nobody else imports it. No rows of Postgres, no prompts.
"""
