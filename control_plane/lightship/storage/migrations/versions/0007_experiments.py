"""Storage: experiments, and how far challengers agree with champions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("group", sa.String(), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("per_request", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("ended_because", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    for column in ("group", "model", "status"):
        op.create_index(f"ix_experiments_{column}", "experiments", [column])
    op.create_table(
        "agreements",
        sa.Column("experiment", sa.String(length=32), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("champion", sa.String(length=64), nullable=False),
        sa.Column("began_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("same", sa.BigInteger(), nullable=False),
        sa.Column("confusion", sa.JSON(), nullable=False),
        sa.Column("differences", sa.JSON(), nullable=False),
        sa.Column("difference_sum", sa.Double(), nullable=False),
        sa.Column("difference_max", sa.Double(), nullable=False),
        sa.Column("latency", sa.JSON(), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("experiment", "device", "champion"),
    )
    # What was signed before names no companions.
    with op.batch_alter_table("assignments") as batch_op:
        batch_op.add_column(sa.Column("beside", sa.String(), nullable=False, server_default=""))
    with op.batch_alter_table("assignments") as batch_op:
        batch_op.alter_column("beside", existing_type=sa.String(), existing_nullable=False, server_default=None)


def downgrade() -> None:
    """Back to the version before."""
    with op.batch_alter_table("assignments") as batch_op:
        batch_op.drop_column("beside")
    op.drop_table("agreements")
    for column in ("group", "model", "status"):
        op.drop_index(f"ix_experiments_{column}", table_name="experiments")
    op.drop_table("experiments")
