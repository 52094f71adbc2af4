"""LoRA and its relatives: sources (where from), formats (whose keys), deltas (the mathematics), merge (in place)."""
