"""Forward passes of qlm's own. `reference` is the plain one, which says what the right logits are."""
