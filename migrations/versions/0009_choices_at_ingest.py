"""what an ingest was told to accept, what its images' owner should know, and how long a refused archive is kept"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    table = "dataset_version"
    op.add_column(table, sa.Column("warnings", json, nullable=False, server_default=sa.text("'[]'")))
    op.add_column(table, sa.Column("code_page", sa.String(32), nullable=True))
    op.add_column(table, sa.Column("allow_refused", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column(table, sa.Column("archive_until", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    for column in ("archive_until", "allow_refused", "code_page", "warnings"):
        op.drop_column("dataset_version", column)
