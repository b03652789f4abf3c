"""priorities and weights, quarantine, retry and reuse, retention

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('batches', sa.Column('priority', sa.Enum('high', 'normal', 'low', name='priority', native_enum=False, create_constraint=True, length=16), server_default='normal', nullable=False))
    op.add_column('batches', sa.Column('weight', sa.Float(), server_default='1', nullable=False))
    op.create_check_constraint(op.f('ck_batches_weight'), 'batches', 'weight > 0')
    op.add_column('batches', sa.Column('retry_of', sa.Uuid(), nullable=True))
    op.add_column('batches', sa.Column('skipped', sa.Integer(), server_default='0', nullable=False))
    op.add_column('batches', sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('shards', sa.Column('tokens', sa.BIGINT(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('quarantined', sa.Boolean(), server_default=sa.text('false'), nullable=False))
    op.add_column('shards', sa.Column('engine', sa.Text(), nullable=True))
    op.add_column('shards', sa.Column('worker', sa.Text(), nullable=True))
    op.create_index('ix_shards_alone', 'shards', ['id'], unique=False, postgresql_where=sa.text("state = 'running' AND (quarantined OR crashes >= 2)"))
    op.add_column('job_tries', sa.Column('engine_deaths', sa.SmallInteger(), server_default='0', nullable=False))
    op.drop_constraint(op.f('ck_results_source'), 'results', type_='check')
    op.execute("ALTER TABLE results ADD CONSTRAINT ck_results_source CHECK (source IN ('engine', 'reused', 'none'))")


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
