"""parts of runs, checkpoints, answers that are kept"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_KINDS = ("ingest", "train", "purge", "publish", "compare")


def upgrade() -> None:
    _allow_kinds(*_KINDS, "fold", "final")
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.add_column(sa.Column("progress", json, nullable=True))
        batch_op.create_index(batch_op.f("ix_job_parent_id"), ["parent_id"], unique=False)
    with op.batch_alter_table("run", schema=None) as batch_op:
        batch_op.add_column(sa.Column("batch_size", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("job_id", sa.String(length=40), nullable=True))
        batch_op.add_column(sa.Column("training_s", sa.Double(), nullable=True))
    with op.batch_alter_table("fold", schema=None) as batch_op:
        batch_op.add_column(sa.Column("seconds", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("outcome_sha256", sa.String(length=64), nullable=True))
        batch_op.create_index(batch_op.f("ix_fold_outcome_sha256"), ["outcome_sha256"], unique=False)
    _give_runs_their_job()

    op.create_table(
        "checkpoint",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("part", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epochs", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_checkpoint_run_id_run")),
        sa.PrimaryKeyConstraint("run_id", "part", "seq", name=op.f("pk_checkpoint")),
    )
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_checkpoint_sha256"), ["sha256"], unique=False)

    op.create_table(
        "answer",
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("location", sa.String(length=255), nullable=True),
        sa.Column("body", json, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_answer_project_id_project")),
        sa.PrimaryKeyConstraint("project_id", "key", name=op.f("pk_answer")),
    )
    with op.batch_alter_table("answer", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_answer_created_at"), ["created_at"], unique=False)


def _give_runs_their_job() -> None:
    """Set the job of each run, and the training seconds of each finished run.

    Waiting and running runs keep the job that they have.
    """
    op.execute(
        "UPDATE run SET job_id = (SELECT max(job.id) FROM job WHERE job.kind = 'train' AND job.subject_id = run.id)"
    )
    # An old row of a fold lacks the outcome that the final fit needs, so the fold of an unfinished run is trained again.
    op.execute("DELETE FROM fold WHERE run_id IN (SELECT id FROM run WHERE state IN ('queued', 'running'))")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    seconds = (
        "(julianday(finished_at) - julianday(started_at)) * 86400.0"
        if is_sqlite
        else "extract(epoch FROM finished_at - started_at)"
    )
    op.execute(f"UPDATE run SET training_s = {seconds} WHERE state = 'succeeded'")  # noqa: S608


def downgrade() -> None:
    op.drop_table("answer")
    op.drop_table("checkpoint")
    with op.batch_alter_table("fold", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_fold_outcome_sha256"))
    # Not in a batch, because on SQLite a batch recreates the table, and rows of other tables refer to its rows.
    for table, column in (
        ("fold", "outcome_sha256"),
        ("fold", "seconds"),
        ("run", "training_s"),
        ("run", "job_id"),
        ("run", "batch_size"),
    ):
        op.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    # The older version knows no jobs of kind `fold` and `final`. So running runs start again with their `train` job.
    op.execute(
        "UPDATE job SET state = 'queued', lease_owner = NULL WHERE kind = 'train' AND state = 'succeeded' AND "
        "id IN (SELECT parent_id FROM job WHERE kind IN ('fold', 'final') AND state IN ('queued', 'running'))"
    )
    op.execute("DELETE FROM job WHERE kind IN ('fold', 'final')")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_job_parent_id"))
        batch_op.drop_column("progress")
    _allow_kinds(*_KINDS)


def _allow_kinds(*kinds: str) -> None:
    # SQLite cannot change a constraint, so a batch recreates the table with its indexes and its other constraints.
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_job_jobkind"), type_="check")
        batch_op.create_check_constraint(batch_op.f("ck_job_jobkind"), f"kind IN ({listed})")
