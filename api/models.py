"""/v1/models: what lines may name at this moment."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from api.auth import KeyedRoute, Reader
from api.errors import refusals
from api.gateway import gateway_of
from pipeline.serving import live_workers, served_models

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=KeyedRoute)


class ModelObject(BaseModel):
    """A name that the live workers serve; `created` is not known."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: Literal["stoker"] = "stoker"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("", responses=refusals(400))
def list_models(request: Request, principal: Reader) -> ModelList:
    """The models that every live worker serves; none while no worker is live."""
    served = served_models(live_workers(gateway_of(request).board)) or frozenset()
    return ModelList(data=[ModelObject(id=name) for name in sorted(served)])
