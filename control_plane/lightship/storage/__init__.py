"""Storage: SQL models and migrations, artifact store."""
