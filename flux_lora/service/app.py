"""The one HTTP application: its parts, behind the check of who may ask. It knows nothing of Ray."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

import flux_lora
from flux_lora.inputs import schemas as input_schemas
from flux_lora.service import cog, events, files, openai, page, status
from flux_lora.service.access import Access
from flux_lora.service.front import Front
from flux_lora.service.journal import Journal

DESCRIPTION = (
    "FLUX.1 with a fine-tune, exactly. Keys go into the header `Authorization: Bearer KEY`; a prediction and its files "
    "are seen with the key that made them, for a limited time."
)


def make_app(front: Front, keys: Sequence[str], *, local: bool) -> FastAPI:
    """Make the application.

    Args:
        front: what all parts of it share.
        keys: that callers may use; empty: nobody needs one.
        local: whether it is served on loopback; then the names that it is asked by are checked.
    """
    app = FastAPI(title="flux-lora", version=flux_lora.__version__, description=DESCRIPTION, redoc_url=None)
    for part in (status, cog, events, openai, files):
        app.include_router(part.router(front))
    app.include_router(page.router())
    app.add_middleware(Access, keys=keys, local=local)
    app.add_middleware(Journal, log=front.log)  # before all else
    written = app.openapi

    def openapi() -> dict[str, Any]:
        document = written()
        schemas = document["components"]["schemas"]
        schemas["Input"] = {
            "title": "Input",
            "type": "object",
            "required": ["prompt"],
            "properties": input_schemas(front.interface),
        }
        schemas["Output"] = {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}}
        for name, fields in (("PredictionRequest", ("Input",)), ("PredictionResponse", ("Input", "Output"))):
            for field in fields:
                schemas[name]["properties"][field.lower()] = {"$ref": f"#/components/schemas/{field}"}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change the document
    return app
