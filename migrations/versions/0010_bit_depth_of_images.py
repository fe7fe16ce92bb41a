"""the number of bits from which the 16-bit images of a data set version are scaled; it was 16 for all of them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("dataset_version", sa.Column("bit_depth", sa.Integer(), nullable=True))
    op.execute(sa.text("UPDATE dataset_version SET bit_depth = 16"))


def downgrade() -> None:
    op.drop_column("dataset_version", "bit_depth")
