"""endpoints, what they cost, and budgets of money

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('endpoints',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('spec', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_endpoints'))
    )
    op.create_table('engine_days',
    sa.Column('engine_id', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('up_s', sa.DOUBLE_PRECISION(), server_default='0', nullable=False),
    sa.Column('busy_s', sa.DOUBLE_PRECISION(), server_default='0', nullable=False),
    sa.Column('slot_s', sa.DOUBLE_PRECISION(), server_default='0', nullable=False),
    sa.Column('slots_s', sa.DOUBLE_PRECISION(), server_default='0', nullable=False),
    sa.Column('gpu_s', sa.DOUBLE_PRECISION(), server_default='0', nullable=False),
    sa.Column('gpu_read_s', sa.DOUBLE_PRECISION(), server_default='0', nullable=False),
    sa.Column('cost', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('counted_until', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('engine_id', 'day', name=op.f('pk_engine_days'))
    )
    op.create_table('usage',
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('key_id', sa.Text(), nullable=False),
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('engine_id', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('slot', sa.SmallInteger(), autoincrement=False, nullable=False),
    sa.Column('jobs', sa.BIGINT(), nullable=False),
    sa.Column('prompt_tokens', sa.BIGINT(), nullable=False),
    sa.Column('completion_tokens', sa.BIGINT(), nullable=False),
    sa.Column('cached_tokens', sa.BIGINT(), nullable=False),
    sa.Column('cost', sa.BIGINT(), nullable=False),
    sa.PrimaryKeyConstraint('tenant', 'key_id', 'batch_id', 'engine_id', 'day', 'slot', name=op.f('pk_usage')),
    postgresql_with={'fillfactor': '70'}
    )
    op.create_index(op.f('ix_usage_batch_id'), 'usage', ['batch_id'], unique=False)
    op.create_index(op.f('ix_usage_engine_id_day'), 'usage', ['engine_id', 'day'], unique=False)
    op.create_table('money_budgets',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('key_id', sa.Text(), nullable=True),
    sa.Column('batch_id', sa.Uuid(), nullable=True),
    sa.Column('period', sa.Enum('day', 'month', 'batch', name='period', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('began_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('cap', sa.BIGINT(), nullable=False),
    sa.Column('spent', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('reserved', sa.BIGINT(), server_default='0', nullable=False),
    sa.CheckConstraint('spent >= 0 AND reserved >= 0', name=op.f('ck_money_budgets_amounts')),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_money_budgets_batch_id_batches'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['key_id'], ['api_keys.id'], name=op.f('fk_money_budgets_key_id_api_keys'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_money_budgets')),
    sa.UniqueConstraint('key_id', 'batch_id', 'period', 'began_at', name='uq_money_budgets_owner', postgresql_nulls_not_distinct=True)
    )
    op.create_index(op.f('ix_money_budgets_batch_id'), 'money_budgets', ['batch_id'], unique=False)
    op.create_table('money_reservations',
    sa.Column('shard_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.Column('budget_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.Column('fence', sa.BIGINT(), nullable=False),
    sa.Column('amount', sa.BIGINT(), nullable=False),
    sa.Column('spent', sa.BIGINT(), nullable=False),
    sa.Column('requests', sa.Integer(), nullable=False),
    sa.ForeignKeyConstraint(['budget_id'], ['money_budgets.id'], name=op.f('fk_money_reservations_budget_id_money_budgets'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('shard_id', 'budget_id', name=op.f('pk_money_reservations'))
    )
    op.create_index(op.f('ix_money_reservations_budget_id'), 'money_reservations', ['budget_id'], unique=False)
    op.add_column('api_keys', sa.Column('day_money', sa.BIGINT(), nullable=True))
    op.add_column('api_keys', sa.Column('month_money', sa.BIGINT(), nullable=True))
    op.add_column('batches', sa.Column('spill', sa.Integer(), server_default='0', nullable=False))
    op.add_column('results', sa.Column('cost', sa.BIGINT(), nullable=True))


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
