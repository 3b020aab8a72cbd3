"""Storage: how migrations run, on the engine that the caller hands over; views are made anew around them."""

from __future__ import annotations

from alembic import context

from lightship.storage.models import Base
from lightship.storage.views import drop_views, make_views

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        drop_views(connection)
        context.run_migrations()
        make_views(connection)
    if connection.in_transaction():
        connection.commit()
