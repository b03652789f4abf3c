"""backlog: what an autoscaler asks; no statistics of what is in shards

Revision ID: 0008
Revises: 0007
"""

from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    # ANALYZE counts each element of an array: 54 s for the shards of ten million jobs, 0.6 s without; no plan asks for it.
    op.execute('ALTER TABLE shards ALTER COLUMN seqs SET STATISTICS 0')
    # Of each node: jobs that are due and have no result, and for how long the oldest one that no worker holds has waited.
    # What dispatch would not send does not count; what Chroma has not been told of is one job of the node documents.
    # OFFSET 0: a batch's budgets are looked at once and not for each of its shards.
    # A view is read with its owner's rights: who may read it needs no right to a table, so an autoscaler sees no prompt.
    op.execute("""
    CREATE VIEW backlog (node, jobs, oldest_s) AS
    SELECT 'generation', CAST(coalesce(sum(s.jobs), 0) AS int8),
        CAST(coalesce(extract(epoch FROM clock_timestamp() - min(b.in_progress_at) FILTER (WHERE s.waits)), 0) AS float8)
    FROM batches b CROSS JOIN LATERAL (
        SELECT EXISTS (SELECT FROM budgets
            WHERE waits_until > clock_timestamp() AND (batch_id = b.id OR key_id = b.key_id)) AS spent
        OFFSET 0) AS budget CROSS JOIN LATERAL (
        SELECT sum(cardinality(seqs) - done) AS jobs, bool_or(state <> 'running') AS waits
        FROM shards WHERE batch_id = b.id AND (state IN ('dispatched', 'running') OR state = 'pending'
            AND NOT budget.spent AND (not_before IS NULL OR not_before <= clock_timestamp()))) AS s
    WHERE b.state = 'in_progress' AND b.ending IS NULL AND b.paused_reason IS NULL
    UNION ALL
    SELECT 'documents', greatest(count(*), CAST(CAST(EXISTS (SELECT FROM passages WHERE NOT indexed)
            OR EXISTS (SELECT FROM collections WHERE lost) OR EXISTS (SELECT FROM vector_removals) AS int4) AS int8)),
        CAST(coalesce(extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE state = 'pending')), 0) AS float8)
    FROM documents
    WHERE state IN ('pending', 'running') AND (not_before IS NULL OR not_before <= clock_timestamp())""")


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
