"""documents, their passages, steps of jobs of several requests

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('collections',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('embedder', sa.Text(), nullable=True),
    sa.Column('index_name', sa.Text(), nullable=False),
    sa.Column('lost', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_collections')),
    sa.UniqueConstraint('tenant', 'name', name='uq_collections_tenant_name')
    )
    op.create_table('vector_removals',
    sa.Column('index_name', sa.Text(), nullable=False),
    sa.Column('passage_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.PrimaryKeyConstraint('index_name', 'passage_id', name=op.f('pk_vector_removals'))
    )
    op.create_table('documents',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('tenant', sa.Text(), nullable=False),
    sa.Column('collection_id', sa.BIGINT(), nullable=True),
    sa.Column('source', sa.Text(), nullable=False),
    sa.Column('digest', sa.Text(), nullable=True),
    sa.Column('size_bytes', sa.BIGINT(), nullable=True),
    sa.Column('kind', sa.Text(), nullable=True),
    sa.Column('note', sa.Text(), nullable=True),
    sa.Column('state', sa.Enum('pending', 'running', 'ready', 'failed', name='state', native_enum=False, create_constraint=True, length=16), server_default='pending', nullable=False),
    sa.Column('fence', sa.BIGINT(), server_default='0', nullable=False),
    sa.Column('crashes', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('tries', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('not_before', sa.DateTime(timezone=True), nullable=True),
    sa.Column('error_code', sa.Text(), nullable=True),
    sa.Column('error_message', sa.Text(), nullable=True),
    sa.Column('markdown', sa.Text(), nullable=True),
    sa.Column('text_digest', sa.Text(), nullable=True),
    sa.Column('passages', sa.Integer(), server_default='0', nullable=False),
    sa.Column('seconds', sa.REAL(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('ended_at', sa.DateTime(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['collection_id'], ['collections.id'], name=op.f('fk_documents_collection_id_collections'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_documents')),
    sa.UniqueConstraint('tenant', 'collection_id', 'source', name='uq_documents_source', postgresql_nulls_not_distinct=True)
    )
    op.create_index(op.f('ix_documents_collection_id'), 'documents', ['collection_id'], unique=False)
    op.create_index('ix_documents_running', 'documents', ['id'], unique=False, postgresql_where=sa.text("state = 'running'"))
    op.create_index('ix_documents_open', 'documents', ['id'], unique=False, postgresql_where=sa.text("state IN ('pending', 'running')"))
    op.create_table('job_steps',
    sa.Column('batch_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.INTEGER(), autoincrement=False, nullable=False),
    sa.Column('step', sa.Text(), nullable=False),
    sa.Column('reply', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(['batch_id'], ['batches.id'], name=op.f('fk_job_steps_batch_id_batches'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('batch_id', 'seq', 'step', name=op.f('pk_job_steps'))
    )
    op.create_table('document_bytes',
    sa.Column('document_id', sa.BIGINT(), autoincrement=False, nullable=False),
    sa.Column('content', sa.LargeBinary(), nullable=False),
    sa.ForeignKeyConstraint(['document_id'], ['documents.id'], name=op.f('fk_document_bytes_document_id_documents'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('document_id', name=op.f('pk_document_bytes'))
    )
    op.create_table('passages',
    sa.Column('id', sa.BIGINT(), sa.Identity(always=False), nullable=False),
    sa.Column('document_id', sa.BIGINT(), nullable=False),
    sa.Column('collection_id', sa.BIGINT(), nullable=False),
    sa.Column('place', sa.Integer(), nullable=False),
    sa.Column('start_char', sa.Integer(), nullable=False),
    sa.Column('end_char', sa.Integer(), nullable=False),
    sa.Column('page', sa.Integer(), nullable=True),
    sa.Column('heading', sa.Text(), nullable=True),
    sa.Column('tokens', sa.Integer(), nullable=False),
    sa.Column('digest', sa.LargeBinary(), nullable=False),
    sa.Column('content', sa.Text(), nullable=False),
    sa.Column('vector', sa.LargeBinary(), nullable=False),
    sa.Column('indexed', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('words', postgresql.TSVECTOR(), sa.Computed("setweight(to_tsvector('english', coalesce(heading, '')), 'A') || to_tsvector('english', content)", persisted=True), nullable=False),
    sa.ForeignKeyConstraint(['document_id'], ['documents.id'], name=op.f('fk_passages_document_id_documents'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_passages'))
    )
    op.create_index('ix_passages_collection', 'passages', ['collection_id', 'id'], unique=False)
    op.create_index(op.f('ix_passages_document_id'), 'passages', ['document_id'], unique=False)
    op.create_index('ix_passages_unindexed', 'passages', ['collection_id', 'id'], unique=False, postgresql_where=sa.text('NOT indexed'))
    op.create_index('ix_passages_words', 'passages', ['words'], unique=False, postgresql_using='gin')
    op.add_column('results', sa.Column('stoker', sa.Text(), nullable=True))


def downgrade() -> None:
    raise NotImplementedError('restore a backup instead: what is new cannot be told in the old schema')
