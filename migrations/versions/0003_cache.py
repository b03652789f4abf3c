"""answers that were given before

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table('cache_entries',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('key', sa.LargeBinary(), nullable=False),
    sa.Column('response', sa.Text(), nullable=False),
    sa.Column('status_code', sa.SmallInteger(), nullable=False),
    sa.Column('prompt_tokens', sa.Integer(), nullable=False),
    sa.Column('completion_tokens', sa.Integer(), nullable=False),
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_cache_entries')),
    sa.UniqueConstraint('tenant', 'key', name=op.f('uq_cache_entries_tenant_key'))
    )
    op.create_index(op.f('ix_cache_entries_expires_at'), 'cache_entries', ['expires_at'], unique=False)
    op.create_table('cache_epochs',
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('epoch', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('tenant', name=op.f('pk_cache_epochs'))
    )
    op.add_column('results', sa.Column('cache_entry_id', sa.BIGINT(), nullable=True))
    op.add_column('results', sa.Column('similarity', sa.REAL(), nullable=True))
    op.add_column('shards', sa.Column('served', sa.Integer(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('saved_tokens', sa.BIGINT(), server_default='0', nullable=False))
    op.drop_constraint(op.f('ck_results_source'), 'results', type_='check')
    op.execute("ALTER TABLE results ADD CONSTRAINT ck_results_source CHECK (source IN ('engine', 'reused', 'exact', 'duplicate', 'semantic', 'none'))")


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
