"""which request holds an Idempotency-Key while it is being answered"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "key_claim",
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_key_claim_project_id_project")),
        sa.PrimaryKeyConstraint("project_id", "key", name=op.f("pk_key_claim")),
    )


def downgrade() -> None:
    op.drop_table("key_claim")
