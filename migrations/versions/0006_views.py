"""views of finished runs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_KINDS = ("ingest", "train", "fold", "final", "purge", "publish", "compare")


def upgrade() -> None:
    _allow_kinds(*_KINDS, "view")
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.create_table(
        "view",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("kind", _enum("viewkind", "layers", "activations", "learning-curve"), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("state", _enum("viewstate", "queued", "running", "succeeded", "failed"), nullable=False),
        sa.Column("progress", json, nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("error", json, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_view_run_id_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_view")),
        sa.UniqueConstraint("run_id", "kind", "key", name=op.f("uq_view_run_id_kind_key")),
    )
    with op.batch_alter_table("view", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_view_sha256"), ["sha256"], unique=False)


def downgrade() -> None:
    op.drop_table("view")
    op.execute("DELETE FROM outbox WHERE kind = 'file'")
    op.execute("DELETE FROM job WHERE kind = 'view'")
    _allow_kinds(*_KINDS)


def _enum(name: str, *values: str) -> sa.Enum:
    return sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=32)


def _allow_kinds(*kinds: str) -> None:
    # SQLite cannot change a constraint, so a batch recreates the table with its indexes and its other constraints.
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_job_jobkind"), type_="check")
        batch_op.create_check_constraint(batch_op.f("ck_job_jobkind"), f"kind IN ({listed})")
