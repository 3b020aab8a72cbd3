"""Storage: of windows, what is merged and never searched; products of features."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_NEW = (("windows", "more"), ("windows", "together"), ("pending_labels", "more"))


def upgrade() -> None:
    """To this version; of the windows that are there, none of this was counted."""
    for table, column in _NEW:
        with op.batch_alter_table(table) as batch_op:
            batch_op.add_column(sa.Column(column, sa.LargeBinary(), nullable=False, server_default=""))
        with op.batch_alter_table(table) as batch_op:
            batch_op.alter_column(column, existing_type=sa.LargeBinary(), existing_nullable=False, server_default=None)


def downgrade() -> None:
    """Back to the version before."""
    for table, column in reversed(_NEW):
        with op.batch_alter_table(table) as batch_op:
            batch_op.drop_column(column)
