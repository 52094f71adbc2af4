"""One image: prompt, latents, pixels, and the check of what was drawn."""
