"""the weights that a run has begun with"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("run", schema=None) as batch_op:
        batch_op.add_column(sa.Column("weights_sha256", sa.String(length=64), nullable=True))
        batch_op.create_index(batch_op.f("ix_run_weights_sha256"), ["weights_sha256"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_run_weights_sha256"), "run")
    op.drop_column("run", "weights_sha256")
