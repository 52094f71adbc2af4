"""How the miniature was made, and how to train it further."""
