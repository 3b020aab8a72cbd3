"""The agent's own update client as a command, for conformance suites and for a look at a repository."""
