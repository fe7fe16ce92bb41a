"""quantised networks, and the precision that a run has begun with"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.create_table(
        "quantised",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("backbone_sha256", sa.String(length=64), nullable=False),
        sa.Column("image_rule", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("manifest", json, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_quantised")),
        sa.UniqueConstraint(
            "backbone_sha256",
            "image_rule",
            "generation",
            name=op.f("uq_quantised_backbone_sha256_image_rule_generation"),
        ),
    )
    with op.batch_alter_table("run", schema=None) as batch_op:
        batch_op.add_column(sa.Column("quantised_sha256", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("precision_choice", json, nullable=True))
        batch_op.create_index(batch_op.f("ix_run_quantised_sha256"), ["quantised_sha256"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_run_quantised_sha256"), "run")
    op.drop_column("run", "precision_choice")
    op.drop_column("run", "quantised_sha256")
    op.drop_table("quantised")
