"""Small pictures of what is being drawn, as WebP files."""

import io

from flux_lora.drawing.preview import Colours, colours_of, preview
from flux_lora.generator import Generator, Step
from flux_lora.service.jobs import Job

QUALITY = 70


class Previews:
    """Makes the small pictures of one generator's steps."""

    def __init__(self) -> None:
        """Know nothing yet: an autoencoder's map is made when it is first needed."""
        self._colours: dict[str, Colours | None] = {}

    def __call__(self, generator: Generator, job: Job, step: Step) -> bytes | None:
        """A small WebP file of what a step's latents are becoming; None where there is no map for this autoencoder."""
        request, pipeline = job.request, generator.parts.pipelines[job.request.model]
        if request.model not in self._colours:
            self._colours[request.model] = colours_of(pipeline.vae)
        colours = self._colours[request.model]
        if colours is None:
            return None
        seed = request.seeds[step.image - 1]
        image = preview(pipeline, colours, step.latents, seed, step.size, step.steps - step.step)
        file = io.BytesIO()
        image.save(file, "webp", quality=QUALITY)
        return file.getvalue()
