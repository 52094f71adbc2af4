"""What a FLUX.1 pipeline is made of, by the names of its folders."""

ENCODERS = ("text_encoder", "text_encoder_2")
"""What reads the prompt: CLIP and T5."""

OWN = ("transformer", "scheduler")
"""What dev and schnell each have of their own."""

SHARED = (*ENCODERS, "tokenizer", "tokenizer_2", "vae")
"""What is the same in both."""

NETWORKS = (*ENCODERS, "vae", "transformer")
"""What has weights."""
