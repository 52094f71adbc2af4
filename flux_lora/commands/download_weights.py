"""``scripts/download_weights``: fetch base weights, the safety checker or a fine-tune into the weights directory."""

import argparse
import shutil
import sys
from collections.abc import Sequence

from flux_lora.commands import operator_settings, paths
from flux_lora.errors import FluxLoraError
from flux_lora.request import MODELS
from flux_lora.settings import Settings
from flux_lora.storage import replacing, sha256_of
from flux_lora.wording import complain

DESCRIPTION = """\
Fetch weights into the weights directory (FLUX_WEIGHTS, default: weights).

  dev      FLUX.1-dev, about 34 GB; accept its licence on the Hugging Face Hub first and set HF_TOKEN
  schnell  FLUX.1-schnell, about 34 GB, or 24 GB beside dev, with which it shares the rest
  safety   Falconsai/nsfw_image_detection, 0.3 GB, in place of the small checker that is built in

An interrupted download goes on where it stopped when the same command is run again.
"""

EXAMPLES = """\
examples:
  scripts/download_weights dev schnell safety
  scripts/download_weights --lora https://huggingface.co/owner/name/resolve/main/lora.safetensors
  scripts/download_weights --lora owner/name
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what is named; the exit status says whether all of it is there."""
    parser = argparse.ArgumentParser(
        prog="scripts/download_weights",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", type=_name, metavar="dev|schnell|safety")
    parser.add_argument(
        "--lora",
        metavar="SOURCE",
        help="make this the fine-tune, lora.safetensors: a path, an address, or an id of Replicate, the Hub or Civitai",
    )
    options = parser.parse_args(arguments)
    if not options.names and options.lora is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        settings = operator_settings()
        for note in Settings.notes():
            complain(note)
        if options.lora is not None:
            _fetch_lora(options.lora, settings)
        if options.names:
            from flux_lora.checkpoint import download

            download.fetch(settings, options.names)
    except FluxLoraError as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _name(text: str) -> str:
    """Check a name; argparse's own choices refuse an empty list of them (Python 3.11)."""
    if text not in (*MODELS, "safety"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of dev, schnell and safety")
    return text


def _fetch_lora(source: str, settings: Settings) -> None:
    from flux_lora.sources import Sources

    file = Sources.from_settings(settings).fetch(paths.of_operator(source), root=None)
    target = settings.weights / "lora.safetensors"
    former = sha256_of(target) if target.is_file() else None
    settings.weights.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        shutil.copyfile(file, part)
    digest = sha256_of(target)
    change = "" if former in (None, digest) else f", in place of the one with SHA-256 {former}"
    print(f"lora: {target}, SHA-256 {digest}{change}")


if __name__ == "__main__":
    sys.exit(main())
