"""Storage: what devices report of errors and of the numbers of their applications; what they are asked, and answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_NEW = ("errors", "app")


def upgrade() -> None:
    """To this version; a device that has not reported since has told none of it."""
    for column in _NEW:
        with op.batch_alter_table("devices") as batch_op:
            batch_op.add_column(sa.Column(column, sa.JSON(), nullable=False, server_default="{}"))
        with op.batch_alter_table("devices") as batch_op:
            batch_op.alter_column(column, existing_type=sa.JSON(), existing_nullable=False, server_default=None)
    op.create_table(
        "device_asks",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("verb", sa.String(length=32), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("asked_by", sa.String(), nullable=False),
        sa.Column("asked_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("sent_at", sa.BigInteger(), nullable=False),
        sa.Column("answered_at", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_device_asks_device", "device_asks", ["device"])


def downgrade() -> None:
    """Back to the version before."""
    op.drop_index("ix_device_asks_device", table_name="device_asks")
    op.drop_table("device_asks")
    for column in reversed(_NEW):
        with op.batch_alter_table("devices") as batch_op:
            batch_op.drop_column(column)
