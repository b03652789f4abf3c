"""schedules and their runs

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('schedules',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('cron', sa.Text(), nullable=False),
    sa.Column('timezone', sa.Text(), nullable=False),
    sa.Column('command', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('folder', sa.Text(), nullable=False),
    sa.Column('missed', sa.Enum('once', 'all', 'skip', name='missed', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('overlap', sa.Enum('skip', 'wait', 'allow', name='overlap', native_enum=False, create_constraint=True, length=16), nullable=False),
    sa.Column('due_until', sa.DateTime(timezone=True), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_schedules')),
    sa.UniqueConstraint('tenant', 'name', name='uq_schedules_tenant_name')
    )
    op.create_table('schedule_runs',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('schedule_id', sa.BIGINT(), nullable=False),
    sa.Column('due_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('asked_for', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('state', sa.Enum('waiting', 'running', 'succeeded', 'failed', 'skipped', name='state', native_enum=False, create_constraint=True, length=16), server_default='waiting', nullable=False),
    sa.Column('fence', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('tries', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('sent_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('ended_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('exit_code', sa.SmallInteger(), nullable=True),
    sa.Column('batch_id', sa.Uuid(), nullable=True),
    sa.Column('told', sa.Text(), nullable=True),
    sa.ForeignKeyConstraint(['schedule_id'], ['schedules.id'], name=op.f('fk_schedule_runs_schedule_id_schedules'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_schedule_runs')),
    sa.UniqueConstraint('schedule_id', 'due_at', name='uq_schedule_runs_schedule_id_due_at')
    )
    op.create_index('ix_schedule_runs_open', 'schedule_runs', ['id'], unique=False, postgresql_where=sa.text("state IN ('waiting', 'running')"))


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
