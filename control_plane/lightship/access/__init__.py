"""Access: who may do what through the operator API: the rules, API tokens, browser sessions."""
