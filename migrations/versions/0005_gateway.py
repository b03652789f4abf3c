"""keys, files, budgets, webhooks, and batches that came through the gateway

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('api_keys',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('digest', sa.LargeBinary(), nullable=False),
    sa.Column('previous_digest', sa.LargeBinary(), nullable=True),
    sa.Column('previous_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('scopes', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('requests_per_minute', sa.Integer(), nullable=True),
    sa.Column('day_tokens', sa.BIGINT(), nullable=True),
    sa.Column('month_tokens', sa.BIGINT(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('last_used_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_api_keys'))
    )
    op.create_index(op.f('ix_api_keys_tenant'), 'api_keys', ['tenant'], unique=False)
    op.create_table('webhook_secrets',
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('secret', sa.LargeBinary(), nullable=False),
    sa.Column('previous', sa.LargeBinary(), nullable=True),
    sa.Column('previous_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('tenant', name=op.f('pk_webhook_secrets'))
    )
    op.create_table('budgets',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('key_id', sa.Text(), nullable=True),
    sa.Column('batch_id', sa.Uuid(), nullable=True),
    sa.Column('period', sa.Enum('day', 'month', 'batch', name='period', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('began_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('cap', sa.BIGINT(), nullable=False),
    sa.Column('spent', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('reserved', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('waits_until', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('spent >= 0 AND reserved >= 0', name=op.f('ck_budgets_amounts')),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_budgets_batch_id_batches'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['key_id'], ['api_keys.id'], name=op.f('fk_budgets_key_id_api_keys'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_budgets')),
    sa.UniqueConstraint('key_id', 'batch_id', 'period', 'began_at', name='uq_budgets_owner', postgresql_nulls_not_distinct=True)
    )
    op.create_index(op.f('ix_budgets_batch_id'), 'budgets', ['batch_id'], unique=False)
    op.create_index('ix_budgets_waiting', 'budgets', ['waits_until'], unique=False, postgresql_where=sa.text('waits_until IS NOT NULL'))
    op.create_table('deliveries',
    sa.Column('id', sa.Uuid(), server_default=sa.text('gen_random_uuid()'), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('url', sa.Text(), nullable=False),
    sa.Column('event', sa.Text(), nullable=False),
    sa.Column('state', sa.Enum('pending', 'delivered', 'failed', name='state', native_enum=False, create_constraint=True, length=16), server_default='pending', nullable=False),
    sa.Column('tries', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('next_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('status_code', sa.SmallInteger(), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('ended_at', sa.DateTime(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_deliveries_batch_id_batches'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_deliveries'))
    )
    op.create_index(op.f('ix_deliveries_batch_id'), 'deliveries', ['batch_id'], unique=True)
    op.create_index('ix_deliveries_pending', 'deliveries', ['next_at'], unique=False, postgresql_where=sa.text("state = 'pending'"))
    op.create_index(op.f('ix_deliveries_tenant_created_at'), 'deliveries', ['tenant', 'created_at'], unique=False)
    op.create_table('files',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('purpose', sa.Enum('batch', 'user_data', 'batch_output', name='purpose', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('filename', sa.Text(), nullable=False),
    sa.Column('size_bytes', sa.BIGINT(), nullable=True),
    sa.Column('digest', sa.Text(), nullable=True),
    sa.Column('blob', sa.Text(), nullable=True),
    sa.Column('batch_id', sa.Uuid(), nullable=True),
    sa.Column('part', sa.Enum('input', 'output', 'errors', name='part', native_enum=False, create_constraint=True, length=16), nullable=True),
    sa.Column('counting_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('estimate', postgresql.JSONB(astext_type=sa.Text()), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('(blob IS NULL) = (batch_id IS NOT NULL)', name=op.f('ck_files_origin')),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_files_batch_id_batches'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_files'))
    )
    op.create_index(op.f('ix_files_batch_id'), 'files', ['batch_id'], unique=False)
    op.create_index('ix_files_deleted', 'files', ['deleted_at'], unique=False, postgresql_where=sa.text('deleted_at IS NOT NULL'))
    op.create_index('ix_files_expiring', 'files', ['expires_at'], unique=False, postgresql_where=sa.text('expires_at IS NOT NULL'))
    op.create_index(op.f('ix_files_tenant_created_at_id'), 'files', ['tenant', 'created_at', 'id'], unique=False)
    op.create_index('ix_files_uncounted', 'files', ['id'], unique=False, postgresql_where=sa.text('size_bytes IS NULL AND deleted_at IS NULL'))
    op.create_table('reservations',
    sa.Column('shard_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.Column('budget_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.Column('fence', sa.BIGINT(), nullable=False),
    sa.Column('amount', sa.BIGINT(), nullable=False),
    sa.ForeignKeyConstraint(['budget_id'], ['budgets.id'], name=op.f('fk_reservations_budget_id_budgets'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('shard_id', 'budget_id', name=op.f('pk_reservations'))
    )
    op.create_index(op.f('ix_reservations_budget_id'), 'reservations', ['budget_id'], unique=False)
    op.add_column('batches', sa.Column('input_file_id', sa.Text(), nullable=True))
    op.add_column('batches', sa.Column('key_id', sa.Text(), nullable=True))
    op.add_column('batches', sa.Column('request', postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column('batches', sa.Column('sums', postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column('batches', sa.Column('validations', sa.SmallInteger(), server_default='0', nullable=False))
    op.add_column('batches', sa.Column('problems', postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column('job_steps', sa.Column('charged', sa.Integer(), server_default='0', nullable=False))
    op.create_index('ix_batches_tenant', 'batches', ['tenant', 'id'], unique=False)


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
