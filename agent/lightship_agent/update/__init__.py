"""Updates: a pure state machine, and beside it the I/O that carries out its actions."""
