"""Linear layers with quantized weights: one op for each weight format, declared once in `ops.py` with its torch reference;
`cpu/` is the library that computes them, and whole decoder steps, on CPUs. Importing this package imports neither."""
