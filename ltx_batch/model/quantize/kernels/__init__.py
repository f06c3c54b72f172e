"""Triton kernels of the int8 path. `reference` says what each computes; nothing imports these before a GPU is used."""
