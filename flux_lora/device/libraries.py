"""diffusers and transformers, imported so that their notices about absent optional packages do not reach the user."""

import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

import diffusers  # noqa: E402  (it imports from transformers what would print)

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

__all__ = ["diffusers", "transformers"]
