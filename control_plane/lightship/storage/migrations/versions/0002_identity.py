"""Storage: issued certificates, revocation, recovery, preauthorised devices, signs of a clone."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    _certificates()
    _preauthorisations()
    _small_tables()
    device_columns: tuple[sa.Column[Any], ...] = (
        sa.Column("serial", sa.String(), nullable=False, server_default=""),
        sa.Column("instance", sa.String(length=16), nullable=False, server_default=""),
        sa.Column("retired_spki", sa.String(length=64), nullable=False, server_default=""),
        sa.Column("retired_at", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("retired_seen", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("cloned_at", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("clone", sa.JSON(), nullable=False, server_default="{}"),
    )
    token_columns: tuple[sa.Column[Any], ...] = (
        sa.Column("preauthorised", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("approval", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    for table, columns in (("devices", device_columns), ("join_tokens", token_columns)):
        _add_columns(table, columns)
    # What was issued before this version can be revoked as well.
    op.execute(
        "insert into certificates (serial, device, spki, issued_at, not_after, revoked_at, reason) "
        "select cert_serial, id, spki, enrolled_at, cert_not_after, "
        "case state when 'active' then 0 else 1 end, case state when 'active' then '' else 'revoked' end from devices"
    )


def _add_columns(table: str, columns: tuple[sa.Column[Any], ...]) -> None:
    """Columns that rows from before need a value for; the program names it itself from then on."""
    with op.batch_alter_table(table) as batch_op:
        for column in columns:
            batch_op.add_column(column)
    with op.batch_alter_table(table) as batch_op:
        for column in columns:
            batch_op.alter_column(column.name, existing_type=column.type, server_default=None)


def _certificates() -> None:
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(length=40), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("spki", sa.String(length=64), nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("serial"),
    )
    op.create_index("ix_certificates_device", "certificates", ["device"])


def _preauthorisations() -> None:
    op.create_table(
        "preauthorisations",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=True),
        sa.Column("serial", sa.String(), nullable=True),
        sa.Column("spki", sa.String(length=64), nullable=True),
        sa.Column("group", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("used_by", sa.String(), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    for column in ("device", "serial", "spki"):
        op.create_index(f"ix_preauthorisations_{column}", "preauthorisations", [column])


def _small_tables() -> None:
    op.create_table(
        "cuts",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("asked_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device"),
    )
    op.create_table(
        "used_nonces",
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("nonce"),
    )
    op.create_table(
        "device_instances",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("instance", sa.String(length=16), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("first_seen", sa.BigInteger(), nullable=False),
        sa.Column("last_seen", sa.BigInteger(), nullable=False),
        sa.Column("returns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device", "instance"),
    )


def downgrade() -> None:
    """Back to the version before."""
    with op.batch_alter_table("join_tokens") as batch_op:
        for name in ("approval", "preauthorised"):
            batch_op.drop_column(name)
    with op.batch_alter_table("devices") as batch_op:
        for name in ("clone", "cloned_at", "retired_seen", "retired_at", "retired_spki", "instance", "serial"):
            batch_op.drop_column(name)
    for table in ("device_instances", "used_nonces", "cuts", "preauthorisations", "certificates"):
        op.drop_table(table)
