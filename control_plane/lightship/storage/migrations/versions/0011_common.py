"""Storage: what is remembered of a model's devices, taken together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "common_memories",
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("looks", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("model"),
    )


def downgrade() -> None:
    """Back to the version before."""
    op.drop_table("common_memories")
