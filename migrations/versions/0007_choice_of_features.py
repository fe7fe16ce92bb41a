"""where the features of a run come from, if its recipe left that open"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    with op.batch_alter_table("run", schema=None) as batch_op:
        batch_op.add_column(sa.Column("features_choice", json, nullable=True))


def downgrade() -> None:
    op.drop_column("run", "features_choice")
