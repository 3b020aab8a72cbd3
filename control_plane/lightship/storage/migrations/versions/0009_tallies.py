"""Storage: counters that several processes add to, the heartbeats of ingest workers, and latencies by bundle."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_SERVED = (("busy_us", sa.BigInteger(), "0"), ("latencies", sa.JSON(), "[]"))


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "tallies",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("labels", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "labels"),
    )
    op.create_table(
        "ingest_beats",
        sa.Column("worker", sa.String(length=64), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("worker"),
    )
    for name, kind, nothing in _SERVED:
        with op.batch_alter_table("exposures") as batch_op:
            batch_op.add_column(sa.Column(name, kind, nullable=False, server_default=nothing))
        with op.batch_alter_table("exposures") as batch_op:
            batch_op.alter_column(name, existing_type=kind, existing_nullable=False, server_default=None)


def downgrade() -> None:
    """Back to the version before."""
    for name, _, _ in reversed(_SERVED):
        with op.batch_alter_table("exposures") as batch_op:
            batch_op.drop_column(name)
    op.drop_table("ingest_beats")
    op.drop_table("tallies")
