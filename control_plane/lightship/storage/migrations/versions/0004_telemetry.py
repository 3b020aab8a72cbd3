"""Storage: reports that came ahead of a gap."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "held_records",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.String(length=16), nullable=False),
        sa.Column("s", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("device", "epoch", "s"),
    )
    op.create_index("dead_letters_by_topic", "dead_letters", ["topic", "code"])
    with op.batch_alter_table("device_epochs") as batch_op:
        batch_op.add_column(sa.Column("ahead", sa.JSON(), nullable=False, server_default="[]"))
        batch_op.add_column(sa.Column("beat", sa.BigInteger(), nullable=False, server_default="0"))
    with op.batch_alter_table("device_epochs") as batch_op:
        batch_op.alter_column("ahead", existing_type=sa.JSON(), existing_nullable=False, server_default=None)
        batch_op.alter_column("beat", existing_type=sa.BigInteger(), existing_nullable=False, server_default=None)


def downgrade() -> None:
    """Back to the version before: what was held is forgotten, and devices send again what was ahead of a gap."""
    with op.batch_alter_table("device_epochs") as batch_op:
        batch_op.drop_column("beat")
        batch_op.drop_column("ahead")
    op.drop_index("dead_letters_by_topic", "dead_letters")
    op.drop_table("held_records")
