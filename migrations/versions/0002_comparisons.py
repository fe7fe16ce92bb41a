"""comparisons"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_KINDS = ("ingest", "train", "purge", "publish")


def upgrade() -> None:
    _allow_kinds(*_KINDS, "compare")
    op.create_table(
        "comparison",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("dataset_version_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "queued",
                "running",
                "succeeded",
                "failed",
                "cancelled",
                name="comparisonstate",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("table", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=True),
        sa.Column("picture_sha256", sa.String(length=64), nullable=True),
        sa.Column("report_sha256", sa.String(length=64), nullable=True),
        sa.Column("error", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["dataset_version_id"],
            ["dataset_version.id"],
            name=op.f("fk_comparison_dataset_version_id_dataset_version"),
        ),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_comparison_project_id_project")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_comparison")),
    )
    with op.batch_alter_table("comparison", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_comparison_dataset_version_id"), ["dataset_version_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparison_picture_sha256"), ["picture_sha256"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparison_project_id"), ["project_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparison_project_id_id"), ["project_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparison_report_sha256"), ["report_sha256"], unique=False)

    op.create_table(
        "comparison_run",
        sa.Column("comparison_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(
            ["comparison_id"], ["comparison.id"], name=op.f("fk_comparison_run_comparison_id_comparison")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_comparison_run_run_id_run")),
        sa.PrimaryKeyConstraint("comparison_id", "position", name=op.f("pk_comparison_run")),
        sa.UniqueConstraint("run_id", name=op.f("uq_comparison_run_run_id")),
    )


def downgrade() -> None:
    op.drop_table("comparison_run")
    op.drop_table("comparison")
    op.execute("DELETE FROM outbox WHERE kind = 'comparison'")
    op.execute("DELETE FROM job WHERE kind = 'compare'")
    _allow_kinds(*_KINDS)


def _allow_kinds(*kinds: str) -> None:
    # SQLite cannot change a constraint, so a batch recreates the table with its indexes and its other constraints.
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_job_jobkind"), type_="check")
        batch_op.create_check_constraint(batch_op.f("ck_job_jobkind"), f"kind IN ({listed})")
