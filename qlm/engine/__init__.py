"""Forward passes of qlm's own: the CPU engine, and `reference`, the plain one that says what the right logits are."""
