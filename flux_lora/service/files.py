"""The pictures of predictions, by address, for as long as the predictions are kept."""

from fastapi import APIRouter, Depends, HTTPException, Response
from fastapi import Request as HttpRequest

from flux_lora.service.front import Front, owner_of
from flux_lora.service.jobs import Picture
from flux_lora.service.predictions import Prediction


def address(http: HttpRequest, prediction: Prediction, picture: Picture) -> str:
    """Where a picture is, by the name that this server was asked by."""
    return str(http.url_for("picture", prediction_id=prediction.id, name=picture.name))


def router(front: Front) -> APIRouter:
    """``/files/{prediction}/{name}``, which needs the key that the prediction was made with."""
    routes = APIRouter(tags=["predictions"])

    @routes.get("/files/{prediction_id}/{name}", name="picture", summary="A picture", response_class=Response)
    async def picture(prediction_id: str, name: str, owner: str = Depends(owner_of)) -> Response:
        prediction = front.predictions.get(prediction_id, owner)
        for found in prediction.pictures if prediction else ():
            if found.name == name:
                headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
                return Response(found.content, media_type=found.media_type, headers=headers)
        raise HTTPException(404, "There is no such picture, or no more.")

    return routes
