"""/v1/models: what lines may name at this moment."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from api.auth import KeyedRoute, Reader
from api.errors import refusals
from api.gateway import gateway_of
from models.states import Trust
from pipeline.serving import live_workers, served_models

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=KeyedRoute)


class ModelExtras(BaseModel):
    """`trust`: what a batch that names the model must have; external where only external endpoints serve it."""

    trust: Trust


class ModelObject(BaseModel):
    """A name that the live workers serve; `created` is not known."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: Literal["stoker"] = "stoker"
    stoker: ModelExtras


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("", responses=refusals(400))
def list_models(request: Request, principal: Reader) -> ModelList:
    """The models that every live worker serves; none while no worker is live."""
    served = served_models(live_workers(gateway_of(request).board))
    trusts = {} if served is None else served.trusts()
    return ModelList(
        data=[ModelObject(id=name, stoker=ModelExtras(trust=trust)) for name, trust in sorted(trusts.items())]
    )
