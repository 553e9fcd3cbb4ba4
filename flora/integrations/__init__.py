"""flora inside other libraries: their models, their loops, their files."""
