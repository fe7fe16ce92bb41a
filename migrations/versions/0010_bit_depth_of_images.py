"""the number of bits from which the 16-bit images of a data set version are scaled; it was 16 for all of them

Which PNG and TIFF files have 16 bits is not recorded, so that versions with any of them get 16. The way down forgets
the bit depths, and back up every such version has 16.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("dataset_version", sa.Column("bit_depth", sa.Integer(), nullable=True))
    op.execute(
        sa.text(
            "UPDATE dataset_version SET bit_depth = 16 WHERE id IN (SELECT membership.version_id FROM membership "
            "JOIN image ON image.id = membership.image_id WHERE image.format IN ('PNG', 'TIFF'))"
        )
    )


def downgrade() -> None:
    op.drop_column("dataset_version", "bit_depth")
