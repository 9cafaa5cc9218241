"""Tests of qlm.checkpoint: what is read, what is refused, and what is written."""
