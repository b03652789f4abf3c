"""answers that were given before, equal jobs of a batch, lines of their own kind

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
    sa.Column('namespace_id', sa.BIGINT(), nullable=True),
    sa.Column('payload', sa.Text(), nullable=True),
    sa.Column('answer', sa.Text(), nullable=True),
    sa.Column('vector', sa.LargeBinary(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_cache_entries')),
    sa.UniqueConstraint('tenant', 'key', name='uq_cache_entries_tenant_key')
    )
    op.create_index(op.f('ix_cache_entries_expires_at'), 'cache_entries', ['expires_at'], unique=False)
    op.create_index('ix_cache_entries_namespace', 'cache_entries', ['namespace_id', 'id'], unique=False, postgresql_where=sa.text('namespace_id IS NOT NULL'))
    op.create_table('cache_epochs',
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('scope', sa.Text(), nullable=False),
    sa.Column('epoch', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('tenant', 'scope', name=op.f('pk_cache_epochs'))
    )
    op.create_table('cache_namespaces',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('key', sa.LargeBinary(), nullable=False),
    sa.Column('endpoint', sa.Text(), nullable=False),
    sa.Column('alias', sa.Text(), nullable=False),
    sa.Column('checkpoint', sa.Text(), nullable=False),
    sa.Column('embedder', sa.Text(), nullable=False),
    sa.Column('template', sa.Text(), nullable=False),
    sa.Column('scope', sa.Text(), nullable=False),
    sa.Column('ttl_s', sa.Double(), nullable=True),
    sa.Column('secret', sa.LargeBinary(), nullable=False),
    sa.Column('policy', sa.Text(), nullable=False),
    sa.Column('model', sa.LargeBinary(), nullable=True),
    sa.Column('fit', sa.Integer(), server_default='0', nullable=False),
    sa.Column('fitting_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('asked_twice', sa.Integer(), server_default='0', nullable=False),
    sa.Column('differed', sa.Integer(), server_default='0', nullable=False),
    sa.Column('lookups', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('served', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('audits', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('saved_tokens', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('audit_tokens', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('used_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_cache_namespaces')),
    sa.UniqueConstraint('tenant', 'key', name='uq_cache_namespaces_tenant_key')
    )
    op.create_table('followers',
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), autoincrement=False, nullable=False),
    sa.Column('leader', sa.INTEGER(), nullable=False),
    sa.PrimaryKeyConstraint('batch_id', 'seq', name=op.f('pk_followers'))
    )
    op.create_index(op.f('ix_followers_batch_id_leader'), 'followers', ['batch_id', 'leader'], unique=False)
    # Statistics that do not know the newest batch say that it has one follower: then either index would seem to do.
    op.execute('ALTER TABLE followers ALTER COLUMN batch_id SET STATISTICS 0')
    op.create_table('cache_lookups',
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), autoincrement=False, nullable=False),
    sa.Column('namespace_id', sa.BIGINT(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('place', sa.Integer(), nullable=False),
    sa.Column('decided', sa.Integer(), server_default='0', nullable=False),
    sa.Column('served_beside', sa.Integer(), nullable=False),
    sa.Column('coin', sa.Double(), nullable=False),
    sa.Column('rate', sa.Double(), nullable=False),
    sa.Column('wished', sa.Boolean(), nullable=False),
    sa.Column('in_shadow', sa.Boolean(), nullable=False),
    sa.Column('audited', sa.Boolean(), nullable=False),
    sa.Column('answer', sa.Text(), nullable=True),
    sa.Column('features', sa.LargeBinary(), nullable=True),
    sa.Column('agreed', sa.Boolean(), nullable=True),
    sa.Column('repeated', sa.Boolean(), nullable=True),
    sa.Column('tokens', sa.Integer(), server_default='0', nullable=False),
    sa.Column('judged_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('folded', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.ForeignKeyConstraint(['namespace_id'], ['cache_namespaces.id'], name=op.f('fk_cache_lookups_namespace_id_cache_namespaces'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('batch_id', 'seq', name=op.f('pk_cache_lookups'))
    )
    op.create_index(op.f('ix_cache_lookups_namespace_id_judged_at'), 'cache_lookups', ['namespace_id', 'judged_at'], unique=False)
    op.create_index('ix_cache_lookups_out', 'cache_lookups', ['namespace_id'], unique=False, postgresql_where=sa.text('audited AND NOT folded'))
    op.create_index('ix_cache_lookups_news', 'cache_lookups', ['namespace_id'], unique=False, postgresql_where=sa.text('judged_at IS NOT NULL AND NOT folded'))
    op.create_table('cache_sources',
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('source', sa.Text(), nullable=False),
    sa.Column('entry_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.ForeignKeyConstraint(['entry_id'], ['cache_entries.id'], name=op.f('fk_cache_sources_entry_id_cache_entries'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('tenant', 'source', 'entry_id', name=op.f('pk_cache_sources'))
    )
    op.create_index(op.f('ix_cache_sources_entry_id'), 'cache_sources', ['entry_id'], unique=False)
    op.add_column('batches', sa.Column('followers', sa.Integer(), server_default='0', nullable=False))
    op.add_column('jobs', sa.Column('stoker', sa.Text(), nullable=True))
    op.add_column('results', sa.Column('cache_entry_id', sa.BIGINT(), nullable=True))
    op.add_column('results', sa.Column('similarity', sa.REAL(), nullable=True))
    op.add_column('shards', sa.Column('served', sa.Integer(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('exact', sa.Integer(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('semantic', sa.Integer(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('saved_tokens', sa.BIGINT(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('followers', sa.Integer(), server_default='0', nullable=False))
    op.add_column('shards', sa.Column('unlooked', sa.Integer(), server_default='0', nullable=False))
    op.add_column('results', sa.Column('namespace_id', sa.BIGINT(), nullable=True))
    op.drop_constraint(op.f('ck_results_source'), 'results', type_='check')
    op.execute("ALTER TABLE results ADD CONSTRAINT ck_results_source CHECK (source IN ('engine', 'reused', 'exact', 'duplicate', 'semantic', 'none'))")


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
