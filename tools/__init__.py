"""Tools of developers and operators; they may use both programs."""
