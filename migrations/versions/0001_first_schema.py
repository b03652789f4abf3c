"""first schema

Revision ID: 0001
Revises: 
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('batches',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('tenant', sa.Text(), server_default='local', nullable=False),
    sa.Column('state', sa.Enum('validating', 'in_progress', 'cancelling', 'finalizing', 'completed', 'failed', 'expired', 'cancelled', name='state', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('ending', sa.Enum('completed', 'failed', 'expired', 'cancelled', name='ending', native_enum=False, create_constraint=True, length=16), nullable=True),
    sa.Column('endpoint', sa.Text(), nullable=False),
    sa.Column('input_name', sa.Text(), nullable=False),
    sa.Column('input_digest', sa.Text(), nullable=False),
    sa.Column('submit_digest', sa.Text(), nullable=False),
    sa.Column('options', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('max_output_tokens', sa.Integer(), nullable=True),
    sa.Column('total', sa.Integer(), server_default='0', nullable=False),
    sa.Column('shards_left', sa.Integer(), server_default='0', nullable=False),
    sa.Column('cursor', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('screened', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('paused_reason', sa.Text(), nullable=True),
    sa.Column('fence', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('in_progress_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('cancelling_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finalizing_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('ended_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batches'))
    )
    op.create_index('ix_batches_live', 'batches', ['id'], unique=False, postgresql_where=sa.text("state IN ('validating', 'in_progress', 'cancelling', 'finalizing')"))
    op.create_index(op.f('ix_batches_tenant_submit_digest'), 'batches', ['tenant', 'submit_digest'], unique=False)
    op.create_table('engines',
    sa.Column('id', sa.INTEGER(), sa.Identity(always=False), nullable=False),
    sa.Column('digest', sa.Text(), nullable=False),
    sa.Column('description', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_engines')),
    sa.UniqueConstraint('digest', name=op.f('uq_engines_digest'))
    )
    op.create_table('jobs',
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), autoincrement=False, nullable=False),
    sa.Column('custom_id', sa.Text(), nullable=False),
    sa.Column('body', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('batch_id', 'seq', name=op.f('pk_jobs')),
    postgresql_partition_by='RANGE (batch_id)'
    )
    op.create_table('results',
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), autoincrement=False, nullable=False),
    sa.Column('outcome', sa.Enum('succeeded', 'truncated', 'empty', 'failed', name='outcome', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('source', sa.Enum('engine', 'none', name='source', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('status_code', sa.SmallInteger(), nullable=True),
    sa.Column('response', sa.Text(), nullable=True),
    sa.Column('error_code', sa.Text(), nullable=True),
    sa.Column('error_message', sa.Text(), nullable=True),
    sa.Column('prompt_tokens', sa.Integer(), nullable=False),
    sa.Column('completion_tokens', sa.Integer(), nullable=False),
    sa.Column('cached_tokens', sa.Integer(), nullable=False),
    sa.Column('reasoning_tokens', sa.Integer(), nullable=False),
    sa.Column('duration_ms', sa.Integer(), nullable=False),
    sa.Column('engine_id', sa.Integer(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('batch_id', 'seq', name=op.f('pk_results')),
    postgresql_partition_by='RANGE (batch_id)'
    )
    op.create_table('job_tries',
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), autoincrement=False, nullable=False),
    sa.Column('tries', sa.SmallInteger(), nullable=False),
    sa.Column('not_before', sa.DateTime(timezone=True), nullable=False),
    sa.Column('last_error', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_job_tries_batch_id_batches'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('batch_id', 'seq', name=op.f('pk_job_tries'))
    )
    op.create_table('shards',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seqs', postgresql.ARRAY(sa.Integer()), nullable=False),
    sa.Column('state', sa.Enum('pending', 'dispatched', 'running', 'done', name='state', native_enum=False, create_constraint=True, length=16), server_default='pending', nullable=False),
    sa.Column('fence', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('crashes', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('holder', sa.Text(), nullable=True),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('not_before', sa.DateTime(timezone=True), nullable=True),
    sa.Column('dispatched_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('done_at_claim', sa.Integer(), server_default='0', nullable=False),
    sa.Column('done', sa.Integer(), server_default='0', nullable=False),
    sa.Column('failed', sa.Integer(), server_default='0', nullable=False),
    sa.Column('truncated', sa.Integer(), server_default='0', nullable=False),
    sa.Column('empty', sa.Integer(), server_default='0', nullable=False),
    sa.Column('prompt_tokens', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('completion_tokens', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('cached_tokens', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('reasoning_tokens', sa.BIGINT(), server_default='0', nullable=False),
    sa.CheckConstraint('done <= cardinality(seqs)', name=op.f('ck_shards_done')),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_shards_batch_id_batches'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_shards')),
    postgresql_with={'fillfactor': '70'}
    )
    op.create_index(op.f('ix_shards_batch_id'), 'shards', ['batch_id'], unique=False)
    op.create_index('ix_shards_live', 'shards', ['id'], unique=False, postgresql_where=sa.text("state IN ('dispatched', 'running')"))
    op.create_index('ix_shards_pending', 'shards', ['batch_id', 'id'], unique=False, postgresql_where=sa.text("state = 'pending'"))
    op.create_index('ix_shards_returned', 'shards', ['batch_id', 'not_before'], unique=False, postgresql_where=sa.text("state = 'pending' AND not_before IS NOT NULL"))
    # Weekly partitions are made ahead by store.schema.make_partitions; what they miss lands here.
    op.execute('CREATE TABLE jobs_default PARTITION OF jobs DEFAULT')
    op.execute('CREATE TABLE results_default PARTITION OF results DEFAULT')


def downgrade() -> None:
    op.drop_index('ix_shards_pending', table_name='shards', postgresql_where=sa.text("state = 'pending'"))
    op.drop_index('ix_shards_live', table_name='shards', postgresql_where=sa.text("state IN ('dispatched', 'running')"))
    op.drop_index(op.f('ix_shards_batch_id'), table_name='shards')
    op.drop_table('shards')
    op.drop_table('job_tries')
    op.drop_table('results')
    op.drop_table('jobs')
    op.drop_table('engines')
    op.drop_index(op.f('ix_batches_tenant_submit_digest'), table_name='batches')
    op.drop_index('ix_batches_live', table_name='batches', postgresql_where=sa.text("state IN ('validating', 'in_progress', 'cancelling', 'finalizing')"))
    op.drop_table('batches')
